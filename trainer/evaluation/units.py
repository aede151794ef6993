"""What is evaluated: slides, or the specimens and patients that they belong to, with truths and predictions.

Pure arithmetic on a split's scores. One thing to know before changing it: `patients` stays with the units at each
level, because patients are what intervals draw wherever one has several units.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from trainer.cohort import Case, Cohort
from trainer.measures.resampling import clusters_of
from trainer.targets import Task

Floats = NDArray[np.float64]
Level = Literal["slides", "specimens", "patients"]
LEVELS: tuple[Level, ...] = get_args(Level)
Pool = Literal["mean", "max"]


@dataclass(frozen=True, kw_only=True)
class Units:
    """Slides, specimens or patients of one split."""

    level: Level
    task: Task
    names: tuple[str, ...]
    """Of the classes, or of the columns."""
    ids: tuple[str, ...]
    patients: tuple[str, ...]
    """Of each unit."""
    truth_NT: Floats
    """(N, 1) of classes, else (N, C), NaN where it is not known."""
    found_NC: Floats
    """Probabilities, or numbers in the columns' units."""
    num_differing: int = 0
    """Units whose slides have different truths."""
    num_left_out: int = 0
    """Of these, the ones without any truth, as slides of several of three classes."""

    @property
    def labels_N(self) -> NDArray[np.int64]:
        """The class of each unit (task classes)."""
        return self.truth_NT[:, 0].astype(np.int64)

    def clusters(self, keep_N: NDArray[np.bool_] | None = None) -> NDArray[np.int64] | None:
        """The patient of each unit, or of those kept, for a bootstrap; None where each patient has one."""
        names = np.array(self.patients)
        return clusters_of(names if keep_N is None else names[keep_N])

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "Units":
        """Some of them, in this order."""
        return Units(
            level=self.level,
            task=self.task,
            names=self.names,
            ids=tuple(self.ids[i] for i in rows),
            patients=tuple(self.patients[i] for i in rows),
            truth_NT=self.truth_NT[rows],
            found_NC=self.found_NC[rows],
        )


def units_of(scores: dict[str, Floats], cohort: Cohort, split: str) -> Units:
    """The slides of a split that are scored, in the cohort's order.

    Args:
        scores: slide_id to predictions (C,).
        cohort: the run's.
        split: which slides.
    """
    cases = [case for slide_id, case in cohort.of(split).items() if slide_id in scores]
    num_targets = 1 if cohort.task == "classes" else len(cohort.columns)
    return Units(
        level="slides",
        task=cohort.task,
        names=cohort.outputs,
        ids=tuple(case.slide_id for case in cases),
        patients=tuple(case.patient_id for case in cases),
        truth_NT=np.array([case.targets for case in cases], np.float64).reshape(-1, num_targets),
        found_NC=np.array([scores[case.slide_id] for case in cases], np.float64).reshape(-1, len(cohort.outputs)),
    )


def levels_of(slides: Units, cases: dict[str, Case], pool: Pool) -> list[Units]:
    """The slides, and the specimens and patients where one of them has several slides.

    Args:
        slides: from `units_of`.
        cases: slide_id to case.
        pool: what becomes of the predictions, and of true numbers, of a unit's slides.
    """
    found = [at_level(slides, cases, level, pool) for level in LEVELS]
    return [units for units in found if units is slides or len(units.ids) + units.num_left_out < len(slides.ids)]


def at_level(slides: Units, cases: dict[str, Case], level: Level, pool: Pool) -> Units:
    """The slides as units of one level; arguments as for `levels_of`."""
    if level == "slides" or not slides.ids:
        return slides
    # A specimen is one of its patient's: numbers of specimens may begin anew with each patient.
    of_slides = [cases[slide_id] for slide_id in slides.ids]
    keys = [(case.patient_id, case.specimen_id if level == "specimens" else "") for case in of_slides]
    return _pooled(slides, keys, level, pool)


def _pooled(slides: Units, keys: list[tuple[str, str]], level: Level, pool: Pool) -> Units:
    """Predictions by `pool`. Truths: of two classes, and of columns of 0 and 1, the higher; of more classes none where
    they differ; of numbers by `pool`."""
    distinct = sorted(set(keys))
    number = {key: i for i, key in enumerate(distinct)}
    unit_n = np.array([number[key] for key in keys])
    order_n = np.argsort(unit_n, kind="stable")
    starts = np.flatnonzero(np.diff(unit_n[order_n], prepend=-1))
    found_nc, truth_nt = slides.found_NC[order_n], slides.truth_NT[order_n]
    sizes = np.diff(np.append(starts, len(order_n)))[:, None]
    mean_uc, max_uc = np.add.reduceat(found_nc, starts) / sizes, np.maximum.reduceat(found_nc, starts)
    found_UC = mean_uc if pool == "mean" else max_uc
    if slides.task == "classes" and pool == "max":
        # The positive class decides between two; of more the maxima are made to add up to 1 again.
        if len(slides.names) == 2:
            found_UC = np.stack([1 - max_uc[:, 1], max_uc[:, 1]], axis=1)
        else:
            found_UC = max_uc / max_uc.sum(1, keepdims=True)
    low_UT, high_UT = np.fmin.reduceat(truth_nt, starts), np.fmax.reduceat(truth_nt, starts)
    differs_U: NDArray[np.bool_] = np.any(low_UT < high_UT, axis=1)
    truth_UT = high_UT
    kept_U: NDArray[np.bool_] = np.ones(len(distinct), np.bool_)
    if slides.task == "regression" and pool == "mean":
        num_known = np.add.reduceat((~np.isnan(truth_nt)).astype(np.float64), starts)
        truth_UT = np.add.reduceat(np.nan_to_num(truth_nt), starts) / np.where(num_known > 0, num_known, np.nan)
    elif slides.task == "classes" and len(slides.names) > 2:
        kept_U = np.logical_not(differs_U)
    kept = np.flatnonzero(kept_U)
    return Units(
        level=level,
        task=slides.task,
        names=slides.names,
        ids=tuple(distinct[i][1] or distinct[i][0] for i in kept),
        patients=tuple(distinct[i][0] for i in kept),
        truth_NT=truth_UT[kept],
        found_NC=found_UC[kept],
        num_differing=int(differs_U.sum()),
        num_left_out=int((~kept_U).sum()),
    )
