"""Arithmetic between pixel frames, in one place: level-0 px, px at a level, output px, microns.

Pure; knows no file. The tiler calls it once per slide and writes the result into the manifest, so that the trainer and
the service never do pixel geometry. Rounding is stated in SPEC.md and must not change within a schema version.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manifests.errors import ManifestError

MPP_TOLERANCE = 0.01
"""A level within 1 % of the requested mpp is used as it is, without resampling."""
_OFF_BORDER_PX = 0.05
"""Readers map level-0 px to level px as floor(x_l0 / downsample), some in float32 (relative error 6e-8: 0.006 px at
100,000 px). Coordinates stay this far past the border of a level px, so that every reader finds the same one."""
_NEAR_LINES = 8
"""Over so few columns the stride of a manifest's record is surely right to less than half a column."""


@dataclass(frozen=True, kw_only=True)
class ReadSize:
    """How one tile is read: `read_w` x `read_h` px at `level`, resampled to `tile_px` unless `is_native`."""

    level: int
    read_w: int
    read_h: int
    is_native: bool
    """The level is used as it is: no resampling."""


def choose_read(
    level_downsamples: tuple[float, ...], mpp: tuple[float, float], tile_px: int, tile_mpp: float
) -> ReadSize:
    """Picks the coarsest level that is at least as fine as requested.

    Args:
        level_downsamples: level-0 px per px of each level, finest first.
        mpp: microns per level-0 px (x, y).
        tile_px: output tile side in px.
        tile_mpp: microns per output px.

    Raises:
        ManifestError: even level 0 is coarser than requested by more than `MPP_TOLERANCE`; resolution that the scanner
            did not record is not made up.
    """
    finest = max(mpp)
    if finest > tile_mpp * (1 + MPP_TOLERANCE):
        raise ManifestError(
            f"scanned at {finest:.4g} mpp, coarser than the requested {tile_mpp:.4g}; give --mpp {finest:.4g}"
        )
    fine_enough = [i for i, d in enumerate(level_downsamples) if finest * d <= tile_mpp * (1 + MPP_TOLERANCE)]
    level = max(fine_enough, key=lambda i: level_downsamples[i])
    scale_x, scale_y = (tile_mpp / (m * level_downsamples[level]) for m in mpp)
    if abs(scale_x - 1) <= MPP_TOLERANCE and abs(scale_y - 1) <= MPP_TOLERANCE:
        return ReadSize(level=level, read_w=tile_px, read_h=tile_px, is_native=True)
    return ReadSize(level=level, read_w=round(tile_px * scale_x), read_h=round(tile_px * scale_y), is_native=False)


def level_to_l0(px: NDArray[np.int64], downsample: float) -> NDArray[np.int32]:
    """Level-0 coordinate whose floor(x_l0 / downsample) is `px`, exact `px * downsample` for whole downsamples."""
    if float(downsample).is_integer():
        return np.asarray(px * int(downsample), np.int32)
    return np.asarray(np.ceil(px * downsample + _OFF_BORDER_PX), np.int32)


def l0_to_level(x_l0: NDArray[np.int32], downsample: float) -> NDArray[np.int64]:
    """Inverse of `level_to_l0`."""
    return np.floor(x_l0 / downsample).astype(np.int64)


def grid_starts(extent_px: int, read_px: int, stride_px: float, offset_px: float = 0.0) -> NDArray[np.int64]:
    """Left (or top) edges, px at the read level, of all tiles from `offset_px` that lie wholly inside `extent_px`."""
    room = extent_px - read_px - offset_px
    count = math.floor(room / stride_px + 1e-9) + 2 if room >= 0 else 1
    starts = np.round(offset_px + np.arange(count) * stride_px).astype(np.int64)
    return starts[starts + read_px <= extent_px]


def line_numbers(starts_l0: NDArray[np.int32], stride_l0: float) -> NDArray[np.int32]:
    """In which column (or row) of its slide's grid each tile lies, counted from the first that holds a tile.

    The record's stride is not quite the grid's own: a level within 1 % of the requested mpp is used as it is, read
    sizes are whole px, aligned grids are wider. Over 200 columns 1 % is two columns. So where the tiles lie on a grid
    the stride is taken from them: from the steps between columns that are near each other, each of which must be a
    whole number of strides, up to the rounding of starts (at most a quarter of a stride of 8 px of the read level).
    Coordinates off any grid fall to the nearest multiple of the record's stride, several to one where they are denser.

    Args:
        starts_l0: left (or top) edges of the tiles, level-0 px, in any order.
        stride_l0: step of the grid by the record, level-0 px, not rounded.
    """
    lines = np.unique(starts_l0)
    gaps, stride = np.diff(lines), stride_l0
    steps = np.round(gaps / stride)
    near = steps <= _NEAR_LINES
    if steps[near].any():
        stride = gaps[near].sum() / steps[near].sum()
        steps = np.round(gaps / stride)
    is_grid = steps.all() and (np.abs(gaps / stride - steps)[near] < 1 / 3).all()
    numbers = np.cumsum([0, *steps]) if is_grid else np.round((lines - lines[:1]) / stride_l0)
    return numbers.astype(np.int32)[np.searchsorted(lines, starts_l0)]


def hilbert_order(col: NDArray[np.int64], row: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order that walks grid cells along a Hilbert curve: any contiguous run is a compact region of the slide.

    Source: the bitwise conversion of grid to curve index, https://en.wikipedia.org/wiki/Hilbert_curve.

    Returns:
        Indices that sort the cells.
    """
    x, y = col.astype(np.int64).copy(), row.astype(np.int64).copy()
    num_bits = int(max(x.max(initial=0), y.max(initial=0))).bit_length()
    index = np.zeros(len(x), np.int64)
    for bit in reversed(range(num_bits)):
        side = np.int64(1) << bit
        rx, ry = (x & side) > 0, (y & side) > 0
        index += side * side * ((3 * rx) ^ ry)
        x &= side - 1
        y &= side - 1
        flip = rx & ~ry
        x[flip], y[flip] = side - 1 - x[flip], side - 1 - y[flip]
        swap = ~ry
        x[swap], y[swap] = y[swap].copy(), x[swap].copy()
    return np.argsort(index, kind="stable")
