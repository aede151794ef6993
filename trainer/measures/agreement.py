"""Agreement of predicted numbers with true ones: R2, mean error, rank correlation, with intervals.

Pure arithmetic, as `statistics` is for classes. One thing to know before changing it: R2 measures against the mean of
the *scored* slides' truth, so it is comparable between models on the same slides, not between sets of slides.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import spearmanr
from sklearn.metrics import mean_absolute_error, r2_score

from trainer.measures.resampling import NUM_REPLICATES, Counts, draw_counts, tails
from trainer.measures.statistics import Floats, Interval


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
    truth: ArrayLike,
    predicted: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of `r2` by drawing slides, or patients, with replacement: as `bootstrap_agreement` has it."""
    drawn = bootstrap_agreement(
        truth, predicted, clusters=clusters, num_replicates=num_replicates, seed=seed, confidence=confidence
    )
    return drawn["r2"]


def bootstrap_agreement(
    truth: ArrayLike,
    predicted: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Interval]:
    """Percentile intervals of `r2`, `mae` and `spearman`, from the same replicates.

    Args:
        truth: numbers, (n,).
        predicted: in the same unit, (n,).
        clusters: the patient of each slide, (n,), where patients are to be drawn (`resampling.draw_counts`).
        num_replicates: bootstrap replicates.
        seed: equal seeds give equal intervals.
        confidence: share of replicates inside, 0 to 1.

    Returns:
        The intervals; NaN where the measure is NaN, or where it is in a replicate: then there are too few slides.
    """
    truth_n, predicted_n = _numbers(truth, predicted)
    tails(num_replicates, confidence)
    if not _has_spread(truth_n, predicted_n):
        return dict.fromkeys(("r2", "mae", "spearman"), Interval(float("nan"), float("nan")))
    values = replicate_agreement(truth_n, predicted_n, clusters, num_replicates, seed)
    ends = tails(num_replicates, confidence)
    return {name: Interval(*map(float, np.quantile(value_r, ends))) for name, value_r in values.items()}


def replicate_agreement(
    truth_n: Floats,
    predicted_n: Floats,
    clusters: ArrayLike | None = None,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
) -> dict[str, Floats]:
    """`r2`, `mae` and `spearman` in each replicate, (replicates,); NaN where a replicate has one value only."""
    error_n, centred_n = truth_n - predicted_n, truth_n - truth_n.mean()
    ranks = _Ranks.of(truth_n), _Ranks.of(predicted_n)
    found: dict[str, list[Floats]] = {"r2": [], "mae": [], "spearman": []}
    strata = np.zeros(len(truth_n), np.int64)
    for counts_rn in draw_counts(strata, num_replicates=num_replicates, seed=seed, clusters=clusters):
        num_r = counts_rn.sum(1)
        has_spread = _spread(counts_rn, truth_n) > 0
        total_r = counts_rn @ centred_n**2 - (counts_rn @ centred_n) ** 2 / num_r
        found["r2"].append(1 - counts_rn @ error_n**2 / np.where(has_spread, total_r, np.nan))
        found["mae"].append(counts_rn @ np.abs(error_n) / num_r)
        has_both = has_spread & (_spread(counts_rn, predicted_n) > 0)
        correlation = _correlation(counts_rn, *(rank.gather(counts_rn) for rank in ranks))
        found["spearman"].append(np.where(has_both, correlation, np.nan))
    return {name: np.concatenate(parts) for name, parts in found.items()}


class _Ranks(NamedTuple):
    """The order of numbers, lowest first, and which distinct number each is."""

    order_n: NDArray[np.int64]
    starts: NDArray[np.int64]
    level_n: NDArray[np.int64]

    @classmethod
    def of(cls, values_n: Floats) -> "_Ranks":
        order_n = np.argsort(values_n, kind="stable")
        sorted_n = values_n[order_n]
        starts = np.flatnonzero(np.append(True, sorted_n[1:] != sorted_n[:-1]))
        return cls(order_n, starts, np.unique(values_n, return_inverse=True)[1])

    def gather(self, counts_rn: Counts) -> Floats:
        """The midrank of each slide in each replicate, (r, n), from 0."""
        counts_rl = np.add.reduceat(counts_rn[:, self.order_n], self.starts, axis=1)
        return np.asarray((np.cumsum(counts_rl, axis=1) - counts_rl / 2)[:, self.level_n], np.float64)


def _correlation(counts_rn: Counts, x_rn: Floats, y_rn: Floats) -> Floats:
    """Pearson's correlation of each row, each slide as often as it counts."""
    num_r1 = counts_rn.sum(1, keepdims=True)
    for values_rn in (x_rn, y_rn):
        values_rn -= (counts_rn * values_rn).sum(1, keepdims=True) / num_r1
    together, of_x, of_y = ((counts_rn * a * b).sum(1) for a, b in ((x_rn, y_rn), (x_rn, x_rn), (y_rn, y_rn)))
    size = np.sqrt(of_x * of_y)
    return np.asarray(together / np.where(size > 0, size, np.nan), np.float64)


def _spread(counts_rn: Counts, values_n: Floats) -> Floats:
    """Highest less lowest of the values that count in each row."""
    is_drawn = counts_rn > 0
    return np.asarray(
        np.where(is_drawn, values_n, -np.inf).max(1) - np.where(is_drawn, values_n, np.inf).min(1), np.float64
    )


def _numbers(truth: ArrayLike, predicted: ArrayLike) -> tuple[Floats, Floats]:
    truth_n, predicted_n = np.asarray(truth, np.float64), np.asarray(predicted, np.float64)
    if truth_n.ndim != 1 or truth_n.shape != predicted_n.shape:
        raise ValueError(f"truth of shape {truth_n.shape}, predictions of {predicted_n.shape}, expected (n,) both")
    return truth_n, predicted_n


def _has_spread(truth_n: Floats, predicted_n: Floats) -> bool:
    return bool(len(truth_n) and np.ptp(truth_n) > 0 and np.isfinite(predicted_n).all())
