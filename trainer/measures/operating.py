"""A score above which a slide is called positive: how it is chosen, and what calling by it is worth.

Pure arithmetic. One thing to know before changing it: a threshold that is chosen on the slides it is reported on looks
better than it is. `choose_threshold` is for validation slides, `measure_calls` for others.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest

from trainer.measures.statistics import Interval, checked, has_auc


@dataclass(frozen=True)
class Rule:
    """How a threshold is found: given as a number, or chosen on other slides."""

    text: str
    """As it was written."""
    kind: str
    """number, youden, sensitivity or specificity."""
    value: float = math.nan
    """The threshold itself, or the sensitivity or specificity wanted."""

    @property
    def is_chosen(self) -> bool:
        """Other slides choose it."""
        return self.kind != "number"

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `0.5`, `youden`, `sensitivity=0.95` or `specificity=0.95`.

        Raises:
            ValueError: none of these.
        """
        name, is_wanted, number = text.partition("=")
        if text == "youden":
            return cls(text, text)
        kind = name if is_wanted else "number"
        try:
            value = float(number if is_wanted else text)
        except ValueError:
            value = math.nan
        if kind not in ("number", "sensitivity", "specificity") or not 0 <= value <= 1 or (is_wanted and value == 0):
            raise ValueError("expected a number from 0 to 1, youden, sensitivity=S or specificity=S (above 0, up to 1)")
        return cls(text, kind, value)


class Share(NamedTuple):
    """`num` of `total`, with Wilson's interval; all but these NaN where there are none in all."""

    num: int
    total: int
    value: float
    interval: Interval


class Calls(NamedTuple):
    """What calling positive from a threshold on is worth."""

    sensitivity: Share
    specificity: Share
    ppv: Share
    npv: Share


def choose_threshold(rule: Rule, labels: ArrayLike, scores: ArrayLike) -> float:
    """The threshold of a rule on these slides; a slide is called positive if its score is at or above it.

    Candidates lie halfway between neighbouring scores (as in pROC, Robin et al. 2011), and at both ends. Of equal ones
    the rule takes the one that finds more positives (youden; Youden, Index for rating diagnostic tests, Cancer 1950),
    the highest that is sensitive enough, or the lowest that is specific enough.

    Args:
        rule: what is wanted.
        labels: 0 or 1, (n,), of slides that are not those to be reported on.
        scores: higher means more likely 1, (n,).

    Returns:
        The threshold; NaN where one class is missing, or a score is.
    """
    if not rule.is_chosen:
        return rule.value
    labels_n, scores_n = checked(labels, scores)
    if not has_auc(labels_n, scores_n):
        return math.nan
    level, level_n = np.unique(scores_n, return_inverse=True)
    between = (level[1:] + level[:-1]) / 2
    # A half between neighbouring floats is one of them: the upper one, lest the lower be called positive.
    between = np.where(between > level[:-1], between, level[1:])
    candidates = np.concatenate([level[:1], between, np.nextafter(level[-1:], np.inf)])
    below = np.concatenate([[0.0], np.cumsum(np.bincount(level_n, ~labels_n))])
    missed = np.concatenate([[0.0], np.cumsum(np.bincount(level_n, labels_n))])
    # Counts are compared, not shares: 19 of 20 is a sensitivity of 0.95, whatever the last bit says.
    num_positive, num_negative = labels_n.sum(), (~labels_n).sum()
    if rule.kind == "youden":
        index = below * num_positive - missed * num_negative
        return float(candidates[np.argmax(index)])
    if rule.kind == "sensitivity":
        most_missed = num_positive - math.ceil(rule.value * num_positive - 1e-9)
        return float(candidates[np.flatnonzero(missed <= most_missed)[-1]])
    least_below = math.ceil(rule.value * num_negative - 1e-9)
    return float(candidates[np.flatnonzero(below >= least_below)[0]])


def measure_calls(labels: ArrayLike, scores: ArrayLike, threshold: float, *, confidence: float = 0.95) -> Calls:
    """Sensitivity, specificity, and predictive values among these slides, as common as positives are here.

    Args:
        labels: 0 or 1, (n,).
        scores: (n,).
        threshold: a slide is called positive if its score is at or above it.
        confidence: of the intervals; they take slides for independent.
    """
    labels_n, scores_n = checked(labels, scores)
    called_n = scores_n >= threshold
    true_pos, true_neg = int((called_n & labels_n).sum()), int((~called_n & ~labels_n).sum())
    num_positive, num_called = int(labels_n.sum()), int(called_n.sum())
    num_negative, num_not_called = len(labels_n) - num_positive, len(labels_n) - num_called
    return Calls(
        sensitivity=share(true_pos, num_positive, confidence=confidence),
        specificity=share(true_neg, num_negative, confidence=confidence),
        ppv=share(true_pos, num_called, confidence=confidence),
        npv=share(true_neg, num_not_called, confidence=confidence),
    )


def share(num: int, total: int, *, confidence: float = 0.95) -> Share:
    """A proportion with its score interval.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    if not total:
        return Share(num, total, math.nan, Interval(math.nan, math.nan))
    found = binomtest(num, total).proportion_ci(confidence, method="wilson")
    return Share(num, total, num / total, Interval(float(found.low), float(found.high)))
