"""The arithmetic under a sweep's table and figures: means over splits, paired differences, trends, a fitted curve.

Pure functions of arrays; knows no run and no file. One thing to know before changing it: Monte-Carlo splits share most
of their training slides, so runs over them are not independent. A plain t interval over J splits shrinks with J as if
they were; the corrected one (Nadeau and Bengio) does not go below what the overlap leaves unknown.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from trainer.measures.statistics import Interval

Floats = NDArray[np.float64]
_NONE = Interval(math.nan, math.nan)
_NUM_REPLICATES = 2000
_LEAST_KS = 4
"""Of a curve with three numbers: with fewer points it goes through them all, whatever they are."""


class Spread(NamedTuple):
    """Mean and sample standard deviation over splits; NaN where there are too few."""

    mean: float
    std: float
    num: int


class Difference(NamedTuple):
    """A mean difference over splits that both sides have."""

    mean: float
    corrected: Interval
    """95 %, by the corrected resampled t."""
    p: float
    """Two-sided, by the same."""
    bootstrap: Interval
    """95 %, drawing the splits' differences anew."""
    num: int


class Decay(NamedTuple):
    """A fitted a + b * exp(-c * K)."""

    a: float
    b: float
    c: float

    def at(self, ks: ArrayLike) -> Floats:
        """Its values."""
        return np.asarray(self.a + self.b * np.exp(-self.c * np.asarray(ks, np.float64)), np.float64)


def spread(values: ArrayLike) -> Spread:
    """Mean and standard deviation (divisor n - 1) of what is not NaN."""
    known = _known(values)
    return Spread(
        float(known.mean()) if len(known) else math.nan,
        float(known.std(ddof=1)) if len(known) > 1 else math.nan,
        len(known),
    )


def bootstrap_mean(values: ArrayLike, *, seed: int = 0) -> Interval:
    """95 % percentile interval of the mean, drawing values anew; NaN for fewer than two that are not NaN."""
    known = _known(values)
    if len(known) < 2:
        return _NONE
    found = stats.bootstrap(
        (known,), np.mean, n_resamples=_NUM_REPLICATES, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


def paired_difference(ours: ArrayLike, theirs: ArrayLike, overlap: ArrayLike) -> Difference:
    """How much higher `ours` is than `theirs` over the same splits.

    Source: Nadeau and Bengio, Inference for the generalization error, Machine Learning 2003, section 3 (the corrected
    resampled t-test): the variance of a mean over J splits is taken as (1/J + n_scored/n_train) times the sample
    variance, with J - 1 degrees of freedom. It was derived for random splits, as of Monte-Carlo cross-validation; for
    k folds the same ratio, 1/(k - 1), is customary.

    Args:
        ours: a measure of each split, (J,), NaN where there is none.
        theirs: likewise, of the same splits.
        overlap: slides scored / slides trained on, of each split.
    """
    difference_J = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    is_known = np.isfinite(difference_J)
    known, ratio = difference_J[is_known], np.asarray(overlap, np.float64)[is_known]
    num = len(known)
    if num < 2:
        return Difference(float(known.mean()) if num else math.nan, _NONE, math.nan, _NONE, num)
    mean = float(known.mean())
    error = math.sqrt((1 / num + float(ratio.mean())) * float(known.var(ddof=1)))
    reach = float(stats.t.ppf(0.975, num - 1)) * error
    score = abs(mean) / error if error else math.inf if mean else 0.0  # All alike: same or not.
    p = float(2 * stats.t.sf(score, num - 1))
    return Difference(mean, Interval(mean - reach, mean + reach), p, bootstrap_mean(known), num)


def rank_correlation(xs: ArrayLike, ys: ArrayLike) -> float:
    """Spearman's rho; NaN for fewer than two pairs, or where one side has one value."""
    x, y = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
    is_known = np.isfinite(x) & np.isfinite(y)
    x, y = x[is_known], y[is_known]
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(stats.spearmanr(x, y).statistic)


def mean_curve(curves_JE: Floats, *, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    """The mean of several curves at each position, and a pointwise 95 % band from drawing whole curves anew.

    Args:
        curves_JE: one row a curve, NaN behind the end of a shorter one.
        seed: equal seeds give equal bands.

    Returns:
        Mean, low, high, (E,) each; the band is NaN for one curve, and where a mean is not defined.
    """
    num = len(curves_JE)
    mean_E = _nanmean(curves_JE)
    if num < 2:
        return mean_E, np.full_like(mean_E, np.nan), np.full_like(mean_E, np.nan)
    drawn = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=_NUM_REPLICATES)
    is_known = np.isfinite(curves_JE)
    counts_RE = drawn @ is_known.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        means_RE = (drawn @ np.where(is_known, curves_JE, 0.0)) / counts_RE
    low_E, high_E = _nanquantile(means_RE, 0.025), _nanquantile(means_RE, 0.975)
    return mean_E, low_E, high_E


def fit_decay(ks: ArrayLike, losses: ArrayLike) -> Decay | None:
    """a + b * exp(-c * K) by least squares, as the paper draws through its training losses (Fig. 4).

    Args:
        ks: tiles per slide, (n,), at least four different ones.
        losses: (n,).

    Returns:
        None where there are fewer, or where the data does not settle the curve: it does not converge, c is not above 0,
        or a number's standard error is not finite.
    """
    x, y = np.asarray(ks, np.float64), np.asarray(losses, np.float64)
    is_known = np.isfinite(x) & np.isfinite(y)
    x, y = x[is_known], y[is_known]
    if len(np.unique(x)) < _LEAST_KS or np.ptp(y) == 0:
        return None
    # Start: a straight line through the logarithm of what lies above a floor a little below all.
    floor = y.min() - 0.05 * np.ptp(y)
    slope, height = np.polyfit(x, np.log(y - floor), 1)
    start = (floor, math.exp(height), math.log(max(-slope, 1 / (100 * x.max()))))

    def curve(k: Floats, a: float, b: float, log_c: float) -> Floats:
        return np.asarray(a + b * np.exp(-np.exp(log_c) * k), np.float64)

    with warnings.catch_warnings(), np.errstate(over="ignore"):
        warnings.simplefilter("error", optimize.OptimizeWarning)
        try:
            (a, b, log_c), covariance = optimize.curve_fit(curve, x, y, p0=start, maxfev=20_000)
        except (RuntimeError, ValueError, optimize.OptimizeWarning):
            return None
    c = math.exp(min(log_c, 700))
    # Settled only if it bends within the data: neither a straight line over all K, nor flat behind the first one.
    bends = c * np.ptp(x) > 1e-2 and c * x.min() < 30
    return Decay(float(a), float(b), c) if np.isfinite(covariance).all() and bends else None


def _known(values: ArrayLike) -> Floats:
    array = np.asarray(values, np.float64)
    return np.asarray(array[np.isfinite(array)], np.float64)


def _nanmean(values_JE: Floats) -> Floats:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # A position that no curve reaches.
        return np.asarray(np.nanmean(values_JE, axis=0), np.float64)


def _nanquantile(values_RE: Floats, share: float) -> Floats:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanquantile(values_RE, share, axis=0), np.float64)
