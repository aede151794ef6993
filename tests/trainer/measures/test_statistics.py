"""AUC, its bootstrap interval and the ROC band, against scikit-learn, by hand and by simulation."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from sklearn.metrics import roc_auc_score

from trainer.measures import resampling, statistics
from trainer.measures.statistics import auc, bootstrap_auc, macro_auc, roc_band

# Four pairs: 0.8 > 0.5, 0.8 > 0.2, 0.5 = 0.5, 0.5 > 0.2 give 1 + 1 + 1/2 + 1 of 4.
TIED = ([1, 1, 0, 0], [0.8, 0.5, 0.5, 0.2])


def simulated(seed: int, num_pos: int, num_neg: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.repeat([1, 0], [num_pos, num_neg])
    return labels, rng.normal(labels * shift)


@st.composite
def two_classes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Labels of both classes and scores with many ties."""
    labels = [0, 1, *draw(st.lists(st.integers(0, 1), max_size=30))]
    return labels, draw(st.lists(st.integers(-3, 3), min_size=len(labels), max_size=len(labels)))


def test_ties_count_half() -> None:
    assert auc(*TIED) == 0.875


@given(two_classes())
def test_auc_is_that_of_all_pairs(case: tuple[list[int], list[int]]) -> None:
    labels, scores = np.array(case[0]), np.array(case[1])
    gap = scores[labels == 1][:, None] - scores[labels == 0]
    assert auc(labels, scores) == pytest.approx(((gap > 0) + (gap == 0) / 2).mean())


@given(two_classes())
def test_auc_knows_order_alone_and_mirrors(case: tuple[list[int], list[int]]) -> None:
    labels, scores = np.array(case[0]), np.array(case[1], float)
    assert auc(labels, np.exp(scores)) == auc(labels, scores)
    assert auc(1 - labels, scores) == pytest.approx(1 - auc(labels, scores))
    assert auc(labels, np.where(scores == 3, np.inf, scores)) == auc(labels, scores)


@given(two_classes())
def test_counts_give_the_same_auc_as_scikit_learn(case: tuple[list[int], list[int]]) -> None:
    labels, scores = np.array(case[0]), np.array(case[1])
    level = np.unique(-scores, return_inverse=True)[1]
    positives, negatives = (np.bincount(level[labels == c], minlength=level.max() + 1)[None] for c in (1, 0))
    assert statistics.auc_of_counts(positives, negatives)[0] == pytest.approx(roc_auc_score(labels, scores))


@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 0, 0]])
def test_one_class_has_no_auc(labels: list[int]) -> None:
    scores = [0.1, 0.2, 0.3]
    band = roc_band(labels, scores, num_points=3)
    assert np.isnan(auc(labels, scores))
    assert np.isnan(bootstrap_auc(labels, scores)).all()
    assert band.fpr.tolist() == [0, 0.5, 1]
    assert np.isnan([band.tpr, band.low, band.high]).all()


def test_no_slides_and_nan_scores_have_no_auc() -> None:
    assert np.isnan(auc([], []))
    assert np.isnan(auc([0, 1], [0.5, np.nan]))
    assert np.isnan(bootstrap_auc([0, 1], [0.5, np.nan])).all()


def test_separated_classes_and_equal_scores() -> None:
    assert bootstrap_auc([0, 0, 1, 1], [1, 2, 3, 4]) == (1, 1)
    assert bootstrap_auc([0, 0, 1, 1], [7, 7, 7, 7]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("labels", "scores", "options"),
    [
        ([0, 1, 2], [1, 2, 3], {}),
        ([0, 1], [1, 2, 3], {}),
        ([0, 1], [1, 2], {"confidence": 95}),
        ([0, 1], [1, 2], {"num_replicates": 0}),
    ],
)
def test_wrong_input_is_refused(labels: list[int], scores: list[float], options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        bootstrap_auc(labels, scores, **options)  # type: ignore[arg-type]


def test_interval_matches_a_plain_bootstrap() -> None:
    labels, scores = simulated(3, 20, 30, shift=1.0)
    rng = np.random.default_rng(1)
    above = scores[:20, None] > scores[20:]  # Positives come first; no ties.
    plain = [above[rng.integers(0, 20, 20)][:, rng.integers(0, 30, 30)].mean() for _ in range(2000)]
    # Two bootstraps of 2,000 differ at the 2.5 % tail by about 0.005 here.
    assert bootstrap_auc(labels, scores) == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.02)


