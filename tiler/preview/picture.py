"""One slide as a picture: its thumbnail, the tissue's outline, kept tiles, rejected areas, and a panel of words.

Pure. Two frames: level-0 px of manifest and outline, and px of the picture; `_Frame` goes from one to the other.
Colours are those of Okabe and Ito (2008), which people with any colour vision tell apart.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from manifests.schema import REASONS, Manifest
from tiler.masks import MaskRecord
from tiler.preview.panel import Bar, Colour, Item, Swatch, Words, draw_panel

SIDE_PX = 1024
"""Longest side of the slide in its picture, px."""
_MIN_SIDE_PX = 768
"""A smaller thumbnail is enlarged to this."""
_TALL = 1.5
"""A slide this much taller than wide has its panel beside it, not below."""
_SIDE_PANEL_PX, _MIN_PANEL_PX = 400, 480
_MIN_TILE_PX = 4.0
"""Smaller tiles are shown by their union alone: their lines would hide the tissue."""

KEPT: Colour = (0, 114, 178)
REJECTED: dict[str, Colour] = {
    "tissue": (138, 143, 152),
    "pen": (230, 159, 0),
    "black": (213, 94, 0),
    "white": (86, 180, 233),
    "blur": (240, 228, 66),
}
"""Reason to colour, for every one of `manifests.schema.REASONS`."""
NAMES = {reason: "no tissue" if reason == "tissue" else reason for reason in REASONS}
"""Reason to what people read."""
_OUTLINE: Colour = (20, 24, 32)


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Size of the slide in the picture, px, and picture px per level-0 px, (x, y)."""

    width: int
    height: int
    scale: NDArray[np.float64]

    def place(self, points_l0: NDArray[Any]) -> NDArray[np.int32]:
        """(…, 2) level-0 px to the nearest picture px."""
        return np.asarray(np.rint(points_l0 * self.scale), np.int32)


def draw_slide(manifest: Manifest, mask: MaskRecord) -> NDArray[np.uint8]:
    """The whole picture, RGB (h, w, 3); the slide's longest side about `SIDE_PX`, the panel beside or below it."""
    thumbnail = mask.overview.thumbnail
    frame = _fit(thumbnail.shape[1], thumbnail.shape[0], mask.overview.px_l0)
    size = frame.width, frame.height
    shrinks = frame.width < thumbnail.shape[1]
    slide = cv2.resize(thumbnail, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    canvas = slide.astype(np.float32)
    shares = {value: _share(mask.areas == value, size) for value in range(len(REASONS) + 1)}
    _tint(canvas, 0.30 * shares[0], REJECTED["tissue"])
    _draw_tiles(canvas, manifest, frame)
    # Stripes: the colour stays itself over ink and black, and what lies beneath stays visible between them.
    stripes = np.where(np.add.outer(np.arange(frame.height), np.arange(frame.width)) % 8 < 3, 0.9, 0.3)
    for value, reason in enumerate(REASONS[1:], start=2):
        _tint(canvas, stripes * shares[value], REJECTED[reason])
        _line(canvas, _contours(shares[value]), REJECTED[reason])
    outline = [frame.place(np.array(ring)) for polygon in mask.outline for ring in polygon]
    _line(canvas, outline or _contours(shares[1]), _OUTLINE)
    slide = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)

    mpp = manifest.slide.mpp_x / frame.scale[0]
    beside = frame.height > _TALL * frame.width
    width = _SIDE_PANEL_PX if beside else max(frame.width, _MIN_PANEL_PX)
    panel = draw_panel(manifest.slide.slide_id, [_facts(manifest), _legend(manifest), [Bar(mpp)]], width)
    return _join(slide, panel, beside=beside)


def _fit(width: int, height: int, px_l0: float) -> _Frame:
    """The frame for a thumbnail of this size: shrunk to `SIDE_PX`, or enlarged to `_MIN_SIDE_PX`."""
    longest = max(width, height)
    zoom = min(SIDE_PX, max(longest, _MIN_SIDE_PX)) / longest
    shown = max(1, round(width * zoom)), max(1, round(height * zoom))
    return _Frame(width=shown[0], height=shown[1], scale=np.array(shown) / (np.array((width, height)) * px_l0))


def _share(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.float32]:
    """Share of each picture px that the mask covers, 0 to 1."""
    shrinks = size[0] < mask.shape[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(mask.astype(np.float32), size, interpolation=how))


def _tint(canvas: NDArray[np.float32], opacity: NDArray[np.floating[Any]], colour: Colour) -> None:
    canvas += opacity[..., None] * (np.array(colour, np.float32) - canvas)


