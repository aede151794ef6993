"""The tiles of a slide: a grid in px of the read level, kept where there is enough tissue. Pure."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manifests.geometry import ReadSize, grid_starts, hilbert_order, level_to_l0


@dataclass(frozen=True)
class Grid:
    """Kept tiles in block order: level-0 corners and tissue shares; and how many positions were left out."""

    x_l0: NDArray[np.int32]
    y_l0: NDArray[np.int32]
    tissue: NDArray[np.float32]
    num_rejected: int


def make_grid(
    mask: NDArray[np.bool_],
    mask_covers: tuple[float, float],
    level_size: tuple[int, int],
    downsample: float,
    read: ReadSize,
    *,
    overlap_share: float,
    min_tissue: float,
) -> Grid:
    """Lays the grid and keeps the tiles with at least `min_tissue` tissue.

    Args:
        mask: tissue over the whole slide, any resolution.
        mask_covers: (width, height) of what the mask covers, px of the read level; not less than the level.
        level_size: (width, height) of the read level, px.
        downsample: level-0 px per px of the read level.
        read: the tile's size at the read level.
        overlap_share: share of a tile's side that its neighbour covers too, [0, 1).
        min_tissue: least tissue share of a tile; 0 keeps all.
    """
    width, height = level_size
    xs = grid_starts(width, read.read_w, read.read_w * (1 - overlap_share))
    ys = grid_starts(height, read.read_h, read.read_h * (1 - overlap_share))
    across, down = mask_covers
    share = box_means(mask, xs / across, (xs + read.read_w) / across, ys / down, (ys + read.read_h) / down)
    row, col = np.nonzero(share >= min_tissue)
    order = hilbert_order(col, row)
    row, col = row[order], col[order]
    return Grid(
        level_to_l0(xs[col], downsample),
        level_to_l0(ys[row], downsample),
        share[row, col].astype(np.float32),
        share.size - len(row),
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
    integral = np.zeros((height + 1, width + 1))
    integral[1:, 1:] = mask.cumsum(0).cumsum(1)
    across = _interpolate(integral, x1 * width, axis=1) - _interpolate(integral, x0 * width, axis=1)
    area = _interpolate(across, y1 * height, axis=0) - _interpolate(across, y0 * height, axis=0)
    boxes = np.outer((y1 - y0) * height, (x1 - x0) * width)
    return np.asarray(np.clip(area / np.maximum(boxes, 1e-12), 0, 1))


def _interpolate(values: NDArray[np.float64], at: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    low = np.clip(np.floor(at).astype(int), 0, values.shape[axis] - 2)
    share = np.expand_dims(at - low, 1 - axis)
    below, above = values.take(low, axis), values.take(low + 1, axis)
    return np.asarray(below + (above - below) * share)
