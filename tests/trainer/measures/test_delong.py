"""DeLong's variance and paired test, against the definition pair by pair, a published example and a case by hand."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from scipy.stats import norm

from trainer.measures.delong import components, delong_interval, delong_test, delong_variance
from trainer.measures.statistics import auc

# Hanley and McNeil, Radiology 1982, Table I: 58 normal and 51 abnormal CT images, rated from 1 to 5.
CT_LABELS = np.repeat([0, 1], [58, 51])
CT_RATINGS = np.concatenate(
    [np.repeat([1, 2, 3, 4, 5], [33, 6, 6, 11, 2]), np.repeat([1, 2, 3, 4, 5], [3, 2, 2, 11, 33])]
)


@st.composite
def two_models(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, at least two of each class, and scores of two models with many ties."""
    labels = [0, 1, 0, 1, *draw(st.lists(st.integers(0, 1), max_size=25))]
    scores = [draw(st.lists(st.integers(-3, 3), min_size=len(labels), max_size=len(labels))) for _ in range(2)]
    return np.array(labels), *(np.array(one, float) for one in scores)


def by_definition(labels: np.ndarray, models: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """AUCs and their covariances, with the kernel 1, 1/2, 0 over all pairs, as DeLong et al. write it."""
    positives, negatives = labels == 1, labels == 0
    kernel = np.stack([np.sign(s[positives][:, None] - s[negatives]) / 2 + 0.5 for s in models])  # (models, m, n)
    theta = kernel.mean((1, 2))
    v10, v01 = kernel.mean(2), kernel.mean(1)
    s10 = sum(np.outer(a - theta, a - theta) for a in v10.T) / (positives.sum() - 1)
    s01 = sum(np.outer(a - theta, a - theta) for a in v01.T) / (negatives.sum() - 1)
    return theta, s10 / positives.sum() + s01 / negatives.sum()


@given(two_models())
def test_midranks_give_the_definition(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    labels, scores, others = case
    theta, covariance = by_definition(labels, [scores, others])
    parts = components(labels, scores)
    assert parts.positives.mean() == pytest.approx(theta[0], abs=1e-12)
    assert parts.negatives.mean() == pytest.approx(theta[0], abs=1e-12)
    assert delong_variance(labels, scores) == pytest.approx(covariance[0, 0], abs=1e-12)
    found = delong_test(labels, scores, others)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert found.difference == pytest.approx(theta[0] - theta[1], abs=1e-12)
    assert found.se**2 == pytest.approx(variance, abs=1e-12)
    if found.se > 1e-6:
        assert found.p == pytest.approx(2 * norm.sf(abs(theta[0] - theta[1]) / math.sqrt(variance)), abs=1e-6)


def test_the_ratings_of_hanley_and_mcneil() -> None:
    """Stata's manual (roctab) has area 0.8932, standard error 0.0307, interval 0.83295 to 0.95339."""
    assert auc(CT_LABELS, CT_RATINGS) == pytest.approx(0.8932, abs=5e-5)
    assert math.sqrt(delong_variance(CT_LABELS, CT_RATINGS)) == pytest.approx(0.0307, abs=5e-5)
    assert delong_interval(CT_LABELS, CT_RATINGS) == pytest.approx((0.83295, 0.95339), abs=5e-6)


def test_by_hand() -> None:
    # Positives 3, 1 against negatives 2, 0: V10 = 1, 1/2; V01 = 1/2, 1; each has variance 1/8, over 2 slides.
    assert delong_variance([1, 1, 0, 0], [3, 1, 2, 0]) == pytest.approx(1 / 8)


def test_the_test_is_symmetric_and_sees_order_alone() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 40)
    scores, others = rng.normal(labels * 1.5), rng.normal(labels * 0.5)
    one, other = delong_test(labels, scores, others), delong_test(labels, others, np.exp(scores))
    assert one.difference == pytest.approx(-other.difference)
    assert one.p == pytest.approx(other.p)
    assert one.interval.low == pytest.approx(-other.interval.high)
    assert one.p < 0.01
    assert one.interval.low > 0


def test_equal_orders_do_not_differ_and_perfect_ones_have_no_variance() -> None:
    labels, scores = [0, 1, 0, 1, 1], [1.0, 2, 3, 4, 5]
    same = delong_test(labels, scores, np.exp(scores))
    assert (same.difference, same.se, same.p) == (0, 0, 1)
    assert delong_interval([0, 0, 1, 1], [1, 2, 3, 4]) == (1, 1)
    parted = delong_test([0, 0, 1, 1], [1, 2, 3, 4], [7, 7, 7, 7])
    assert parted.difference == 0.5
    assert math.isnan(parted.p), "no variance, but a difference"


@pytest.mark.parametrize(
    ("labels", "scores"), [([1, 1], [0.1, 0.2]), ([0, 1], [0.1, np.nan]), ([0, 1, 1], [0.1, 0.2, 0.3])]
)
def test_without_two_of_each_class_there_is_none(labels: list[int], scores: list[float]) -> None:
    assert math.isnan(delong_variance(labels, scores))
    assert np.isnan(delong_interval(labels, scores)).all()
    found = delong_test(labels, scores, [1.0] * len(labels))
    assert math.isnan(found.p)
    assert np.isnan(found.interval).all()
