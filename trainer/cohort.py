"""The cohort: which slides a run uses, what is known of them, and which patients train, validate and test.

A patient is on one side only, and so is a slide that lies in the archive twice.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from manifests import ManifestSource
from manifests.files import write_text
from trainer.config import Cohort as CohortConfig
from trainer.config import Head as HeadConfig
from trainer.errors import TrainerError
from trainer.labelled import Labelled, match_name, read_labelled
from trainer.splits.drawing import split_patients
from trainer.splits.files import fit_split, read_split
from trainer.splits.grouping import Split, refuse_leak, side_of
from trainer.splits.sides import count_sides, refuse_poor, tell_gaps
from trainer.targets import Targets, Task, cells_of, few, parse_targets, refuse_unlearnable

_HEAD = HeadConfig()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One slide of the cohort, with its targets as `trainer.targets` has them."""

    slide_id: str
    targets: Targets
    specimen_id: str
    patient_id: str
    split: Split
    num_tiles: int

    @property
    def label(self) -> int:
        """The class's position in `Cohort.classes`."""
        (target,) = self.targets
        return round(target)


@dataclass(frozen=True)
class Cohort:
    """The cases of a run, sorted by slide_id, and what is predicted of them."""

    cases: tuple[Case, ...]
    classes: tuple[str, ...] = ()
    """Names of the classes, sorted; none for the other tasks."""
    notes: tuple[str, ...] = ()
    """Sentences to tell the user once."""
    task: Task = "classes"
    columns: tuple[str, ...] = ("label",)
    """Of the labels file, as the targets are ordered."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """What is predicted: the classes, or the columns."""
        return self.classes if self.task == "classes" else self.columns

    def of(self, split: str) -> dict[str, Case]:
        """slide_id to case for one split."""
        return {case.slide_id: case for case in self.cases if case.split == split}

    def num_tiles(self, split: str) -> dict[str, int]:
        """slide_id to tiles for one split."""
        return {case.slide_id: case.num_tiles for case in self.of(split).values()}

    def write(self, file: Path) -> None:
        """Writes the cohort with its splits as CSV; numbers read back bit for bit."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["slide_id", *self.columns, "specimen_id", "patient_id", "split", "num_tiles"])
        for case in self.cases:
            cells = cells_of(case.targets, self.task, self.classes)
            writer.writerow([case.slide_id, *cells, case.specimen_id, case.patient_id, case.split, case.num_tiles])
        write_text(file, out.getvalue())

    @classmethod
    def read(cls, file: Path, head: HeadConfig = _HEAD) -> Self:
        """Reads what `write` wrote, with the head of the run.

        Raises:
            TrainerError: not readable, or not the columns of the head.
        """
        try:
            with file.open(newline="", encoding="utf-8") as stream:
                rows = list(csv.DictReader(stream))
        except OSError as error:
            raise TrainerError(f"{file}: the run's cohort cannot be read ({error.strerror})") from None
        if rows and not set(head.columns) <= set(rows[0]):
            raise TrainerError(f"{file}: expected the run's head.columns {list(head.columns)}, got {list(rows[0])}")
        targets, classes = parse_targets(rows, head, str(file))
        cases = tuple(
            Case(
                slide_id=row["slide_id"],
                targets=targets[row["slide_id"]],
                specimen_id=row["specimen_id"],
                patient_id=row["patient_id"],
                split=side_of(row["split"], str(file)),
                num_tiles=int(row["num_tiles"]),
            )
            for row in rows
        )
        return cls(cases, classes, task=head.task, columns=head.columns)


