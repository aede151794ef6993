"""Subgroups: what predictions are worth among slides that share a value in a column of a labels file.

One thing to know before changing it: the labels file may be newer than the run, but not another one. Where it says
otherwise than the run's cohort what a slide is, it is refused.
"""

import csv
import io
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.cohort import Cohort
from trainer.config import Head
from trainer.errors import TrainerError
from trainer.evaluation.sections import answers_of, why_not
from trainer.evaluation.units import Units
from trainer.labelled import match_name
from trainer.measures.agreement import bootstrap_r2, r2
from trainer.measures.merits import MERITS, pair, rounded
from trainer.measures.multiclass import one_versus_rest
from trainer.measures.statistics import Interval, auc, bootstrap_auc
from trainer.targets import cells_of, few, parse_targets

NOT_GIVEN = "(empty)"
"""The value of an empty cell."""
_FIELDS = ("column", "value", "of", "num_slides", "num_positive", "measure", "estimate", "low", "high", "reason")
Values = dict[str, dict[str, str]]
"""Column to slide_id to value."""


def read_values(file: Path, columns: Sequence[str], cohort: Cohort, head: Head, split: str) -> Values:
    """What the columns say of each slide of the split.

    Args:
        file: a labels file; the run's own, or one with more columns.
        columns: those to group by.
        cohort: the run's.
        head: the run's.
        split: whose slides must all be there.

    Raises:
        TrainerError: not readable, unknown columns, slides that are missing or twice, or labels that are not the run's.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = [{k: (v or "").strip() for k, v in row.items() if k} for row in csv.DictReader(stream)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise TrainerError(f"--labels {file}: not readable as CSV ({reason})") from None
    there = list(rows[0]) if rows else []
    if "slide_id" not in there:
        raise TrainerError(f"--labels {file}: expected the column slide_id and at least one row, got {there}")
    if unknown := [column for column in columns if column not in there]:
        offered = ", ".join(column for column in there if column != "slide_id")
        raise TrainerError(f"--by {' '.join(unknown)}: no such column in {file}; it has {offered}")
    cases = {case.slide_id: case for case in cohort.cases}
    for row in rows:
        row["slide_id"] = match_name(row["slide_id"], cases)
    rows = [row for row in rows if row["slide_id"] in cases]
    of_slide = {row["slide_id"]: row for row in rows}
    if missing := [slide_id for slide_id in cohort.of(split) if slide_id not in of_slide]:
        num = len(cohort.of(split))
        raise TrainerError(
            f"--labels {file}: {len(missing)} of {num} slides of {split} are not in it: {few(missing)}; add them"
        )
    if twice := [slide_id for slide_id, num in Counter(row["slide_id"] for row in rows).items() if num > 1]:
        raise TrainerError(f"--labels {file}: {len(twice)} slides are listed twice: {few(twice)}; keep one row of each")
    _refuse_other_labels(file, of_slide, cohort, head)
    return {column: {slide_id: row[column] or NOT_GIVEN for slide_id, row in of_slide.items()} for column in columns}


def compare_subgroups(slides: Units, values: Values) -> list[dict[str, Any]]:
    """One row for each value of each column; of several columns of targets one for each of them too.

    Args:
        slides: the scored slides.
        values: as `read_values` has them.

    Returns:
        Rows fit for JSON: `estimate`, `low`, `high` are null, and `reason` says why, where the measure is not defined.
    """
    rows = []
    for column, of_slide in values.items():
        groups: dict[str, list[int]] = defaultdict(list)
        for i, slide_id in enumerate(slides.ids):
            groups[of_slide[slide_id]].append(i)
        for value in sorted(groups, key=_value_order):
            rows += [{"column": column, "value": value, **found} for found in _measure(slides.take(groups[value]))]
    return rows


def subgroups_csv(rows: list[dict[str, Any]]) -> str:
    """The rows as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _measure(group: Units) -> list[dict[str, Any]]:
    """A row without column and value, for each column of targets."""
    merit = MERITS[group.task]
    rows: list[dict[str, Any]] = []
    if group.task == "classes" and len(group.names) > 2:
        drawn = one_versus_rest(group.labels_N, group.found_NC, clusters=group.clusters())
        reason = why_not(group.labels_N.astype(float), group.found_NC)
        return [_row("mean over classes", len(group.ids), None, merit, drawn.macro, drawn.macro_interval, reason)]
    positions = (1,) if group.task == "classes" else range(len(group.names))
    for position in positions:
        truth, found, known_N = answers_of(group, position)
        clusters, name = group.clusters(known_N), group.names[position]
        if group.task == "regression":
            reason = "one value only" if len(np.unique(truth)) < 2 else None
            interval = bootstrap_r2(truth, found, clusters=clusters)
            rows.append(_row(name, len(truth), None, merit, r2(truth, found), interval, reason))
        else:
            interval = bootstrap_auc(truth, found, clusters=clusters)
            num_positive = int(truth.sum())
            value, reason = auc(truth, found), why_not(truth, found)
            rows.append(_row(name, len(truth), num_positive, merit, value, interval, reason))
    return rows


def _row(
    of: str, num: int, num_positive: int | None, merit: str, value: float, interval: Interval, reason: str | None
) -> dict[str, Any]:
    low, high = pair(interval)
    if reason is None and low is None and not math.isnan(value):
        reason = "too few slides for an interval"
    counts = {"num_slides": num, "num_positive": num_positive}
    return {
        "of": of,
        **counts,
        "measure": merit,
        "estimate": rounded(value),
        "low": low,
        "high": high,
        "reason": reason,
    }


def _refuse_other_labels(file: Path, of_slide: dict[str, dict[str, str]], cohort: Cohort, head: Head) -> None:
    if not set(head.columns) <= set(next(iter(of_slide.values()), {})):
        return  # A file that knows other things of the slides alone.
    expected = {case.slide_id: cells_of(case.targets, cohort.task, cohort.classes) for case in cohort.cases}
    if cohort.task == "classes":
        (column,) = head.columns
        found = {slide_id: [row[column]] for slide_id, row in of_slide.items()}
    else:
        targets, _ = parse_targets(list(of_slide.values()), head, f"--labels {file}")
        found = {slide_id: cells_of(values, cohort.task, ()) for slide_id, values in targets.items()}
    if other := [slide_id for slide_id, cells in found.items() if cells != expected[slide_id]]:
        raise TrainerError(
            f"--labels {file}: {len(other)} slides have another {' or '.join(head.columns)} there than in the run's "
            f"cohort: {few(other)}; give the labels that the run was trained with"
        )


def _value_order(value: str) -> tuple[bool, bool, float, str]:
    """Numbers by value, then words, what is not given last."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    is_word = math.isnan(number)
    return value == NOT_GIVEN, is_word, 0.0 if is_word else number, value
