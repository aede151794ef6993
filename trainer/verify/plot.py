"""The results of `slidegrad verify` as a picture: every case's errors beside their limits, as PNG bytes."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterMathtext

from trainer.reports.plots import BLUE, GREEN, INK, MUTED, ORANGE
from trainer.verify.cases import DType
from trainer.verify.errors import LIMITS, Result, What

_COLOURS: dict[DType, tuple[str, str]] = {"float64": (GREEN, "v"), "float32": (BLUE, "o"), "bf16": (ORANGE, "s")}
_PANELS: tuple[tuple[What, str], ...] = (
    ("loss", "loss, all steps"),
    ("gradients", "gradients, first step"),
    ("parameters", "parameters, last step"),
)
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_WIDTH = 0.7
"""Of an encoder's marks, beside each other; 1 from encoder to encoder."""
_NONE = 1e-18
"""Where no error is drawn: below what float64 can tell."""


def plot_errors(results: Sequence[Result]) -> bytes:
    """One panel each for loss, gradients and parameters: a mark for each case, by encoder, and the limits as lines."""
    encoders = list(dict.fromkeys(result.case.encoder for result in results))
    dtypes = [dtype for dtype in _COLOURS if any(result.case.dtype == dtype for result in results)]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        panels = figure.subplots(1, len(_PANELS), sharey=True)
        for panel, (what, title) in zip(panels, _PANELS, strict=True):
            for dtype in dtypes:
                _draw_dtype(panel, [r for r in results if r.case.dtype == dtype], encoders, what)
            panel.set_title(title, loc="left")
            panel.set_yscale("log")
            panel.set_xticks(range(len(encoders)), encoders, rotation=25, ha="right")
            panel.set_xlim(-0.6, len(encoders) - 0.4)
            panel.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.6)
        panels[0].set_ylabel("relative L1 error against the single process")
        panels[0].set_ylim(bottom=_NONE / 3)
        exponents = LogFormatterMathtext()
        panels[0].yaxis.set_major_formatter(lambda y, at: "0" if y < 2 * _NONE else exponents(y, at))
        marks, names = panels[0].get_legend_handles_labels()
        figure.legend(marks, names, loc="outside lower center", ncols=2 * len(dtypes), frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=140, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()


def _draw_dtype(panel: Axes, results: Sequence[Result], encoders: list[str], what: What) -> None:
    dtype = results[0].case.dtype
    colour, marker = _COLOURS[dtype]
    name = f"H {dtype}" if dtype == "bf16" else f"P {dtype}"
    x: list[float] = []
    y: list[float] = []
    for i, encoder in enumerate(encoders):
        errors = [max(result.errors[what], _NONE) for result in results if result.case.encoder == encoder]
        x += [i + _WIDTH * ((j + 0.5) / len(errors) - 0.5) for j in range(len(errors))]
        y += errors
    panel.plot(x, y, marker, color=colour, markersize=4, alpha=0.75, mew=0, label=name)
    panel.axhline(LIMITS[dtype][what], color=colour, linewidth=1.2, linestyle="--", label=f"limit of {dtype}")
