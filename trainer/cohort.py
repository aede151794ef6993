"""The cohort: which slides a run uses, what is known of them, and which patients train, validate and test.

A patient is on one side only, and so is a slide that lies in the archive twice.
"""

import csv
import dataclasses
import hashlib
import io
import math
from collections import Counter, defaultdict
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

from manifests import ManifestSource
from manifests.files import write_text
from tiler.discover import SLIDE_SUFFIXES
from trainer.config import Cohort as CohortConfig
from trainer.config import Head as HeadConfig
from trainer.errors import TrainerError
from trainer.targets import (
    Targets,
    Task,
    cells_of,
    class_order,
    few,
    parse_targets,
    read_labels,
    refuse_unlearnable,
    strata_of,
)

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_MAX_NAMED = 5
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

    def only(self, case: Case) -> Self:
        """The cohort with one case alone. No `Head` follows from it: that takes the training slides."""
        return dataclasses.replace(self, cases=(case,))

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
                split=_split(row["split"]),
                num_tiles=int(row["num_tiles"]),
            )
            for row in rows
        )
        return cls(cases, classes, task=head.task, columns=head.columns)


def load_cohort(
    labels: Path, source: ManifestSource, config: CohortConfig, seed: int, head: HeadConfig = _HEAD
) -> Cohort:
    """Joins the labels with the manifests and settles the splits.

    Args:
        labels: CSV with slide_id, the head's columns [, specimen_id] [, patient_id] [, split = train | val | test].
        source: the manifests.
        config: shares of the splits, used where the labels name none.
        seed: the run's seed; patients are split by a keyed hash.
        head: what is predicted.

    Raises:
        TrainerError: unreadable labels, labels without a manifest, a patient or a duplicate on two sides, or fewer
            than two classes, or values of a column, to train on.
    """
    rows = read_labels(labels, head)
    catalog = {row["slide_id"]: row for row in source.catalog().to_pylist()}
    for row in rows:
        row["slide_id"] = match_slide(row["slide_id"], catalog)
    missing = [row["slide_id"] for row in rows if row["slide_id"] not in catalog]
    if missing:
        raise TrainerError(f"{labels}: {len(missing)} of {len(rows)} slides have no manifest: {few(missing)}")
    twice = [slide_id for slide_id, n in Counter(row["slide_id"] for row in rows).items() if n > 1]
    if twice:
        raise TrainerError(f"{labels}: {len(twice)} slides are listed twice: {few(twice)}")
    notes: list[str] = []
    unusable = [row["slide_id"] for row in rows if not catalog[row["slide_id"]]["num_tiles"]]
    if unusable:
        notes.append(f"{len(unusable)} labelled slides have no tiles and are left out: {few(unusable)}")
        rows = [row for row in rows if catalog[row["slide_id"]]["num_tiles"]]
    if not rows:
        raise TrainerError(f"{labels}: none of the slides has tiles: {few(unusable)}")
    targets, classes = parse_targets(rows, head, f"--labels {labels}")
    unknown = [slide_id for slide_id, values in targets.items() if all(map(math.isnan, values))]
    if unknown:
        notes.append(f"{len(unknown)} slides have no {' or '.join(head.columns)} and are left out: {few(unknown)}")
        targets = {slide_id: values for slide_id, values in targets.items() if not all(map(math.isnan, values))}
        rows = [row for row in rows if row["slide_id"] in targets]
    _fill_ids(rows, labels, notes)

    same_side = _sides([(row, catalog[row["slide_id"]]["fingerprint"]) for row in rows])
    if all(row.get("split") for row in rows):
        splits = {row["slide_id"]: _split(row["split"]) for row in rows}
        _refuse_leak(rows, splits, same_side)
    elif any(row.get("split") for row in rows):
        bare = [row["slide_id"] for row in rows if not row.get("split")]
        raise TrainerError(f"{labels}: {len(bare)} slides have no split while others do: {few(bare)}")
    else:
        strata = strata_of(targets, head.task, classes)
        splits = split_patients(strata, same_side, config, seed, carries=head.task != "classes")

    training = {slide_id: values for slide_id, values in targets.items() if splits[slide_id] == "train"}
    notes += refuse_unlearnable(training, head, classes, str(labels))
    cases = tuple(
        Case(
            slide_id=row["slide_id"],
            targets=targets[row["slide_id"]],
            specimen_id=row["specimen_id"],
            patient_id=row["patient_id"],
            split=splits[row["slide_id"]],
            num_tiles=catalog[row["slide_id"]]["num_tiles"],
        )
        for row in sorted(rows, key=lambda row: row["slide_id"])
    )
    return Cohort(cases, classes, tuple(notes), head.task, head.columns)


