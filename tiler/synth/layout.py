"""Where tissue, foci and pen lie on one slide, at 8 microns per cell. Pure functions of a random generator.

Not for pixels (texture.py). Everything is a smooth signed field in cells, positive inside, sampled at cell centres:
the truth map is its sign, the renderer interpolates it, so that outlines are smooth at 0.5 microns and agree with the
truth. Before changing a draw: both slides of a pair must consume the same draws, whatever their label.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from tiler.synth.config import CELL_PX, GRID_PX, CohortConfig

Field = NDArray[np.float32]

BACKGROUND, TISSUE, TUMOUR, LOOKALIKE, PEN = range(5)
"""Codes of the truth map."""
TILE_CELLS = GRID_PX // CELL_PX
"""Cells per side of the 128-px tiles in which shares are counted."""
_MARGIN_CELLS = 4.0
"""Tissue keeps this far from the slide's edge."""
_PEN_RGB = ((40, 150, 80), (35, 60, 165), (35, 33, 38), (200, 45, 55))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Signed fields over one slide, (height, width) cells; positive inside."""

    tissue: Field
    """Distance inside the tissue in cells, negative outside (approximate away from the outline)."""
    tumour: Field
    """Inside tumour foci, in cells."""
    lookalike: Field
    """Inside look-alike foci, in cells."""
    pen: Field
    """Inside pen strokes, in cells."""
    glandular: Field
    """Positive where tissue holds glands (no unit)."""
    pen_rgb: tuple[int, int, int]
    """Colour of the pen, 0 to 255."""

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height) in level-0 px."""
        height, width = self.tissue.shape
        return width * CELL_PX, height * CELL_PX

    @property
    def truth(self) -> NDArray[np.uint8]:
        """The label map at 8 microns per px, (height, width): 0 background … 4 pen."""
        truth = np.where(self.tissue > 0, TISSUE, BACKGROUND).astype(np.uint8)
        truth[self.lookalike > 0] = LOOKALIKE
        truth[self.tumour > 0] = TUMOUR
        truth[self.pen > 0] = PEN
        return truth


def draw_layout(
    rng: np.random.Generator, config: CohortConfig, *, is_scant: bool, has_pen: bool, label: int, mirror: int
) -> Layout:
    """Draws one slide's layout.

    Args:
        rng: The pair's generator; both slides of a pair come here with it in the same state.
        config: Sizes and shares.
        is_scant: Almost no tissue.
        has_pen: With pen strokes; they never cover a focus.
        label: 1 makes the tumour foci tumour, 0 makes them look-alike, in the same places.
        mirror: 0 as drawn, 1 left-right, 2 top-bottom, 3 both.
    """
    shape = (_draw_cells(rng, config.height_px), _draw_cells(rng, config.width_px))
    tissue = _draw_tissue(rng, shape, config.scant_fraction if is_scant else config.tissue_fraction, is_scant)
    tumour, lookalike = _draw_foci(rng, tissue, config, is_scant)
    glandular = smooth_noise(rng, shape, 40) + np.float32(0.25)
    pen, pen_rgb = _draw_pen(rng, tissue, np.maximum(tumour, lookalike))
    nothing = np.full(shape, -1e3, np.float32)
    layout = Layout(
        tissue=tissue,
        tumour=tumour if label else nothing,
        lookalike=lookalike if label else np.maximum(tumour, lookalike),
        pen=pen if has_pen else nothing,
        glandular=glandular,
        pen_rgb=pen_rgb,
    )
    return _mirrored(layout, mirror)


