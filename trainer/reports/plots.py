"""Pictures of a run: numbers in, SVG for a page out.

Knows no files and decides nothing; `report` chooses what is shown. Figures are made with matplotlib's objects, never
with pyplot, so that nothing is kept open. One thing to know before changing it: an SVG goes *into* an HTML page, where
it takes the page's font and its colours from CSS variables (`--series-1` …), so one picture suits light and dark.
"""

import contextlib
import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from trainer.measures.statistics import Interval, RocBand

INK, MUTED, LINE, BLUE, ORANGE, GREEN = "#1b1f24", "#5f6874", "#d3d8de", "#0072b2", "#d55e00", "#009e73"
"""The last three: Okabe and Ito, Color Universal Design, 2008, told apart by all kinds of colour vision."""
_CSS = {INK: "--ink", MUTED: "--muted", LINE: "--line", BLUE: "--series-1", ORANGE: "--series-2", GREEN: "--series-3"}
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # A class may be named "$".
    "svg.fonttype": "none",  # Text stays text: it can be selected, searched and read aloud.
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}
_WIDE, _SQUARE = (5.6, 3.1), (4.7, 4.5)
_ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3, "borderaxespad": 0.2}
"""A legend where it covers no curve."""
_MAX_POINTS = 300
"""A curve of more steps is drawn as means over this many bins: 200,000 points would weigh 10 MB and look a smear."""
_MAX_DOTS = 1000
_MAX_NAME = 24


def house_style() -> AbstractContextManager[None]:
    """The look of all figures, while the context lasts."""
    return mpl.rc_context(_STYLE)


def loss_curves(epochs: ArrayLike, train: ArrayLike, val: ArrayLike, *, best_epoch: int | None = None) -> str:
    """Training and validation loss by epoch, (n,) each; NaN where there is none."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure("epoch", "loss")
        axes.plot(epochs, train, color=BLUE, marker="o", label="train")
        if np.isfinite(np.asarray(val, float)).any():
            axes.plot(epochs, val, color=ORANGE, marker="s", label="validation")
        _mark_best(axes, best_epoch)
        axes.legend(**_ABOVE)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure, "loss", "Training and validation loss by epoch")


def merit_curve(
    epochs: ArrayLike,
    values: ArrayLike,
    *,
    measure: str = "AUC",
    floor: tuple[float, str] = (0.5, "chance"),
    best_epoch: int | None = None,
) -> str:
    """Validation AUC, or another measure of at most 1, by epoch, (n,) each; NaN where there is none.

    Args:
        epochs: from 0.
        values: of each epoch.
        measure: its name.
        floor: what a model is worth that knows nothing, and what that is called.
        best_epoch: the chosen one.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure("epoch", f"validation {measure}")
        axes.plot(epochs, values, color=ORANGE, marker="s", label=f"validation {measure}")
        axes.axhline(floor[0], color=MUTED, linewidth=1, linestyle=(0, (1, 2)), label=floor[1])
        _mark_best(axes, best_epoch)
        axes.set_ylim(top=1.02)
        axes.legend(**_ABOVE)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure, "merit", f"Validation {measure} by epoch")


def learning_rate(steps: ArrayLike, lr: ArrayLike) -> str:
    """Learning rate by step, (n,) each."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure("step", "learning rate")
        axes.plot(*_binned(steps, lr), color=BLUE)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        return _svg(figure, "lr", "Learning rate by step")


def throughput(steps: ArrayLike, tiles_per_s: ArrayLike, wait_share: ArrayLike) -> str:
    """Tiles per second, and below it the share of each step spent waiting for data (0 to 1), by step, (n,) each."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_WIDE, layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        x, y = _binned(steps, tiles_per_s)
        upper.plot(x, y, color=BLUE)
        upper.set(ylabel="tiles / s", ylim=(0, 1.1 * float(np.nanmax(y, initial=1))))
        x, y = _binned(steps, wait_share)
        lower.fill_between(x, y, color=ORANGE, alpha=0.25, linewidth=0)
        lower.plot(x, y, color=ORANGE)
        lower.set(xlabel="step", ylabel="data wait", ylim=(0, max(0.1, 1.15 * float(np.nanmax(y, initial=0)))))
        lower.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        lower.yaxis.set_major_locator(MaxNLocator(3))
        lower.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return _svg(figure, "throughput", "Tiles per second and share of time spent waiting for data, by step")


def roc(band: RocBand, auc: float, interval: Interval, *, confidence: float = 0.95) -> str:
    """The ROC curve with its bootstrap band."""
    percent = f"{confidence:.0%}".replace("%", " %")
    with mpl.rc_context(_STYLE):
        figure, axes = _figure("false-positive rate (1 − specificity)", "sensitivity", size=_SQUARE)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (1, 2)), label="chance")
        axes.fill_between(band.fpr, band.low, band.high, color=BLUE, alpha=0.2, linewidth=0, label=f"{percent} band")
        label = f"AUC {auc:.3f} ({interval.low:.3f}–{interval.high:.3f})"
        axes.plot(np.append(0, band.fpr), np.append(0, band.tpr), color=BLUE, linewidth=2.2, label=label)
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        axes.legend(loc="lower right", reverse=True)
        return _svg(figure, "roc", f"ROC curve, AUC {auc:.3f}")


