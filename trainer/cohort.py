"""The cohort: which slides a run uses, their classes, and which patients train, validate and test.

A patient is on one side only, and so is a slide that lies in the archive twice.
"""

import csv
import dataclasses
import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

from manifests import ManifestSource
from manifests.files import write_text
from tiler.discover import SLIDE_SUFFIXES
from trainer.config import Cohort as CohortConfig
from trainer.errors import TrainerError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_MAX_NAMED = 5
_COLUMNS = ("slide_id", "label", "specimen_id", "patient_id", "split", "num_tiles")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One slide of the cohort. `label` is the class's position in `Cohort.classes`."""

    slide_id: str
    label: int
    specimen_id: str
    patient_id: str
    split: Split
    num_tiles: int


@dataclass(frozen=True)
class Cohort:
    """The cases of a run, sorted by slide_id, and the names of the classes, sorted."""

    cases: tuple[Case, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Sentences to tell the user once."""

    def of(self, split: str) -> dict[str, Case]:
        """slide_id to case for one split."""
        return {case.slide_id: case for case in self.cases if case.split == split}

    def num_tiles(self, split: str) -> dict[str, int]:
        """slide_id to tiles for one split."""
        return {case.slide_id: case.num_tiles for case in self.of(split).values()}

    def only(self, case: Case) -> Self:
        """The cohort with one case alone, its classes kept."""
        return dataclasses.replace(self, cases=(case,))

    def write(self, file: Path) -> None:
        """Writes the cohort with its splits as CSV."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for case in self.cases:
            name = self.classes[case.label]
            writer.writerow([case.slide_id, name, case.specimen_id, case.patient_id, case.split, case.num_tiles])
        write_text(file, out.getvalue())

    @classmethod
    def read(cls, file: Path) -> Self:
        """Reads what `write` wrote."""
        try:
            with file.open(newline="", encoding="utf-8") as stream:
                rows = list(csv.DictReader(stream))
        except OSError as error:
            raise TrainerError(f"{file}: the run's cohort cannot be read ({error.strerror})") from None
        classes = tuple(sorted({row["label"] for row in rows}, key=_class_order))
        cases = tuple(
            Case(
                slide_id=row["slide_id"],
                label=classes.index(row["label"]),
                specimen_id=row["specimen_id"],
                patient_id=row["patient_id"],
                split=_split(row["split"]),
                num_tiles=int(row["num_tiles"]),
            )
            for row in rows
        )
        return cls(cases, classes)


def load_cohort(labels: Path, source: ManifestSource, config: CohortConfig, seed: int) -> Cohort:
    """Joins the labels with the manifests and settles the splits.

    Args:
        labels: CSV with slide_id, label [, specimen_id] [, patient_id] [, split = train | val | test].
        source: the manifests.
        config: shares of the splits, used where the labels name none.
        seed: the run's seed; patients are split by a keyed hash.

    Raises:
        TrainerError: unreadable labels, labels without a manifest, a patient or a duplicate on two sides, or fewer
            than two classes to train on.
    """
    rows = _read_labels(labels)
    catalog = {row["slide_id"]: row for row in source.catalog().to_pylist()}
    for row in rows:
        row["slide_id"] = _match(row["slide_id"], catalog)
    missing = [row["slide_id"] for row in rows if row["slide_id"] not in catalog]
    if missing:
        raise TrainerError(f"{labels}: {len(missing)} of {len(rows)} slides have no manifest: {_few(missing)}")
    twice = [slide_id for slide_id, n in Counter(row["slide_id"] for row in rows).items() if n > 1]
    if twice:
        raise TrainerError(f"{labels}: {len(twice)} slides are listed twice: {_few(twice)}")
    notes: list[str] = []
    unusable = [row["slide_id"] for row in rows if not catalog[row["slide_id"]]["num_tiles"]]
    if unusable:
        notes.append(f"{len(unusable)} labelled slides have no tiles and are left out: {_few(unusable)}")
        rows = [row for row in rows if catalog[row["slide_id"]]["num_tiles"]]
    _fill_ids(rows, labels, notes)

    same_side = _sides([(row, catalog[row["slide_id"]]["fingerprint"]) for row in rows])
    if all(row.get("split") for row in rows):
        splits = {row["slide_id"]: _split(row["split"]) for row in rows}
        _refuse_leak(rows, splits, same_side)
    elif any(row.get("split") for row in rows):
        bare = [row["slide_id"] for row in rows if not row.get("split")]
        raise TrainerError(f"{labels}: {len(bare)} slides have no split while others do: {_few(bare)}")
    else:
        splits = split_patients({row["slide_id"]: row["label"] for row in rows}, same_side, config, seed)

    classes = tuple(sorted({row["label"] for row in rows}, key=_class_order))
    cases = tuple(
        Case(
            slide_id=row["slide_id"],
            label=classes.index(row["label"]),
            specimen_id=row["specimen_id"],
            patient_id=row["patient_id"],
            split=splits[row["slide_id"]],
            num_tiles=catalog[row["slide_id"]]["num_tiles"],
        )
        for row in sorted(rows, key=lambda row: row["slide_id"])
    )
    in_training = {case.label for case in cases if case.split == "train"}
    if len(in_training) < 2:
        raise TrainerError(
            f"{labels}: the training split has {len(in_training)} of the classes {list(classes)}, expected at least 2"
        )
    return Cohort(cases, classes, tuple(notes))


def split_patients(
    labels: dict[str, str], same_side: dict[str, str], config: CohortConfig, seed: int
) -> dict[str, Split]:
    """Splits groups of slides that must stay together, class by class, by a hash keyed with the seed.

    Args:
        labels: slide_id to class name.
        same_side: slide_id to the group (patient) it belongs to.
        config: shares for validation and test.
        seed: the run's seed.
    """
    # A group with slides of several classes is cut with the last class, the diseased one where 1 means disease.
    group_class: dict[str, str] = {}
    for slide_id, label in labels.items():
        group = same_side[slide_id]
        group_class[group] = max(group_class.get(group, label), label, key=_class_order)
    by_class: dict[str, list[str]] = defaultdict(list)
    for group, label in group_class.items():
        by_class[label].append(group)

    def key(group: str) -> bytes:
        return hashlib.blake2b(f"slidegrad-split-1\x00{seed}\x00{group}".encode()).digest()

    side: dict[str, Split] = {}
    for groups in by_class.values():
        groups.sort(key=key)
        num_test, num_val = round(config.test_fraction * len(groups)), round(config.val_fraction * len(groups))
        for i, group in enumerate(groups):
            side[group] = "test" if i < num_test else "val" if i < num_test + num_val else "train"
    return {slide_id: side[same_side[slide_id]] for slide_id in labels}


def _read_labels(file: Path) -> list[dict[str, str]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = [{k: (v or "").strip() for k, v in row.items() if k} for row in csv.DictReader(stream)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TrainerError(f"--labels {file}: not readable as CSV ({error})") from None
    if not rows or not {"slide_id", "label"} <= set(rows[0]):
        found = list(rows[0]) if rows else "no rows"
        raise TrainerError(f"--labels {file}: expected the columns slide_id, label and at least one row, got {found}")
    bare = [row["slide_id"] for row in rows if not row["label"]]
    if bare:
        raise TrainerError(f"--labels {file}: {len(bare)} slides have an empty label: {_few(bare)}")
    return rows


def _match(name: str, catalog: dict[str, object]) -> str:
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
            raise TrainerError(f"{labels}: {len(bare)} slides have no {column} while others do: {_few(bare)}")
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
        named = "; ".join(f"slides {_few(members[g])} in {' and '.join(sorted(sides[g]))}" for g in leaks[:_MAX_NAMED])
        more = f" and {len(leaks) - _MAX_NAMED} more" if len(leaks) > _MAX_NAMED else ""
        raise TrainerError(
            f"{len(leaks)} patients (or copies of one slide) are on two sides of the split: {named}{more}; "
            "put all slides of a patient in one split"
        )


def _split(name: str) -> Split:
    for split in SPLITS:
        if split == name:
            return split
    raise TrainerError(f"split {name!r}: expected one of {', '.join(SPLITS)}")


def _class_order(name: str) -> tuple[int, float, str]:
    """Numbers by value, before words by letter."""
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
