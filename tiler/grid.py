"""The tiles of a slide: a grid in px of the read level, kept where there is enough tissue. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from manifests.geometry import ReadSize, grid_starts, hilbert_order, level_to_l0


@dataclass(frozen=True)
class Grid:
    """Kept tiles in block order: level-0 corners and tissue shares; and how many places were left out, by reason."""

    x_l0: NDArray[np.int32]
    y_l0: NDArray[np.int32]
    tissue: NDArray[np.float32]
    rejected: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Lattice:
    """Where tiles may lie: starts in px of the read level, x then y."""

    xs: NDArray[np.int64]
    ys: NDArray[np.int64]


def lay_lattice(
    level_size: tuple[int, int],
    read: ReadSize,
    *,
    overlap_share: float = 0.0,
    offset_share: tuple[float, float] = (0.0, 0.0),
    align_to: tuple[int, int] | None = None,
) -> Lattice:
    """All places for a tile that lie wholly inside the level.

    Args:
        level_size: (width, height) of the read level, px.
        read: the tile's size at the read level.
        overlap_share: share of a tile's side that its neighbour covers too, [0, 1).
        offset_share: where the lattice starts (x, y), in shares of a tile's side.
        align_to: (width, height) of the file's own compressed tiles, px of the read level: every place then starts at
            a corner of one, and the step is the next multiple of its side. None: no alignment.
    """
    sides = read.read_w, read.read_h
    starts = []
    for axis, side in enumerate(sides):
        step = side * (1 - overlap_share)
        if align_to is not None:
            step = -(-side // align_to[axis]) * align_to[axis]
        starts.append(grid_starts(level_size[axis], side, step, offset_share[axis] * side))
    return Lattice(xs=starts[0], ys=starts[1])


def make_grid(
    lattice: Lattice,
    read: ReadSize,
    downsample: float,
    tissue: NDArray[np.bool_],
    artefacts: Mapping[str, NDArray[np.bool_]],
    mask_covers: tuple[float, float],
    *,
    min_tissue: float,
) -> Grid:
    """Keeps the places with at least `min_tissue` tissue once the artefacts are left out, one after the other.

    A place is rejected for the first reason after which its share is too small: "tissue", then the artefacts in order.

    Args:
        lattice: the places.
        read: the tile's size at the read level.
        downsample: level-0 px per px of the read level.
        tissue: mask over the whole slide, any resolution.
        artefacts: reason to mask, in the same frame.
        mask_covers: (width, height) of what the masks cover, px of the read level; not less than the level.
        min_tissue: least tissue share of a tile; 0 keeps all.
    """
    xs, ys = lattice.xs, lattice.ys
    across, down = mask_covers
    edges = xs / across, (xs + read.read_w) / across, ys / down, (ys + read.read_h) / down
    clean = tissue
    share = box_means(clean, *edges)
    kept = share >= min_tissue
    rejected = {"tissue": int((~kept).sum())}
    for reason, mask in artefacts.items():
        touched = clean & mask
        if touched.any():
            clean = clean & ~mask
            share = box_means(clean, *edges)
        before, kept = kept, kept & (share >= min_tissue)
        rejected[reason] = int((before & ~kept).sum())
    row, col = np.nonzero(kept)
    order = hilbert_order(col, row)
    row, col = row[order], col[order]
    return Grid(
        level_to_l0(xs[col], downsample),
        level_to_l0(ys[row], downsample),
        share[row, col].astype(np.float32),
        rejected,
    )


def box_means(
    mask: NDArray[np.bool_],
    x0: NDArray[np.float64],
    x1: NDArray[np.float64],
    y0: NDArray[np.float64],
    y1: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Exact mean of the mask over the boxes [x0, x1) x [y0, y1), each edge given as a share of the mask's side.

    The mask is piecewise constant, so its integral image is piecewise bilinear, and interpolating it gives the exact
    area of a box whose edges fall inside mask pixels.

    Returns:
        (len(y0), len(x0)) means.
    """
    height, width = mask.shape
    integral = cv2.integral(mask.view(np.uint8))  # int32, (height + 1, width + 1)
    across = _interpolate(integral, x1 * width, axis=1) - _interpolate(integral, x0 * width, axis=1)
    area = _interpolate(across, y1 * height, axis=0) - _interpolate(across, y0 * height, axis=0)
    boxes = np.outer((y1 - y0) * height, (x1 - x0) * width)
    return np.asarray(np.clip(area / np.maximum(boxes, 1e-12), 0, 1))


def _interpolate(values: NDArray[Any], at: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    low = np.clip(np.floor(at).astype(int), 0, values.shape[axis] - 2)
    share = np.expand_dims(at - low, 1 - axis)
    below, above = values.take(low, axis), values.take(low + 1, axis)
    return np.asarray(below + (above - below) * share)
