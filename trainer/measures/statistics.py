"""Area under the ROC curve with an interval: how well scores order slides, and how sure one may be of it.

Pure arithmetic on labels and scores; knows no slide, run or picture. One thing to know before changing it: the interval
of the AUC and the band of the ROC come from the same replicates (`replicates`), so that report and result never
disagree. What is drawn is said by `resampling`: slides, or patients where `clusters` names them.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score, roc_curve

from trainer.measures.resampling import NUM_REPLICATES, Counts, draw_counts, percentiles, tails

Floats = NDArray[np.float64]
T = TypeVar("T")


class Interval(NamedTuple):
    """A confidence interval; both ends NaN where it is not defined."""

    low: float
    high: float


class RocBand(NamedTuple):
    """A ROC curve on a grid: true-positive rate, and its interval at each false-positive rate, all of one length."""

    fpr: Floats
    tpr: Floats
    low: Floats
    high: Floats


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """The chance that a positive scores higher than a negative, ties counting half (Mann-Whitney U by midranks).

    Source: Hanley and McNeil, The meaning and use of the area under a ROC curve, Radiology 1982.

    Args:
        labels: 0 or 1, (n,).
        scores: higher means more likely 1, (n,).

    Returns:
        0 to 1; NaN if only one class is there, or if a score is NaN (a model that diverged).

    Raises:
        ValueError: labels other than 0 and 1, or not as many scores as labels.
    """
    labels_n, scores_n = checked(labels, scores)
    if not has_auc(labels_n, scores_n):
        return float("nan")
    # By order alone, as scikit-learn takes no infinite score.
    return float(roc_auc_score(labels_n, np.unique(scores_n, return_inverse=True)[1]))


def bootstrap_auc(
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of the AUC by stratified bootstrap: positives and negatives are drawn apart.

    Source: Carpenter and Bithell, Bootstrap confidence intervals, Statistics in Medicine 2000; stratified and with
    2,000 replicates as in pROC (Robin et al., BMC Bioinformatics 2011). Classes that no score confuses give [1, 1]:
    a bootstrap cannot see beyond its sample.

    Args:
        labels: 0 or 1, (n,).
        scores: higher means more likely 1, (n,).
        clusters: the patient of each slide, (n,), where patients are to be drawn (`resampling.draw_counts`).
        num_replicates: bootstrap replicates.
        seed: equal seeds give equal intervals.
        confidence: share of replicates inside, 0 to 1.

    Returns:
        The interval; NaN where `auc` is NaN, or where too few patients make it so in many replicates.

    Raises:
        ValueError: as `auc`; or a confidence that is not between 0 and 1, or no replicates.
    """
    labels_n, scores_n = checked(labels, scores)
    tails(num_replicates, confidence)
    if not has_auc(labels_n, scores_n):
        return Interval(float("nan"), float("nan"))
    drawn = replicates(labels_n, scores_n, num_replicates, seed, clusters)
    return Interval(*percentiles(np.concatenate([auc_of_counts(p, n) for p, n in drawn]), confidence))


def roc_band(
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
    confidence: float = 0.95,
    num_points: int = 1001,
) -> RocBand:
    """The ROC curve, with a pointwise interval of the true-positive rate from the replicates of `bootstrap_auc`.

    Source: vertical averaging in Fawcett, An introduction to ROC analysis, Pattern Recognition Letters 2006.

    Args:
        labels: 0 or 1, (n,).
        scores: higher means more likely 1, (n,).
        clusters: as in `bootstrap_auc`.
        num_replicates: bootstrap replicates.
        seed: as in `bootstrap_auc`.
        confidence: share of replicates inside, at each false-positive rate.
        num_points: grid points from 0 to 1, both ends included.

    Returns:
        The curve; all but `fpr` is NaN where `auc` is NaN. Where the curve is vertical, its upper end.

    Raises:
        ValueError: as `bootstrap_auc`.
    """
    labels_n, scores_n = checked(labels, scores)
    ends = tails(num_replicates, confidence)
    grid = np.linspace(0.0, 1.0, num_points)
    if not has_auc(labels_n, scores_n):
        return RocBand(grid, *(np.full(num_points, np.nan) for _ in range(3)))
    order = np.unique(scores_n, return_inverse=True)[1]
    fpr, tpr, _ = roc_curve(labels_n, order, drop_intermediate=False)
    curves = [
        np.interp(grid, np.append(0.0, f), np.append(0.0, t))
        for positives, negatives in replicates(labels_n, scores_n, num_replicates, seed, clusters)
        for f, t in zip(_rates(negatives), _rates(positives), strict=True)
        if np.isfinite(f[-1] + t[-1])  # Both classes were drawn.
    ]
    low, high = np.quantile(np.stack(curves), ends, axis=0)
    return RocBand(grid, np.interp(grid, fpr, tpr), low, high)


