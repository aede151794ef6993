"""What predictions of slides, specimens or patients are worth: one section of an evaluation, fit for JSON.

Chooses the measures by task; they are worked out in `trainer.measures`. One thing to know before changing it: numbers
that are also in `result.json` come from the same functions and seeds, so that they are equal.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation.units import Floats, Units
from trainer.measures.agreement import bootstrap_agreement, mean_error, r2, spearman
from trainer.measures.calibration import Calibration, calibrate
from trainer.measures.delong import delong_interval, delong_variance
from trainer.measures.merits import pair, rounded
from trainer.measures.multiclass import balanced_accuracy, confusion, multiclass_brier, one_versus_rest
from trainer.measures.operating import Rule, Share, choose_threshold, measure_calls
from trainer.measures.ranking import rank
from trainer.measures.statistics import mean_known

ONE_CLASS = "one class only"
NO_NUMBERS = "scores that are not numbers"


def assess(units: Units, rules: Sequence[Rule], chosen_on: Units | None) -> dict[str, Any]:
    """One section.

    Args:
        units: what is measured.
        rules: thresholds, for tasks of two answers.
        chosen_on: validation units of the same level, for rules that choose.
    """
    section: dict[str, Any] = {"num": len(units.ids), "num_patients": len(set(units.patients))}
    if units.level != "slides":
        section |= {"num_differing": units.num_differing, "num_left_out": units.num_left_out}
    match units.task:
        case "classes" if len(units.names) == 2:
            section |= _assess_answers(units, 1, rules, chosen_on)
        case "classes":
            section |= _assess_classes(units)
        case "multilabel":
            columns = {
                name: _assess_answers(units, position, rules, chosen_on) for position, name in enumerate(units.names)
            }
            aucs = [math.nan if column["auc"] is None else column["auc"] for column in columns.values()]
            section |= {"auc": rounded(mean_known(aucs)), "by_column": columns}
        case "regression":
            section |= {"by_column": {name: _assess_numbers(units, i) for i, name in enumerate(units.names)}}
    return section


def answers_of(units: Units, position: int) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Labels (0 or 1) and scores of what has two answers, where the true one is known, and which units these are.

    Args:
        units: of two classes, of more (each against the rest), or of columns.
        position: of the class, or of the column.
    """
    if units.task == "classes":
        return (units.labels_N == position).astype(float), units.found_NC[:, position], np.ones(len(units.ids), bool)
    known_N = ~np.isnan(units.truth_NT[:, position])
    return units.truth_NT[known_N, position], units.found_NC[known_N, position], known_N


def why_not(labels: Floats, scores: Floats) -> str | None:
    """Why there is no AUC; None if there is."""
    if np.isnan(scores).any():
        return NO_NUMBERS
    return ONE_CLASS if len(np.unique(labels)) < 2 else None


def _assess_answers(units: Units, position: int, rules: Sequence[Rule], chosen_on: Units | None) -> dict[str, Any]:
    labels, scores, known_N = answers_of(units, position)
    clusters = units.clusters(known_N)
    num_positive = int(labels.sum())
    section: dict[str, Any] = {
        "num_negative": len(labels) - num_positive,
        "num_positive": num_positive,
        "reason": why_not(labels, scores),
        "ci_by": units.level if clusters is None else "patients",
    }
    ranking = rank(labels, scores, clusters=clusters)
    section |= {
        "auc": rounded(ranking.auc),
        "auc_ci": pair(ranking.auc_interval),
        "auc_se_delong": rounded(math.sqrt(delong_variance(labels, scores))),
        "auc_ci_delong": pair(delong_interval(labels, scores)),
        "average_precision": rounded(ranking.average_precision),
        "average_precision_ci": pair(ranking.average_precision_interval),
        "thresholds": [],
        "calibration": None,
    }
    if section["reason"] == NO_NUMBERS or not len(labels):
        return section
    for rule in rules:
        section["thresholds"].append(_operate(labels, scores, rule, chosen_on, position))
    section["calibration"] = _tell_calibration(calibrate(labels, scores))
    return section


def _operate(labels: Floats, scores: Floats, rule: Rule, chosen_on: Units | None, position: int) -> dict[str, Any]:
    threshold, told = rule.value, {"rule": rule.text, "chosen_on": None}
    if rule.is_chosen:
        assert chosen_on is not None, "a rule that chooses comes with the units to choose on"
        others, their_scores, _ = answers_of(chosen_on, position)
        threshold = choose_threshold(rule, others, their_scores)
        told["chosen_on"] = f"{len(others)} validation {chosen_on.level}"
    if math.isnan(threshold):
        return {**told, "threshold": None, "reason": f"validation has {why_not(others, their_scores)}"}
    calls = measure_calls(labels, scores, threshold)._asdict()
    return {**told, "threshold": threshold, **{name: _tell_share(found) for name, found in calls.items()}}


def _tell_share(share: Share) -> dict[str, Any]:
    return {"value": rounded(share.value), "ci": pair(share.interval), "num": share.num, "of": share.total}


def _tell_calibration(found: Calibration) -> dict[str, Any]:
    return {
        "brier": rounded(found.brier),
        "intercept": rounded(found.intercept),
        "slope": rounded(found.slope),
        "in_the_large": rounded(found.in_the_large),
        "expected_error": rounded(found.expected_error),
        "reliability": [
            {
                "low": rounded(bin.low),
                "high": rounded(bin.high),
                "predicted": rounded(bin.predicted),
                "observed": rounded(bin.observed.value),
                "observed_ci": pair(bin.observed.interval),
                "num": bin.observed.total,
            }
            for bin in found.bins
        ],
    }


def _assess_classes(units: Units) -> dict[str, Any]:
    labels, probs = units.labels_N, units.found_NC
    clusters, counts_CC = units.clusters(), confusion(units.labels_N, np.nan_to_num(units.found_NC))
    drawn, is_number = one_versus_rest(labels, probs, clusters=clusters), not np.isnan(probs).any()
    by_class: Mapping[str, Any] = {
        name: {"num": int((labels == i).sum()), "auc": rounded(drawn.by_class[i]), "auc_ci": pair(interval)}
        for i, (name, interval) in enumerate(zip(units.names, drawn.by_class_intervals, strict=True))
    }
    return {
        "reason": why_not(labels.astype(float), probs),
        "ci_by": units.level if clusters is None else "patients",
        "auc": rounded(drawn.macro),
        "auc_ci": pair(drawn.macro_interval),
        "by_class": by_class,
        "confusion": counts_CC.tolist() if is_number else None,
        "balanced_accuracy": rounded(balanced_accuracy(counts_CC)) if is_number else None,
        "brier": rounded(multiclass_brier(labels, probs)),
    }


def _assess_numbers(units: Units, position: int) -> dict[str, Any]:
    known_N = ~np.isnan(units.truth_NT[:, position])
    truth, found = units.truth_NT[known_N, position], units.found_NC[known_N, position]
    clusters = units.clusters(known_N)
    section: dict[str, Any] = {
        "num": len(truth),
        "reason": _why_no_numbers(truth, found),
        "ci_by": units.level if clusters is None else "patients",
    }
    intervals = bootstrap_agreement(truth, found, clusters=clusters)
    for name, measure in {"r2": r2, "mae": mean_error, "spearman": spearman}.items():
        section |= {name: rounded(measure(truth, found)), f"{name}_ci": pair(intervals[name])}
    return section


def _why_no_numbers(truth: Floats, found: Floats) -> str | None:
    if np.isnan(found).any():
        return NO_NUMBERS
    return "one value only" if len(np.unique(truth)) < 2 else None