def test_interval_covers_the_truth() -> None:
    """95 % intervals of 300 simulated cohorts; on 80 slides a percentile bootstrap covers a little less."""
    truth = 0.8413  # Phi(shift / sqrt 2), shift sqrt 2.
    intervals = [
        bootstrap_auc(*simulated(seed, 40, 40, shift=2**0.5), num_replicates=500, seed=seed) for seed in range(300)
    ]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.89 <= covered <= 0.985


def test_seed_decides_and_chunks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, scores = simulated(0, 15, 20, shift=0.7)
    whole = bootstrap_auc(labels, scores, seed=5)
    assert bootstrap_auc(labels, scores, seed=6) != whole
    monkeypatch.setattr(resampling, "_COUNTS_PER_CHUNK", 1_000)
    assert bootstrap_auc(labels, scores, seed=5) == whole


def test_classes_are_drawn_apart_and_whole() -> None:
    labels, scores = np.tile([0, 1], 20), np.arange(40)
    ((positives, negatives),) = statistics.replicates(labels == 1, scores.astype(float), 100, seed=0)
    assert (positives.sum(1) == 20).all()
    assert (negatives.sum(1) == 20).all()
    # Highest score first: positives and negatives take turns. One generator for both would draw the same counts.
    assert not positives[:, 1::2].any()
    assert not negatives[:, ::2].any()
    assert (positives[:, ::2] != negatives[:, 1::2]).any(1).all()


def test_wider_confidence_is_a_wider_interval() -> None:
    case = simulated(0, 15, 20, shift=0.7)
    narrow, wide = bootstrap_auc(*case, confidence=0.5), bootstrap_auc(*case, confidence=0.99)
    assert wide.low < narrow.low < auc(*case) < narrow.high < wide.high


@settings(max_examples=30, deadline=None)
@given(two_classes())
def test_band_is_a_roc_curve(case: tuple[list[int], list[int]]) -> None:
    band = roc_band(*case, num_replicates=50)
    for curve in (band.tpr, band.low, band.high):
        assert ((curve >= 0) & (curve <= 1)).all()
        assert (np.diff(curve) >= -1e-12).all()
        assert curve[-1] == 1
    assert (band.low <= band.high).all()
    # A step within one grid cell is off by at most half of it.
    assert np.trapezoid(band.tpr, band.fpr) == pytest.approx(auc(*case), abs=0.002 * 31)


def test_band_by_hand() -> None:
    # From high to low: positive (TPR 1/2), a tie of one each (to 1, 1/2), negative (to 1, 1).
    band = roc_band(*TIED, num_points=5)
    assert band.tpr.tolist() == [0.5, 0.75, 1, 1, 1]


def test_band_and_interval_sharereplicates() -> None:
    labels, scores = simulated(0, 25, 25, shift=1.0)
    one = {"num_replicates": 1, "seed": 9}
    band, interval = roc_band(labels, scores, **one), bootstrap_auc(labels, scores, **one)
    assert np.trapezoid(band.low, band.fpr) == pytest.approx(interval.low, abs=0.01)


def test_macro_auc() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    probs = rng.dirichlet(np.ones(3), 60)
    assert macro_auc(labels, probs) == pytest.approx(roc_auc_score(labels, probs, multi_class="ovr"))
    binary = labels > 0
    assert macro_auc(binary, probs[:, :2]) == auc(binary, probs[:, 1])
    # A class without slides is left out, not counted as 0.5.
    two = labels < 2
    expected = np.mean([auc(labels[two] == c, probs[two, c]) for c in (0, 1)])
    assert macro_auc(labels[two], probs[two]) == pytest.approx(expected)
    assert np.isnan(macro_auc([1, 1], probs[:2]))
    with pytest.raises(ValueError, match="expected 0 to 2"):
        macro_auc([0, 3], probs[:2])
