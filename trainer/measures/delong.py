"""The variance of an AUC, and whether two models' AUCs on the same slides differ, by DeLong's method.

Source: DeLong, DeLong and Clarke-Pearson, Comparing the areas under two or more correlated receiver operating
characteristic curves: a nonparametric approach, Biometrics 1988; by midranks, in n log n, as Sun and Xu, Fast
implementation of DeLong's algorithm, IEEE Signal Processing Letters 2014. One thing to know before changing it: the
method takes slides for independent. Where patients have several, ask it of patients (pooled scores), not of slides.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm, rankdata

from trainer.measures.statistics import Floats, Interval, auc, checked, has_auc


class Components(NamedTuple):
    """DeLong's structural components: what each slide contributes. The mean of either is the AUC."""

    positives: Floats
    """V10: the share of negatives that score below this positive, ties counting half, (m,)."""
    negatives: Floats
    """V01: the share of positives that score above this negative, likewise, (n,)."""


class Difference(NamedTuple):
    """The AUC of one model less that of another, on the same slides."""

    difference: float
    se: float
    interval: Interval
    p: float
    """Two-sided; NaN where the difference has no variance but is not 0."""


def components(labels: ArrayLike, scores: ArrayLike) -> Components:
    """The structural components, in the order of the slides.

    Args:
        labels: 0 or 1, (n,).
        scores: higher means more likely 1, (n,).

    Raises:
        ValueError: as `statistics.auc`; or one class only, or a score that is NaN.
    """
    labels_n, scores_n = checked(labels, scores)
    if not has_auc(labels_n, scores_n):
        raise ValueError("one class only, or a score that is NaN: expected both classes and numbers")
    rank_n, positives, negatives = rankdata(scores_n), scores_n[labels_n], scores_n[~labels_n]
    below = rank_n[labels_n] - rankdata(positives)
    not_above = rank_n[~labels_n] - rankdata(negatives)
    return Components(below / len(negatives), 1 - not_above / len(positives))


def delong_variance(labels: ArrayLike, scores: ArrayLike) -> float:
    """Variance of the AUC; NaN where `auc` is NaN, or a class has one slide.

    Args:
        labels: 0 or 1, (n,).
        scores: higher means more likely 1, (n,).
    """
    if math.isnan(auc(labels, scores)):
        return math.nan
    return _variance(components(labels, scores))


def delong_interval(labels: ArrayLike, scores: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """The AUC plus and minus its normal quantiles, cut at 0 and 1; NaN where `delong_variance` is NaN.

    Args:
        labels: 0 or 1, (n,).
        scores: higher means more likely 1, (n,).
        confidence: of the interval, between 0 and 1.
    """
    value, variance = auc(labels, scores), delong_variance(labels, scores)
    low, high = norm.interval(confidence, loc=value, scale=math.sqrt(variance)) if variance else (value, value)
    return Interval(float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1)))


def delong_test(labels: ArrayLike, scores: ArrayLike, others: ArrayLike, *, confidence: float = 0.95) -> Difference:
    """Whether two models order the same slides equally well.

    Args:
        labels: 0 or 1, (n,).
        scores: of one model, (n,).
        others: of the other, (n,).
        confidence: of the difference's interval.

    Returns:
        AUC of `scores` less that of `others`; all NaN where either AUC is NaN.
    """
    difference = auc(labels, scores) - auc(labels, others)
    if math.isnan(difference):
        return Difference(math.nan, math.nan, Interval(math.nan, math.nan), math.nan)
    ours, theirs = components(labels, scores), components(labels, others)
    # The variance of the difference is that of the components' differences: exactly 0 for equal orders.
    gap = Components(ours.positives - theirs.positives, ours.negatives - theirs.negatives)
    se = math.sqrt(_variance(gap))
    if se > 0:
        low, high = norm.interval(confidence, loc=difference, scale=se)
        p = float(2 * norm.sf(abs(difference) / se))
    else:
        # Equal orders: nothing speaks for a difference. A class of one slide, or a difference without variance: NaN.
        low, high = (difference, difference) if se == 0 else (math.nan, math.nan)
        p = 1.0 if se == difference == 0 else math.nan
    return Difference(difference, se, Interval(float(low), float(high)), p)


def _variance(parts: Components) -> float:
    if min(map(len, parts)) < 2:
        return math.nan
    return float(sum(part.var(ddof=1) / len(part) for part in parts))
