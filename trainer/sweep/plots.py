"""A sweep's figures, after Fig. 4 of the paper: training loss by epoch, training loss by K, the measure by K.

Numbers in, figures out: `to_svg` for the page, `save` for files. One thing to know before changing it: K has a log
axis, as the paper's K are spread evenly there; and each K has one colour in all pictures of a page.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

from manifests.files import atomic_path
from trainer.measures.merits import Merit
from trainer.measures.statistics import Interval
from trainer.reports import plots
from trainer.reports.plots import BLUE, GREEN, MUTED, ORANGE
from trainer.sweep.statistics import Decay, Floats, mean_curve
from trainer.sweep.tables import MEASURES

MAX_SERIES = 6
"""More lines than this in one picture tell nothing; the table has them all."""
PURPLE, YELLOW, SKY = "#cc79a7", "#e69f00", "#56b4e9"
"""Okabe and Ito's too; they are seen on white and on black alike."""
_COLORS = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY)
_MARKS = ("o", "s", "^", "D", "v", "P")
_DARK, _BRIGHT = 0.28, 0.86
"""Of matplotlib's viridis: from a blue that shows on black to a green that shows on white."""


def loss_by_epoch(curves: Mapping[str, Floats]) -> Figure:
    """Mean training loss by epoch, a line for each K, with bands from drawing splits anew.

    Args:
        curves: what a line is called, as "K 350", to losses (splits, epochs), K ascending.
    """
    with mpl.rc_context(plots.STYLE):
        figure, axes = plots.new_figure("epoch", "training loss")
        shades = mpl.colormaps["viridis"](np.linspace(_DARK, _BRIGHT, len(curves)))
        for color, (name, losses_JE) in zip(shades, curves.items(), strict=True):
            mean_E, low_E, high_E = mean_curve(losses_JE)
            epochs = np.arange(len(mean_E))
            line: dict[str, Any] = {"marker": "o"} if len(mean_E) < 3 else {}
            axes.plot(epochs, mean_E, color=mpl.colors.to_hex(color), label=name, **line)
            if np.isfinite(low_E).any():
                axes.fill_between(epochs, low_E, high_E, color=mpl.colors.to_hex(color), alpha=0.2, linewidth=0)
        axes.legend(**plots.LEGEND_ABOVE)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return figure


def loss_by_k(
    series: Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[Interval]]], fits: Mapping[str, Decay | None]
) -> Figure:
    """Final training loss by K, with the fitted a + b * exp(-c * K) where there is one.

    Args:
        series: a line's name to K ascending, means over splits and their intervals (NaN where there is none).
        fits: a line's name to its curve.
    """
    with mpl.rc_context(plots.STYLE):
        figure, axes = plots.new_figure("K, tiles of a slide (log scale)", "final training loss")
        for i, (name, (ks, means, intervals)) in enumerate(series.items()):
            fit, color = fits.get(name), _COLORS[i % len(_COLORS)]
            _draw_means(axes, i, name, ks, means, intervals, joined=fit is None)
            if fit is not None:
                dense = np.geomspace(ks[0], ks[-1], 200)
                axes.plot(dense, fit.at(dense), color=color, linewidth=1.4, linestyle=(0, (4, 2)))
        _finish_k(axes, series)
        return figure


def measure_by_k(
    series: Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[Interval]]], merit: Merit, *, what: str
) -> Figure:
    """A measure by K, with intervals over splits.

    Args:
        series: as in `loss_by_k`.
        merit: the measure.
        what: of which slides, as "test".
    """
    with mpl.rc_context(plots.STYLE):
        figure, axes = plots.new_figure("K, tiles of a slide (log scale)", f"{what} {MEASURES[merit]}")
        for i, (name, (ks, means, intervals)) in enumerate(series.items()):
            _draw_means(axes, i, name, ks, means, intervals, joined=True)
        if merit == "auc":
            low, high = axes.get_ylim()
            if low < 0.55:
                axes.axhline(0.5, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), label="chance")
            axes.set_ylim(low, max(high, min(1.02, high + 0.02)))
        _finish_k(axes, series)
        return figure


def to_svg(figure: Figure, name: str, description: str) -> str:
    """For an HTML page, in its font and colours."""
    with mpl.rc_context(plots.STYLE):
        return plots.page_svg(figure, name, description)


def save(figure: Figure, stem: Path) -> None:
    """Writes STEM.svg and STEM.png, on white."""
    with mpl.rc_context(plots.STYLE | {"svg.hashsalt": stem.name}):
        for suffix, more in (
            (".svg", {"metadata": {"Date": None}}),
            (".png", {"dpi": 200, "metadata": {"Software": None}}),
        ):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix[1:], facecolor="white", **more)
            with atomic_path(stem.with_suffix(suffix)) as partial:
                partial.write_bytes(buffer.getvalue())


def _draw_means(
    axes: Axes,
    i: int,
    name: str,
    ks: Sequence[int],
    means: Sequence[float],
    intervals: Sequence[Interval],
    *,
    joined: bool,
) -> None:
    # Beside each other where several series have the same K: 3 % of a log axis.
    x = np.asarray(ks, float) * 1.03**i
    reach = np.array([[m - n.low, n.high - m] for m, n in zip(means, intervals, strict=True)]).T
    axes.errorbar(
        x,
        means,
        yerr=np.maximum(np.nan_to_num(reach), 0),
        color=_COLORS[i % len(_COLORS)],
        marker=_MARKS[i % len(_MARKS)],
        linestyle="-" if joined else "none",
        markersize=5.5,
        elinewidth=1.2,
        capsize=3,
        label=name,
    )


def _finish_k(axes: Axes, series: Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[Interval]]]) -> None:
    ks = sorted({k for own, _, _ in series.values() for k in own})
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(_apart(ks)))
    axes.xaxis.set_major_formatter(lambda k, _: f"{k:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(ks[0] / 1.25, ks[-1] * 1.25)
    if len(series) > 1:
        axes.legend(**(plots.LEGEND_ABOVE | {"ncols": 2}))


def _apart(ks: Sequence[int]) -> list[int]:
    """Those that can be labelled without touching: a fifteenth of the axis apart."""
    least = math.log(ks[-1] / ks[0] * 1.25**2) / 15
    kept: list[int] = []
    for k in ks:
        if not kept or math.log(k / kept[-1]) >= least:
            kept.append(k)
    return kept
