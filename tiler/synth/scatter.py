"""Where each nucleus and gland of one slide lies, stamped on whole density planes.

Not for colour (texture.py) nor for how a nucleus looks (nuclei.py). The two kinds of focus differ here and in
nuclei.py only: large nuclei far apart, or small ones close together.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from tiler.synth import nuclei
from tiler.synth.config import CELL_PX
from tiler.synth.layout import Field, Layout
from tiler.synth.nuclei import MARGIN_PX, NucleusKind, Plane

EPITHELIUM, LUMEN = 128, 255
"""Codes in the gland plane; 0 is stroma."""
_STROMA_NUCLEUS_PX = 34.0
"""Root of the stroma's area per nucleus, in level-0 px."""
_GLAND_PITCH_PX = 215.0
"""Distance between neighbouring glands, in level-0 px."""
_GLAND_NUCLEUS_PX = 13.0
"""Distance between nuclei along a gland's outline, in level-0 px."""
_CROWDS = {nuclei.TUMOUR: 25.5, nuclei.LYMPHOCYTE: 12.2}
"""Distance between neighbouring nuclei of a focus, in level-0 px."""


def draw_planes(rng: np.random.Generator, layout: Layout, fibre_angles: Field) -> tuple[Plane, Plane]:
    """Density of nuclei and code of glands, both (height + 64, width + 64) level-0 px, with a margin of 32."""
    width, height = layout.size_px
    density = np.zeros((height + 2 * MARGIN_PX, width + 2 * MARGIN_PX), np.uint8)
    glands = np.zeros_like(density)
    _draw_glands(rng, layout, density, glands)
    _draw_stroma_nuclei(rng, layout, density, glands, fibre_angles)
    _draw_crowd(rng, layout.tumour, density, nuclei.TUMOUR)
    _draw_crowd(rng, layout.lookalike, density, nuclei.LYMPHOCYTE)
    return density, glands


def _draw_glands(rng: np.random.Generator, layout: Layout, density: Plane, glands: Plane) -> None:
    """Rings of nuclei round a pale lumen, where the layout is glandular and no focus lies."""
    centres = _jittered_grid(rng, layout.size_px, _GLAND_PITCH_PX, 0.14)
    radii = rng.uniform(55, 100, size=len(centres))
    clear = np.minimum(layout.tissue, -np.maximum(layout.tumour, layout.lookalike))
    fits = (_at(layout.glandular, centres) > 0) & (_at(clear, centres) * CELL_PX > radii + 8)
    for centre, radius in zip(centres[fits], radii[fits], strict=True):
        turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        reach = radius * nuclei.draw_outline(rng, turn, 0.22)
        ring = reach[:, None] * np.stack((np.cos(turn), np.sin(turn)), axis=1)
        lumen = ring * rng.uniform(0.3, 0.62)
        for outline, code in ((ring, EPITHELIUM), (lumen, LUMEN)):
            points = np.rint((centre + MARGIN_PX + outline) * 16).astype(np.int32)[:, None]
            cv2.fillPoly(glands, [points], code, cv2.LINE_AA, 4)
        perimeter = float(np.linalg.norm(np.diff(ring, axis=0, append=ring[:1]), axis=1).sum())
        turns = np.linspace(0, 2 * np.pi, max(8, round(perimeter / _GLAND_NUCLEUS_PX)), endpoint=False)
        turns = turns + rng.normal(0, 0.03, size=turns.shape)
        depth = np.interp(turns, turn, reach, period=2 * np.pi) - rng.normal(15, 2.5, size=turns.shape)
        places = centre + depth[:, None] * np.stack((np.cos(turns), np.sin(turns)), axis=1)
        nuclei.stamp(density, nuclei.GLANDULAR, places, nuclei.pick(rng, turns + rng.normal(0, 0.15, turns.shape)))


def _draw_stroma_nuclei(
    rng: np.random.Generator, layout: Layout, density: Plane, glands: Plane, fibre_angles: Field
) -> None:
    """Spindle nuclei along the fibres and a few lymphocytes, outside glands and foci."""
    width, height = layout.size_px
    places = rng.uniform((0, 0), (width, height), size=(round(width * height / _STROMA_NUCLEUS_PX**2), 2))
    columns, rows = np.floor(places).astype(np.int64).T
    clear = np.minimum(layout.tissue, -np.maximum(layout.tumour, layout.lookalike))
    places = places[(_at(clear, places) > 0.4) & (glands[rows + MARGIN_PX, columns + MARGIN_PX] == 0)]
    angles = _nearest(fibre_angles, places) + rng.normal(0, 0.2, size=len(places))
    numbers = nuclei.pick(rng, angles)
    is_round = rng.random(len(places)) < 0.25
    nuclei.stamp(density, nuclei.SPINDLE, places[~is_round], numbers[~is_round])
    nuclei.stamp(density, nuclei.LYMPHOCYTE, places[is_round], numbers[is_round])


def _draw_crowd(rng: np.random.Generator, field: Field, density: Plane, kind: NucleusKind) -> None:
    """Fills a focus with nuclei of one kind, in any direction."""
    if field.max() <= 0:
        return
    height, width = field.shape
    places = _jittered_grid(rng, (width * CELL_PX, height * CELL_PX), _CROWDS[kind], 0.17)
    places = places[_at(field, places) > rng.normal(0.1, 0.35, size=len(places))]
    nuclei.stamp(density, kind, places, nuclei.pick(rng, rng.uniform(0, np.pi, size=len(places))))


def _jittered_grid(
    rng: np.random.Generator, size_px: tuple[int, int], pitch_px: float, jitter: float
) -> NDArray[np.float64]:
    """Hexagonal grid over the slide, (N, 2) in level-0 px, each point moved by `jitter` times the pitch."""
    row_px = pitch_px * np.sqrt(3) / 2
    rows, columns = np.mgrid[0 : int(size_px[1] / row_px), 0 : int(size_px[0] / pitch_px)]
    x = (columns + 0.5 * (rows % 2) + 0.25) * pitch_px
    grid = np.stack((x.ravel(), ((rows + 0.5) * row_px).ravel()), axis=1)
    places: NDArray[np.float64] = grid + rng.normal(0, jitter * pitch_px, size=grid.shape)
    return places


def _at(field: Field, xy_px: NDArray[np.float64]) -> Field:
    """A field at level-0 points, linear between cell centres."""
    height, width = field.shape
    x, y = np.clip(xy_px / CELL_PX - 0.5, 0, np.array((width - 1.001, height - 1.001))).T
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    fx, fy = x - left, y - top
    upper = field[top, left] * (1 - fx) + field[top, left + 1] * fx
    lower = field[top + 1, left] * (1 - fx) + field[top + 1, left + 1] * fx
    values: Field = (upper * (1 - fy) + lower * fy).astype(np.float32)
    return values


def _nearest(field: Field, xy_px: NDArray[np.float64]) -> Field:
    columns, rows = np.floor(xy_px / CELL_PX).astype(np.int64).T
    values: Field = field[rows, columns]
    return values
