"""A sweep's tables: as Markdown and CSV to keep, on the terminal to read, as plain values for the result.

One thing to know before changing it: the two measures stand side by side and are called what they are. The best
validation value was chosen as the best, so it is higher than what new slides would give; the test value is not.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table as RichTable

from trainer.measures.merits import Merit
from trainer.measures.statistics import Interval
from trainer.reports.findings import Table
from trainer.sweep.results import to_csv
from trainer.sweep.statistics import Difference, Spread
from trainer.sweep.summary import Comparison, Line, Series, Setting, Summary, Trend

MEASURES: dict[Merit, str] = {"auc": "AUC", "r2": "R²"}
TITLES = {
    "end_to_end": "end to end",
    "frozen_gma": "frozen encoder, GMA",
    "frozen_transmil": "frozen encoder, TransMIL",
    "tile_mean": "tile-level, mean",
    "tile_max": "tile-level, max",
    "max_pool": "max-pool MIL",
}
"""Methods as tables call them; others by their own name."""


def main_table(summary: Summary, merit: Merit) -> Table:
    """Table 1: means over splits, with the standard deviation."""
    settings = [line.setting for line in summary.lines]
    axes = _axes(settings)
    name = MEASURES[merit]
    header = (*(title for title, _ in axes), "Runs", f"Best validation {name}", f"Test {name}", "Final training loss")
    rows = [
        (
            *(cell(line.setting) for _, cell in axes),
            _count(line),
            spread_text(line.val),
            spread_text(line.test),
            spread_text(line.loss),
        )
        for line in summary.lines
    ]
    return Table("Mean (standard deviation) over splits", header, rows)


def comparison_table(summary: Summary, merit: Merit) -> Table | None:
    """Paired differences from the reference; None without another method."""
    if not summary.comparisons:
        return None
    axes = _axes([line.setting for line in summary.lines])
    name, rows = MEASURES[merit], []
    for comparison in summary.comparisons:
        own = comparison.setting
        against = f" (reference: K {comparison.against.k_text})" if comparison.against.k != own.k else ""
        labels = [cell(own) for _, cell in axes]
        for what, found in ((f"test {name}", comparison.test), (f"best validation {name}", comparison.val)):
            rows.append((f"{labels[0]}{against}", *labels[1:], what, *difference_cells(found)))
    title = f"Differences from {title_of(summary.reference)}, split by split"
    return Table(title, (*(title for title, _ in axes), "Measure", *_OF_DIFFERENCE), rows)


def trend_table(summary: Summary, merit: Merit) -> Table | None:
    """What happens as K grows; None where no series has two K."""
    if not summary.trends:
        return None
    several = [Setting(trend.series, None, "fixed") for trend in summary.trends]
    axes = [(title, cell) for title, cell in _axes(several) if title != "K"]
    rows = [
        (
            *(cell(setting) for _, cell in axes),
            f"{trend.ks[0]:,} to {trend.ks[-1]:,}",
            number(trend.loss_rho, "+.2f"),
            _verdict(trend),
            *difference_cells(trend.test),
        )
        for setting, trend in zip(several, summary.trends, strict=True)
    ]
    loss = ("K", "ρ(K, loss)", f"Test {MEASURES[merit]} from smallest to largest K")
    return Table("As K grows", (*(title for title, _ in axes), *loss, *_OF_DIFFERENCE), rows)


def trend_sentences(summary: Summary, merit: Merit) -> list[str]:
    """Whether training loss falls with K, and whether the measure does not, for each series."""
    said, names = [], series_names([line.setting.series for line in summary.lines])
    for trend in summary.trends:
        found, (first, *_, last) = trend.test, trend.ks
        said.append(
            f"{names[trend.series]}: the mean final training loss {_loss_verdict(trend)}; test {MEASURES[merit]} at K "
            f"{last:,} less at K {first:,}: {number(found.mean, '+.3f')}{_interval_text(found.corrected)}: "
            f"{_verdict(trend)}."
        )
    return said


def to_markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """The tables one after the other, then the notes."""
    parts = []
    for table in tables:
        lines = [
            f"## {table.title}",
            "",
            _md_row(table.header),
            _md_row(["---", *("---:" for _ in table.header[1:])]),
            *(_md_row(row) for row in table.rows),
        ]
        parts.append("\n".join(lines))
    parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(part for part in parts if part) + "\n"


def main_csv(summary: Summary, merit: Merit) -> str:
    """Table 1 with one number a cell, the differences from the reference beside it."""
    differences = {comparison.setting: comparison for comparison in summary.comparisons}
    records = [_record(line, differences.get(line.setting), merit) for line in summary.lines]
    header = list(records[0]) if records else []
    return to_csv(header, (record.values() for record in records))


def print_table(table: Table) -> RichTable:
    """For the terminal."""
    printed = RichTable(title=table.title, title_justify="left")
    for i, name in enumerate(table.header):
        printed.add_column(name, justify="left" if i == 0 else "right")
    for row in table.rows:
        printed.add_row(*row)
    return printed


def to_result(summary: Summary, merit: Merit) -> dict[str, Any]:
    """Differences and trends, fit for JSON."""
    return {
        "reference": summary.reference,
        "differences": [
            {
                **_axes_record(comparison.setting),
                f"test_{merit}": _difference_record(comparison.test),
                f"best_val_{merit}": _difference_record(comparison.val),
            }
            for comparison in summary.comparisons
        ],
        "trends": [
            {
                **trend.series._asdict(),
                "ks": list(trend.ks),
                "loss_rho": _plain(trend.loss_rho),
                "loss_fit": trend.decay and trend.decay._asdict(),
                f"test_{merit}": _difference_record(trend.test),
                f"best_val_{merit}": _difference_record(trend.val),
                "verdict": _verdict(trend),
            }
            for trend in summary.trends
        ],
    }


def title_of(method: str) -> str:
    """A method as tables call it."""
    return TITLES.get(method, method)


def number(value: float, form: str = ".3f") -> str:
    """A number, or a dash."""
    return format(value, form).replace("-", "−") if math.isfinite(value) else "–"


def spread_text(found: Spread) -> str:
    """As 0.812 (0.031)."""
    return f"{number(found.mean)} ({number(found.std)})" if found.num else "–"


def difference_cells(found: Difference) -> tuple[str, ...]:
    """For the columns `_OF_DIFFERENCE`."""
    p = f"{found.p:.3f}" if found.p >= 0.001 else "< 0.001" if math.isfinite(found.p) else "–"
    return number(found.mean, "+.3f"), _ends(found.corrected), p, _ends(found.bootstrap), str(found.num)


_OF_DIFFERENCE = ("Difference", "95 %, corrected t", "p", "95 %, bootstrap", "Splits")
Cell = Callable[[Setting], str]


def _axes(settings: Sequence[Setting]) -> list[tuple[str, Cell]]:
    """Columns that tell settings apart: the method always, others where they differ."""
    found: list[tuple[str, Cell]] = [("Method", lambda setting: title_of(setting.series.method))]
    if len({(setting.k, setting.tiles) for setting in settings}) > 1:
        found.append(("K", lambda setting: setting.k_text))
    if len({setting.series.precision for setting in settings}) > 1:
        found.append(("Precision", lambda setting: setting.series.precision))
    if len({setting.series.nproc for setting in settings}) > 1:
        found.append(("Processes", lambda setting: str(setting.series.nproc)))
    return found


def _count(line: Line) -> str:
    return str(line.num_done) if line.num_done == line.num_runs else f"{line.num_done} of {line.num_runs}"


def _loss_verdict(trend: Trend) -> str:
    rho = trend.loss_rho
    if math.isnan(rho):
        return "is the same for all K"
    falls = "does not fall with K" if rho >= 0 else "falls with K, not at every step"
    falls = "falls at every step of K" if rho < -1 + 1e-9 else falls
    return f"{falls} (Spearman's rho {number(rho, '+.2f')} over {len(trend.ks)} K)"


def _verdict(trend: Trend) -> str:
    """Whether the test measure falls from the smallest to the largest K."""
    interval = trend.test.corrected
    if not math.isfinite(trend.test.mean):
        return "not known"
    if not math.isfinite(interval.low):
        return "one split, no interval"
    return "rises" if interval.low > 0 else "falls" if interval.high < 0 else "neither a fall nor a rise is shown"


def _ends(interval: Interval) -> str:
    return f"{number(interval.low, '+.3f')} to {number(interval.high, '+.3f')}" if math.isfinite(interval.low) else "–"


def _interval_text(interval: Interval) -> str:
    if not math.isfinite(interval.low):
        return ""
    return f" (95 % interval {_ends(interval)})"


def series_names(series: Sequence[Series]) -> dict[Series, str]:
    """Series as figures and sentences call them: by method, and by what else tells them apart."""
    precisions, nprocs = ({getattr(one, name) for one in series} for name in ("precision", "nproc"))
    return {
        one: ", ".join(
            [title_of(one.method)]
            + [one.precision] * (len(precisions) > 1)
            + [_processes(one.nproc)] * (len(nprocs) > 1)
        )
        for one in series
    }


def _processes(nproc: int) -> str:
    return "1 process" if nproc == 1 else f"{nproc} processes"


def _md_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _axes_record(setting: Setting) -> dict[str, Any]:
    return {**setting.series._asdict(), "k": setting.k, "tiles": setting.tiles}


def _record(line: Line, comparison: Comparison | None, merit: Merit) -> dict[str, Any]:
    record = {**_axes_record(line.setting), "num_done": line.num_done, "num_runs": line.num_runs}
    for name, found in ((f"best_val_{merit}", line.val), (f"test_{merit}", line.test), ("final_train_loss", line.loss)):
        record |= {f"{name}_mean": _plain(found.mean), f"{name}_std": _plain(found.std)}
    for name in ("test", "val"):
        found_difference = getattr(comparison, name) if comparison else None
        flat = _difference_record(found_difference) if found_difference else dict.fromkeys(_DIFFERENCE_NAMES)
        prefix = f"{'best_val' if name == 'val' else 'test'}_{merit}_difference"
        record |= {f"{prefix}_{key}": value for key, value in flat.items()}
    return record


_DIFFERENCE_NAMES = ("mean", "low", "high", "p", "bootstrap_low", "bootstrap_high", "num_splits")


def _difference_record(found: Difference) -> dict[str, Any]:
    values = (found.mean, *found.corrected, found.p, *found.bootstrap)
    return dict(zip(_DIFFERENCE_NAMES, (*map(_plain, values), found.num), strict=True))


def _plain(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
