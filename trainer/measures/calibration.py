"""Whether probabilities are what they say: of slides with 0.3, three in ten are positive.

Pure arithmetic. One thing to know before changing it: order and calibration are different things, a model can be
perfect in one and useless in the other. Training on balanced classes alone shifts the intercept.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from trainer.measures.operating import Share, share
from trainer.measures.statistics import Floats, checked

NUM_BINS = 10
_NEAREST = 1e-7
"""Probabilities nearer to 0 or 1 than this have no usable log odds; float32 tells no more from 1."""


class Bin(NamedTuple):
    """Slides of like probability."""

    low: float
    high: float
    """The lowest and the highest probability in it."""
    predicted: float
    """Their mean."""
    observed: Share
    """How many are positive."""


class Calibration(NamedTuple):
    """What `calibrate` finds."""

    brier: float
    intercept: float
    slope: float
    in_the_large: float
    expected_error: float
    bins: list[Bin]


def brier(labels: ArrayLike, probs: ArrayLike) -> float:
    """Mean squared error of the probabilities, 0 to 1, lower is better; a guess of 0.5 has 0.25. NaN without slides.

    Source: Brier, Verification of forecasts expressed in terms of probability, 1950, halved for two classes as usual.

    Args:
        labels: 0 or 1, (n,).
        probs: of 1, (n,).
    """
    labels_n, probs_n = checked(labels, probs)
    return float(np.mean((probs_n - labels_n) ** 2)) if len(labels_n) else math.nan


def recalibrate(labels: ArrayLike, probs: ArrayLike) -> tuple[float, float]:
    """Intercept and slope of logistic recalibration, logit P(1) = intercept + slope * logit(prob); 0 and 1 are perfect.

    A slope below 1 says that probabilities are too extreme. Source: Cox, Two further applications of a model for
    binary regression, Biometrika 1958.

    Args:
        labels: 0 or 1, (n,).
        probs: of 1, (n,); taken for 1e-7 off 0 and 1 where they are nearer.

    Returns:
        Both; NaN where they do not exist: one class only, or classes that the probabilities separate wholly.
    """
    labels_n, odds_n = _log_odds(labels, probs)
    positives, negatives = odds_n[labels_n], odds_n[~labels_n]
    if not (len(positives) and len(negatives)):
        return math.nan, math.nan
    is_apart = positives.min() >= negatives.max() or negatives.min() >= positives.max()
    if is_apart or np.isnan(odds_n).any():
        return math.nan, math.nan
    scale = float(odds_n.std())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of a step that was not needed, at the end.
        model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10, max_iter=1000)
        model.fit(odds_n[:, None] / scale, labels_n)
    return float(model.intercept_[0]), float(model.coef_[0, 0] / scale)


def in_the_large(labels: ArrayLike, probs: ArrayLike) -> float:
    """The intercept that makes the mean probability right, with a slope of 1; above 0 if probabilities are too low.

    Source: "calibration-in-the-large" of Van Calster et al., Calibration: the Achilles heel of predictive analytics,
    BMC Medicine 2019.

    Args:
        labels: 0 or 1, (n,).
        probs: of 1, (n,); as in `recalibrate`.

    Returns:
        NaN with one class only.
    """
    labels_n, odds_n = _log_odds(labels, probs)
    if labels_n.all() or not labels_n.any() or np.isnan(odds_n).any():
        return math.nan
    rate, bound = labels_n.mean(), float(np.abs(odds_n).max()) + 50
    return float(brentq(lambda shift: expit(odds_n + shift).mean() - rate, -bound, bound, xtol=1e-12))


def calibrate(labels: ArrayLike, probs: ArrayLike, *, num_bins: int = NUM_BINS) -> Calibration:
    """All measures of calibration, and the reliability table.

    The expected calibration error is the mean distance of observed share and mean probability over bins that hold
    equally many slides (Naeini, Cooper and Hauskrecht, Obtaining well calibrated probabilities using Bayesian binning,
    AAAI 2015, with equal-mass bins as Nixon et al., Measuring calibration in deep learning, 2019, advise). Equal
    probabilities share a bin, so there may be fewer bins.

    Args:
        labels: 0 or 1, (n,).
        probs: of 1, (n,).
        num_bins: at most.
    """
    labels_n, probs_n = checked(labels, probs)
    bins = _bins(labels_n.astype(np.int64), probs_n, num_bins)
    error = sum(bin.observed.total * abs(bin.observed.value - bin.predicted) for bin in bins)
    intercept, slope = recalibrate(labels_n, probs_n)
    return Calibration(
        brier=brier(labels_n, probs_n),
        intercept=intercept,
        slope=slope,
        in_the_large=in_the_large(labels_n, probs_n),
        expected_error=error / len(labels_n) if bins else math.nan,
        bins=bins,
    )


def _bins(labels_n: NDArray[np.int64], probs_n: Floats, num_bins: int) -> list[Bin]:
    if not len(labels_n) or np.isnan(probs_n).any():
        return []
    edges = np.quantile(probs_n, np.linspace(0, 1, num_bins + 1))
    bin_n = np.searchsorted(edges[1:-1], probs_n)
    found = []
    for i in np.unique(bin_n):
        inside, truth = probs_n[bin_n == i], labels_n[bin_n == i]
        observed = share(int(truth.sum()), len(truth))
        found.append(Bin(float(inside.min()), float(inside.max()), float(inside.mean()), observed))
    return found


def _log_odds(labels: ArrayLike, probs: ArrayLike) -> tuple[NDArray[np.bool_], Floats]:
    labels_n, probs_n = checked(labels, probs)
    return labels_n, np.asarray(logit(np.clip(probs_n, _NEAREST, 1 - _NEAREST)), np.float64)
