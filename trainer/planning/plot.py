"""A plan as a picture, PNG bytes: seconds of a slide by ranks, and the largest number of tiles by encoder."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from trainer.planning.capacity import Capacity
from trainer.planning.forecast import Forecast
from trainer.planning.simulation import Phase
from trainer.reports.plots import BLUE, GREEN, INK, MUTED, ORANGE

_PHASES: dict[Phase, tuple[str, str]] = {
    "reading": (GREEN, ":"),
    "encoding": (BLUE, "-"),
    "gather": (ORANGE, "--"),
    "aggregation": ("#cc79a7", "-."),
    "scatter": ("#e69f00", ":"),
    "sum": (ORANGE, "-"),
    "update": (MUTED, "-."),
}
"""Colours of Okabe and Ito, as in `trainer.reports.plots`."""
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_HEIGHT = 0.38
"""Of a bar, of 1 from row to row."""


def plot_plan(title: str, forecasts: Sequence[Forecast], capacities: Sequence[Capacity]) -> bytes:
    """Both panels.

    Args:
        title: what was planned.
        forecasts: by ranks.
        capacities: by encoder and precision.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(12, 4.8), layout="constrained")
        scaling, capacity = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _draw_scaling(scaling, forecasts)
        _draw_capacities(capacity, capacities)
        figure.suptitle(title, x=0.01, ha="left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=140, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()


def _draw_scaling(axes: Axes, forecasts: Sequence[Forecast]) -> None:
    steps = [one.step for one in forecasts]
    ranks = [step.num_encoders for step in steps]
    for phase, (colour, line) in _PHASES.items():
        seconds = [step.seconds[phase] for step in steps]
        if any(seconds):
            axes.plot(ranks, [s or float("nan") for s in seconds], line, color=colour, linewidth=1.4, label=phase)
    slide_s = [step.slide_s for step in steps]
    axes.plot(ranks, slide_s, "o-", color=INK, linewidth=2, markersize=4, label="a slide")
    ideal_s = [step.slide_s * step.efficiency for step in steps]
    axes.plot(ranks, ideal_s, color=MUTED, linewidth=0.8, label="if ranks did nothing but encode")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ranks, [f"{n:,}" for n in ranks])
    axes.set_ylim(min(ideal_s) / 300, 30 * max(slide_s))  # Above is room for the legend.
    axes.set_xlabel("encoder ranks")
    axes.set_ylabel("seconds of a slide")
    axes.set_title("where scaling ends", loc="left")
    axes.grid(color=MUTED, alpha=0.2, linewidth=0.6)
    axes.legend(ncols=2, fontsize=8, loc="upper right")


def _draw_capacities(axes: Axes, capacities: Sequence[Capacity]) -> None:
    places = range(len(capacities))
    predicted = [one.predicted for one in capacities]
    measured = [one.measured for one in capacities]
    has_measured = any(n is not None for n in measured)
    height = _HEIGHT if has_measured else 2 * _HEIGHT
    shift = _HEIGHT / 2 if has_measured else 0.0
    axes.barh([i - shift for i in places], predicted, height, color=BLUE, alpha=0.55, label="predicted")
    if has_measured:
        axes.barh([i + shift for i in places], [n or 0 for n in measured], height, color=BLUE, label="measured")
    paper = [(i, one.paper) for i, one in enumerate(capacities) if one.paper]
    if paper:
        x, y = [n for _, n in paper], [i for i, _ in paper]
        axes.plot(x, y, "D", color=ORANGE, markersize=6, label="the paper, H100 80 GB")
    axes.set_yticks(places, [f"{one.encoder}, {one.precision}" for one in capacities])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel("tiles")
    axes.set_title("largest step in one graph on one device", loc="left")
    axes.grid(axis="x", color=MUTED, alpha=0.2, linewidth=0.6)
    axes.legend(fontsize=8, loc="best")
