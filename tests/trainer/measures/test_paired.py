"""Paired intervals of differences: as a plain bootstrap draws them, narrower than unpaired, and 0 for equal models."""

from collections.abc import Callable

import numpy as np
import pytest

from trainer.measures.agreement import r2
from trainer.measures.delong import delong_test
from trainer.measures.paired import paired_auc, paired_macro_auc, paired_r2
from trainer.measures.statistics import Interval, auc, bootstrap_auc, macro_auc

RNG = np.random.default_rng(0)
LABELS = np.repeat([0, 1], 60)
SHARED = RNG.normal(LABELS * 1.5)
OURS, THEIRS = SHARED + RNG.normal(0, 0.3, 120), SHARED + RNG.normal(0, 1.2, 120)


COUNTS = np.stack([np.ones(120, int), *RNG.multinomial(120, np.full(120, 1 / 120), size=4)])
"""How often each slide counts in five replicates."""


def extremes(measure: Callable[..., float], truth: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """The smallest and the largest difference in these replicates, each measured on the slides that it has drawn."""
    drawn = [np.repeat(np.arange(120), row) for row in COUNTS]
    found = [measure(truth[rows], ours[rows]) - measure(truth[rows], theirs[rows]) for rows in drawn]
    return [min(found), max(found)]


def test_both_models_are_measured_on_the_slides_of_each_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("paired", "multiclass", "agreement"):
        monkeypatch.setattr(f"trainer.measures.{module}.draw_counts", lambda *_, **__: iter([COUNTS[:2], COUNTS[2:]]))
    whole = {"confidence": 1 - 1e-9}
    assert paired_auc(LABELS, OURS, THEIRS, **whole) == pytest.approx(extremes(auc, LABELS, OURS, THEIRS), abs=1e-6)
    labels = RNG.integers(0, 3, 120)
    ours, theirs = (w * np.eye(3)[labels] + RNG.dirichlet(np.ones(3), 120) for w in (0.5, 0.2))
    found = paired_macro_auc(labels, ours, theirs, **whole)
    assert found == pytest.approx(extremes(macro_auc, labels, ours, theirs), abs=1e-6)
    truth = RNG.normal(50, 10, 120)
    ours, theirs = truth + RNG.normal(0, 4, 120), truth + RNG.normal(0, 7, 120)
    assert paired_r2(truth, ours, theirs, **whole) == pytest.approx(extremes(r2, truth, ours, theirs), abs=1e-6)


def test_a_paired_interval_is_narrower_than_an_unpaired_one_and_that_of_delong() -> None:
    interval = paired_auc(LABELS, OURS, THEIRS)
    widths = [high - low for low, high in (bootstrap_auc(LABELS, scores) for scores in (OURS, THEIRS))]
    assert interval.high - interval.low < 0.9 * np.hypot(*widths)
    assert interval == pytest.approx(delong_test(LABELS, OURS, THEIRS).interval, abs=0.02)


def test_equal_models_do_not_differ() -> None:
    assert paired_auc(LABELS, OURS, np.exp(OURS)) == Interval(0, 0)
    assert paired_r2(OURS, THEIRS, THEIRS) == Interval(0, 0)


def test_patients_are_drawn_where_they_are_named() -> None:
    """Every slide three times: as much is known as of one each."""
    three = [np.repeat(values, 3) for values in (LABELS, OURS, THEIRS)]
    by_patient = paired_auc(*three, clusters=np.arange(360) // 3)
    assert by_patient == pytest.approx(paired_auc(LABELS, OURS, THEIRS), abs=0.01)
    by_slide = paired_auc(*three)
    assert by_slide.high - by_slide.low < 0.8 * (by_patient.high - by_patient.low)


def test_without_two_classes_or_values_there_is_none() -> None:
    assert np.isnan(paired_auc([1, 1], [0.1, 0.2], [0.3, 0.1])).all()
    assert np.isnan(paired_macro_auc([1, 1], np.eye(3)[:2], np.eye(3)[:2])).all()
    assert np.isnan(paired_r2([2.0, 2.0], [1, 2], [2, 1])).all()
