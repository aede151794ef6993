"""What the rows of a sweep say together: means over splits, differences between methods, trends over K. Pure.

One thing to know before changing it: two settings are compared over the splits that both have done, never mean against
mean, since splits differ from each other by more than methods do.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from trainer.sweep.grid import END_TO_END
from trainer.sweep.results import EpochRow, Row
from trainer.sweep.statistics import (
    Decay,
    Difference,
    Floats,
    Spread,
    fit_decay,
    paired_difference,
    rank_correlation,
    spread,
)


class Series(NamedTuple):
    """What varies beside K and the split."""

    method: str
    precision: str
    nproc: int


class Setting(NamedTuple):
    """What a row of the table stands for."""

    series: Series
    k: int | None
    tiles: str

    @property
    def k_text(self) -> str:
        """As it is written in a table."""
        return f"{self.k:,}" if self.k is not None else {"own": "its own"}.get(self.tiles, self.tiles)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the table."""

    setting: Setting
    num_done: int
    num_runs: int
    val: Spread
    """The best validation measure, as in the paper."""
    test: Spread
    loss: Spread
    """The last epoch's training loss."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One setting less another one, over the splits that both have."""

    setting: Setting
    against: Setting
    val: Difference
    test: Difference


@dataclass(frozen=True, kw_only=True)
class Trend:
    """What happens to a series as K grows."""

    series: Series
    ks: tuple[int, ...]
    loss_rho: float
    """Spearman's, of K and the mean final training loss; -1 where it falls at every step."""
    decay: Decay | None
    """a + b * exp(-c * K) through the mean final losses; None where the data does not settle it."""
    val: Difference
    """Largest K less smallest."""
    test: Difference


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All of it."""

    reference: str
    """The method that others are compared with."""
    lines: list[Line]
    comparisons: list[Comparison]
    trends: list[Trend]


def summarise(rows: Sequence[Row], reference: str | None = None) -> Summary:
    """Finds all of it.

    Args:
        rows: of all runs, done or not.
        reference: a method; end_to_end if there is such a run, else the first one, if not given.
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    chosen = reference or (END_TO_END if END_TO_END in methods or not methods else methods[0])
    settings = by_setting(rows)
    lines = [_line(setting, of_setting) for setting, of_setting in settings.items()]
    comparisons = []
    for setting, of_setting in settings.items():
        if setting.series.method == chosen or (against := _counterpart(setting, chosen, list(settings))) is None:
            continue
        val, test = _differences(of_setting, settings[against])
        comparisons.append(Comparison(setting=setting, against=against, val=val, test=test))
    return Summary(reference=chosen, lines=lines, comparisons=comparisons, trends=_trends(settings))


def by_setting(rows: Sequence[Row]) -> dict[Setting, list[Row]]:
    """The rows of each setting, method by method, K ascending."""
    methods, precisions = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("method", "precision"))
    found: dict[Setting, list[Row]] = {}
    for row in rows:
        found.setdefault(_setting_of(row), []).append(row)

    def order(setting: Setting) -> tuple[Any, ...]:
        series = setting.series
        place = methods.index(series.method), precisions.index(series.precision), series.nproc
        return *place, setting.k is None, setting.k or 0

    return {setting: found[setting] for setting in sorted(found, key=order)}


def curves_by_k(epoch_rows: Sequence[EpochRow], series: Series) -> dict[Setting, Floats]:
    """Training losses of a series by epoch, K ascending: (splits, epochs), NaN where a run has no such epoch."""
    found: dict[Setting, dict[str, dict[int, float]]] = {}
    for row in epoch_rows:
        if (setting := _setting_of(row)).series == series:
            loss = math.nan if row.train_loss is None else row.train_loss
            found.setdefault(setting, {}).setdefault(row.run, {})[row.epoch] = loss
    curves = {}
    for setting in sorted(found, key=lambda setting: (setting.k is None, setting.k or 0)):
        num_epochs = 1 + max(max(losses) for losses in found[setting].values())
        curves[setting] = np.array(
            [[losses.get(epoch, math.nan) for epoch in range(num_epochs)] for losses in found[setting].values()]
        )
    return curves


def values_of(rows: Sequence[Row], value: Callable[[Row], float | None]) -> Floats:
    """One number of each run that is done; NaN where it has none."""
    return np.array([value(row) for row in rows if row.state == "done"], np.float64)


def _setting_of(row: Row | EpochRow) -> Setting:
    return Setting(Series(row.method, row.precision, row.nproc), row.k, row.tiles)


def _line(setting: Setting, rows: Sequence[Row]) -> Line:
    return Line(
        setting=setting,
        num_done=sum(row.state == "done" for row in rows),
        num_runs=len(rows),
        val=spread(values_of(rows, lambda row: row.val_best)),
        test=spread(values_of(rows, lambda row: row.test)),
        loss=spread(values_of(rows, lambda row: row.final_train_loss)),
    )


def _counterpart(setting: Setting, reference: str, settings: Sequence[Setting]) -> Setting | None:
    """The reference with the same K, precision and processes; where a method has no such K, with its largest."""
    series = setting.series._replace(method=reference)
    same = [other for other in settings if other.series == series]
    if exact := [other for other in same if (other.k, other.tiles) == (setting.k, setting.tiles)]:
        return exact[0]
    is_without_k = setting.tiles == "own" or all(other.tiles == "own" for other in same)
    return same[-1] if same and is_without_k else None


def _differences(ours: Sequence[Row], theirs: Sequence[Row]) -> tuple[Difference, Difference]:
    """Of the best validation measure, and of the test measure."""
    by_split = {row.split: row for row in theirs if row.state == "done"}
    pairs = [(row, by_split[row.split]) for row in ours if row.state == "done" and row.split in by_split]

    def column(value: Callable[[Row], float | None], side: int) -> list[Any]:
        return [value(pair[side]) for pair in pairs]

    val, test = (
        paired_difference(
            np.array(column(value, 0), np.float64),
            np.array(column(value, 1), np.float64),
            np.array(column(overlap, 0), np.float64),
        )
        for value, overlap in (
            (lambda row: row.val_best, lambda row: row.val_overlap),
            (lambda row: row.test, lambda row: row.overlap),
        )
    )
    return val, test


def _trends(settings: dict[Setting, list[Row]]) -> list[Trend]:
    """Of each series with several K that have runs done."""
    trends = []
    for series in dict.fromkeys(setting.series for setting in settings):
        mine = {
            setting.k: rows
            for setting, rows in settings.items()
            if setting.series == series and setting.k is not None and any(row.state == "done" for row in rows)
        }
        if len(mine) < 2:
            continue
        ks = sorted(mine)
        losses = [spread(values_of(mine[k], lambda row: row.final_train_loss)).mean for k in ks]
        val, test = _differences(mine[ks[-1]], mine[ks[0]])
        trends.append(
            Trend(
                series=series,
                ks=tuple(ks),
                loss_rho=rank_correlation(ks, losses),
                decay=fit_decay(ks, losses),
                val=val,
                test=test,
            )
        )
    return trends
