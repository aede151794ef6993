"""Agreement of predicted numbers with true ones: R2 with an interval, mean error, rank correlation.

Pure arithmetic, as `statistics` is for classes. One thing to know before changing it: R2 measures against the mean of
the *scored* slides' truth, so it is comparable between models on the same slides, not between sets of slides.
"""

import warnings

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import DegenerateDataWarning, bootstrap, spearmanr
from sklearn.metrics import mean_absolute_error, r2_score

from trainer.measures.statistics import Floats, Interval

_NUMBERS_PER_BATCH = 4_000_000
"""Replicates are drawn in batches of this many numbers, 32 MB a table."""


def r2(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Share of the variance of the truth that the predictions explain, 1 - SS_residual / SS_total.

    Args:
        truth: numbers, (n,).
        predicted: in the same unit, (n,).

    Returns:
        At most 1, 0 for the mean of the truth itself, below 0 for worse; NaN if all truths are equal (or there are
        fewer than two), or if a prediction is no number.
    """
    truth_n, predicted_n = _numbers(truth, predicted)
    return float(r2_score(truth_n, predicted_n)) if _has_spread(truth_n, predicted_n) else float("nan")


def mean_error(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Mean absolute error, in the unit of the numbers, (n,) both; NaN without any, or if one is no number."""
    truth_n, predicted_n = _numbers(truth, predicted)
    is_defined = len(truth_n) and np.isfinite(predicted_n).all()
    return float(mean_absolute_error(truth_n, predicted_n)) if is_defined else float("nan")


def spearman(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Rank correlation of (n,) and (n,), -1 to 1; NaN if either has one value only, or if one is no number."""
    truth_n, predicted_n = _numbers(truth, predicted)
    is_defined = _has_spread(truth_n, predicted_n) and np.ptp(predicted_n) > 0
    return float(spearmanr(truth_n, predicted_n).statistic) if is_defined else float("nan")


def bootstrap_r2(
    truth: ArrayLike, predicted: ArrayLike, *, num_replicates: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Percentile interval of `r2` by drawing slides with replacement.

    Args:
        truth: numbers, (n,).
        predicted: in the same unit, (n,).
        num_replicates: bootstrap replicates.
        seed: equal seeds give equal intervals.
        confidence: share of replicates inside, 0 to 1.

    Returns:
        The interval; NaN where `r2` is NaN, or where it is in a replicate: then there are too few slides.
    """
    truth_n, predicted_n = _numbers(truth, predicted)
    if not _has_spread(truth_n, predicted_n):
        return Interval(float("nan"), float("nan"))

    def of_rows(truth_rn: Floats, predicted_rn: Floats, axis: int) -> Floats:
        residual = ((truth_rn - predicted_rn) ** 2).sum(axis)
        total = ((truth_rn - truth_rn.mean(axis, keepdims=True)) ** 2).sum(axis)
        return np.asarray(1 - residual / np.where(np.ptp(truth_rn, axis) > 0, total, np.nan), np.float64)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # NaN says it.
        found = bootstrap(
            (truth_n, predicted_n),
            of_rows,
            paired=True,
            vectorized=True,
            n_resamples=num_replicates,
            batch=max(1, _NUMBERS_PER_BATCH // len(truth_n)),
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return Interval(float(found.low), float(found.high))


def _numbers(truth: ArrayLike, predicted: ArrayLike) -> tuple[Floats, Floats]:
    truth_n, predicted_n = np.asarray(truth, np.float64), np.asarray(predicted, np.float64)
    if truth_n.ndim != 1 or truth_n.shape != predicted_n.shape:
        raise ValueError(f"truth of shape {truth_n.shape}, predictions of {predicted_n.shape}, expected (n,) both")
    return truth_n, predicted_n


def _has_spread(truth_n: Floats, predicted_n: Floats) -> bool:
    return bool(len(truth_n) and np.ptp(truth_n) > 0 and np.isfinite(predicted_n).all())
