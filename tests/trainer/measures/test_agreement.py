"""R2, mean error and rank correlation, against their definitions and by simulation; and where they are not defined."""

import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from trainer.measures.agreement import (
    bootstrap_agreement,
    bootstrap_r2,
    mean_error,
    r2,
    replicate_agreement,
    spearman,
)


def simulated(seed: int, num: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.normal(50, 10, num)
    return truth, truth + rng.normal(0, noise, num)


def test_by_hand() -> None:
    truth, predicted = [1.0, 2.0, 6.0], [1.0, 4.0, 5.0]
    assert r2(truth, predicted) == pytest.approx(1 - 5 / 14)
    assert mean_error(truth, predicted) == 1
    assert spearman(truth, predicted) == 1
    assert r2(truth, [3.0, 3.0, 3.0]) == pytest.approx(0), "the mean explains nothing"
    assert r2(truth, [9.0, 9.0, 9.0]) < -1


numbers = st.lists(st.integers(-50, 50), min_size=3, max_size=30, unique=True)


@given(numbers, st.integers(0, 5))
def test_rank_correlation_knows_order_alone(truth: list[int], seed: int) -> None:
    predicted = np.random.default_rng(seed).permutation(len(truth)).astype(float)
    assert spearman(truth, np.exp(predicted)) == pytest.approx(spearman(truth, predicted))
    assert spearman(truth, -predicted) == pytest.approx(-spearman(truth, predicted))


@given(numbers, st.floats(0.1, 100), st.floats(-100, 100))
def test_r2_has_no_unit(truth: list[int], scale: float, shift: float) -> None:
    predicted = np.array(truth) + np.linspace(-3, 3, len(truth))
    scaled = r2(np.array(truth) * scale + shift, predicted * scale + shift)
    assert scaled == pytest.approx(r2(truth, predicted), abs=1e-6)


@pytest.mark.parametrize(
    ("truth", "predicted"),
    [([], []), ([1.0], [1.0]), ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]), ([1.0, 2.0], [1.0, float("nan")])],
)
def test_what_is_not_defined_is_nan_without_a_warning(truth: list[float], predicted: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan([r2(truth, predicted), spearman(truth, predicted), *bootstrap_r2(truth, predicted)]).all()
        assert np.isnan(spearman([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]))
        assert np.isnan(bootstrap_r2([1.0, 2.0, 3.0], [1.0, 2.5, 3.0])).all(), "too few: a replicate has one value"
        assert np.isnan(mean_error([1.0, 2.0], [1.0, float("nan")]))


def test_the_interval_is_that_of_a_plain_bootstrap() -> None:
    truth, predicted = simulated(0, 60, noise=6)
    rng = np.random.default_rng(1)
    draws = [rng.integers(0, 60, 60) for _ in range(2000)]
    plain = np.quantile([r2(truth[rows], predicted[rows]) for rows in draws], [0.025, 0.975])
    # Two bootstraps of 2,000 differ at the 2.5 % tail by about 0.01 here.
    assert bootstrap_r2(truth, predicted) == pytest.approx(plain, abs=0.03)


def test_the_seed_decides_and_confidence_widens() -> None:
    case = simulated(0, 40, noise=6)
    interval = bootstrap_r2(*case)
    assert bootstrap_r2(*case) == interval
    assert bootstrap_r2(*case, seed=1) != interval
    narrow = bootstrap_r2(*case, confidence=0.5)
    assert interval.low < narrow.low < r2(*case) < narrow.high < interval.high


def test_lengths_that_differ_are_refused() -> None:
    for measure in (r2, mean_error, spearman, bootstrap_r2):
        with pytest.raises(ValueError, match=r"expected \(n,\) both"):
            measure([1.0, 2.0], [1.0])


def test_all_measures_of_a_replicate_are_those_of_the_slides_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, predicted = np.array([1.0, 2.0, 2.0, 5.0, 7.0]), np.array([1.5, 1.5, 3.0, 3.0, 9.0])
    counts = np.array([[1, 1, 1, 1, 1], [0, 3, 0, 1, 1], [2, 0, 1, 2, 0]])
    monkeypatch.setattr("trainer.measures.agreement.draw_counts", lambda *_, **__: iter([counts]))
    found = replicate_agreement(truth, predicted)
    for name, measure in {"r2": r2, "mae": mean_error, "spearman": spearman}.items():
        expected = [measure(truth[rows], predicted[rows]) for rows in (np.repeat(np.arange(5), row) for row in counts)]
        assert found[name] == pytest.approx(expected, abs=1e-9), name


def test_where_patients_have_several_slides_they_are_drawn() -> None:
    truth, predicted = (np.repeat(values, 3) for values in simulated(0, 40, noise=6))
    alone, shared = (
        bootstrap_agreement(truth, predicted),
        bootstrap_agreement(truth, predicted, clusters=np.arange(120) // 3),
    )
    for name in ("r2", "mae", "spearman"):
        assert shared[name].high - shared[name].low > 1.3 * (alone[name].high - alone[name].low)
    assert bootstrap_r2(truth, predicted) == alone["r2"]
