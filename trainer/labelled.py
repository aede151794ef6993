"""The labels joined with the manifests: which slides there are, what is known of them, and which belong together.

Knows no split. One thing to know before changing it: slides that are left out here are in no run and in no drawing of
splits, so that both always mean the same cohort.
"""

import difflib
import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from manifests import ManifestSource
from tiler.discover import SLIDE_SUFFIXES
from trainer.config import Head as HeadConfig
from trainer.errors import TrainerError
from trainer.splits.grouping import group_slides
from trainer.targets import Targets, cells_of, few, parse_targets, read_labels, refuse_twins, strata_of

_MIN_LIKENESS = 0.75
"""difflib's ratio from which a class with one patient may be another one's name mistyped."""


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """The slides that have tiles and a label."""

    head: HeadConfig
    rows: list[dict[str, str]]
    """Of the labels file, in its order, with slide_id as the manifests have it, specimen_id and patient_id."""
    targets: dict[str, Targets]
    """slide_id to targets."""
    classes: tuple[str, ...]
    """In order; none for the other tasks."""
    group_of: dict[str, str]
    """slide_id to the group that stays on one side of a split."""
    num_tiles: dict[str, int]
    """slide_id to tiles."""
    left_out: frozenset[str] = frozenset()
    """Slides that the labels name, but that have no tiles or no label."""
    notes: tuple[str, ...] = ()
    """Sentences to tell the user once."""

    @property
    def strata(self) -> dict[str, str]:
        """slide_id to what the sides of a split shall have alike."""
        return strata_of(self.targets, self.head.task, self.classes)

    @property
    def has_split(self) -> bool:
        """The labels say of some slide on which side it is."""
        return any(row.get("split") for row in self.rows)

    def digest(self) -> str:
        """A hash of all that splits follow from: slides, targets, and which slides belong together."""
        told = hashlib.blake2b(digest_size=16)
        for slide_id, targets in sorted(self.targets.items()):
            cells = cells_of(targets, self.head.task, self.classes)
            told.update("\x00".join([slide_id, *cells, self.group_of[slide_id], ""]).encode())
        return told.hexdigest()


def read_labelled(labels: Path, source: ManifestSource, head: HeadConfig) -> Labelled:
    """Joins the labels with the manifests.

    Args:
        labels: CSV with slide_id, the head's columns [, specimen_id] [, patient_id]; further columns are kept.
        source: the manifests.
        head: what is predicted.

    Raises:
        TrainerError: unreadable labels, labels without a manifest, a slide listed twice, two names of one class.
    """
    rows = read_labels(labels, head)
    catalog = {row["slide_id"]: row for row in source.catalog().to_pylist()}
    for row in rows:
        row["slide_id"] = match_name(row["slide_id"], catalog)
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
    refuse_twins(classes, f"--labels {labels}: column {head.columns[0]}")
    unknown = [slide_id for slide_id, values in targets.items() if all(map(math.isnan, values))]
    if unknown:
        notes.append(f"{len(unknown)} slides have no {' or '.join(head.columns)} and are left out: {few(unknown)}")
        targets = {slide_id: values for slide_id, values in targets.items() if not all(map(math.isnan, values))}
        rows = [row for row in rows if row["slide_id"] in targets]
    _fill_ids(rows, labels, notes)
    group_of = group_slides([(row, catalog[row["slide_id"]]["fingerprint"]) for row in rows])
    return Labelled(
        head=head,
        rows=rows,
        targets=targets,
        classes=classes,
        group_of=group_of,
        num_tiles={row["slide_id"]: catalog[row["slide_id"]]["num_tiles"] for row in rows},
        left_out=frozenset(unusable + unknown),
        notes=(*notes, *_lone_classes(targets, classes, group_of)),
    )


def match_name(name: str, known: Container[str]) -> str:
    """A slide's id from what a list calls it, which may be the file: its suffix is dropped where only that is known."""
    stem = next((name[: -len(s)] for s in SLIDE_SUFFIXES if name.lower().endswith(s)), name)
    return stem if name not in known and stem in known else name


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


def _lone_classes(targets: dict[str, Targets], classes: tuple[str, ...], group_of: dict[str, str]) -> list[str]:
    """Sentences about classes that one patient has: rare, or another class's name mistyped."""
    groups: dict[str, set[str]] = defaultdict(set)
    for slide_id, values in targets.items() if classes else ():
        groups[classes[round(values[0])]].add(group_of[slide_id])
    sentences = []
    for name in classes:
        if len(groups[name]) > 1:
            continue
        others = [other for other in classes if len(groups[other]) > 1]
        like = difflib.get_close_matches(name, others, 1, _MIN_LIKENESS)
        twin = f"; is it {like[0]}, which {len(groups[like[0]])} have, mistyped?" if like else ""
        sentences.append(f"the class {name} has one patient, who is on one side of any split{twin}")
    return sentences
