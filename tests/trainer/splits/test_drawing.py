"""Any cohort: nobody on two sides, every side with its share of each class, the same splits everywhere and for ever."""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trainer.config import Cohort as CohortConfig
from trainer.errors import TrainerError
from trainer.splits.drawing import Drawing, draw_splits, split_patients
from trainer.splits.grouping import group_slides
from trainer.targets import strata_of

QUARTERS = CohortConfig(val_fraction=0.25, test_fraction=0.25)
Slides = list[tuple[dict[str, str], str, str]]
"""A labels row, the file's fingerprint, the class."""


@st.composite
def cohorts(draw: st.DrawFn) -> Slides:
    """Patients with one to four slides, of one class or two, some rare; slides that share a specimen or a file."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    classes, weights = ["a", "b", "rare"], [rng.random(), rng.random(), rng.random() / 20]
    twins = draw(st.sampled_from([0.0, 0.03, 0.3]))
    slides: Slides = []
    for patient in range(draw(st.integers(1, 60))):
        own = rng.choices(classes, weights)
        for _ in range(rng.randint(1, 4)):
            n = len(slides)
            has_twin, label = (
                slides and rng.random() < twins,
                rng.choice([*own, own[0], rng.choices(classes, weights)[0]]),
            )
            row = {"slide_id": f"s{n}", "patient_id": f"p{patient}", "specimen_id": f"p{patient}.{rng.randint(0, 1)}"}
            slides.append((row, rng.choice(slides)[1] if has_twin else f"f{n}", label))
    return slides


def joined(slides: Slides) -> tuple[dict[str, str], dict[str, str]]:
    """slide_id to stratum, and to group."""
    return {row["slide_id"]: label for row, _, label in slides}, group_slides([(row, file) for row, file, _ in slides])


def groups_by_stratum(strata: Mapping[str, str], group_of: Mapping[str, str]) -> dict[str, set[str]]:
    """A group is of the last class that it has."""
    last: dict[str, str] = {}
    for slide_id, stratum in strata.items():
        last[group_of[slide_id]] = max(last.get(group_of[slide_id], ""), stratum)
    found: dict[str, set[str]] = defaultdict(set)
    for group, stratum in last.items():
        found[stratum].add(group)
    return found


def drawings(**more: Any) -> st.SearchStrategy[Drawing]:
    mccv = st.builds(
        Drawing,
        num=st.just(6),
        seed=st.integers(0, 2**63 - 1),
        val_fraction=st.floats(0, 0.4),
        test_fraction=st.floats(0.05, 0.5),
    )
    folds = st.builds(
        Drawing,
        method=st.just("kfold"),
        num=st.integers(2, 6),
        seed=st.integers(0, 2**63 - 1),
        val_fraction=st.floats(0, 0.4),
    )
    return {"mccv": mccv, "kfold": folds}.get(more.get("method", ""), mccv | folds)


@given(cohorts(), drawings(), st.booleans())
def test_no_patient_specimen_or_file_is_on_two_sides(slides: Slides, drawing: Drawing, carries: bool) -> None:
    strata, group_of = joined(slides)
    for number in range(drawing.num):
        side = draw_splits(strata, group_of, drawing, number, carries=carries)
        assert side.keys() == strata.keys()
        for name in (lambda row, _: row["patient_id"], lambda row, _: row["specimen_id"], lambda _, file: file):
            sides = defaultdict(set)
            for row, file, _ in slides:
                sides[name(row, file)].add(side[row["slide_id"]])
            assert all(len(some) == 1 for some in sides.values())


@given(cohorts(), drawings())
def test_each_class_has_its_share_on_each_side_within_one_patient(slides: Slides, drawing: Drawing) -> None:
    strata, group_of = joined(slides)
    test_fraction = drawing.test_fraction if drawing.method == "mccv" else 1 / drawing.num
    for number in range(drawing.num):
        side = {group_of[s]: split for s, split in draw_splits(strata, group_of, drawing, number).items()}
        for groups in groups_by_stratum(strata, group_of).values():
            held = Counter(side[group] for group in groups)
            assert abs(held["test"] - test_fraction * len(groups)) < 1
            left = len(groups) - held["test"]
            assert abs(held["val"] - min(left, drawing.val_fraction * len(groups))) < 1


@given(cohorts(), drawings())
def test_shares_hold_in_all_where_strata_carry_what_rounding_loses(slides: Slides, drawing: Drawing) -> None:
    """As for columns and numbers, where each stratum may be a single patient."""
    _, group_of = joined(slides)
    # Each patient is a stratum.
    side = {group_of[s]: split for s, split in draw_splits(group_of, group_of, drawing, 0, carries=True).items()}
    held = Counter(side.values())
    test_fraction = drawing.test_fraction if drawing.method == "mccv" else 1 / drawing.num
    assert abs(held["test"] - test_fraction * len(side)) < 1
    if drawing.method == "mccv":
        assert abs(held["val"] - drawing.val_fraction * len(side)) <= 1


@given(cohorts(), drawings(method="kfold"))
def test_folds_partition_the_patients_evenly(slides: Slides, drawing: Drawing) -> None:
    strata, group_of = joined(slides)
    tests = []
    for number in range(drawing.num):
        splits = draw_splits(strata, group_of, drawing, number)
        tests.append({group_of[slide_id] for slide_id, side in splits.items() if side == "test"})
    assert sorted(group for fold in tests for group in fold) == sorted(set(group_of.values()))
    sizes = [len(fold) for fold in tests]
    assert max(sizes) - min(sizes) <= 1
    for groups in groups_by_stratum(strata, group_of).values():
        of_class = [len(fold & groups) for fold in tests]
        assert max(of_class) - min(of_class) <= 1


@given(cohorts(), st.integers(0, 99), st.randoms(use_true_random=False))
def test_a_split_depends_on_seed_and_number_and_on_nothing_else(
    slides: Slides, seed: int, shuffler: random.Random
) -> None:
    strata, group_of = joined(slides)
    few, many = Drawing(num=5, seed=seed), Drawing(num=20, seed=seed)
    other = slides.copy()
    shuffler.shuffle(other)
    for number in range(5):
        split = draw_splits(strata, group_of, few, number)
        assert split == draw_splits(strata, group_of, many, number)
        assert split == draw_splits(*joined(other), many, number)


@settings(max_examples=15)
@given(cohorts())
def test_other_seeds_numbers_and_methods_are_other_splits(slides: Slides) -> None:
    strata, group_of = joined(slides)
    assume(len(set(group_of.values())) > 25)
    same = [
        draw_splits(strata, group_of, Drawing(method=method, num=5, seed=seed), number)  # type: ignore[arg-type]
        for method in ("mccv", "kfold")
        for seed in (0, 1)
        for number in range(5)
    ]
    assert len({tuple(sorted(split.items())) for split in same}) == len(same)


STRATA = {f"s{i}": "abc"[i * i % 7 % 3] for i in range(401)}
GROUPS = {f"s{i}": f"0 patient p{i // 2}" for i in range(401)}


def digest(splits: Mapping[str, str]) -> str:
    text = "".join(f"{slide_id},{side}\n" for slide_id, side in sorted(splits.items()))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@pytest.mark.parametrize(
    ("seed", "carries", "expected"),
    [
        (0, False, "d4419b8059e2ceac"),
        (7, False, "00a8689a76db60aa"),
        (0, True, "244166f7fadc9839"),
        (7, True, "4296bbd516dd68e7"),
    ],
)
def test_the_split_of_a_seed_is_what_it_always_was(seed: int, carries: bool, expected: str) -> None:
    config = CohortConfig(val_fraction=0.13, test_fraction=0.17)
    assert digest(split_patients(STRATA, GROUPS, config, seed, carries=carries)) == expected


@pytest.mark.parametrize(
    ("drawing", "number", "expected"),
    [
        (Drawing(), 0, "44d3fb1c19004d36"),
        (Drawing(seed=7), 19, "5476f4c4d8f44fd7"),
        (Drawing(method="kfold", num=5), 0, "7efd2cb0007506f1"),
        (Drawing(method="kfold", num=5, seed=7), 4, "b8811f5b794ee357"),
    ],
)
def test_the_splits_of_a_study_stay_what_they_are(drawing: Drawing, number: int, expected: str) -> None:
    assert digest(draw_splits(STRATA, GROUPS, drawing, number)) == expected


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"num": 0}, "--num 0: expected 1 to 1000"),
        ({"num": 1001}, "--num 1001: expected 1 to 1000"),
        ({"num": 1, "method": "kfold"}, "--num 1: expected 2 to 1000"),
        ({"val_fraction": -0.1}, r"--val-fraction -0.1: expected \[0, 1\)"),
        ({"val_fraction": float("nan")}, "--val-fraction nan: expected"),
        ({"test_fraction": 0}, r"--test-fraction 0: expected \(0, 1\)"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "--val-fraction and --test-fraction are 1 together"),
        ({"val_fraction": 0.5, "num": 2, "method": "kfold"}, "--val-fraction 0.5 with --num 2 folds: expected below"),
        ({"seed": -1}, "--seed -1: expected"),
    ],
)
def test_numbers_without_sense_are_refused(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainerError, match=message):
        Drawing(**numbers)


def test_rare_columns_and_all_sizes_of_numbers_reach_every_split() -> None:
    """Eight slides of eighty are a yes in the rare column: split by chance alone, a side would often have none."""
    many = {f"s{i}": (float(i % 2), float(i % 10 == 0)) for i in range(80)}
    numbers = {f"s{i}": (i**2 * 1.0,) for i in range(80)}
    one_each = {slide_id: slide_id for slide_id in many}
    for seed in range(5):
        strata = strata_of(many, "multilabel", ())
        splits = split_patients(strata, one_each, QUARTERS, seed, carries=True)
        assert Counter(splits[s] for s, targets in many.items() if targets[1]) == {"train": 4, "val": 2, "test": 2}
        splits = split_patients(strata_of(numbers, "regression", ()), one_each, QUARTERS, seed, carries=True)
        for side, size in (("train", 40), ("val", 20), ("test", 20)):
            values = [numbers[s][0] for s in numbers if splits[s] == side]
            assert len(values) == size
            assert sum(value > 40**2 for value in values) == pytest.approx(size / 2, abs=1)


def test_many_small_strata_get_their_shares_together() -> None:
    strata = {f"s{i}": str(i) for i in range(20)}
    splits = split_patients(strata, {s: s for s in strata}, QUARTERS, 0, carries=True)
    assert Counter(splits.values()) == {"train": 10, "val": 5, "test": 5}
    alone = split_patients(strata, {s: s for s in strata}, QUARTERS, 0)
    assert Counter(alone.values()) == {"train": 20}, "a class with one patient trains"
