"""Average precision, its interval and the precision-recall curve, against scikit-learn and `statistics`."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from sklearn.metrics import average_precision_score, precision_recall_curve

from trainer.measures.ranking import average_precision, precision_band, rank
from trainer.measures.statistics import auc, bootstrap_auc


@st.composite
def two_classes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    labels = [0, 1, *draw(st.lists(st.integers(0, 1), max_size=30))]
    return np.array(labels), np.array(draw(st.lists(st.integers(-3, 3), min_size=len(labels), max_size=len(labels))))


@settings(max_examples=50)
@given(two_classes())
def test_as_scikit_learn_has_it(case: tuple[np.ndarray, np.ndarray]) -> None:
    labels, scores = case
    found, curve = rank(labels, scores, num_replicates=20), precision_band(labels, scores, num_replicates=20)
    assert found.average_precision == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert average_precision(labels, np.where(scores == 3, np.inf, scores)) == found.average_precision
    precision, recall, _ = precision_recall_curve(labels, scores)
    for x, y in zip(curve.recall[1:], curve.precision[1:], strict=True):
        first = np.flatnonzero(recall >= x - 1e-12)[-1]  # From high recall to low: the highest score that has so much.
        assert y == pytest.approx(precision[first])


def test_replicates_have_the_average_precision_of_the_slides_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, scores = np.array([0, 1, 1, 0, 1]), np.array([3.0, 3.0, 2.0, 2.0, 1.0])
    counts = np.array([[1, 1, 1, 1, 1], [0, 3, 0, 2, 0], [2, 0, 0, 0, 3]])
    monkeypatch.setattr("trainer.measures.statistics.draw_counts", lambda *_, **__: iter([counts]))
    drawn = [np.repeat(np.arange(5), row) for row in counts]
    expected = [average_precision_score(labels[rows], scores[rows]) for rows in drawn]
    found = rank(labels, scores, num_replicates=3, confidence=1 - 1e-9)
    assert found.average_precision_interval == pytest.approx((min(expected), max(expected)), abs=1e-6)


def test_the_interval_of_the_auc_is_that_of_the_result() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 25)
    scores, clusters = rng.normal(labels), np.arange(50) // 2
    assert rank(labels, scores).auc == auc(labels, scores)
    assert rank(labels, scores).auc_interval == bootstrap_auc(labels, scores)
    assert rank(labels, scores, clusters=clusters).auc_interval == bootstrap_auc(labels, scores, clusters=clusters)


def test_intervals_and_band_hold_the_estimate() -> None:
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], [60, 20])
    scores = rng.normal(labels * 1.2)
    found, curve = rank(labels, scores), precision_band(labels, scores)
    low, high = found.average_precision_interval
    assert 0 < low < found.average_precision < high < 1
    assert (curve.low <= curve.high).all()
    assert np.mean((curve.low <= curve.precision) & (curve.precision <= curve.high)) > 0.95


def test_one_class_has_none() -> None:
    found = rank([1, 1], [0.1, 0.2])
    assert np.isnan([found.auc, found.average_precision, *found.auc_interval, *found.average_precision_interval]).all()
    with pytest.raises(ValueError, match="one class only"):
        precision_band([1, 1], [0.1, 0.2])
