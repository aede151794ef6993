"""Which figures a sweep has, of which numbers: for the page, and as files in SWEEP/plots. `plots` draws them."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.measures.merits import Merit
from trainer.reports.findings import Figure
from trainer.sweep import plots
from trainer.sweep.results import EpochRow, Row
from trainer.sweep.statistics import bootstrap_mean, spread
from trainer.sweep.summary import Series, Setting, Summary, by_setting, curves_by_k, values_of
from trainer.sweep.tables import MEASURES, series_names


def draw_figures(
    sweep: Path, rows: Sequence[Row], epoch_rows: Sequence[EpochRow], summary: Summary, merit: Merit
) -> list[Figure]:
    """The figures, for the page; and as files in SWEEP/plots."""
    series = list(dict.fromkeys(line.setting.series for line in summary.lines))
    names, drawn, left_out = series_names(series), series[: plots.MAX_SERIES], len(series) - plots.MAX_SERIES
    more = f" {left_out} more series are in the table alone." if left_out > 0 else ""
    figures = []
    for one in drawn:
        name, title = "_".join(map(str, one)), f"Training loss by epoch: {names[one]}"
        curves = {
            f"K {setting.k_text}" if setting.k else f"{setting.k_text} tiles": losses
            for setting, losses in curves_by_k(epoch_rows, one).items()
        }
        if not curves:
            figures.append(Figure(title, missing="No epoch has ended yet."))
            continue
        caption = "Mean over splits; shaded: pointwise 95 % band, drawing splits anew." + more
        figures.append(_figure(sweep, f"loss_by_epoch_{name}", title, plots.loss_by_epoch(curves), caption))
    fits = {names[trend.series]: trend.decay for trend in summary.trends}
    settings = by_setting(rows)

    def by_k(value: Callable[[Row], float | None]) -> dict[str, Any]:
        return _by_k({s: of for s, of in settings.items() if s.series in drawn}, names, value)

    losses = by_k(lambda row: row.final_train_loss)
    if not losses:
        return figures
    fitted = [name for name, fit in fits.items() if fit is not None]
    caption = "Mean over splits of the last epoch's training loss; bars: 95 % of drawing splits anew."
    if fitted:
        caption += " Dashed: a + b·exp(−c·K), fitted to the means."
    if unfitted := [name for name, fit in fits.items() if fit is None]:
        caption += f" No curve is drawn through {'; '.join(unfitted)}: the points do not settle one (it takes four K)."
    figure = plots.loss_by_k(losses, fits)
    figures.append(_figure(sweep, "loss_by_k", "Final training loss by K", figure, caption + more))
    for what, stem, value in (
        ("test", "test", lambda row: row.test),
        ("best validation", "best_val", lambda row: row.val_best),
    ):
        title, means = f"{what.capitalize()} {MEASURES[merit]} by K", by_k(value)
        if not means:
            figures.append(Figure(title, missing=f"No run has a {what} {MEASURES[merit]}."))
            continue
        caption = "Mean over splits; bars: 95 % of drawing splits anew. These take splits as independent."
        figure = plots.measure_by_k(means, merit, what=what)
        figures.append(_figure(sweep, f"{stem}_{merit}_by_k", title, figure, caption + more))
    return figures


def _figure(sweep: Path, stem: str, title: str, figure: Any, caption: str) -> Figure:
    plots.save(figure, sweep / "plots" / stem)
    return Figure(title, plots.to_svg(figure, stem, title), caption=caption)


def _by_k(
    settings: dict[Setting, list[Row]], names: dict[Series, str], value: Callable[[Row], float | None]
) -> dict[str, Any]:
    """A series' name to K ascending, means over splits and their intervals; of K that are numbers."""
    found: dict[str, Any] = {}
    for setting, rows in settings.items():
        values = values_of(rows, value)
        mean = spread(values).mean
        if setting.k is not None and math.isfinite(mean):
            ks, means, intervals = found.setdefault(names[setting.series], ([], [], []))
            ks.append(setting.k)
            means.append(mean)
            intervals.append(bootstrap_mean(values))
    return found
