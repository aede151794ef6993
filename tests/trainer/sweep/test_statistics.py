"""A sweep's arithmetic against scipy, and against what can be worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from trainer.sweep.statistics import (
    bootstrap_mean,
    fit_decay,
    mean_curve,
    paired_difference,
    rank_correlation,
    spread,
)

KS = (50, 100, 350, 700, 2100, 4900)


def test_spread_is_of_what_is_known() -> None:
    found = spread([0.7, math.nan, 0.8, 0.9])
    assert found.mean == pytest.approx(0.8)
    assert found.std == pytest.approx(0.1)
    assert found.num == 3
    assert math.isnan(spread([0.5]).std)
    assert math.isnan(spread([]).mean)


def test_the_corrected_interval_by_hand() -> None:
    """Differences 1, 2, 3 (times 0.01): mean 2, variance 1; with 1/3 + 1/4 of it the error is sqrt(7/12)."""
    ours, theirs = [0.71, 0.82, 0.63], [0.70, 0.80, 0.60]
    found = paired_difference(ours, theirs, [0.25, 0.2, 0.3])
    error = 0.01 * math.sqrt(7 / 12)
    assert found.mean == pytest.approx(0.02)
    assert found.corrected == pytest.approx((0.02 - 4.302653 * error, 0.02 + 4.302653 * error), abs=1e-8)
    # t with two degrees of freedom has a closed form: P(|T| > t) = 1 - t / sqrt(2 + t^2).
    t = 0.02 / error
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_without_overlap_it_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.8, 0.05, 20), rng.normal(0.78, 0.05, 20)
    found, true = paired_difference(ours, theirs, np.zeros(20)), stats.ttest_rel(ours, theirs)
    assert found.p == pytest.approx(true.pvalue)
    assert found.corrected == pytest.approx(tuple(true.confidence_interval(0.95)))
    wider = paired_difference(ours, theirs, np.full(20, 0.3))
    assert wider.corrected.low < found.corrected.low < found.corrected.high < wider.corrected.high
    assert wider.p > found.p
    assert wider.bootstrap == found.bootstrap
    # The plain t, and a bootstrap as wide, shrink with more splits; the corrected one not below the overlap.
    assert (wider.corrected.high - wider.mean) ** 2 > 0.3 * np.var(ours - theirs, ddof=1) * stats.t.ppf(0.975, 19) ** 2


def test_splits_that_one_side_lacks_do_not_count() -> None:
    found = paired_difference([0.9, math.nan, 0.7, 0.8], [0.8, 0.1, math.nan, 0.6], [0.2] * 4)
    assert found.num == 2
    assert found.mean == pytest.approx(0.15)
    one = paired_difference([0.9], [0.8], [0.2])
    assert (one.num, one.mean) == (1, pytest.approx(0.1))
    assert math.isnan(one.corrected.low)
    assert math.isnan(one.p)
    assert paired_difference([], [], []).num == 0


def test_differences_that_are_all_alike() -> None:
    assert paired_difference([0.5, 0.75], [0.5, 0.75], [0.2, 0.2]).p == 1
    found = paired_difference([0.75, 0.5], [0.5, 0.25], [0.2, 0.2])
    assert found.p == 0
    assert found.corrected == found.bootstrap == (0.25, 0.25)


def test_the_bootstrap_of_two_values_reaches_from_one_to_the_other() -> None:
    """A mean of two draws from 0 and 1 is 0 or 1 in a quarter of all draws each: beyond 2.5 %."""
    assert bootstrap_mean([0.0, 1.0, math.nan]) == (0, 1)
    assert math.isnan(bootstrap_mean([1.0]).low)
    values = np.random.default_rng(1).normal(size=200)
    found = bootstrap_mean(values)
    assert found.low == pytest.approx(values.mean() - 1.96 * values.std() / math.sqrt(200), abs=0.02)
    assert found == bootstrap_mean(values)


def test_rank_correlation_is_scipys_and_none_where_there_is_none() -> None:
    losses = [0.7, 0.6, 0.65, 0.4, math.nan, 0.4]
    true = stats.spearmanr([50, 100, 350, 700, 4900], [0.7, 0.6, 0.65, 0.4, 0.4]).statistic
    assert rank_correlation(KS, losses) == pytest.approx(true)
    assert rank_correlation(KS, [6, 5, 4, 3, 2, 1]) == pytest.approx(-1)
    assert math.isnan(rank_correlation([50], [0.5]))
    assert math.isnan(rank_correlation(KS, [0.5] * 6))


def test_a_band_reaches_over_whole_curves_and_over_those_that_end_early() -> None:
    curves_JE = np.array([[0.9, 0.8, 0.7], [0.7, 0.6, math.nan]])
    mean_E, low_E, high_E = mean_curve(curves_JE)
    assert mean_E == pytest.approx([0.8, 0.7, 0.7])
    # Of two curves one is drawn twice in a quarter of all draws.
    assert low_E == pytest.approx([0.7, 0.6, 0.7])
    assert high_E == pytest.approx([0.9, 0.8, 0.7])
    mean_E, low_E, _ = mean_curve(curves_JE[:1])
    assert mean_E == pytest.approx([0.9, 0.8, 0.7])
    assert np.isnan(low_E).all()


def test_a_band_narrows_with_the_number_of_curves() -> None:
    curves_JE = np.random.default_rng(0).normal(0.5, 0.1, (400, 5))
    _, low_E, high_E = mean_curve(curves_JE)
    assert high_E - low_E == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.15)


@pytest.mark.parametrize(("a", "b", "c"), [(0.25, 0.5, 1 / 500), (0.05, 0.6, 1 / 90), (0.4, 0.3, 1 / 4000)])
def test_a_decay_is_found_again(a: float, b: float, c: float) -> None:
    losses = a + b * np.exp(-c * np.array(KS))
    exact = fit_decay(KS, losses)
    assert exact is not None
    assert exact == pytest.approx((a, b, c), rel=1e-3)
    assert exact.at(KS) == pytest.approx(losses, abs=1e-6)
    noisy = fit_decay(KS, losses + 0.01 * np.random.default_rng(0).normal(size=6))
    assert noisy is not None
    assert noisy.at(KS) == pytest.approx(losses, abs=0.03)


@pytest.mark.parametrize(
    "losses",
    [
        [0.8 - 1e-4 * k for k in KS],
        [0.5] * 6,
        [0.9, 0.3, 0.3, 0.3, 0.3, 0.3],  # All of it between the first two.
        [0.7, 0.5, math.nan, math.nan, 0.4, math.nan],  # Three points.
        [math.nan] * 6,
    ],
)
def test_no_curve_is_drawn_that_the_points_do_not_settle(losses: list[float]) -> None:
    assert fit_decay(KS, losses) is None
