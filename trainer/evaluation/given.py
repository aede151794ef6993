"""Scores out of files: those that a run keeps of its slides, and those that a user gives in their place.

Reads and checks; computes nothing. One thing to know before changing it: a run's own scores count only if the
checkpoint that gave them is still the one that the run would choose.
"""

import csv
import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.checkpoint import read_best_state
from trainer.cohort import Cohort
from trainer.errors import TrainerError
from trainer.evaluation.units import Floats
from trainer.labelled import match_name
from trainer.measures.merits import PREDICTED
from trainer.scoring import scored_epochs
from trainer.targets import Task, few

_OFF = 1e-3
"""By which probabilities of all classes may miss 1: files round."""


def kept_scores(run: Path, split: str, task: Task) -> dict[str, Floats] | None:
    """slide_id to predictions (C,) of a split, from `scores.parquet`; None if there are none of today's checkpoint."""
    file = run / "scores.parquet"
    try:
        if not file.exists() or is_outdated(run, split):
            return None
        rows = pq.read_table(file, filters=[("split", "==", split)])
        if not len(rows):
            return None
        values = rows[PREDICTED[task]].to_pylist()
        return dict(zip(rows["slide_id"].to_pylist(), np.array(values, np.float64), strict=True))
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise _unreadable(file, error) from None


def is_outdated(run: Path, split: str) -> bool:
    """Another checkpoint gave the split's scores than the one that is chosen now, as far as that is told."""
    epochs = scored_epochs(run / "scores.parquet")
    if split not in epochs:
        return False
    try:
        return epochs[split] != read_best_state(run).get("epoch")
    except TrainerError:  # Its checkpoints were removed; what it scored is as good as before.
        return False


def read_given(file: Path, cohort: Cohort) -> dict[str, Floats]:
    """slide_id to predictions (C,), from a file that a user gives.

    Args:
        file: Parquet or CSV with slide_id and `probs` (of numbers: `values`), a list, or a column `probs_NAME` for each
            class or column; of two classes the second is enough.
        cohort: the run's.

    Raises:
        TrainerError: not readable, other columns, slides twice or not of the cohort, or values that are none.
    """
    names, table = _read_columns(file, cohort)
    known = {case.slide_id for case in cohort.cases}
    slide_ids = [match_name(name, known) for name in names]
    if twice := [slide_id for slide_id, num in Counter(slide_ids).items() if num > 1]:
        raise TrainerError(f"--scores {file}: {len(twice)} slides are there twice: {few(twice)}; keep one row of each")
    if unknown := sorted(set(slide_ids) - known):
        raise TrainerError(
            f"--scores {file}: {len(unknown)} slides are not of the run's cohort: {few(unknown)}; leave them out"
        )
    if bad := [slide_ids[i] for i in np.flatnonzero(~np.isfinite(table).all(1))]:
        raise TrainerError(f"--scores {file}: {len(bad)} slides have scores that are not numbers: {few(bad)}")
    if cohort.task != "regression":
        is_off = ((table < 0) | (table > 1)).any(1)
        if cohort.task == "classes":
            is_off |= np.abs(table.sum(1) - 1) > _OFF
        if off := [slide_ids[i] for i in np.flatnonzero(is_off)]:
            summed = " that add up to 1" if cohort.task == "classes" else ""
            raise TrainerError(
                f"--scores {file}: expected probabilities from 0 to 1{summed}, {len(off)} slides have others: "
                f"{few(off)}; turn logits into probabilities first"
            )
    return dict(zip(slide_ids, table, strict=True))


def refuse_missing(file: Path, given: Collection[str], cohort: Cohort, split: str, why: str = "") -> None:
    """Raises TrainerError where slides of the split have no score; `why` says what the split is needed for."""
    if missing := [slide_id for slide_id in cohort.of(split) if slide_id not in given]:
        raise TrainerError(
            f"--scores {file}: {len(missing)} of {len(cohort.of(split))} slides of {split} are missing{why}: "
            f"{few(missing)}; add them"
        )


def _read_columns(file: Path, cohort: Cohort) -> tuple[list[str], Floats]:
    """Names of slides, and predictions (n, C)."""
    predicted, names = PREDICTED[cohort.task], cohort.outputs
    try:
        columns = _read_csv(file) if file.suffix.lower() == ".csv" else pq.read_table(file).to_pydict()
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise _unreadable(file, error) from None
    wanted = [f"{predicted}_{name}" for name in names]
    is_short = cohort.task == "classes" and len(names) == 2 and wanted[0] not in columns
    single = wanted[1:] if is_short else wanted
    is_list = predicted in columns
    if "slide_id" not in columns or not (is_list or set(single) <= set(columns)):
        listed = f" (or {predicted}, a list)" if file.suffix.lower() != ".csv" else ""
        raise TrainerError(
            f"--scores {file}: expected the columns slide_id, {', '.join(wanted)}{listed}, got {', '.join(columns)}"
        )
    slide_ids = [str(name).strip() for name in columns["slide_id"]]
    if not slide_ids:
        raise TrainerError(f"--scores {file}: no rows; expected one for each slide")
    rows = columns[predicted] if is_list else list(zip(*(columns[name] for name in single), strict=True))
    width = len(names) if is_list else len(single)
    values = [list(map(_number, row)) if isinstance(row, list | tuple) else [] for row in rows]
    if bad := [name for name, row in zip(slide_ids, values, strict=True) if len(row) != width]:
        raise TrainerError(
            f"--scores {file}: {predicted}: expected {width} numbers a slide ({', '.join(names)}), {len(bad)} slides "
            f"have not: {few(bad)}"
        )
    table = np.array(values, np.float64)
    return slide_ids, table if table.shape[1] == len(names) else np.stack([1 - table[:, 0], table[:, 0]], axis=1)


def _read_csv(file: Path) -> dict[str, list[str]]:
    with file.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        names, rows = list(reader.fieldnames or ()), list(reader)
    return {name: [(row[name] or "").strip() for row in rows] for name in names}


def _number(value: object) -> float:
    """NaN for what is none."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _unreadable(file: Path, error: Exception) -> TrainerError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0]
    return TrainerError(f"{file}: scores cannot be read ({reason}); expected Parquet or CSV")