def _contours(share: NDArray[np.float32]) -> list[NDArray[np.int32]]:
    """Rings round where the share is at least a half, holes too; picture px."""
    return list(cv2.findContours((share >= 0.5).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0])


def _line(canvas: NDArray[np.float32], rings: list[NDArray[np.int32]], colour: Colour) -> None:
    """Rings drawn over the canvas, smooth; OpenCV smooths lines in uint8 only."""
    opacity = np.zeros(canvas.shape[:2], np.uint8)
    cv2.polylines(opacity, rings, isClosed=True, color=255, thickness=1, lineType=cv2.LINE_AA)
    _tint(canvas, opacity / np.float32(255), colour)


def _draw_tiles(canvas: NDArray[np.float32], manifest: Manifest, frame: _Frame) -> None:
    """The union of all tiles as a faint tint with a border; each tile's own rectangle if it is large enough."""
    corners = np.stack([manifest.x_l0, manifest.y_l0], -1).astype(np.int64)
    starts = frame.place(corners)
    ends = frame.place(corners + np.array(manifest.footprint_l0))
    union = np.zeros(canvas.shape[:2], np.uint8)
    lines = np.zeros_like(union)
    # Neighbours share the line of px between them, so the union has the end's px too.
    for (x0, y0), (x1, y1) in zip(starts.tolist(), ends.tolist(), strict=True):
        union[y0 : y1 + 1, x0 : x1 + 1] = 1
    side_px = float(min(np.array(manifest.footprint_l0) * frame.scale))
    has_lines = side_px >= _MIN_TILE_PX
    if has_lines:
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            cv2.rectangle(lines, start, end, 1)
    border = np.zeros_like(union)
    cv2.drawContours(border, cv2.findContours(union, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0], -1, 1)
    # The smaller the tiles, the more of the tissue their lines cover, and the fainter they are.
    line_opacity = float(np.interp(side_px, (_MIN_TILE_PX, 24), (0.2, 0.65)))
    _tint(canvas, np.float32(0.08 if has_lines else 0.18) * union, KEPT)
    _tint(canvas, np.float32(line_opacity) * lines, KEPT)
    _tint(canvas, np.float32(0.8) * border, KEPT)


def _facts(manifest: Manifest) -> list[Item]:
    """What is known of the slide, in short phrases."""
    record = manifest.slide
    mpp = f"{record.mpp_x:.4g}" if record.mpp_x == record.mpp_y else f"{record.mpp_x:.4g} x {record.mpp_y:.4g}"
    phrases = [
        f"{record.num_tiles:,} tiles of {record.tile_px} px at {record.tile_mpp:.4g} µm/px",
        f"{record.tissue_mm2:,.1f} mm² tissue",
        f"{record.num_bad_tiles:,} damaged tiles left out" if record.num_bad_tiles else "",
        f"slide {record.width_l0:,} x {record.height_l0:,} px at {mpp} µm/px (from {record.mpp_source or 'unknown'})",
        f"another source says {record.mpp_other:.4g} µm/px" if record.mpp_conflict and record.mpp_other else "",
        f"read by {record.backend or 'unknown'}, level {record.level}",
    ]
    return [Words(phrase) for phrase in phrases if phrase]


def _legend(manifest: Manifest) -> list[Item]:
    """Colours, with how many places of the grid each stands for."""
    record = manifest.slide
    return [
        Swatch("tissue outline", _OUTLINE, "line"),
        Swatch(f"kept tiles {record.num_tiles:,}", KEPT, "box"),
        *(Swatch(f"{NAMES[r]} {getattr(record, f'rejected_{r}'):,}", REJECTED[r]) for r in REASONS),
    ]


def _join(slide: NDArray[np.uint8], panel: NDArray[np.uint8], *, beside: bool) -> NDArray[np.uint8]:
    """Slide and panel on one white sheet, the slide in the middle where the panel is wider."""
    (height, width), (panel_h, panel_w) = slide.shape[:2], panel.shape[:2]
    if beside:
        sheet = np.full((max(height, panel_h), width + panel_w, 3), 255, np.uint8)
        sheet[:height, :width] = slide
        sheet[:panel_h, width:] = panel
    else:
        sheet = np.full((height + panel_h, max(width, panel_w), 3), 255, np.uint8)
        left = (sheet.shape[1] - width) // 2
        sheet[:height, left : left + width] = slide
        sheet[height:, :panel_w] = panel
    return sheet
