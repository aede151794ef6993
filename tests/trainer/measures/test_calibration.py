"""Calibration against scikit-learn, against the equations that its fits solve, and on probabilities known to be off."""

import math
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from trainer.measures.calibration import brier, calibrate, in_the_large, recalibrate

RNG = np.random.default_rng(0)


def drawn(num: int, intercept: float = 0.0, slope: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and probabilities whose log odds need this slope and intercept to be right."""
    odds = RNG.normal(0, 1.5, num)
    return (RNG.random(num) < expit(intercept + slope * odds)).astype(int), expit(odds)


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1)), min_size=1, max_size=40))
def test_brier_is_scikit_learns(slides: list[tuple[int, float]]) -> None:
    labels, probs = [label for label, _ in slides], [prob for _, prob in slides]
    assert brier(labels, probs) == pytest.approx(brier_score_loss(labels, probs, labels=[0, 1]), abs=1e-12)


@pytest.mark.parametrize(("intercept", "slope"), [(0.0, 1.0), (1.0, 1.0), (-0.5, 0.4)])
def test_logistic_recalibration_finds_what_is_off(intercept: float, slope: float) -> None:
    labels, probs = drawn(20_000, intercept, slope)
    found = recalibrate(labels, probs)
    assert found == pytest.approx((intercept, slope), abs=0.1)
    # The score equations of the fit: residuals add up to nothing, nor do they when weighted by the log odds.
    residual = labels - expit(found[0] + found[1] * logit(probs))
    assert residual.mean() == pytest.approx(0, abs=1e-6)
    assert (residual * logit(probs)).mean() == pytest.approx(0, abs=1e-6)
    shift = in_the_large(labels, probs)
    assert expit(logit(probs) + shift).mean() == pytest.approx(labels.mean(), abs=1e-9)
    if slope == 1:
        assert shift == pytest.approx(intercept, abs=0.1)


def test_reliability_is_scikit_learns_with_equal_mass_bins() -> None:
    labels, probs = drawn(500)
    probs = np.round(probs, 2)  # Ties.
    found = calibrate(labels, probs)
    observed, predicted = calibration_curve(labels, probs, n_bins=10, strategy="quantile")
    assert [bin.observed.value for bin in found.bins] == pytest.approx(observed, abs=1e-12)
    assert [bin.predicted for bin in found.bins] == pytest.approx(predicted, abs=1e-12)
    sizes = np.array([bin.observed.total for bin in found.bins])
    assert sizes.sum() == 500
    assert found.expected_error == pytest.approx((sizes * np.abs(observed - predicted)).sum() / 500)


def test_equal_probabilities_share_a_bin_whatever_the_order_of_the_slides() -> None:
    labels, probs = np.array([1, 0] * 50), np.repeat([0.2, 0.8], 50)
    found = calibrate(labels, probs)
    assert [(bin.low, bin.high, bin.observed.total) for bin in found.bins] == [(0.2, 0.2, 50), (0.8, 0.8, 50)]
    order = RNG.permutation(100)
    again = calibrate(labels[order], probs[order])
    assert [(bin.low, bin.high, bin.observed) for bin in again.bins] == [
        (bin.low, bin.high, bin.observed) for bin in found.bins
    ]
    assert found.expected_error == pytest.approx(0.3)


def test_certain_probabilities_stay_finite() -> None:
    labels = [0, 1, 0, 1, 1, 0]
    found = calibrate(labels, [0.0, 1.0, 1.0, 0.0, 0.7, 0.4])
    assert all(map(math.isfinite, (found.intercept, found.slope, found.in_the_large, found.brier)))


@pytest.mark.parametrize(
    ("labels", "probs", "slope_alone"),
    [
        ([1, 1], [0.2, 0.7], False),
        ([0, 0, 1, 1], [0.1, 0.2, 0.2, 0.9], True),
        ([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5], True),
        ([0, 1], [0.5, float("nan")], False),
    ],
)
def test_what_does_not_exist_is_nan_without_a_warning(labels: list[int], probs: list[float], slope_alone: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(recalibrate(labels, probs)).all()
        assert math.isfinite(in_the_large(labels, probs)) == slope_alone
    empty = calibrate([], [])
    assert np.isnan([empty.brier, empty.expected_error]).all()
    assert empty.bins == []