def split_patients(
    strata: dict[str, str], same_side: dict[str, str], config: CohortConfig, seed: int, *, carries: bool = False
) -> dict[str, Split]:
    """Splits groups of slides that must stay together, stratum by stratum, by a hash keyed with the seed.

    Args:
        strata: slide_id to what the splits shall have alike, as the class's name.
        same_side: slide_id to the group (patient) it belongs to.
        config: shares for validation and test.
        seed: the run's seed.
        carries: what a stratum loses by rounding is made up for in the next: many small strata would all lose.
    """
    # A group with slides of several strata is cut with the last, the diseased one where 1 means disease.
    stratum_of: dict[str, str] = {}
    for slide_id, stratum in strata.items():
        group = same_side[slide_id]
        stratum_of[group] = max(stratum_of.get(group, stratum), stratum, key=class_order)
    by_stratum: dict[str, list[str]] = defaultdict(list)
    for group, stratum in stratum_of.items():
        by_stratum[stratum].append(group)

    def key(group: str) -> bytes:
        return hashlib.blake2b(f"slidegrad-split-1\x00{seed}\x00{group}".encode()).digest()

    side: dict[str, Split] = {}
    given = Counter[str]()
    for stratum in sorted(by_stratum, key=class_order):
        groups = sorted(by_stratum[stratum], key=key)
        if not carries:
            given.clear()
        num_groups = given.total() + len(groups)
        num_test = round(config.test_fraction * num_groups) - given["test"]
        num_val = round(config.val_fraction * num_groups) - given["val"]
        for i, group in enumerate(groups):
            side[group] = "test" if i < num_test else "val" if i < num_test + num_val else "train"
            given[side[group]] += 1
    return {slide_id: side[same_side[slide_id]] for slide_id in strata}


def match_slide(name: str, catalog: Container[str]) -> str:
    """Labels may name the file: its slide suffix is dropped where only that finds a manifest."""
    stem = next((name[: -len(s)] for s in SLIDE_SUFFIXES if name.lower().endswith(s)), name)
    return stem if name not in catalog and stem in catalog else name


def _fill_ids(rows: list[dict[str, str]], labels: Path, notes: list[str]) -> None:
    """Gives every row a specimen and a patient; a slide without is its own.

    Raises:
        TrainerError: some rows have one and others do not, which would split patients unnoticed.
    """
    for column in ("specimen_id", "patient_id"):
        bare = [row["slide_id"] for row in rows if not row.get(column)]
        if bare and len(bare) < len(rows):
            raise TrainerError(f"{labels}: {len(bare)} slides have no {column} while others do: {few(bare)}")
        if bare and column == "patient_id":
            notes.append("no patient_id in the labels: each slide counts as its own patient")
    for row in rows:
        row["specimen_id"] = row.get("specimen_id") or row["slide_id"]
        row["patient_id"] = row.get("patient_id") or row["specimen_id"]


def _sides(rows: Iterable[tuple[dict[str, str], str]]) -> dict[str, str]:
    """slide_id to a group's name: slides that share patient, specimen or file, directly or not, share a group.

    Args:
        rows: a labels row and its slide's fingerprint.

    Returns:
        The first patient of the group names it, so that a split does not depend on the files' bytes.
    """
    parent: dict[str, str] = {}

    def find(x: str) -> str:
        while parent.setdefault(x, x) != x:
            x = parent[x] = parent[parent[x]]
        return x

    slides = []
    for row, fingerprint in rows:
        # "0 patient" sorts first: a group's root is always its smallest patient.
        keys = (f"0 patient {row['patient_id']}", f"1 specimen {row['specimen_id']}", f"2 file {fingerprint}")
        root, *others = sorted({find(key) for key in keys})
        parent.update(dict.fromkeys(others, root))
        slides.append((row["slide_id"], keys[0]))
    return {slide_id: find(patient) for slide_id, patient in slides}


def _refuse_leak(rows: list[dict[str, str]], splits: dict[str, Split], same_side: dict[str, str]) -> None:
    sides: dict[str, set[str]] = defaultdict(set)
    members: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        sides[same_side[row["slide_id"]]].add(splits[row["slide_id"]])
        members[same_side[row["slide_id"]]].append(row["slide_id"])
    leaks = [group for group in sides if len(sides[group]) > 1]
    if leaks:
        named = "; ".join(f"slides {few(members[g])} in {' and '.join(sorted(sides[g]))}" for g in leaks[:_MAX_NAMED])
        more = f" and {len(leaks) - _MAX_NAMED} more" if len(leaks) > _MAX_NAMED else ""
        raise TrainerError(
            f"{len(leaks)} patients (or copies of one slide) are on two sides of the split: {named}{more}; "
            "put all slides of a patient in one split"
        )


def _split(name: str) -> Split:
    for split in SPLITS:
        if split == name:
            return split
    raise TrainerError(f"labels: split {name!r}: expected one of {', '.join(SPLITS)}")
