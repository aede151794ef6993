"""Thresholds and what calling by them is worth: rules by hand, Wilson's interval by its formula."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from sklearn.metrics import roc_curve

from trainer.measures.operating import Rule, choose_threshold, measure_calls, share

LABELS = [0, 0, 0, 1, 0, 1, 1, 1]
SCORES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("0.5", "number", 0.5),
        ("0", "number", 0),
        ("sensitivity=0.95", "sensitivity", 0.95),
        ("specificity=1", "specificity", 1),
    ],
)
def test_rules_are_read(text: str, kind: str, value: float) -> None:
    rule = Rule.parse(text)
    assert (rule.text, rule.kind, rule.value, rule.is_chosen) == (text, kind, value, kind != "number")
    assert Rule.parse("youden").is_chosen


@pytest.mark.parametrize(
    "text",
    [
        "",
        "half",
        "1.5",
        "-0.1",
        "nan",
        "sensitivity",
        "sensitivity=",
        "sensitivity=0",
        "sensitivity=95",
        "ppv=0.9",
        "youden=1",
    ],
)
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number from 0 to 1, youden"):
        Rule.parse(text)


@pytest.mark.parametrize(
    ("text", "threshold"),
    [
        ("youden", 0.35),  # J = 1 + 3/4 - 1, as from 0.55 on, but finds more.
        ("sensitivity=1", 0.35),
        ("sensitivity=0.75", 0.55),
        ("sensitivity=0.76", 0.35),
        ("specificity=1", 0.55),
        ("specificity=0.75", 0.35),
        ("specificity=0.5", 0.25),
        ("0.123", 0.123),
    ],
)
def test_the_rule_chooses_halfway_between_scores(text: str, threshold: float) -> None:
    assert choose_threshold(Rule.parse(text), LABELS, SCORES) == pytest.approx(threshold)


def test_no_score_is_specific_enough_but_one_above_all() -> None:
    threshold = choose_threshold(Rule.parse("specificity=1"), [1, 0], [0.3, 0.9])
    assert threshold > 0.9
    assert measure_calls([1, 0], [0.3, 0.9], threshold).specificity.value == 1


def test_neighbouring_floats_are_told_apart() -> None:
    low, high = 0.5, math.nextafter(0.5, 1)
    threshold = choose_threshold(Rule.parse("youden"), [0, 1], [low, high])
    assert low < threshold <= high


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6)), min_size=2, max_size=40))
def test_youden_is_the_best_of_the_roc_curve(slides: list[tuple[int, int]]) -> None:
    labels, scores = np.array(slides).T
    threshold = choose_threshold(Rule.parse("youden"), labels, scores)
    if len(set(labels)) < 2:
        assert math.isnan(threshold)
        return
    fpr, tpr, _ = roc_curve(labels, scores)
    calls = measure_calls(labels, scores, threshold)
    assert calls.sensitivity.value + calls.specificity.value - 1 == pytest.approx((tpr - fpr).max())


def test_calls_by_hand() -> None:
    calls = measure_calls(LABELS, SCORES, 0.5)  # At the threshold is above it.
    assert [(one.num, one.total) for one in calls] == [(3, 4), (3, 4), (3, 4), (3, 4)]
    calls = measure_calls(LABELS, SCORES, 0.55)
    assert [(one.num, one.total) for one in calls] == [(3, 4), (4, 4), (3, 3), (4, 5)]
    nobody = measure_calls(LABELS, SCORES, 2.0)
    assert nobody.ppv.total == 0
    assert math.isnan(nobody.ppv.value)
    assert np.isnan(nobody.ppv.interval).all()


@pytest.mark.parametrize(("num", "total"), [(0, 10), (3, 4), (81, 263), (10, 10)])
def test_the_interval_is_wilsons(num: int, total: int) -> None:
    z, p = 1.959963984540054, num / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    assert share(num, total).interval == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_the_interval_of_newcombes_example() -> None:
    """81 of 263: 0.2553 to 0.3662 (Newcombe, Statistics in Medicine 1998, Table I)."""
    assert share(81, 263).interval == pytest.approx((0.2553, 0.3662), abs=5e-5)