def count_tiles(truth: NDArray[np.uint8], code: int | None = None) -> int:
    """Tiles of 128 level-0 px of which at least half is `code`, or for None any tissue (focus included)."""
    inside = (truth >= TISSUE) & (truth <= LOOKALIKE) if code is None else truth == code
    height, width = (side // TILE_CELLS for side in inside.shape)
    blocks = inside[: height * TILE_CELLS, : width * TILE_CELLS].reshape(height, TILE_CELLS, width, TILE_CELLS)
    return int((blocks.sum(axis=(1, 3)) >= TILE_CELLS**2 / 2).sum())


def _draw_cells(rng: np.random.Generator, side_px: tuple[int, int]) -> int:
    low, high = -(-side_px[0] // GRID_PX), side_px[1] // GRID_PX
    return int(rng.integers(low, high + 1)) * TILE_CELLS


def _draw_tissue(
    rng: np.random.Generator, shape: tuple[int, int], fraction: tuple[float, float], is_scant: bool
) -> Field:
    """One to three ellipses with noisy outlines, cut where they cover the drawn share of the slide."""
    height, width = shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    num_pieces = int(rng.integers(1, 4))
    share = rng.uniform(*fraction)
    if is_scant:
        num_pieces = min(num_pieces, 2)
    along_x = width >= height
    long_side, short_side = (width, height) if along_x else (height, width)
    field = np.full(shape, -10, np.float32)
    for piece in range(num_pieces):
        semi_long = 0.42 * long_side / num_pieces * rng.uniform(0.85, 1.0)
        semi_short = 0.40 * short_side * rng.uniform(0.75, 1.0)
        centre_long = (piece + 0.5 + rng.uniform(-0.05, 0.05)) * long_side / num_pieces
        centre_short = (0.5 + rng.uniform(-0.05, 0.05)) * short_side
        angle = rng.uniform(-0.3, 0.3)
        dl, ds = (x - centre_long, y - centre_short) if along_x else (y - centre_long, x - centre_short)
        along = (np.cos(angle) * dl + np.sin(angle) * ds) / semi_long
        across = (np.cos(angle) * ds - np.sin(angle) * dl) / semi_short
        field = np.maximum(field, 1 - np.sqrt(along**2 + across**2).astype(np.float32))
    roughness = 0.05 if is_scant else 0.2
    scale = max(6.0, min(shape) / 6)
    field += np.float32(roughness) * (smooth_noise(rng, shape, scale) + 0.35 * smooth_noise(rng, shape, scale / 4))
    edge = np.minimum(np.minimum(x, width - 1 - x), np.minimum(y, height - 1 - y))
    field -= np.square(np.clip(1 - (edge - _MARGIN_CELLS) / (3 * _MARGIN_CELLS), 0, None), dtype=np.float32)
    return _in_cells(field - np.quantile(field, 1 - share).astype(np.float32))


def _draw_foci(rng: np.random.Generator, tissue: Field, config: CohortConfig, is_scant: bool) -> tuple[Field, Field]:
    """Grows compact foci to the drawn share of tissue tiles: (tumour, look-alike)."""
    num_tissue = count_tiles((tissue > 0).astype(np.uint8))
    num_tumour = int(rng.integers(1, config.max_foci + 1))
    num_lookalike = int(rng.integers(1, 3))
    share = rng.uniform(*config.tumour_fraction)
    extra_share = rng.uniform(*config.lookalike_fraction)
    if is_scant:
        num_tumour, num_lookalike = 1, 1
    least = 3 if is_scant else 1
    target = max(least, min(round(share * num_tissue), int(0.10 * num_tissue)))
    room = tissue - np.float32(0.75)
    tumour = _grow(rng, room, min(num_tumour, target), target)
    extra_target = round(extra_share * num_tissue)
    room = np.minimum(room, -tumour - 3)
    lookalike = _grow(rng, room, min(num_lookalike, max(1, extra_target)), extra_target)
    return tumour, lookalike


def _grow(rng: np.random.Generator, room: Field, num_foci: int, num_tiles: int) -> Field:
    """Grows `num_foci` blobs at once inside `room` until they hold `num_tiles` tiles, or come nearest to it."""
    y, x = np.mgrid[0 : room.shape[0], 0 : room.shape[1]].astype(np.float32)
    distance = np.full(room.shape, np.inf, np.float32)
    for cy, cx in _draw_centres(rng, room, num_foci):
        weight = np.float32(np.exp(rng.normal(0, 0.2)))
        wobble = 1 + 0.22 * np.clip(smooth_noise(rng, room.shape, 9), -1.5, 1.5)
        distance = np.minimum(distance, np.hypot(x - cx, y - cy) * weight * wobble)
    best, best_error = np.full(room.shape, -1e3, np.float32), num_tiles
    for radius in np.arange(1.0, max(room.shape), 0.25, dtype=np.float32):
        field = np.minimum(radius - distance, room)
        error = count_tiles((field > 0).astype(np.uint8)) - num_tiles
        if abs(error) < best_error:
            best, best_error = field, abs(error)
        if error >= 0:
            break
    return best


def _draw_centres(rng: np.random.Generator, room: Field, num_foci: int) -> list[tuple[float, float]]:
    """Centres (y, x) deep in the room and far from one another; fewer where there is no room."""
    depth = cv2.distanceTransform((room > 0).astype(np.uint8), cv2.DIST_L2, 3)
    deep = np.argwhere(depth >= min(5.0, 0.6 * float(depth.max())))
    centres: list[tuple[float, float]] = []
    if depth.max() <= 0:
        return centres
    for _ in range(num_foci):
        candidates = deep[rng.integers(len(deep), size=12)].astype(np.float64)
        if centres:
            apart = np.linalg.norm(candidates[:, None] - np.asarray(centres)[None], axis=-1).min(axis=1)
            candidates = candidates[[int(apart.argmax())]]
        centres.append((float(candidates[0, 0]), float(candidates[0, 1])))
    return centres


def _draw_pen(rng: np.random.Generator, tissue: Field, focus: Field) -> tuple[Field, tuple[int, int, int]]:
    """One or two pen strokes, of 16 tries those that lie partly over tissue and least over foci."""
    height, width = tissue.shape
    colour = _PEN_RGB[int(rng.integers(len(_PEN_RGB)))]
    forbidden = focus > -3
    pen = np.zeros(tissue.shape, np.uint8)
    thickness = int(rng.integers(6, 11))
    for _ in range(int(rng.integers(1, 3))):
        best, best_cost = pen, np.inf
        for _ in range(16):
            start = rng.uniform((0.1, 0.1), (0.9, 0.9)) * (width, height)
            heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.35, size=14))
            step = 0.04 * max(height, width) * np.stack((np.cos(heading), np.sin(heading)), axis=1)
            points = np.round((start + np.cumsum(step, axis=0)) * 16).astype(np.int32)
            stroke = cv2.polylines(np.zeros_like(pen), [points[:, None]], False, 1, thickness, cv2.LINE_8, 4)
            inked = max(1, int(stroke.sum()))
            over_tissue = ((stroke > 0) & (tissue > 0)).sum() / inked
            over_focus = ((stroke > 0) & forbidden).sum() / inked
            cost = abs(over_tissue - 0.35) + 5 * over_focus + (inked < 8 * thickness)
            if cost < best_cost:
                best, best_cost = stroke, float(cost)
        pen = np.maximum(pen, best)
    smooth = cv2.GaussianBlur(pen.astype(np.float32), (0, 0), 1.2)
    return np.where(forbidden, np.minimum(4 * (smooth - 0.5), -1), 4 * (smooth - 0.5)).astype(np.float32), colour


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], scale_cells: float) -> Field:
    """Noise of about unit deviation whose features are `scale_cells` wide."""
    height, width = shape
    rows, cols = (int(np.ceil(side / scale_cells)) + 3 for side in (height, width))
    coarse = rng.standard_normal((rows, cols)).astype(np.float32)
    size = (round(cols * scale_cells), round(rows * scale_cells))
    fine: Field = cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)
    top, left = (round(scale_cells * rng.uniform(0.5, 1.5)) for _ in range(2))
    return fine[top : top + height, left : left + width] / np.float32(0.7)


def _in_cells(field: Field) -> Field:
    """Scales a signed field so that near its outline it grows by about one per cell."""
    dy, dx = np.gradient(field)
    slope = np.hypot(dx, dy)
    near = np.abs(field) < 3 * slope
    return (field / max(float(np.median(slope[near])) if near.any() else 1.0, 1e-6)).astype(np.float32)


def _mirrored(layout: Layout, mirror: int) -> Layout:
    step_y, step_x = (-1 if mirror & 2 else 1), (-1 if mirror & 1 else 1)

    def turned(field: Field) -> Field:
        return np.ascontiguousarray(field[::step_y, ::step_x])

    return replace(
        layout,
        tissue=turned(layout.tissue),
        tumour=turned(layout.tumour),
        lookalike=turned(layout.lookalike),
        pen=turned(layout.pen),
        glandular=turned(layout.glandular),
    )
