"""The slide beside its heatmap, as a PNG to open or print.

Arrays and words in, bytes out; knows no file. Figures are made with matplotlib's objects, never with pyplot, so that
nothing is kept open.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tiler.preview.panel import bar_length_um, bar_text
from trainer.heatmaps.painting import RANKS, SCALE_QUANTILE, SIGNS
from trainer.heatmaps.words import in_lines, printable
from trainer.reports.plots import INK, MUTED, house_style

_MAX_PICTURE_PX = 1800
_MARGIN = 0.12
"""Inches, as all lengths here that are no px."""
_DPI = 140
_TITLE_CHARACTERS = 78
_NOTE_CHARACTERS = 110
_BAR_CHARACTERS = 48
_END_CHARACTERS = 20
_QUANTILE = f"{100 * SCALE_QUANTILE:.0f} % quantile"


@dataclass(frozen=True, kw_only=True)
class Legend:
    """What the colours of a heatmap mean: words beside the colour bar, from its low to its high end."""

    name: str
    """The panel's title."""
    colors: Colormap
    label: str
    ticks: tuple[str, str, str]
    """At the low end, in the middle, at the high end."""
    is_cut: bool = False
    """Some values lie beyond the ends."""


ATTENTION = Legend(
    name="attention",
    colors=RANKS,
    label="rank of a tile's attention within the slide",
    ticks=("lowest", "median", "highest"),
)


def contribution_legend(what: str, ends: tuple[str, str], scale: float, *, is_cut: bool) -> Legend:
    """The legend of contributions.

    Args:
        what: the number that they add up to.
        ends: what a tile below 0 does, and one above.
        scale: where the colours end (`painting.color_scale`).
        is_cut: some contributions lie beyond.
    """
    lines = (*in_lines(f"a tile's part of the {what}", _BAR_CHARACTERS), f"colours end at the {_QUANTILE} of its size")
    low, high = (in_lines(end, _END_CHARACTERS) for end in ends)
    return Legend(
        name="contribution",
        colors=SIGNS,
        label="\n".join(lines),
        ticks=("\n".join([f"−{scale:.2g}", *low]), "0", "\n".join([f"+{scale:.2g}", *high])),
        is_cut=is_cut,
    )


def draw_card(
    thumbnail: NDArray[np.uint8],
    painted: NDArray[np.uint8],
    mpp_thumb: float,
    legend: Legend = ATTENTION,
    *,
    title: str = "",
    notes: Sequence[str] = (),
) -> bytes:
    """The slide beside its heatmap, with a scale bar and a colour bar, as PNG on a white card.

    Args:
        thumbnail: RGB of the whole slide, (h, w, 3).
        painted: from `painting.paint_slide`, (h, w, 3).
        mpp_thumb: microns per px of both.
        legend: what the colours mean.
        title: the slide.
        notes: lines under the title.
    """
    height, width = thumbnail.shape[:2]
    # Wide slides one above the other, others side by side: fills a page's width either way.
    rows, columns = (2, 1) if width > 2 * height else (1, 2)
    panel_w = 10.0 / columns
    panel_h = max(2.4 / rows, min(panel_w * height / width, 9.0))
    titles = in_lines(title, _TITLE_CHARACTERS) if title else []
    small = [line for note in notes for line in in_lines(note, _NOTE_CHARACTERS)]
    head = 0.24 * len(titles) + 0.19 * len(small) + (0.12 if titles else 0)
    wide = max(min(panel_w, panel_h * width / height) * columns + 1.4, 7.5 if titles else 4.0)
    with house_style():
        figure = Figure(figsize=(wide, panel_h * rows + 0.4 + head))
        body = 1 - head / figure.get_figheight()
        figure.set_layout_engine("constrained", rect=(0, 0, 1, body), w_pad=_MARGIN, h_pad=0.06)
        panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
        _write_head(figure, titles, small)
        for panel, picture, name in zip(panels, (thumbnail, painted), ("slide", legend.name), strict=True):
            panel.imshow(_shrunk(picture), interpolation="lanczos", extent=(0, width, height, 0))
            panel.set_title(name, loc="left", color=MUTED, fontsize=10)
            panel.set_axis_off()
        _scale_bar(panels[0], width, height, mpp_thumb)
        extend = "both" if legend.is_cut else "neither"
        bar = figure.colorbar(
            ScalarMappable(cmap=legend.colors), ax=panels, shrink=0.7, aspect=28, pad=0.015, extend=extend
        )
        bar.set_ticks([0, 0.5, 1], labels=["\n".join(map(printable, tick.split("\n"))) for tick in legend.ticks])
        bar.set_label("\n".join(map(printable, legend.label.split("\n"))))
        bar.outline.set_visible(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()


def _write_head(figure: Figure, titles: list[str], notes: list[str]) -> None:
    """Title and notes in the upper left corner."""
    width, height = figure.get_size_inches()
    x, y = _MARGIN / width, height - _MARGIN
    for line in titles:
        figure.text(x, y / height, line, va="top", fontsize=12, weight="bold", color=INK)
        y -= 0.24
    for line in notes:
        figure.text(x, y / height, line, va="top", fontsize=9, color=MUTED)
        y -= 0.19


def _shrunk(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """At most `_MAX_PICTURE_PX` a side: matplotlib takes 15 s for a picture of 6,000 px, and shows no more of it."""
    factor = min(1.0, _MAX_PICTURE_PX / max(picture.shape[:2]))
    return np.asarray(cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA), np.uint8)


def _scale_bar(panel: Axes, width: int, height: int, mpp: float) -> None:
    """A bar of 1, 2 or 5 times a power of ten microns, at most a quarter of the picture long, below its left corner."""
    length_um = bar_length_um(width * mpp / 4)
    y = height * 1.02
    panel.plot([0, length_um / mpp], [y, y], color=INK, linewidth=2.5, clip_on=False, solid_capstyle="butt")
    panel.text(length_um / mpp + 0.01 * width, y, bar_text(length_um), va="center", fontsize=9, clip_on=False)
    panel.set(xlim=(0, width), ylim=(height, 0))