def load_cohort(
    labels: Path,
    source: ManifestSource,
    config: CohortConfig,
    seed: int,
    head: HeadConfig = _HEAD,
    *,
    split: Path | None = None,
    usual: CohortConfig | None = None,
) -> Cohort:
    """Joins the labels with the manifests and settles the splits.

    Args:
        labels: CSV with slide_id, the head's columns [, specimen_id] [, patient_id] [, split = train | val | test].
        source: the manifests.
        config: shares of the splits, used where none are given.
        seed: the run's seed; patients are split by a keyed hash.
        head: what is predicted.
        split: CSV with slide_id, split for all these slides, if the labels do not say it.
        usual: what the recipe has; shares that were changed beside given splits are told.

    Raises:
        TrainerError: unreadable labels, labels without a manifest, one class under two names, a split that does not
            fit (see `fit_split`), a patient or a duplicate on two sides, or fewer than two classes, or values of a
            column, to train on.
    """
    slides = read_labelled(labels, source, head)
    notes = list(slides.notes)
    if split is not None or slides.has_split:
        splits, more = _take_split(split, slides, config) if split is not None else (_labels_split(labels, slides), [])
        notes += [*more, *_tell_unused(config, usual, splits)]
    else:
        splits = split_patients(slides.strata, slides.group_of, config, seed, carries=head.task != "classes")
    training = {slide_id: values for slide_id, values in slides.targets.items() if splits[slide_id] == "train"}
    notes += refuse_unlearnable(training, head, slides.classes, str(labels))
    notes += tell_gaps({"": count_sides(splits, slides)}, slides, ("val", "test"))
    cases = tuple(
        Case(
            slide_id=row["slide_id"],
            targets=slides.targets[row["slide_id"]],
            specimen_id=row["specimen_id"],
            patient_id=row["patient_id"],
            split=splits[row["slide_id"]],
            num_tiles=slides.num_tiles[row["slide_id"]],
        )
        for row in sorted(slides.rows, key=lambda row: row["slide_id"])
    )
    return Cohort(cases, slides.classes, tuple(notes), head.task, head.columns)


def refuse_other_split(cohort: Cohort, split: Path) -> None:
    """Looks whether a run that is gone on with has the split that it is given.

    Raises:
        TrainerError: it has another, or the file is not readable.
    """
    given, known = read_split(split), {case.slide_id for case in cohort.cases}
    given = {match_name(name, known): side for name, side in given.items()}
    if others := [case.slide_id for case in cohort.cases if given.get(case.slide_id) != case.split]:
        raise TrainerError(
            f"--resume with another --split than the run's: {len(others)} slides are on other sides, {few(others)}; "
            "leave --split out, or give another --out"
        )


def _labels_split(labels: Path, slides: Labelled) -> dict[str, Split]:
    """The sides that the labels name.

    Raises:
        TrainerError: a slide without one, an unknown word, or a leak.
    """
    if bare := [row["slide_id"] for row in slides.rows if not row.get("split")]:
        raise TrainerError(f"{labels}: {len(bare)} slides have no split while others do: {few(bare)}")
    splits = {row["slide_id"]: side_of(row["split"], str(labels)) for row in slides.rows}
    refuse_leak(splits, slides.group_of)
    return splits


def _take_split(file: Path, slides: Labelled, config: CohortConfig) -> tuple[dict[str, Split], list[str]]:
    """The sides that a file gives, and sentences to tell.

    Raises:
        TrainerError: it does not fit the cohort, or a side is empty or has one class alone.
    """
    splits, notes = fit_split(file, slides)
    instead = "give another split, as `slidegrad splits` draws them"
    may_be_empty: tuple[Split, ...] = () if config.val_fraction else ("val",)
    without = f"{instead} (to go without validation: none in val, and --cohort.val-fraction 0)"
    refuse_poor(
        count_sides(splits, slides),
        slides,
        where=f"--split {file}",
        way_out={"train": instead, "val": without, "test": instead},
        may_be_empty=may_be_empty,
    )
    return splits, notes


def _tell_unused(config: CohortConfig, usual: CohortConfig | None, splits: dict[str, Split]) -> list[str]:
    """Sentences about shares that do nothing, as the split is given."""
    if usual is None:
        return []
    is_allowed = config.val_fraction == 0 and "val" not in splits.values()  # Without it, no split without validation.
    shares = {
        "val_fraction": (config.val_fraction, usual.val_fraction if not is_allowed else 0),
        "test_fraction": (config.test_fraction, usual.test_fraction),
    }
    changed = {name: share for name, (share, before) in shares.items() if share != before}
    return [f"cohort.{name}={share:g} changes nothing: the split is given" for name, share in changed.items()]
