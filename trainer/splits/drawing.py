"""Drawing splits: one for a run, or many for a study, as Monte-Carlo cross-validation or folds.

Pure functions of the patients' names, what is known of them, and a seed; they know no file. Patients are sorted by a
hash that is keyed with the seed and cut into sides, stratum by stratum, so that every side has its share of each class.
One thing to know before changing it: the keys are what makes a split the same everywhere and for ever; each way of
drawing has a key of its own.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from trainer.config import Cohort as CohortConfig
from trainer.errors import TrainerError
from trainer.splits.grouping import Split
from trainer.targets import class_order

Method = Literal["mccv", "kfold"]
MOST_SPLITS = 1000


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How many splits are drawn, and in which way.

    Raises:
        TrainerError: a number that makes no sense, in the words of the command's flags.
    """

    method: Method = "mccv"
    """mccv: each split is drawn anew from all patients (Monte-Carlo cross-validation, as in the paper's 20 splits);
    kfold: each patient is in the test of exactly one split."""
    num: int = 20
    """Splits, or folds."""
    val_fraction: float = 0.15
    """Share of all patients for validation."""
    test_fraction: float = 0.2
    """Share of all patients for the test; has no part in kfold, where a fold is the test."""
    seed: int = 0

    def __post_init__(self) -> None:
        least = 2 if self.method == "kfold" else 1
        _check(least <= self.num <= MOST_SPLITS, f"--num {self.num}", f"{least} to {MOST_SPLITS}")
        _check(0 <= self.val_fraction < 1, f"--val-fraction {self.val_fraction:g}", "[0, 1)")
        _check(0 <= self.seed < 2**63, f"--seed {self.seed}", "[0, 2^63)")
        if self.method == "kfold":
            most = 1 - 1 / self.num
            what = f"--val-fraction {self.val_fraction:g} with --num {self.num} folds"
            _check(self.val_fraction < most, what, f"below {most:g}, some patients must train")
        else:
            _check(0 < self.test_fraction < 1, f"--test-fraction {self.test_fraction:g}", "(0, 1)")
            both = self.val_fraction + self.test_fraction
            _check(both < 1, f"--val-fraction and --test-fraction are {both:g} together", "below 1, some must train")


def draw_splits(
    strata: Mapping[str, str], group_of: Mapping[str, str], drawing: Drawing, number: int, *, carries: bool = False
) -> dict[str, Split]:
    """One split of a study; of mccv it depends on `number` but not on how many there are.

    Args:
        strata: slide_id to what the sides shall have alike, see `trainer.targets.strata_of`.
        group_of: slide_id to the group (patient) that stays on one side, see `group_slides`.
        drawing: how the splits are drawn.
        number: which of them, from 0.
        carries: see `split_patients`.

    Returns:
        slide_id to its side.
    """
    assert 0 <= number < drawing.num, "splits are numbered from 0"
    by_stratum = _by_stratum(strata, group_of)
    val, seed = drawing.val_fraction, drawing.seed
    if drawing.method == "mccv":
        key = _keyed(f"slidegrad-mccv-1\x00{seed}\x00{number}")
        side = _cut(by_stratum, key, val, test_fraction=drawing.test_fraction, carries=carries)
    else:
        # Dealt out like cards, one stratum after the other, folds differ by one patient at most, in each class and
        # in all.
        key = _keyed(f"slidegrad-kfold-1\x00{seed}")
        dealt = [group for s in sorted(by_stratum, key=class_order) for group in sorted(by_stratum[s], key=key)]
        key = _keyed(f"slidegrad-kfold-val-1\x00{seed}\x00{number}")
        side = _cut(by_stratum, key, val, test=frozenset(dealt[number :: drawing.num]), carries=carries)
    return {slide_id: side[group_of[slide_id]] for slide_id in strata}


def split_patients(
    strata: Mapping[str, str], group_of: Mapping[str, str], config: CohortConfig, seed: int, *, carries: bool = False
) -> dict[str, Split]:
    """The split of a run whose labels name none, and that was given none.

    Args:
        strata: slide_id to what the splits shall have alike, as the class's name.
        group_of: slide_id to the group (patient) it belongs to.
        config: shares for validation and test.
        seed: the run's seed.
        carries: what a stratum loses by rounding is made up for in the next: many small strata would all lose.
    """
    key = _keyed(f"slidegrad-split-1\x00{seed}")
    by_stratum = _by_stratum(strata, group_of)
    side = _cut(by_stratum, key, config.val_fraction, test_fraction=config.test_fraction, carries=carries)
    return {slide_id: side[group_of[slide_id]] for slide_id in strata}


def _by_stratum(strata: Mapping[str, str], group_of: Mapping[str, str]) -> dict[str, list[str]]:
    """Stratum to its groups. A group with slides of several goes with the last, the diseased where 1 is disease."""
    stratum_of: dict[str, str] = {}
    for slide_id, stratum in strata.items():
        group = group_of[slide_id]
        stratum_of[group] = max(stratum_of.get(group, stratum), stratum, key=class_order)
    by_stratum: dict[str, list[str]] = defaultdict(list)
    for group, stratum in stratum_of.items():
        by_stratum[stratum].append(group)
    return by_stratum


def _cut(
    by_stratum: Mapping[str, list[str]],
    key: Callable[[str], bytes],
    val_fraction: float,
    *,
    test_fraction: float = 0.0,
    test: Collection[str] | None = None,
    carries: bool,
) -> dict[str, Split]:
    """Group to side: test first, then validation, then training, in the order of `key`; `test` names the test's."""
    side: dict[str, Split] = {}
    given = Counter[str]()
    for stratum in sorted(by_stratum, key=class_order):
        groups = sorted(by_stratum[stratum], key=key)
        if not carries:
            given.clear()
        num_groups = given.total() + len(groups)
        if test is None:
            num_test = round(test_fraction * num_groups) - given["test"]
        else:
            groups.sort(key=lambda group: group not in test)
            num_test = sum(group in test for group in groups)
        num_val = round(val_fraction * num_groups) - given["val"]
        for i, group in enumerate(groups):
            side[group] = "test" if i < num_test else "val" if i < num_test + num_val else "train"
            given[side[group]] += 1
    return side


def _keyed(prefix: str) -> Callable[[str], bytes]:
    def key(group: str) -> bytes:
        return hashlib.blake2b(f"{prefix}\x00{group}".encode()).digest()

    return key


def _check(good: bool, what: str, expected: str) -> None:
    if not good:
        raise TrainerError(f"{what}: expected {expected}")
