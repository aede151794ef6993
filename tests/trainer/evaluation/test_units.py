"""Slides pooled into specimens and patients: predictions, truths, and what differs."""

import math

import numpy as np
import pytest

from trainer.cohort import Case, Cohort
from trainer.evaluation.units import Pool, Units, at_level, levels_of, units_of
from trainer.targets import Targets, Task

Row = tuple[str, str, Targets, list[float]]
"""patient, specimen, targets, predictions."""


def levels(rows: list[Row], task: Task, names: tuple[str, ...], pool: Pool = "mean") -> dict[str, Units]:
    cases, scores = [], {}
    for i, (patient, specimen, targets, found) in enumerate(rows):
        ids = {"specimen_id": specimen, "patient_id": patient}
        cases.append(Case(slide_id=f"s{i}", targets=targets, split="test", num_tiles=1, **ids))
        scores[f"s{i}"] = np.array(found)
    is_class = task == "classes"
    cohort = Cohort(tuple(cases), names if is_class else (), task=task, columns=("label",) if is_class else names)
    slides = units_of(scores, cohort, "test")
    return {units.level: units for units in levels_of(slides, cohort.of("test"), pool)}


TWO: list[Row] = [
    ("b", "1", (0.0,), [0.9, 0.1]),
    ("a", "1", (1.0,), [0.4, 0.6]),
    ("b", "2", (1.0,), [0.2, 0.8]),
    ("b", "1", (0.0,), [0.7, 0.3]),
]


def test_two_classes_take_the_higher_and_the_mean() -> None:
    found = levels(TWO, "classes", ("0", "1"))
    assert list(found) == ["slides", "specimens", "patients"]
    specimens, patients = found["specimens"], found["patients"]
    assert specimens.patients == ("a", "b", "b"), "specimen 1 of a is not specimen 1 of b"
    assert specimens.found_NC[:, 1] == pytest.approx([0.6, 0.2, 0.8])
    assert specimens.labels_N.tolist() == [1, 0, 1]
    assert specimens.num_differing == 0
    assert patients.ids == patients.patients == ("a", "b")
    assert patients.found_NC == pytest.approx(np.array([[0.4, 0.6], [0.6, 0.4]]))
    assert patients.labels_N.tolist() == [1, 1], "one positive slide makes a positive patient"
    assert (patients.num_differing, patients.num_left_out) == (1, 0)
    assert patients.clusters() is None
    assert specimens.clusters().tolist() == [0, 1, 1]  # type: ignore[union-attr]


def test_the_maximum_is_that_of_the_higher_class() -> None:
    patients = levels(TWO, "classes", ("0", "1"), "max")["patients"]
    assert patients.found_NC == pytest.approx(np.array([[0.4, 0.6], [0.2, 0.8]]))


def test_more_classes_have_no_truth_where_they_differ() -> None:
    rows: list[Row] = [
        ("a", "a", (0.0,), [0.8, 0.1, 0.1]),
        ("a", "a", (2.0,), [0.1, 0.1, 0.8]),
        ("b", "b", (1.0,), [0.2, 0.6, 0.2]),
        ("b", "b", (1.0,), [0.5, 0.3, 0.2]),
    ]
    for pool, expected in (("mean", [0.35, 0.45, 0.2]), ("max", [5 / 13, 6 / 13, 2 / 13])):
        patients = levels(rows, "classes", ("x", "y", "z"), pool)["patients"]  # type: ignore[arg-type]
        assert patients.ids == ("b",)
        assert (patients.num_differing, patients.num_left_out) == (1, 1)
        assert patients.found_NC[0] == pytest.approx(expected)


def test_columns_are_a_yes_where_one_is_and_unknown_where_all_are() -> None:
    rows: list[Row] = [
        ("a", "a", (0.0, math.nan), [0.2, 0.4]),
        ("a", "a", (1.0, math.nan), [0.6, 0.8]),
        ("b", "b", (math.nan, 0.0), [0.1, 0.1]),
        ("b", "b", (0.0, 0.0), [0.3, 0.5]),
    ]
    patients = levels(rows, "multilabel", ("er", "pr"))["patients"]
    assert np.array_equal(patients.truth_NT, [[1, np.nan], [0, 0]], equal_nan=True)
    assert patients.found_NC == pytest.approx(np.array([[0.4, 0.6], [0.2, 0.3]]))
    assert patients.num_differing == 1


@pytest.mark.parametrize(("pool", "truth"), [("mean", 20.0), ("max", 30.0)])
def test_numbers_are_pooled_as_their_predictions_are(pool: Pool, truth: float) -> None:
    rows: list[Row] = [
        ("a", "a", (10.0,), [11.0]),
        ("a", "a", (30.0,), [25.0]),
        ("a", "a", (math.nan,), [3.0]),
        ("b", "b", (5.0,), [6.0]),
    ]
    patients = levels(rows, "regression", ("hrd",), pool)["patients"]
    assert patients.truth_NT[:, 0].tolist() == [truth, 5.0]
    assert patients.found_NC[:, 0].tolist() == [13.0 if pool == "mean" else 25.0, 6.0]


def test_where_all_have_one_slide_there_are_slides_alone() -> None:
    rows: list[Row] = [("a", "1", (0.0,), [0.9, 0.1]), ("b", "2", (1.0,), [0.2, 0.8])]
    assert list(levels(rows, "classes", ("0", "1"))) == ["slides"]


def test_validation_can_be_pooled_where_nothing_is_to_pool() -> None:
    cohort = Cohort(
        (Case(slide_id="s", targets=(1.0,), specimen_id="x", patient_id="p", split="val", num_tiles=1),), ("0", "1")
    )
    slides = units_of({"s": np.array([0.3, 0.7])}, cohort, "val")
    pooled = at_level(slides, cohort.of("val"), "patients", "mean")
    assert (pooled.level, pooled.ids) == ("patients", ("p",))
    assert len(units_of({}, cohort, "val").ids) == 0
