"""Area under the ROC curve with an interval: how well scores order slides, and how sure one may be of it.

Pure arithmetic on labels and scores; knows no slide, run or picture. One thing to know before changing it: the interval
of the AUC and the band of the ROC come from the same replicates (`_replicates`), so that report and result never
disagree. Slides are the unit that is drawn: where patients have several slides, the interval is too narrow.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score, roc_curve

Floats = NDArray[np.float64]
T = TypeVar("T")
_COUNTS_PER_CHUNK = 4_000_000
"""Replicates are drawn in chunks of this many counts, 32 MB a table."""


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
    labels_n, scores_n = _checked(labels, scores)
    if not _has_auc(labels_n, scores_n):
        return float("nan")
    # By order alone, as scikit-learn takes no infinite score.
    return float(roc_auc_score(labels_n, np.unique(scores_n, return_inverse=True)[1]))


def bootstrap_auc(
    labels: ArrayLike, scores: ArrayLike, *, num_replicates: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Percentile interval of the AUC by stratified bootstrap: positives and negatives are drawn apart.

    Source: Carpenter and Bithell, Bootstrap confidence intervals, Statistics in Medicine 2000; stratified and with
    2,000 replicates as in pROC (Robin et al., BMC Bioinformatics 2011). Classes that no score confuses give [1, 1]:
    a bootstrap cannot see beyond its sample.

    Args:
        labels: 0 or 1, (n,).
        scores: higher means more likely 1, (n,).
        num_replicates: bootstrap replicates.
        seed: equal seeds give equal intervals.
        confidence: share of replicates inside, 0 to 1.

    Returns:
        The interval; NaN where `auc` is NaN.

    Raises:
        ValueError: as `auc`; or a confidence that is not between 0 and 1, or no replicates.
    """
    labels_n, scores_n = _checked(labels, scores)
    tails = _tails(num_replicates, confidence)
    if not _has_auc(labels_n, scores_n):
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(
        np.concatenate([_auc_of_counts(p, n) for p, n in _replicates(labels_n, scores_n, num_replicates, seed)]), tails
    )
    return Interval(float(low), float(high))


def roc_band(
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    num_replicates: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
    num_points: int = 1001,
) -> RocBand:
    """The ROC curve, with a pointwise interval of the true-positive rate from the replicates of `bootstrap_auc`.

    Source: vertical averaging in Fawcett, An introduction to ROC analysis, Pattern Recognition Letters 2006.

    Args:
        labels: 0 or 1, (n,).
        scores: higher means more likely 1, (n,).
        num_replicates: bootstrap replicates.
        seed: as in `bootstrap_auc`.
        confidence: share of replicates inside, at each false-positive rate.
        num_points: grid points from 0 to 1, both ends included.

    Returns:
        The curve; all but `fpr` is NaN where `auc` is NaN. Where the curve is vertical, its upper end.

    Raises:
        ValueError: as `bootstrap_auc`.
    """
    labels_n, scores_n = _checked(labels, scores)
    tails = _tails(num_replicates, confidence)
    grid = np.linspace(0.0, 1.0, num_points)
    if not _has_auc(labels_n, scores_n):
        return RocBand(grid, *(np.full(num_points, np.nan) for _ in range(3)))
    order = np.unique(scores_n, return_inverse=True)[1]
    fpr, tpr, _ = roc_curve(labels_n, order, drop_intermediate=False)
    curves = [
        np.interp(grid, np.append(0.0, f), np.append(0.0, t))
        for positives, negatives in _replicates(labels_n, scores_n, num_replicates, seed)
        for f, t in zip(_rates(negatives), _rates(positives), strict=True)
    ]
    low, high = np.quantile(np.stack(curves), tails, axis=0)
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


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], Floats]:
    labels_n, scores_n = np.asarray(labels), np.asarray(scores, np.float64)
    if labels_n.ndim != 1 or labels_n.shape != scores_n.shape:
        raise ValueError(f"labels of shape {labels_n.shape} and scores of shape {scores_n.shape}, expected (n,) both")
    if not np.isin(labels_n, (0, 1)).all():
        raise ValueError(f"labels {np.unique(labels_n)[:5].tolist()}, expected 0 and 1")
    return labels_n.astype(bool), scores_n


def _has_auc(labels_n: NDArray[np.bool_], scores_n: Floats) -> bool:
    return bool(labels_n.any() and not labels_n.all() and not np.isnan(scores_n).any())


def _tails(num_replicates: int, confidence: float) -> tuple[float, float]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}, expected between 0 and 1")
    if num_replicates < 1:
        raise ValueError(f"num_replicates {num_replicates}, expected 1 or more")
    return (1 - confidence) / 2, (1 + confidence) / 2


def _replicates(
    labels_n: NDArray[np.bool_], scores_n: Floats, num_replicates: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Bootstrap replicates as counts per distinct score, highest score first, in chunks.

    To draw n slides with replacement is to draw a multinomial of how often each score occurs. No replicate is sorted.

    Yields:
        Counts of positives and of negatives, each (replicates in the chunk, distinct scores).
    """
    level_n = np.unique(-scores_n, return_inverse=True)[1]
    num_levels = int(level_n.max()) + 1
    # A generator for each class: what is drawn does not depend on the size of the chunks.
    rngs = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2)]
    strata = [np.bincount(level_n[mask], minlength=num_levels) for mask in (labels_n, ~labels_n)]
    chunk = max(1, _COUNTS_PER_CHUNK // num_levels)
    for start in range(0, num_replicates, chunk):
        size = min(chunk, num_replicates - start)
        positives, negatives = (
            rng.multinomial(count.sum(), count / count.sum(), size=size)
            for rng, count in zip(rngs, strata, strict=True)
        )
        yield positives, negatives


def _auc_of_counts(positives: NDArray[np.int64], negatives: NDArray[np.int64]) -> Floats:
    """AUC of each row: negatives below each positive, and half of those level with it."""
    num_negatives = negatives.sum(1, keepdims=True)
    below = num_negatives - np.cumsum(negatives, axis=1) + negatives / 2
    return np.asarray((positives * below).sum(1) / (positives.sum(1) * num_negatives[:, 0]), np.float64)


def _rates(counts: NDArray[np.int64]) -> Floats:
    """Share of each row's slides at or above each score."""
    return np.asarray(np.cumsum(counts, axis=1) / counts.sum(1, keepdims=True), np.float64)
