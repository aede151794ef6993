"""Another run on the same slides: whether one of them is better.

One thing to know before changing it: slides that either run trained on say nothing. Shared slides must be of the same
split in both runs, with the same labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.cohort import Cohort
from trainer.errors import TrainerError
from trainer.evaluation.given import is_outdated, kept_scores
from trainer.evaluation.sections import answers_of, why_not
from trainer.evaluation.units import Floats, Pool, Units, levels_of, units_of
from trainer.measures.agreement import r2
from trainer.measures.delong import delong_test
from trainer.measures.merits import pair, rounded
from trainer.measures.paired import paired_auc, paired_macro_auc, paired_r2
from trainer.measures.statistics import Interval, auc, macro_auc
from trainer.prepare import read_config
from trainer.targets import cells_of, few


@dataclass(frozen=True)
class Other:
    """The other run."""

    run: Path
    scores: dict[str, Floats]


def open_other(run: Path, cohort: Cohort, split: str) -> Other:
    """The other run's scores of the slides that both have.

    Args:
        run: the other run's folder.
        cohort: this run's.
        split: which slides.

    Raises:
        TrainerError: no run, no scores of this split, other things predicted, no shared slide, or shared slides of
            another split or with other labels.
    """
    if not (run / "config.yaml").is_file():
        raise TrainerError(f"--against {run}: no run here (no config.yaml); give the folder of `slidegrad train --out`")
    theirs = Cohort.read(run / "cohort.csv", head=read_config(run).head)
    if (theirs.task, theirs.outputs) != (cohort.task, cohort.outputs):
        ours, others = (f"{one.task} {', '.join(one.outputs)}" for one in (cohort, theirs))
        raise TrainerError(f"--against {run}: predicts {others}, this run {ours}; only like runs can be compared")
    their_cases = {case.slide_id: case for case in theirs.cases}
    shared = [case for slide_id, case in cohort.of(split).items() if slide_id in their_cases]
    if moved := [case.slide_id for case in shared if their_cases[case.slide_id].split != split]:
        raise TrainerError(
            f"--against {run}: {len(moved)} slides of {split} are of another split there: {few(moved)}; compare runs "
            "that split the cohort alike"
        )
    relabelled = [
        case.slide_id
        for case in shared
        if cells_of(case.targets, cohort.task, cohort.classes)
        != cells_of(their_cases[case.slide_id].targets, theirs.task, theirs.classes)
    ]
    if relabelled:
        raise TrainerError(
            f"--against {run}: {len(relabelled)} slides have other labels there: {few(relabelled)}; compare runs "
            "of the same labels"
        )
    scores = kept_scores(run, split, cohort.task)
    if scores is None:
        is_old = (run / "scores.parquet").exists() and is_outdated(run, split)
        what = "scores of an older checkpoint" if is_old else f"no scores of its {split} slides yet"
        raise TrainerError(f"--against {run}: {what}; run slidegrad evaluate on it first, with --split {split}")
    scores = {case.slide_id: scores[case.slide_id] for case in shared if case.slide_id in scores}
    if not scores:
        raise TrainerError(f"--against {run}: none of its scored slides is a {split} slide of this run")
    return Other(run, scores)


def compare(slides: Units, other: Other, cohort: Cohort, split: str, pool: Pool) -> dict[str, Any]:
    """Both runs on the slides that both have scored, at each level, fit for JSON.

    Args:
        slides: this run's scored slides.
        other: the other run.
        cohort: this run's.
        split: which slides.
        pool: as for `levels_of`.

    Raises:
        TrainerError: no slide is scored by both.
    """
    shared = [i for i, slide_id in enumerate(slides.ids) if slide_id in other.scores]
    if not shared:
        raise TrainerError(f"--against {other.run}: no slide of {split} is scored by both runs")
    ours = slides.take(shared)
    theirs = units_of({slide_id: other.scores[slide_id] for slide_id in ours.ids}, cohort, split)
    assert ours.ids == theirs.ids, "both in the cohort's order"
    levels: dict[str, Any] = {
        one.level: _compare_level(one, another)
        for one, another in zip(*(levels_of(units, cohort.of(split), pool) for units in (ours, theirs)), strict=True)
    }
    return {
        "run": str(other.run),
        "num_slides": len(shared),
        "num_not_shared": len(slides.ids) - len(shared),
        **levels,
    }


def _compare_level(ours: Units, theirs: Units) -> dict[str, Any]:
    about = {"num": len(ours.ids)}
    match ours.task:
        case "classes" if len(ours.names) == 2:
            return {**about, **_compare_answers(ours, theirs, 1)}
        case "classes":
            by_class = {name: _compare_answers(ours, theirs, i) for i, name in enumerate(ours.names)}
            return {**about, **_compare_classes(ours, theirs), "by_class": by_class}
        case "multilabel":
            return {**about, "by_column": {n: _compare_answers(ours, theirs, i) for i, n in enumerate(ours.names)}}
        case _:
            return {**about, "by_column": {n: _compare_numbers(ours, theirs, i) for i, n in enumerate(ours.names)}}


def _compare_answers(ours: Units, theirs: Units, position: int) -> dict[str, Any]:
    labels, scores, known_N = answers_of(ours, position)
    _, others, _ = answers_of(theirs, position)
    clusters = ours.clusters(known_N)
    interval = paired_auc(labels, scores, others, clusters=clusters)
    tested = delong_test(labels, scores, others)
    values = "auc", (auc(labels, scores), auc(labels, others))
    told = _tell(*values, interval, ours, clusters is not None, [scores, others], labels)
    delong = {"se": rounded(tested.se), "ci": pair(tested.interval), "p": rounded_p(tested.p)}
    return {**told, "delong": delong}


def _compare_classes(ours: Units, theirs: Units) -> dict[str, Any]:
    labels, clusters = ours.labels_N, ours.clusters()
    interval = paired_macro_auc(labels, ours.found_NC, theirs.found_NC, clusters=clusters)
    values = "auc", (macro_auc(labels, ours.found_NC), macro_auc(labels, theirs.found_NC))
    found = [ours.found_NC, theirs.found_NC]
    return _tell(*values, interval, ours, clusters is not None, found, labels.astype(float))


def _compare_numbers(ours: Units, theirs: Units, position: int) -> dict[str, Any]:
    truth, found, known_N = answers_of(ours, position)
    _, others, _ = answers_of(theirs, position)
    clusters = ours.clusters(known_N)
    interval = paired_r2(truth, found, others, clusters=clusters)
    values = "r2", (r2(truth, found), r2(truth, others))
    return _tell(*values, interval, ours, clusters is not None, [found, others], truth)


def _tell(
    measure: str,
    values: tuple[float, float],
    interval: Interval,
    units: Units,
    is_clustered: bool,
    found: Sequence[Floats],
    truth: Floats,
) -> dict[str, Any]:
    reasons = [why_not(truth, one) for one in found]
    return {
        measure: rounded(values[0]),
        f"{measure}_other": rounded(values[1]),
        "difference": rounded(values[0] - values[1]),
        "difference_ci": pair(interval),
        "ci_by": "patients" if is_clustered else units.level,
        "reason": next((reason for reason in reasons if reason), None),
    }


def rounded_p(p: float) -> float | None:
    """To three significant digits; null for NaN."""
    return float(f"{p:.3g}") if np.isfinite(p) else None
