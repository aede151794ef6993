"""Average precision beside the AUC, and the precision-recall curve, with intervals.

Pure arithmetic. One thing to know before changing it: everything here comes from the replicates that
`statistics.bootstrap_auc` draws, so that a `Ranking` has the interval of the AUC that `result.json` has.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import average_precision_score

from trainer.measures.resampling import NUM_REPLICATES, Counts, percentiles, tails
from trainer.measures.statistics import Floats, Interval, Levels, auc, auc_of_counts, checked, has_auc, replicates

_NOT_DEFINED = Interval(math.nan, math.nan)


class PrecisionBand(NamedTuple):
    """A precision-recall curve on a grid: precision, and its interval at each recall, all of one length."""

    recall: Floats
    precision: Floats
    low: Floats
    high: Floats


class Ranking(NamedTuple):
    """How well scores order slides; NaN where the AUC is not defined."""

    auc: float
    auc_interval: Interval
    average_precision: float
    average_precision_interval: Interval


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """Mean precision over the positives, each at its own score: the area below the precision-recall steps.

    Source: `average_precision_score` of scikit-learn; without interpolation, which promises too much (Davis and
    Goadrich, The relationship between precision-recall and ROC curves, 2006).

    Args:
        labels: 0 or 1, (n,).
        scores: higher means more likely 1, (n,).

    Returns:
        0 to 1; NaN where `auc` is NaN.
    """
    labels_n, scores_n = checked(labels, scores)
    if not has_auc(labels_n, scores_n):
        return math.nan
    # By order alone, as scikit-learn takes no infinite score.
    return float(average_precision_score(labels_n, np.unique(scores_n, return_inverse=True)[1]))


def rank(
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
    confidence: float = 0.95,
) -> Ranking:
    """AUC and average precision with percentile intervals.

    Args:
        labels: 0 or 1, (n,).
        scores: higher means more likely 1, (n,).
        clusters: the patient of each slide, (n,), where patients are to be drawn (`resampling.draw_counts`).
        num_replicates: bootstrap replicates.
        seed: equal seeds give equal intervals.
        confidence: share of replicates inside, 0 to 1.

    Raises:
        ValueError: as `statistics.bootstrap_auc`.
    """
    labels_n, scores_n = checked(labels, scores)
    tails(num_replicates, confidence)
    if not has_auc(labels_n, scores_n):
        return Ranking(math.nan, _NOT_DEFINED, math.nan, _NOT_DEFINED)
    aucs, means = [], []
    for positives, negatives in replicates(labels_n, scores_n, num_replicates, seed, clusters):
        recall_rl, precision_rl = _precision(positives, negatives)
        aucs.append(auc_of_counts(positives, negatives))
        means.append((np.diff(recall_rl, axis=1, prepend=0) * precision_rl).sum(1))
    return Ranking(
        auc(labels_n, scores_n),
        Interval(*percentiles(np.concatenate(aucs), confidence)),
        average_precision(labels_n, scores_n),
        Interval(*percentiles(np.concatenate(means), confidence)),
    )


def precision_band(
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
    confidence: float = 0.95,
    num_points: int = 501,
) -> PrecisionBand:
    """The precision-recall curve, with a pointwise interval of the precision from the replicates of `rank`.

    Args:
        labels: 0 or 1, (n,), both of them.
        scores: higher means more likely 1, (n,).
        clusters: as in `rank`.
        num_replicates: bootstrap replicates.
        seed: as in `rank`.
        confidence: share of replicates inside, at each recall.
        num_points: grid points from recall 0 to 1, both ends included.

    Raises:
        ValueError: as `rank`; or one class only, or a score that is NaN.
    """
    labels_n, scores_n = checked(labels, scores)
    ends = tails(num_replicates, confidence)
    if not has_auc(labels_n, scores_n):
        raise ValueError("one class only, or a score that is NaN: expected both classes and numbers")
    grid = np.linspace(0.0, 1.0, num_points)
    curves = [
        _at_recall(grid, recall_l, precision_l)
        for positives, negatives in replicates(labels_n, scores_n, num_replicates, seed, clusters)
        for recall_l, precision_l in zip(*_precision(positives, negatives), strict=True)
        if np.isfinite(recall_l[-1])
    ]
    whole = np.ones((1, len(labels_n)), np.int64)
    (recall_l,), (precision_l,) = _precision(*Levels.of(labels_n, scores_n).gather(whole))
    low, high = np.quantile(np.stack(curves), ends, axis=0)
    return PrecisionBand(grid, _at_recall(grid, recall_l, precision_l), low, high)


def _precision(positives: Counts, negatives: Counts) -> tuple[Floats, Floats]:
    """Recall and precision of each row at each distinct score; recall is NaN in a row without positives."""
    found, called = np.cumsum(positives, axis=1), np.cumsum(positives + negatives, axis=1)
    num_positives = found[:, -1:]
    recall = found / np.where(num_positives > 0, num_positives, np.nan)
    return recall, np.where(called > 0, found / np.maximum(called, 1), 1.0)


def _at_recall(grid: Floats, recall_l: Floats, precision_l: Floats) -> Floats:
    """Precision at the highest score that has at least each recall of the grid."""
    # Above 0 the first score of equal recall; at 0 the first that finds a positive.
    first = np.searchsorted(recall_l, np.maximum(grid, np.nextafter(0, 1)) - 1e-12 * (grid > 0))
    return np.asarray(precision_l[np.minimum(first, len(recall_l) - 1)], np.float64)
