"""What predictions are worth, by task: the measure that chooses a checkpoint, and what `result.json` says.

Pure arithmetic on arrays of a split's slides; the measures themselves are in `statistics` and `agreement`. One thing to
know before changing it: over several columns the mean is of those where the measure is defined, so a column with one
value in a small split costs its own number alone.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, assert_never

import numpy as np
from numpy.typing import ArrayLike

from trainer.measures.agreement import bootstrap_r2, mean_error, r2, spearman
from trainer.measures.multiclass import one_versus_rest
from trainer.measures.resampling import clusters_of
from trainer.measures.statistics import Floats, Interval, auc, bootstrap_auc, by_column, macro_auc, mean_known
from trainer.targets import Task

Merit = Literal["auc", "r2"]
MERITS: dict[Task, Merit] = {"classes": "auc", "multilabel": "auc", "regression": "r2"}
"""What chooses a checkpoint."""
PREDICTED: dict[Task, str] = {"classes": "probs", "multilabel": "probs", "regression": "values"}
"""What predictions are called in files."""


def find_merit(task: Task, truth: Floats, found: Floats) -> tuple[Merit, float]:
    """The measure that chooses a checkpoint: its name and its value, higher is better; NaN where it is not defined.

    "auc" of two classes, its one-vs-rest mean over more, its mean over columns; "r2", the mean over columns.

    Args:
        task: what is predicted.
        truth: targets (n, 1) of classes, else (n, C), NaN where they are not known.
        found: predictions (n, C).
    """
    match task:
        case "classes":
            return "auc", macro_auc(truth[:, 0].astype(np.int64), found)
        case "multilabel":
            return "auc", mean_known(by_column(auc, truth, found))
        case "regression":
            return "r2", mean_known(by_column(r2, truth, found))
        case _:
            assert_never(task)


def measure_all(
    task: Task, names: tuple[str, ...], truth: Floats, found: Floats, patients: ArrayLike | None = None
) -> dict[str, Any]:
    """Measures, 95 % intervals and counts, fit for JSON: null where one is not defined.

    `ci_by` says what the intervals' bootstrap drew: slides, or patients where one has several slides.

    Args:
        task: what is predicted.
        names: of the classes, or of the columns.
        truth: as in `find_merit`.
        found: as in `find_merit`.
        patients: of each slide, (n,); each slide is its own if not given.
    """
    clusters = None if patients is None else clusters_of(patients)
    drawn = {"ci_by": "slides" if clusters is None else "patients"}
    if task == "classes":
        _, merit = find_merit(task, truth, found)
        labels = truth[:, 0].astype(np.int64)
        if len(names) == 2:
            interval = bootstrap_auc(labels, found[:, 1], clusters=clusters)
        else:
            interval = one_versus_rest(labels, found, clusters=clusters).macro_interval
        counts = np.bincount(labels, minlength=len(names)).tolist()
        return {"auc": rounded(merit), "auc_ci": pair(interval), "num_per_class": counts, **drawn}

    result: dict[str, Any] = {"auc": None, "auc_ci": [None, None]}
    measures: dict[str, Callable[[Floats, Floats], float]]
    bootstrap: Callable[..., Interval]
    if task == "multilabel":
        measures, bootstrap = {"auc": auc}, bootstrap_auc
        counts = [[int((values == target).sum()) for target in (0, 1)] for values in truth.T]
    else:
        measures, bootstrap = {"r2": r2, "mae": mean_error, "spearman": spearman}, bootstrap_r2
        counts = (~np.isnan(truth)).sum(0).tolist()
    for name, measure in measures.items():
        values = by_column(measure, truth, found)
        result[name] = rounded(mean_known(values))
        result[f"{name}_by_column"] = dict(zip(names, map(rounded, values), strict=True))
    # A mean over several columns has none: its replicates would have to draw slides for all columns at once.
    intervals, main = [], MERITS[task]
    for truth_n, found_n in zip(truth.T, found.T, strict=True):
        known = ~np.isnan(truth_n)
        of_known = None if clusters is None else clusters_of(clusters[known])
        intervals.append(pair(bootstrap(truth_n[known], found_n[known], clusters=of_known)))
    result[f"{main}_ci"] = intervals[0] if len(names) == 1 else [None, None]
    result[f"{main}_ci_by_column"] = dict(zip(names, intervals, strict=True))
    return {**result, "num_by_column": dict(zip(names, counts, strict=True)), **drawn}


def rank_of(merit: Sequence[float | None]) -> tuple[float, ...]:
    """Orders epochs by (merit, minus loss), higher is better; what is not defined is below all that is."""
    return tuple(-math.inf if value is None else value for value in merit)


def pair(interval: Interval) -> list[float | None]:
    """An interval for JSON, as `rounded`."""
    return [rounded(end) for end in interval]


def rounded(value: float) -> float | None:
    """A number for JSON, to four digits or decimals; null for NaN, which JSON does not know."""
    if not np.isfinite(value):
        return None
    return round(value, 4) if abs(value) >= 0.1 else float(f"{value:.4g}")
