"""What a split's predictions are worth, by task, as the loop chooses by it and `result.json` tells it."""

import json

import numpy as np
import pytest

from trainer.measures.agreement import bootstrap_r2
from trainer.measures.merits import find_merit, measure_all, rank_of
from trainer.measures.statistics import auc, bootstrap_auc, macro_auc

RNG = np.random.default_rng(0)
LABELS = np.repeat([0.0, 1.0], 10)[:, None]
PROBS = np.stack([1 - (p := RNG.random(20) * 0.6 + LABELS[:, 0] * 0.4), p], axis=1)


def test_two_classes_have_an_auc_and_its_interval() -> None:
    found = measure_all("classes", ("benign", "tumour"), LABELS, PROBS)
    assert found["auc"] == round(auc(LABELS[:, 0], PROBS[:, 1]), 4)
    assert found["auc_ci"] == [round(end, 4) for end in bootstrap_auc(LABELS[:, 0], PROBS[:, 1])]
    assert found["num_per_class"] == [10, 10]
    assert find_merit("classes", LABELS, PROBS) == ("auc", auc(LABELS[:, 0], PROBS[:, 1]))


def test_more_classes_have_the_mean_over_them() -> None:
    labels, probs = RNG.integers(0, 3, 30), RNG.dirichlet(np.ones(3), 30)
    found = measure_all("classes", ("a", "b", "c"), labels[:, None].astype(float), probs)
    assert found["auc"] == round(macro_auc(labels, probs), 4)
    low, high = found["auc_ci"]
    assert 0 < low < found["auc"] < high < 1


def test_patients_with_several_slides_are_what_is_drawn() -> None:
    """Both slides of a patient are alike: half as much is known as if they were patients of their own."""
    truth, probs = np.repeat(LABELS, 2, axis=0), np.repeat(PROBS, 2, axis=0)
    alone = measure_all("classes", ("0", "1"), truth, probs)
    shared = measure_all("classes", ("0", "1"), truth, probs, [f"p{i // 2}" for i in range(40)])
    once = measure_all("classes", ("0", "1"), LABELS, PROBS, [f"p{i}" for i in range(20)])
    assert [found["ci_by"] for found in (alone, shared, once)] == ["slides", "patients", "slides"]
    assert shared["auc_ci"] == pytest.approx(once["auc_ci"], abs=0.02)
    assert shared["auc_ci"][0] < alone["auc_ci"][0] - 0.01


def test_columns_have_the_mean_of_those_defined_over_the_slides_that_are_known() -> None:
    truth = np.concatenate([LABELS, np.ones_like(LABELS), LABELS], axis=1)
    truth[3:8, 2] = np.nan
    probs = RNG.random((20, 3))
    first, third = (
        auc(truth[:, 0], probs[:, 0]),
        auc(np.delete(truth[:, 2], range(3, 8)), np.delete(probs[:, 2], range(3, 8))),
    )
    found = measure_all("multilabel", ("er", "pr", "her2"), truth, probs)
    assert found["auc_by_column"] == {"er": round(first, 4), "pr": None, "her2": round(third, 4)}
    assert find_merit("multilabel", truth, probs) == ("auc", pytest.approx((first + third) / 2))
    assert found["num_by_column"] == {"er": [10, 10], "pr": [0, 20], "her2": [5, 10]}
    assert found["auc_ci_by_column"]["pr"] == [None, None]
    assert found["auc_ci"] == [None, None], "no interval for a mean over columns"
    json.dumps(found, allow_nan=False)


def test_one_column_has_the_interval_of_two_classes() -> None:
    found = measure_all("multilabel", ("er",), LABELS, PROBS[:, 1:])
    classes = measure_all("classes", ("0", "1"), LABELS, PROBS)
    assert (found["auc"], found["auc_ci"]) == (classes["auc"], classes["auc_ci"])


def test_numbers_have_r2_error_and_rank_correlation() -> None:
    truth = np.stack([np.arange(20.0), np.full(20, 7.0)], axis=1)
    truth[0, 0] = np.nan
    predicted = truth + 0.5
    predicted[0, 0] = 1e9
    found = measure_all("regression", ("hrd", "ki67"), truth, predicted)
    assert found["auc"] is None
    assert found["r2_by_column"]["ki67"] is None
    assert found["r2"] == found["r2_by_column"]["hrd"] == round(1 - 19 * 0.25 / (19 * 30), 4), "one column is defined"
    assert found["mae_by_column"] == {"hrd": 0.5, "ki67": 0.5}
    assert found["spearman"] == 1
    assert found["num_by_column"] == {"hrd": 19, "ki67": 20}
    json.dumps(found, allow_nan=False)
    alone = measure_all("regression", ("hrd",), truth[1:, :1], predicted[1:, :1])
    assert alone["r2_ci"] == [round(end, 4) for end in bootstrap_r2(truth[1:, 0], predicted[1:, 0])]


@pytest.mark.parametrize(("task", "num"), [("classes", 2), ("multilabel", 3), ("regression", 3)])
def test_without_slides_nothing_is_defined(task: str, num: int) -> None:
    truth = np.empty((0, 1 if task == "classes" else num))
    name, merit = find_merit(task, truth, np.empty((0, num)))  # type: ignore[arg-type]
    assert name == ("r2" if task == "regression" else "auc")
    assert np.isnan(merit)
    json.dumps(measure_all(task, ("a", "b", "c")[:num], truth, np.empty((0, num))), allow_nan=False)  # type: ignore[arg-type]


def test_a_small_error_keeps_its_digits() -> None:
    truth = np.arange(5.0)[:, None] * 1e-6
    assert measure_all("regression", ("x",), truth, truth + 1.2345e-7)["mae"] == pytest.approx(1.234e-7, rel=1e-3)


def test_merit_decides_then_the_loss_and_what_is_not_defined_comes_last() -> None:
    order = [(None, None), (None, -0.9), (None, -0.1), (-3.0, None), (0.5, -0.8), (0.5, -0.2), (0.6, -0.9)]
    assert sorted(order, key=rank_of) == order
    assert rank_of(order[0]) == rank_of((None, None))