def macro_auc(labels: ArrayLike, probs: ArrayLike) -> float:
    """One-versus-rest AUC, each class counting the same, over the classes that occur.

    Source: one-versus-rest as in Fawcett, An introduction to ROC analysis, 2006, without weights by class size.

    Args:
        labels: class indices, (n,).
        probs: class probabilities, (n, num_classes); two classes give the AUC of class 1.

    Returns:
        0 to 1; NaN if only one class is there.

    Raises:
        ValueError: a label that has no column.
    """
    labels_n, probs_nc = np.asarray(labels), np.asarray(probs, np.float64)
    if probs_nc.ndim != 2 or len(probs_nc) != len(labels_n):
        raise ValueError(f"probs of shape {probs_nc.shape}, expected ({len(labels_n)}, num_classes)")
    num_classes = probs_nc.shape[1]
    if len(labels_n) and not (labels_n.min() >= 0 and labels_n.max() < num_classes):
        raise ValueError(f"labels {labels_n.min()} to {labels_n.max()}, expected 0 to {num_classes - 1}")
    if num_classes == 2:
        return auc(labels_n, probs_nc[:, 1])
    present = np.unique(labels_n)
    return float(np.mean([auc(labels_n == c, probs_nc[:, c]) for c in present])) if len(present) > 1 else float("nan")


def by_column(measure: Callable[[Floats, Floats], T], truth: ArrayLike, found: ArrayLike) -> list[T]:
    """A measure of each column over the slides whose truth is known.

    Args:
        measure: of (n,) and (n,).
        truth: (n, num_columns), NaN where it is not known.
        found: scores or predictions, (n, num_columns).
    """
    columns = zip(np.asarray(truth, np.float64).T, np.asarray(found, np.float64).T, strict=True)
    return [measure(truth_n[~np.isnan(truth_n)], found_n[~np.isnan(truth_n)]) for truth_n, found_n in columns]


def mean_known(values: ArrayLike) -> float:
    """The mean of what is not NaN; NaN without any."""
    values_n = np.asarray(values, np.float64)
    return float(np.nanmean(values_n)) if not np.isnan(values_n).all() else float("nan")


def checked(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], Floats]:
    """Labels, (n,), and scores, (n,), as arrays; ValueError as `auc`."""
    labels_n, scores_n = np.asarray(labels), np.asarray(scores, np.float64)
    if labels_n.ndim != 1 or labels_n.shape != scores_n.shape:
        raise ValueError(f"labels of shape {labels_n.shape} and scores of shape {scores_n.shape}, expected (n,) both")
    if not np.isin(labels_n, (0, 1)).all():
        raise ValueError(f"labels {np.unique(labels_n)[:5].tolist()}, expected 0 and 1")
    return labels_n.astype(bool), scores_n


def has_auc(labels_n: NDArray[np.bool_], scores_n: Floats) -> bool:
    """Both classes are there, and all scores are numbers."""
    return bool(labels_n.any() and not labels_n.all() and not np.isnan(scores_n).any())


def replicates(
    labels_n: NDArray[np.bool_], scores_n: Floats, num_replicates: int, seed: int, clusters: ArrayLike | None = None
) -> Iterator[tuple[Counts, Counts]]:
    """Bootstrap replicates as counts per distinct score, highest score first, in chunks. No replicate is sorted.

    Yields:
        Counts of positives and of negatives, each (replicates in the chunk, distinct scores).
    """
    levels = Levels.of(labels_n, scores_n)
    for counts_rn in draw_counts(labels_n, num_replicates=num_replicates, seed=seed, clusters=clusters):
        yield levels.gather(counts_rn)


class Levels(NamedTuple):
    """The slides in the order of their scores, highest first, and where each distinct score begins."""

    order_n: NDArray[np.int64]
    starts: NDArray[np.int64]
    is_positive_n: NDArray[np.bool_]
    """In that order."""

    @classmethod
    def of(cls, labels_n: NDArray[np.bool_], scores_n: Floats) -> "Levels":
        """Of labels and scores, (n,) each."""
        order_n = np.argsort(-scores_n, kind="stable")
        sorted_n = scores_n[order_n]
        starts = np.flatnonzero(np.append(True, sorted_n[1:] != sorted_n[:-1]))
        return cls(order_n, starts, labels_n[order_n])

    def gather(self, counts_rn: Counts) -> tuple[Counts, Counts]:
        """From counts of slides to counts of positives and of negatives at each distinct score."""
        sorted_rn = counts_rn[:, self.order_n]
        positives_rn = sorted_rn * self.is_positive_n
        negatives_rn = sorted_rn - positives_rn
        if len(self.starts) == len(self.order_n):
            return positives_rn, negatives_rn
        return np.add.reduceat(positives_rn, self.starts, axis=1), np.add.reduceat(negatives_rn, self.starts, axis=1)


def auc_of_counts(positives: Counts, negatives: Counts) -> Floats:
    """AUC of each row: negatives below each positive, and half of those level with it; NaN without one of the two."""
    num_negatives = negatives.sum(1, keepdims=True)
    below = num_negatives - np.cumsum(negatives, axis=1) + negatives / 2
    num_pairs = positives.sum(1) * num_negatives[:, 0]
    return np.asarray((positives * below).sum(1) / np.where(num_pairs > 0, num_pairs, np.nan), np.float64)


def _rates(counts: Counts) -> Floats:
    """Share of each row's slides at or above each score."""
    totals = counts.sum(1, keepdims=True)
    return np.asarray(np.cumsum(counts, axis=1) / np.where(totals > 0, totals, np.nan), np.float64)
