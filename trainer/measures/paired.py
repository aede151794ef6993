"""Two models on the same slides: the difference of what they are worth, with a paired bootstrap interval.

Pure arithmetic. One thing to know before changing it: both models are measured on the same draw of slides. Intervals of
each alone overlap long before the difference stops being sure.
"""

import numpy as np
from numpy.typing import ArrayLike

from trainer.measures.agreement import replicate_agreement
from trainer.measures.multiclass import mean_of_rows, replicate_one_versus_rest
from trainer.measures.resampling import NUM_REPLICATES, draw_counts, percentiles
from trainer.measures.statistics import Interval, Levels, auc, auc_of_counts, checked


def paired_auc(
    labels: ArrayLike,
    scores: ArrayLike,
    others: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of the AUC of `scores` less that of `others`, stratified by class.

    Args:
        labels: 0 or 1, (n,).
        scores: of one model, (n,).
        others: of the other, (n,).
        clusters: the patient of each slide, (n,), where patients are to be drawn (`resampling.draw_counts`).
        num_replicates: bootstrap replicates.
        seed: equal seeds give equal intervals.
        confidence: share of replicates inside, 0 to 1.

    Returns:
        The interval; NaN where either AUC is.
    """
    if np.isnan(auc(labels, scores) - auc(labels, others)):
        return Interval(float("nan"), float("nan"))
    labels_n, scores_n = checked(labels, scores)
    ours, theirs = Levels.of(labels_n, scores_n), Levels.of(labels_n, np.asarray(others, np.float64))
    differences = [
        auc_of_counts(*ours.gather(counts_rn)) - auc_of_counts(*theirs.gather(counts_rn))
        for counts_rn in draw_counts(labels_n, num_replicates=num_replicates, seed=seed, clusters=clusters)
    ]
    return Interval(*percentiles(np.concatenate(differences), confidence))


def paired_macro_auc(
    labels: ArrayLike,
    probs: ArrayLike,
    others: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """As `paired_auc` of the one-versus-rest mean over the classes that occur; probabilities are (n, C)."""
    labels_n = np.asarray(labels, np.int64)
    classes = np.unique(labels_n).tolist()
    if len(classes) < 2:
        return Interval(float("nan"), float("nan"))
    ours, theirs = (
        mean_of_rows(replicate_one_versus_rest(labels_n, found_nc, classes, clusters, num_replicates, seed))
        for found_nc in (np.asarray(probs, np.float64), np.asarray(others, np.float64))
    )
    return Interval(*percentiles(ours - theirs, confidence))


def paired_r2(
    truth: ArrayLike,
    predicted: ArrayLike,
    others: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """As `paired_auc` of R2, for numbers (n,), not stratified; NaN where truths are all equal."""
    truth_n = np.asarray(truth, np.float64)
    if not len(truth_n) or not np.ptp(truth_n) > 0:
        return Interval(float("nan"), float("nan"))
    ours, theirs = (
        replicate_agreement(truth_n, np.asarray(found, np.float64), clusters, num_replicates, seed)["r2"]
        for found in (predicted, others)
    )
    return Interval(*percentiles(ours - theirs, confidence))
