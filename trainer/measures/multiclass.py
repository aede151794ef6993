"""More than two classes: each against the rest, and which class is taken for which.

Pure arithmetic on class positions and probabilities; the mean AUC itself is `statistics.macro_auc`. One thing to know
before changing it: classes that do not occur count nowhere, neither as right nor as wrong.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import confusion_matrix

from trainer.measures.resampling import NUM_REPLICATES, draw_counts, percentiles, tails
from trainer.measures.statistics import Floats, Interval, Levels, auc, auc_of_counts, mean_known


class OneVersusRest(NamedTuple):
    """AUC of each class against the rest, and their mean; NaN for classes that do not occur."""

    macro: float
    macro_interval: Interval
    by_class: list[float]
    by_class_intervals: list[Interval]


def one_versus_rest(
    labels: ArrayLike,
    probs: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
    confidence: float = 0.95,
) -> OneVersusRest:
    """AUCs with percentile intervals by a bootstrap that is stratified by all classes.

    Args:
        labels: class positions, (n,).
        probs: class probabilities, (n, C), C from 2.
        clusters: the patient of each slide, (n,), where patients are to be drawn (`resampling.draw_counts`).
        num_replicates: bootstrap replicates.
        seed: equal seeds give equal intervals.
        confidence: share of replicates inside, 0 to 1.
    """
    labels_n, probs_nc = np.asarray(labels, np.int64), np.asarray(probs, np.float64)
    tails(num_replicates, confidence)
    values = [auc(labels_n == c, probs_nc[:, c]) for c in range(probs_nc.shape[1])]
    nowhere = Interval(math.nan, math.nan)
    known = [c for c, value in enumerate(values) if not math.isnan(value)]
    if not known:
        return OneVersusRest(math.nan, nowhere, values, [nowhere] * len(values))
    drawn = replicate_one_versus_rest(labels_n, probs_nc, known, clusters, num_replicates, seed)
    intervals = [nowhere] * len(values)
    for c, aucs_r in zip(known, drawn.T, strict=True):
        intervals[c] = Interval(*percentiles(aucs_r, confidence))
    return OneVersusRest(mean_known(values), Interval(*percentiles(mean_of_rows(drawn), confidence)), values, intervals)


def replicate_one_versus_rest(
    labels_n: NDArray[np.int64],
    probs_nc: Floats,
    classes: list[int],
    clusters: ArrayLike | None = None,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
) -> Floats:
    """AUC of these classes in each replicate, (replicates, len(classes)); NaN where a replicate has none of a class."""
    levels = [Levels.of(labels_n == c, probs_nc[:, c]) for c in classes]
    chunks = [
        np.stack([auc_of_counts(*level.gather(counts_rn)) for level in levels], axis=1)
        for counts_rn in draw_counts(labels_n, num_replicates=num_replicates, seed=seed, clusters=clusters)
    ]
    return np.concatenate(chunks)


def mean_of_rows(values_rc: Floats) -> Floats:
    """The mean of what is known in each row; NaN where nothing is."""
    is_known = ~np.isnan(values_rc)
    num_known = is_known.sum(1)
    return np.asarray(np.where(is_known, values_rc, 0).sum(1) / np.where(num_known > 0, num_known, np.nan), np.float64)


def confusion(labels: ArrayLike, probs: ArrayLike) -> NDArray[np.int64]:
    """Slides by true class (rows) and most probable class (columns), (C, C); the first of equally probable ones.

    Args:
        labels: class positions, (n,).
        probs: class probabilities, (n, C).
    """
    labels_n, probs_nc = np.asarray(labels, np.int64), np.asarray(probs, np.float64)
    num_classes = probs_nc.shape[1]
    if not len(labels_n):
        return np.zeros((num_classes, num_classes), np.int64)
    counts = confusion_matrix(labels_n, probs_nc.argmax(1), labels=np.arange(num_classes))
    return np.asarray(counts, np.int64)


def balanced_accuracy(counts_cc: NDArray[np.int64]) -> float:
    """The mean over the classes that occur of the share of their slides that are taken for what they are.

    Args:
        counts_cc: as `confusion` gives it.

    Returns:
        0 to 1; NaN without slides.
    """
    totals = counts_cc.sum(1)
    return mean_known(np.diag(counts_cc)[totals > 0] / totals[totals > 0]) if totals.any() else math.nan


def multiclass_brier(labels: ArrayLike, probs: ArrayLike) -> float:
    """Squared error of the probabilities, summed over classes, mean over slides: 0 to 2, lower is better.

    Source: Brier, Verification of forecasts expressed in terms of probability, 1950. NaN without slides.

    Args:
        labels: class positions, (n,).
        probs: class probabilities, (n, C).
    """
    labels_n, probs_nc = np.asarray(labels, np.int64), np.asarray(probs, np.float64)
    true_nc = np.eye(probs_nc.shape[1])[labels_n]
    return float(((probs_nc - true_nc) ** 2).sum(1).mean()) if len(labels_n) else math.nan
