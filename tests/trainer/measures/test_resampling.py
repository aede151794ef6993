"""What the bootstrap draws: strata whole, patients whole; and how often its intervals hold the truth."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import norm

from trainer.measures import resampling
from trainer.measures.delong import delong_interval
from trainer.measures.resampling import clusters_of, draw_counts, percentiles
from trainer.measures.statistics import bootstrap_auc

TRUE_AUC = 0.8
SHIFT = 2**0.5 * norm.ppf(TRUE_AUC)
"""Between the means of two normal classes of variance 1 that have this AUC."""


def drawn(strata: list[int], clusters: list[int] | None = None, num: int = 200, seed: int = 0) -> np.ndarray:
    return np.concatenate(list(draw_counts(strata, clusters=clusters, num_replicates=num, seed=seed)))


def test_each_stratum_is_drawn_apart_and_whole() -> None:
    strata = [0, 2, 1, 0, 2, 2, 2]
    counts = drawn(strata)
    assert counts.shape == (200, 7)
    for stratum in range(3):
        assert (counts[:, np.array(strata) == stratum].sum(1) == strata.count(stratum)).all()
    assert counts[:, [1, 4, 5, 6]].mean(0) == pytest.approx(1, abs=0.2), "all alike"
    assert (counts[:, 2] == 1).all(), "alone in its stratum"


def test_patients_are_drawn_with_all_their_slides_by_their_highest_class() -> None:
    labels, patients = [0, 1, 0, 0, 1, 0, 0], [7, 7, 3, 3, 5, 9, 9]
    counts = drawn(labels, patients)
    for patient in set(patients):
        own = counts[:, np.array(patients) == patient]
        assert (own == own[:, :1]).all()
    # Patients 7 and 5 are positive, 3 and 9 are not: two of each, in every replicate.
    assert (counts[:, 0] + counts[:, 4] == 2).all()
    assert (counts[:, 2] + counts[:, 5] == 2).all()
    assert len(np.unique(counts, axis=0)) == 9


def test_the_seed_decides_and_chunks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    strata, clusters = [0, 1] * 10, [i // 2 for i in range(20)]
    whole = drawn(strata), drawn([0] * 20, clusters)
    assert (drawn(strata, seed=1) != whole[0]).any()
    monkeypatch.setattr(resampling, "_COUNTS_PER_CHUNK", 70)
    assert (drawn(strata) == whole[0]).all()
    assert (drawn([0] * 20, clusters) == whole[1]).all()


def test_who_has_one_slide_is_no_cluster() -> None:
    assert clusters_of(["b", "a", "c"]) is None
    assert clusters_of([]) is None
    found = clusters_of(["b", "a", "b"])
    assert found is not None
    assert found.tolist() == [1, 0, 1]


def test_an_interval_of_replicates_that_often_have_no_measure_is_none() -> None:
    values = np.arange(100.0)
    assert percentiles(values, 0.9) == pytest.approx(np.quantile(values, [0.05, 0.95]))
    values[:4] = np.nan
    assert percentiles(values, 0.9) == pytest.approx(np.quantile(values[4:], [0.05, 0.95]))
    values[:6] = np.nan
    assert np.isnan(percentiles(values)).all()


def coverage(intervals: list[tuple[float, float]]) -> float:
    return float(np.mean([low <= TRUE_AUC <= high for low, high in intervals]))


@pytest.mark.torture
def test_intervals_hold_the_true_auc_as_often_as_they_say(times: Callable[[int, int], int]) -> None:
    """100 slides a class, binormal, true AUC 0.8; the shares are printed."""
    num = times(40, 2000)
    labels = np.repeat([0, 1], 100)
    cohorts = [np.random.default_rng([7, i]).normal(labels * SHIFT) for i in range(num)]
    replicates = times(500, 2000)
    found = {
        "bootstrap": coverage(
            [bootstrap_auc(labels, s, num_replicates=replicates, seed=i) for i, s in enumerate(cohorts)]
        ),
        "DeLong": coverage([delong_interval(labels, scores) for scores in cohorts]),
    }
    print(f"coverage of 95 % intervals in {num} cohorts: {found}")
    low, high = (0.85, 1.0) if num < 2000 else (0.93, 0.97)  # Of 40, 0.85 or less in 1 of 100.
    assert all(low < share <= high for share in found.values()), found


@pytest.mark.torture
def test_where_patients_have_several_slides_drawing_patients_keeps_the_promise(
    times: Callable[[int, int], int],
) -> None:
    """40 patients a class with 5 slides each that are half alike: drawing slides promises too much."""
    num, replicates = times(40, 1000), times(300, 1000)
    labels, patients = np.repeat([0, 1], 200), np.arange(400) // 5
    covered: dict[str, list[tuple[float, float]]] = {"slides": [], "patients": []}
    for i in range(num):
        rng = np.random.default_rng([11, i])
        scores = labels * SHIFT + (rng.normal(size=80)[patients] + rng.normal(size=400)) / 2**0.5
        covered["slides"].append(bootstrap_auc(labels, scores, num_replicates=replicates, seed=i))
        clustered = bootstrap_auc(labels, scores, clusters=patients, num_replicates=replicates, seed=i)
        covered["patients"].append(clustered)
    found = {name: coverage(intervals) for name, intervals in covered.items()}
    print(f"coverage of 95 % intervals in {num} cohorts, by what is drawn: {found}")
    low, high = (0.85, 1.0) if num < 1000 else (0.92, 0.97)
    assert low < found["patients"] <= high, found
    assert found["slides"] < found["patients"] - (0.0 if num < 1000 else 0.1), found