def rocs(curves: Mapping[str, tuple[RocBand, float]]) -> str:
    """Several ROC curves without their bands: name to the curve and its AUC."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure("false-positive rate (1 − specificity)", "sensitivity", size=_SQUARE)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        for i, (name, (band, auc)) in enumerate(curves.items()):
            style: dict[str, Any] = {"color": (BLUE, ORANGE, GREEN)[i % 3], "linestyle": ("-", "--", ":")[i // 3 % 3]}
            short = name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"
            label = f"{auc:.3f} {short}"  # A legend leaves out what begins with an underscore.
            axes.plot(np.append(0, band.fpr), np.append(0, band.tpr), linewidth=2, label=label, **style)
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        axes.legend(loc="lower right")
        return _svg(figure, "rocs", f"ROC curves of {len(curves)}")


def scatter(truth: ArrayLike, predicted: ArrayLike, *, name: str) -> str:
    """Predicted against true numbers, (n,) both, in one unit, with the line where they are equal."""
    truth_n, predicted_n = np.asarray(truth, float), np.asarray(predicted, float)
    kept = np.random.default_rng(0).permutation(len(truth_n))[:_MAX_DOTS]
    low, high = (float(bound([truth_n, predicted_n])) for bound in (np.min, np.max))
    margin = 0.04 * (high - low) or 0.5
    limits = (low - margin, high + margin)
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(f"true {name}", f"predicted {name}", size=_SQUARE)
        axes.plot(limits, limits, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), label="predicted = true")
        axes.plot(truth_n[kept], predicted_n[kept], "o", color=BLUE, markersize=5, alpha=0.6, mew=0)
        axes.set(xlim=limits, ylim=limits, aspect="equal")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.legend(loc="upper left")
        return _svg(figure, f"scatter {name}", f"Predicted against true {name}")


def score_distribution(labels: ArrayLike, scores: ArrayLike, *, names: Sequence[str] = ("negative", "positive")) -> str:
    """Scores (0 to 1) of each class: a histogram, and below it a dot for every slide.

    Args:
        labels: 0 or 1, (n,).
        scores: probability of class 1, (n,).
        names: of class 0 and class 1.
    """
    labels_n, scores_n = np.asarray(labels), np.asarray(scores, float)
    rng = np.random.default_rng(0)
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(f"score (probability of {names[1]})", "", size=_SQUARE)
        for row, color in enumerate((BLUE, ORANGE)):
            of_class = scores_n[labels_n == row]
            counts, edges = np.histogram(of_class, bins=20, range=(0, 1))
            axes.stairs(
                row + 0.55 * counts / max(counts.max(), 1), edges, baseline=row, fill=True, color=color, alpha=0.55
            )
            dots = rng.permutation(of_class)[:_MAX_DOTS]
            axes.plot(
                dots, row - rng.uniform(0.07, 0.24, len(dots)), "o", color=color, markersize=3.4, alpha=0.6, mew=0
            )
            if len(of_class):
                axes.plot([np.median(of_class)] * 2, [row - 0.28, row + 0.6], color=INK, linewidth=1.2)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.4, 1.7))
        axes.set_yticks([0.1, 1.1], [f"{n}\nn = {(labels_n == i).sum()}" for i, n in enumerate(names)])
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        return _svg(figure, "scores", "Distribution of scores by class; the upright line is the median")


@contextlib.contextmanager
def styled_figure(xlabel: str, ylabel: str) -> Iterator[tuple[Figure, Axes]]:
    """A square figure in the report's style, for pictures that are drawn elsewhere."""
    with mpl.rc_context(_STYLE):
        yield _figure(xlabel, ylabel, size=_SQUARE)


def _figure(xlabel: str, ylabel: str, *, size: tuple[float, float] = _WIDE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def _mark_best(axes: Axes, best_epoch: int | None) -> None:
    if best_epoch is not None:
        axes.axvline(best_epoch, color=GREEN, linewidth=1.2, linestyle="--", label="chosen checkpoint")


def _binned(x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The curve as means over at most `_MAX_POINTS` bins of equal length."""
    points = np.stack([np.asarray(x, float), np.asarray(y, float)])
    num_points = points.shape[1]
    if num_points <= _MAX_POINTS:
        return points[0], points[1]
    starts = np.linspace(0, num_points, _MAX_POINTS, endpoint=False).astype(np.int64)
    means = np.add.reduceat(points, starts, axis=1) / np.diff(np.append(starts, num_points))
    return means[0], means[1]


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an SVG element for an HTML page: no prolog, no address, colours from the page."""
    buffer = io.StringIO()
    # Ids that are referred to are hashes salted with the name: they differ between the figures of one page.
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # The style element would hold for the whole page; its one rule is in the page's own style.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| id="[a-zA-Z0-9.]+_\d+"', "", svg)
    svg = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    svg = re.sub(r"(font(?:-family)?: [^;\"]*?)'?DejaVu Sans'?[^;\"]*", r"\1inherit", svg)
    for color, variable in _CSS.items():
        svg = svg.replace(color, f"var({variable}, {color})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)


# For figures that are drawn elsewhere and belong to a page.
STYLE, LEGEND_ABOVE, new_figure, page_svg = _STYLE, _ABOVE, _figure, _svg
