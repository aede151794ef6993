"""Each class against the rest, confusion and the like, against scikit-learn and a plain bootstrap."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from trainer.measures.multiclass import balanced_accuracy, confusion, multiclass_brier, one_versus_rest
from trainer.measures.statistics import macro_auc

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 90)
PROBS = RNG.dirichlet(np.ones(3), 90) * 0.7 + 0.3 * np.eye(3)[LABELS]
TIED = np.round(PROBS, 1)


@pytest.mark.parametrize("probs", [PROBS, TIED])
def test_aucs_are_scikit_learns(probs: np.ndarray) -> None:
    found = one_versus_rest(LABELS, probs, num_replicates=50)
    expected = [roc_auc_score(c == LABELS, probs[:, c]) for c in range(3)]
    assert found.by_class == pytest.approx(expected, abs=1e-12)
    assert found.macro == pytest.approx(np.mean(expected), abs=1e-12) == macro_auc(LABELS, probs)
    assert found.macro_interval.low < found.macro < found.macro_interval.high


def test_replicates_have_the_aucs_of_the_slides_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = RNG.multinomial(90, np.full(90, 1 / 90), size=4)
    monkeypatch.setattr("trainer.measures.multiclass.draw_counts", lambda *_, **__: iter([counts]))
    drawn = [np.repeat(np.arange(90), row) for row in counts]
    found = one_versus_rest(LABELS, TIED, confidence=1 - 1e-9)
    macro = [macro_auc(LABELS[rows], TIED[rows]) for rows in drawn]
    assert found.macro_interval == pytest.approx((min(macro), max(macro)), abs=1e-6)
    first = [roc_auc_score(LABELS[rows] == 0, TIED[rows, 0]) for rows in drawn]
    assert found.by_class_intervals[0] == pytest.approx((min(first), max(first)), abs=1e-6)


def test_a_class_that_does_not_occur_has_no_auc_and_costs_the_others_nothing() -> None:
    two = LABELS < 2
    found = one_versus_rest(LABELS[two], PROBS[two], num_replicates=50)
    assert np.isnan(found.by_class[2])
    assert np.isnan(found.by_class_intervals[2]).all()
    assert found.macro == pytest.approx(macro_auc(LABELS[two], PROBS[two]))
    alone = one_versus_rest([1, 1], PROBS[:2])
    assert np.isnan([alone.macro, *alone.macro_interval, *alone.by_class]).all()


def test_confusion_and_balanced_accuracy() -> None:
    counts = confusion(LABELS, PROBS)
    assert counts.sum() == 90
    assert counts[1, 2] == ((LABELS == 1) & (PROBS.argmax(1) == 2)).sum()
    assert balanced_accuracy(counts) == pytest.approx(balanced_accuracy_score(LABELS, PROBS.argmax(1)), abs=1e-12)
    two = LABELS < 2  # Class 2 is never right or wrong, though it is predicted.
    expected = np.mean([(PROBS[c == LABELS].argmax(1) == c).mean() for c in (0, 1)])
    assert balanced_accuracy(confusion(LABELS[two], PROBS[two])) == pytest.approx(expected)
    assert np.isnan(balanced_accuracy(confusion([], np.empty((0, 3)))))


def test_brier_by_hand() -> None:
    assert multiclass_brier([0, 2], [[1, 0, 0], [0.5, 0.25, 0.25]]) == pytest.approx((0.25 + 0.0625 + 0.5625) / 2)
    assert multiclass_brier([0, 1], [[0, 1], [1, 0]]) == 2
