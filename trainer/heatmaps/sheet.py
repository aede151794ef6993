"""The sheet of a slide's tiles that stand highest and lowest: which they are, and the sheet as a PNG.

Pixels in, bytes out; opens no slide. One thing to know before changing it: tiles lie on the sheet px by px as they were
read (enlarged, or shrunk, by a whole factor), so the figure's size in px is exact: its dpi is a power of two.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from manifests import Manifest
from tiler.preview.panel import bar_length_um, bar_text
from trainer.heatmaps.painting import RANKS, SIGNS, color_scale, rank_share, sign_share
from trainer.heatmaps.values import SlideValues
from trainer.heatmaps.words import in_lines, printable
from trainer.reports.plots import INK, MUTED, house_style

_DPI = 128
_COLUMNS = 6
_MIN_SIDE_PX, _MAX_SIDE_PX = 160, 320
_FRAME_PX, _MARGIN_PX, _GAP_PX, _CAPTION_PX, _HEADING_PX, _LINE_PX, _FOOT_PX = 5, 36, 18, 50, 44, 26, 64


@dataclass(frozen=True, eq=False)
class Choice:
    """Rows of the manifest: `top` from the highest down, `bottom` from the lowest up; no row is in both."""

    top: NDArray[np.int64]
    bottom: NDArray[np.int64]

    @property
    def rows(self) -> NDArray[np.int64]:
        """Both, the top first."""
        return np.concatenate([self.top, self.bottom])


def choose_tiles(leading: NDArray[np.floating], num: int) -> Choice:
    """The `num` highest and the `num` lowest tiles; of equal ones those with lower rows. Half each if there are fewer.

    Args:
        leading: what they are sorted by, one per tile (n,); NaN for tiles the model did not see, which are not chosen.
        num: of each.
    """
    seen = np.flatnonzero(np.isfinite(leading))
    falling = seen[np.argsort(-leading[seen], kind="stable")]
    rising = seen[np.argsort(leading[seen], kind="stable")]
    num_top = min(num, -(-len(seen) // 2))
    top = falling[:num_top]
    return Choice(top, rising[~np.isin(rising, top)][: min(num, len(seen) - num_top)])


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where everything lies on the sheet, px from its upper left corner."""

    width: int
    height: int
    side: int
    """Of a tile as it is shown."""
    corners: tuple[tuple[int, int], ...]
    """(left, top) of every tile, the top ones first."""
    headings: tuple[int, ...]
    """Upper end of each part's heading; parts without tiles have none."""


