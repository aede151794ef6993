"""What each side of a split holds, and whether that is enough to train, to choose and to test.

Patients are counted by group: those that share a specimen or a copied slide count as one.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.errors import TrainerError
from trainer.labelled import Labelled
from trainer.splits.grouping import SPLITS, Split
from trainer.targets import few


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a split."""

    num_patients: int
    num_slides: int
    patients_of: dict[str, int]
    """Patients with a slide of the class, or (multilabel) with a yes in the column; empty for regression."""
    slides_of: dict[str, int]
    """Likewise slides."""
    unmeasurable: tuple[str, ...]
    """Classes that no slide here has, or columns with fewer than two known values: there is nothing to tell apart."""

    def to_dict(self) -> dict[str, Any]:
        """Counts, fit for JSON."""
        counts = {"num_patients": self.num_patients, "num_slides": self.num_slides}
        return {**counts, "patients_of": self.patients_of, "slides_of": self.slides_of} if self.slides_of else counts


def count_sides(splits: Mapping[str, Split], slides: Labelled) -> dict[Split, Side]:
    """Side to what it holds, for all sides, those without a slide included."""
    those: dict[Split, list[str]] = {side: [] for side in SPLITS}
    for slide_id, side in splits.items():
        those[side].append(slide_id)
    return {side: _count(slide_ids, slides) for side, slide_ids in those.items()}


def _count(slide_ids: Sequence[str], slides: Labelled) -> Side:
    task, columns = slides.head.task, slides.head.columns
    names = {"classes": slides.classes, "multilabel": columns, "regression": ()}[task]
    slides_of = Counter[str]()
    groups_of: dict[str, set[str]] = defaultdict(set)
    for slide_id in slide_ids:
        targets = slides.targets[slide_id]
        here = (round(targets[0]),) if task == "classes" else (i for i in range(len(names)) if targets[i] == 1)
        for i in here:
            slides_of[names[i]] += 1
            groups_of[names[i]].add(slides.group_of[slide_id])
    if task == "classes":
        unmeasurable = [name for name in names if not slides_of[name]]
    else:
        values = [{slides.targets[slide_id][i] for slide_id in slide_ids} for i in range(len(columns))]
        known = [{value for value in column if not math.isnan(value)} for column in values]
        unmeasurable = [column for column, some in zip(columns, known, strict=True) if len(some) < 2]
    return Side(
        num_patients=len({slides.group_of[slide_id] for slide_id in slide_ids}),
        num_slides=len(slide_ids),
        patients_of={name: len(groups_of[name]) for name in names},
        slides_of={name: slides_of[name] for name in names},
        unmeasurable=tuple(unmeasurable),
    )


def refuse_poor(
    sides: Mapping[Split, Side],
    slides: Labelled,
    *,
    where: str,
    way_out: Mapping[Split, str],
    may_be_empty: Collection[Split] = (),
) -> None:
    """Looks whether every side has patients, and of two classes at least: with one, nothing is learnt or measured.

    Args:
        sides: of one split.
        slides: the cohort.
        where: the split, for errors.
        way_out: what to do if a side has too little.
        may_be_empty: sides that may have no patient.

    Raises:
        TrainerError: an empty side, or one with a single class.
    """
    needed = [name for name in SPLITS if sides[name].num_patients or name not in may_be_empty]
    for name in needed:
        if not sides[name].num_patients:
            raise TrainerError(f"{where}: a split without a patient in {name}; {way_out[name]}")
    for name in needed:
        absent = sides[name].unmeasurable
        if slides.head.task != "classes" or not absent or len(absent) < len(slides.classes) - 1:
            continue
        (present,) = set(slides.classes) - set(absent)
        totals = {label: sum(side.patients_of[label] for side in sides.values()) for label in absent}
        out = way_out[name]
        if max(totals.values()) < len(needed):
            out = f"{len(needed)} sides need a patient each: label more of them, or leave the class out"
        counted = few([f"class {label}: {total}" for label, total in totals.items()])
        raise TrainerError(
            f"{where}: {name} has the class {present} alone, as too few patients have another ({counted}); {out}"
        )


def tell_gaps(
    sides_of: Mapping[str, Mapping[Split, Side]], slides: Labelled, names: Collection[Split] = SPLITS
) -> list[str]:
    """Sentences about classes and columns of which nothing can be learnt or measured on some side.

    Args:
        sides_of: a split's name to its sides.
        slides: the cohort.
        names: sides to look at.
    """
    lacking: dict[tuple[str, Split], list[str]] = defaultdict(list)
    for split, sides in sides_of.items():
        for name in names:
            for label in sides[name].unmeasurable if sides[name].num_slides else ():
                lacking[label, name].append(split)
    what = "no slide of the class {}" if slides.head.task == "classes" else "fewer than two values of {}"
    of = {split: f" in {few(split)}" for split in map(tuple, lacking.values()) if any(split)}
    return [
        f"{name} has {what.format(label)}{of.get(tuple(splits), '')}: it cannot be "
        f"{'learnt' if name == 'train' else 'measured'} there"
        for (label, name), splits in lacking.items()
    ]
