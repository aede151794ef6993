"""Slides that must stay together, and the sides that they may be on.

One thing to know before changing it: groups are named by their patients and splits are drawn by hashes of those names,
so another name is another split of every cohort.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from trainer.errors import TrainerError
from trainer.targets import few

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_MAX_NAMED = 5


def group_slides(rows: Iterable[tuple[dict[str, str], str]]) -> dict[str, str]:
    """slide_id to a group's name: slides that share patient, specimen or file, directly or not, share a group.

    Args:
        rows: a labels row and its slide's fingerprint.

    Returns:
        The first patient of the group names it, so that a split does not depend on the files' bytes.
    """
    parent: dict[str, str] = {}

    def find(x: str) -> str:
        while parent.setdefault(x, x) != x:
            parent[x] = parent[parent[x]]  # On a line of its own: `x = parent[x] = …` would assign x first.
            x = parent[x]
        return x

    slides = []
    for row, fingerprint in rows:
        # "0 patient" sorts first: a group's root is always its smallest patient.
        keys = (f"0 patient {row['patient_id']}", f"1 specimen {row['specimen_id']}", f"2 file {fingerprint}")
        root, *others = sorted({find(key) for key in keys})
        parent.update(dict.fromkeys(others, root))
        slides.append((row["slide_id"], keys[0]))
    return {slide_id: find(patient) for slide_id, patient in slides}


def refuse_leak(splits: Mapping[str, Split], group_of: Mapping[str, str]) -> None:
    """Looks whether every group is on one side.

    Args:
        splits: slide_id to its side.
        group_of: slide_id to its group.

    Raises:
        TrainerError: a group on two sides; names some of its slides.
    """
    sides: dict[str, set[str]] = defaultdict(set)
    members: dict[str, list[str]] = defaultdict(list)
    for slide_id, split in splits.items():
        sides[group_of[slide_id]].add(split)
        members[group_of[slide_id]].append(slide_id)
    leaks = [group for group in sides if len(sides[group]) > 1]
    if leaks:
        named = "; ".join(f"slides {few(members[g])} in {' and '.join(sorted(sides[g]))}" for g in leaks[:_MAX_NAMED])
        more = f" and {len(leaks) - _MAX_NAMED} more" if len(leaks) > _MAX_NAMED else ""
        raise TrainerError(
            f"{len(leaks)} patients (or copies of one slide) are on two sides of the split: {named}{more}; "
            "put all slides of a patient in one split"
        )


def side_of(word: str, where: str) -> Split:
    """The side that a file's word names.

    Raises:
        TrainerError: another word.
    """
    for split in SPLITS:
        if split == word:
            return split
    raise TrainerError(f"{where}: split {word!r}: expected one of {', '.join(SPLITS)}")