def plan_sheet(num_top: int, num_bottom: int, side: int, num_lines: int) -> Layout:
    """Lays out the parts one below the other, in rows of six.

    Args:
        num_top, num_bottom: tiles of each part.
        side: of a tile, px.
        num_lines: of text at the top.
    """
    y = _MARGIN_PX + _LINE_PX * num_lines
    corners, headings = [], []
    for num in filter(None, (num_top, num_bottom)):
        headings.append(y)
        y += _HEADING_PX
        for i in range(num):
            row, column = divmod(i, _COLUMNS)
            corners.append((_MARGIN_PX + column * (side + _GAP_PX), y + row * (side + _CAPTION_PX)))
        y += -(-num // _COLUMNS) * (side + _CAPTION_PX)
    width = 2 * _MARGIN_PX + _COLUMNS * side + (_COLUMNS - 1) * _GAP_PX
    return Layout(width=width, height=y + _FOOT_PX, side=side, corners=tuple(corners), headings=tuple(headings))


def shown_side(tile_px: int) -> int:
    """A tile's side on the sheet, px: `tile_px` by the whole factor, or divisor, that makes it fit to look at."""
    if tile_px < _MIN_SIDE_PX:
        return tile_px * -(-_MIN_SIDE_PX // tile_px)
    return -(-tile_px // -(-tile_px // _MAX_SIDE_PX))


def draw_sheet(
    manifest: Manifest, values: SlideValues, choice: Choice, tiles_NHWC: NDArray[np.uint8], lines: Sequence[str]
) -> bytes:
    """The sheet as PNG.

    Args:
        manifest: the slide's.
        values: of all its tiles.
        choice: the tiles, at least one.
        tiles_NHWC: their pixels, in the order of `choice.rows`, RGB.
        lines: what is said of the slide, the first as the title.
    """
    slide, side = manifest.slide, shown_side(manifest.slide.tile_px)
    broken = [in_lines(line, 6 * side // 9) for line in lines]
    texts = [(text, i == 0) for i, some in enumerate(broken) for text in some]
    layout = plan_sheet(len(choice.top), len(choice.bottom), side, len(texts) + 1)
    kind = f"contribution to the {values.what}" if values.has_contributions else "attention"
    with house_style():
        figure = Figure(figsize=(layout.width / _DPI, layout.height / _DPI), dpi=_DPI, facecolor="white")
        pen = _Pen(figure, layout)
        for i, (text, is_title) in enumerate(texts):
            top = _MARGIN_PX + i * _LINE_PX
            pen.write(_MARGIN_PX, top, text, 20 if is_title else 15, INK if is_title else MUTED, is_bold=is_title)
        for top, end in zip(layout.headings, ("highest", "lowest"), strict=False):  # A slide of one tile has no lowest.
            pen.write(_MARGIN_PX, top + 8, printable(f"{end} {kind}"), 17, INK)
        colors = _colors(values, choice.rows)
        for i, (row, (left, top)) in enumerate(zip(choice.rows.tolist(), layout.corners, strict=True)):
            number = i + 1 if i < len(choice.top) else i + 1 - len(choice.top)
            pen.frame(left, top, side, colors[i])
            pen.show(left, top, _fit(tiles_NHWC[i], side))
            pen.write(left, top + side + 9, f"{number}.  {_tell(values, row)}", 14, INK)
            pen.write(left, top + side + 28, f"x {manifest.x_l0[row]:,}  y {manifest.y_l0[row]:,}", 12, MUTED)
        tile_um = slide.tile_px * slide.tile_mpp
        length_um, foot = bar_length_um(tile_um), layout.height - _FOOT_PX + 22
        length_px = round(length_um / tile_um * side)
        pen.fill(_MARGIN_PX, foot - 3, length_px, 6, INK)
        about = f"{bar_text(length_um)}     a tile: {tile_um:.4g} µm, {slide.tile_px} px at {slide.tile_mpp:g} µm/px"
        pen.write(_MARGIN_PX + length_px + 12, foot - 9, f"{about};  x, y: upper left corner, level-0 px", 13, MUTED)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
        return buffer.getvalue()


class _Pen:
    """Draws on a figure in px from its upper left corner."""

    def __init__(self, figure: Figure, layout: Layout) -> None:
        self._figure, self._width, self._height = figure, layout.width, layout.height

    def write(self, left: float, top: float, text: str, size_px: int, color: str, *, is_bold: bool = False) -> None:
        """Text with its upper left corner there."""
        x, y, weight = left / self._width, 1 - top / self._height, "bold" if is_bold else "normal"
        self._figure.text(x, y, text, va="top", fontsize=size_px * 72 / _DPI, color=color, weight=weight)

    def show(self, left: int, top: int, picture: NDArray[np.uint8]) -> None:
        """A picture, px by px."""
        self._figure.figimage(picture, left, self._height - top - len(picture), origin="upper", zorder=2)

    def fill(self, left: int, top: int, width: int, height: int, color: str | tuple[float, ...]) -> None:
        """A filled box."""
        corner = left, self._height - top - height
        self._figure.add_artist(Rectangle(corner, width, height, color=color, linewidth=0, transform=None, zorder=1))

    def frame(self, left: int, top: int, side: int, color: tuple[float, ...]) -> None:
        """A frame round a square."""
        wide = side + 2 * _FRAME_PX
        self.fill(left - _FRAME_PX, top - _FRAME_PX, wide, wide, color)


def _fit(tile: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """A tile in the size that is shown: every px repeated, or shrunk by area."""
    if side >= len(tile):
        return tile.repeat(side // len(tile), 0).repeat(side // len(tile), 1)
    return np.asarray(cv2.resize(tile, (side, side), interpolation=cv2.INTER_AREA), np.uint8)


def _colors(values: SlideValues, rows: NDArray[np.int64]) -> list[tuple[float, ...]]:
    """The tiles' colours on the heatmap."""
    if values.has_contributions:
        colors_N4 = SIGNS(sign_share(values.contribution[rows], color_scale(values.contribution)))
    else:
        colors_N4 = RANKS(rank_share(values.attention)[rows])
    return [tuple(color) for color in colors_N4.tolist()]


def _tell(values: SlideValues, row: int) -> str:
    """The tile's value."""
    if values.has_contributions:
        return f"{values.contribution[row]:+.3g}".replace("-", "−")
    return f"{values.attention[row]:.3g}"
