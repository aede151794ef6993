"""From the cells of the labels file to targets: what is known of each slide, as numbers.

Rows in, numbers out; knows no manifest and no model. Targets are, by task: classes, the class's position among the
classes; multilabel, 1 (yes) or 0 (no) for each column; regression, a number for each column. One thing to know before
changing it: what is not known is the one object `math.nan`, so that equal targets compare equal.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from trainer.config import Head as HeadConfig
from trainer.errors import TrainerError

Task = Literal["classes", "multilabel", "regression"]
Targets = tuple[float, ...]
_OTHER_USE = ("slide_id", "specimen_id", "patient_id", "split", "num_tiles")
_MAX_NAMED = 5
_NUM_STRATA = 4


def read_labels(file: Path, head: HeadConfig) -> list[dict[str, str]]:
    """The rows of the labels file, with stripped cells.

    Raises:
        TrainerError: not readable, without rows, or without the columns that the head names.
    """
    if taken := [column for column in head.columns if column in _OTHER_USE]:
        raise TrainerError(f"head.columns is {head.columns}: expected columns to predict, {taken} say something else")
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = [{k: (v or "").strip() for k, v in row.items() if k} for row in csv.DictReader(stream)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TrainerError(f"--labels {file}: not readable as CSV ({error})") from None
    wanted = ("slide_id", *head.columns)
    if not rows or not set(wanted) <= set(rows[0]):
        found = list(rows[0]) if rows else "no rows"
        raise TrainerError(
            f"--labels {file}: expected the columns {', '.join(wanted)} and at least one row, got {found}; "
            "head.columns says what to predict"
        )
    return rows


def parse_targets(
    rows: Sequence[dict[str, str]], head: HeadConfig, where: str
) -> tuple[dict[str, Targets], tuple[str, ...]]:
    """slide_id to targets, and the names of the classes in order (none for the other tasks).

    Args:
        rows: of the labels file, or of a run's cohort.
        head: the task and its columns.
        where: the file, for errors.

    Raises:
        TrainerError: a cell that says nothing for the task.
    """
    if head.task == "classes":
        (column,) = head.columns
        if bare := [row["slide_id"] for row in rows if not row[column]]:
            raise TrainerError(f"{where}: {len(bare)} slides have an empty {column}: {few(bare)}")
        classes = tuple(sorted({row[column] for row in rows}, key=class_order))
        return {row["slide_id"]: (float(classes.index(row[column])),) for row in rows}, classes
    by_column = []
    for column in head.columns:
        values = [_number(row[column], head.task) for row in rows]
        if bad := [row for row, value in zip(rows, values, strict=True) if value is None]:
            expected = "0, 1 or empty" if head.task == "multilabel" else "a number or empty"
            named = few([f"{row['slide_id']} ({row[column]!r})" for row in bad])
            raise TrainerError(f"{where}: column {column}: expected {expected}, {len(bad)} slides have not: {named}")
        if all(value is not None and math.isnan(value) for value in values):
            named = few([row["slide_id"] for row in rows])
            raise TrainerError(f"{where}: column {column} is empty for all {len(rows)} slides: {named}")
        by_column.append([value for value in values if value is not None])
    return {row["slide_id"]: tuple(values) for row, *values in zip(rows, *by_column, strict=True)}, ()


def cells_of(targets: Targets, task: Task, classes: tuple[str, ...]) -> list[str]:
    """What `parse_targets` reads as these targets, bit for bit."""
    match task:
        case "classes":
            return [classes[round(target)] for target in targets]
        case "multilabel":
            return ["" if math.isnan(target) else f"{target:.0f}" for target in targets]
        case "regression":
            return ["" if math.isnan(target) else repr(target) for target in targets]


def refuse_unlearnable(
    training: dict[str, Targets], head: HeadConfig, classes: tuple[str, ...], where: str
) -> list[str]:
    """Looks whether the training slides tell enough of every class or column.

    Args:
        training: slide_id to targets of the training slides.
        head: the task and its columns.
        classes: their names.
        where: the file, for errors.

    Returns:
        Sentences to tell the user.

    Raises:
        TrainerError: fewer than two classes to train on, or a column with fewer than two values.
    """
    if head.task == "classes":
        present = {round(targets[0]) for targets in training.values()}
        if len(present) < 2:
            raise TrainerError(
                f"{where}: the training split has {len(present)} of the classes {list(classes)}, expected at least 2"
            )
        absent = [name for i, name in enumerate(classes) if i not in present]
        return [f"no training slide has the class {few(absent)}: it cannot be learned"] if absent else []
    for i, column in enumerate(head.columns):
        known = {slide_id: targets[i] for slide_id, targets in training.items() if not math.isnan(targets[i])}
        if len(set(known.values())) < 2:
            value = f"only the value {next(iter(known.values())):g}" if known else "no value"
            named = few(list(known or training))
            raise TrainerError(
                f"{where}: column {column} has {value} among the {len(training)} training slides ({named}), expected "
                "at least 2; leave it out of head.columns, or split otherwise"
            )
    return []


def refuse_twins(classes: Sequence[str], where: str) -> None:
    """Looks whether two classes are one, written in two ways.

    Raises:
        TrainerError: names that differ by case or space alone, or numbers of one value.
    """
    twins: dict[str | float, list[str]] = {}
    for name in classes:
        kind, value, _ = class_order(name)
        is_number = kind == 0 and math.isfinite(value) and "_" not in name  # Python reads 1_0 as ten.
        twins.setdefault(value if is_number else " ".join(name.casefold().split()), []).append(name)
    if alike := [" and ".join(map(repr, names)) for names in twins.values() if len(names) > 1]:
        raise TrainerError(f"{where}: one class is written in several ways: {few(alike)}; write it in one")


def strata_of(targets: dict[str, Targets], task: Task, classes: tuple[str, ...]) -> dict[str, str]:
    """slide_id to the name of what splits shall have alike: names ordered as by `class_order`.

    The class; the rarest column that is a yes, as rare labels are the ones that a split can miss (after Sechidis,
    Tsoumakas and Vlahavas, On the stratification of multi-label data, 2011, who distribute the rarest first); the
    quarter of the slides that the first column puts it into.
    """
    if task == "classes":
        return {slide_id: classes[round(values[0])] for slide_id, values in targets.items()}
    values_NC = np.array(list(targets.values()))
    if task == "multilabel":
        is_yes_NC = values_NC == 1
        rarity_C = np.empty(values_NC.shape[1], np.int64)  # 1 for the commonest.
        rarity_C[np.argsort(-is_yes_NC.sum(0), kind="stable")] = np.arange(1, len(rarity_C) + 1)
        stratum_N = (is_yes_NC * rarity_C).max(1)
    else:
        first_N = values_NC[:, 0]
        quarters = np.nanquantile(first_N, np.arange(1, _NUM_STRATA) / _NUM_STRATA)
        stratum_N = np.where(np.isnan(first_N), -1, np.digitize(first_N, quarters))
    return {slide_id: str(stratum) for slide_id, stratum in zip(targets, stratum_N, strict=True)}


def class_order(name: str) -> tuple[int, float, str]:
    """Numbers by value, before words by letter."""
    try:
        value = float(name)
    except ValueError:
        value = math.nan
    return (1, 0.0, name) if math.isnan(value) else (0, value, name)


def few(names: Sequence[str]) -> str:
    """The first names of a list that may be long."""
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _number(cell: str, task: Task) -> float | None:
    """The cell's value, NaN if it is empty, None if it is no value of the task."""
    if not cell:
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        return None
    is_good = value in (0, 1) if task == "multilabel" else math.isfinite(value)
    return value if is_good else None
