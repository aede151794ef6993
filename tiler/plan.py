"""The read planner: which regions to read so that each compressed tile of the file is decoded once. Pure.

The file's own tiles (usually 256 px, JPEG) are what decoding costs, so they are the unit: those that the wanted tiles
touch are covered by rectangles of a few, no two overlapping, and each rectangle is cut down to the px that are wanted
of it. A wanted tile is put together from its parts. So every needed compressed tile is decoded exactly once, however
dense the sample is; a tile with no neighbour is one region, its own; and no more calls are made than rectangles.

Measured with cuCIM, us a compressed tile of 256 px, its share of the call and of one copy included: rectangles of 1x1
180, 2x2 169, 4x2 167, 8x2 172, 8x8 191, 16x16 278: past a few MB the pixels leave the cache before they are copied.

The plan never changes which tiles are read or their order, and a tile's pixels never depend on what was read with it:
parts are only cut out and put together, resampling comes after.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from manifests.geometry import l0_to_level, level_to_l0

BLOCK_PX = 512 * 1024
"""Most px in one region of several compressed tiles: 1.5 MB."""


class BlockRead(NamedTuple):
    """One region to read, and the parts of tiles that lie in it.

    `x_l0`, `y_l0` is its corner in level-0 px; `x`, `y` the same corner and `width`, `height` its size in px of the
    read level. `parts` int64 (n, 7), px of the read level: tile, left and top in the region, left and top in the tile,
    width, height.
    """

    x_l0: int
    y_l0: int
    x: int
    y: int
    width: int
    height: int
    parts: NDArray[np.int64]


def plan_reads(
    x_l0: NDArray[np.int32],
    y_l0: NDArray[np.int32],
    downsample: float,
    read_size: tuple[int, int],
    file_tile: tuple[int, int],
    *,
    may_share: bool = True,
    most_px: int = BLOCK_PX,
) -> tuple[list[BlockRead], int]:
    """Plans the reads of distinct tiles of one slide at one level.

    Args:
        x_l0, y_l0: corners in level-0 px, (n,).
        downsample: level-0 px per px of the read level.
        read_size: (width, height) of one tile at the read level, px.
        file_tile: (width, height) of the file's own compressed tiles at that level, px.
        may_share: False reads every tile alone: for readers whose pixels depend on where a read began.
        most_px: px in one region of several compressed tiles; 0 has each compressed tile read alone.

    Returns:
        Reads whose parts make up every tile exactly once, in the order of their first tiles; and how many compressed
        tiles they decode.
    """
    if len(x_l0) == 0:
        return [], 0
    x, y = l0_to_level(x_l0, downsample), l0_to_level(y_l0, downsample)
    left, top = x // file_tile[0], y // file_tile[1]
    right, bottom = (x + read_size[0] - 1) // file_tile[0], (y + read_size[1] - 1) // file_tile[1]
    if not may_share:
        num_decoded = int(((right - left + 1) * (bottom - top + 1)).sum())
        return [_alone(i, x_l0, y_l0, x, y, read_size) for i in range(len(x))], num_decoded
    column, row = int(left.min()), int(top.min())
    left, right, top, bottom = left - column, right - column, top - row, bottom - row
    needed = _touched(left, top, right, bottom)
    boxes, owner = _cover(needed, max(1, most_px // (file_tile[0] * file_tile[1])))
    tile, box = _pairs(left, top, right, bottom, owner)
    # Each part: where a tile and a rectangle of compressed tiles meet, px of the level, half-open.
    corner = np.array([column, row])
    first, past = (corner + boxes[box, :2]) * file_tile, (corner + boxes[box, 2:]) * file_tile
    at = np.stack((x[tile], y[tile]), 1)
    begin, end = np.maximum(at, first), np.minimum(at + read_size, past)
    # Each region: no more of its rectangle than its parts.
    starts = np.flatnonzero(np.append(True, box[1:] != box[:-1]))
    region, region_end = np.minimum.reduceat(begin, starts), np.maximum.reduceat(end, starts)
    within = begin - np.repeat(region, np.diff(np.append(starts, len(box))), axis=0)
    parts = np.concatenate((tile[:, None], within, begin - at, end - begin), axis=1)
    where = np.concatenate((level_to_l0(region, downsample), region, region_end - region), axis=1)
    # By their first tiles, which lie in block order: the parts of a tile come soon after each other, and find it in the
    # cache (10 % faster where they are resampled).
    order = np.argsort(tile[starts], kind="stable")
    parts_of = [parts[start:stop] for start, stop in pairwise([*starts.tolist(), len(parts)])]
    return [
        BlockRead(left_l0, top_l0, left_px, top_px, width, height, parts_of[i])
        for i, (left_l0, top_l0, left_px, top_px, width, height) in zip(
            order.tolist(), where[order].tolist(), strict=True
        )
    ], int(needed.sum())


def _alone(
    i: int,
    x_l0: NDArray[np.int32],
    y_l0: NDArray[np.int32],
    x: NDArray[np.int64],
    y: NDArray[np.int64],
    size: tuple[int, int],
) -> BlockRead:
    return BlockRead(int(x_l0[i]), int(y_l0[i]), int(x[i]), int(y[i]), *size, np.array([[i, 0, 0, 0, 0, *size]]))


def _touched(
    left: NDArray[np.int64], top: NDArray[np.int64], right: NDArray[np.int64], bottom: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """The compressed tiles, (rows, columns), that lie under any of the tiles, given by their edges, all inclusive."""
    steps = np.zeros((int(bottom.max()) + 2, int(right.max()) + 2), np.int64)
    for rows, columns, step in (
        (top, left, 1),
        (bottom + 1, right + 1, 1),
        (top, right + 1, -1),
        (bottom + 1, left, -1),
    ):
        np.add.at(steps, (rows, columns), step)
    return np.asarray(steps.cumsum(0).cumsum(1)[:-1, :-1] > 0)


def _cover(needed: NDArray[np.bool_], most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Covers the needed cells of a grid by rectangles of at most `most` cells, about twice as wide as high.

    Greedy, in reading order: each rectangle grows to the right, then down.

    Returns:
        The rectangles, (n, 4): left, top, right, bottom in cells, half-open; and which of them holds each cell.
    """
    if most == 1:
        rows, columns = np.nonzero(needed)
        owner = np.full(needed.shape, -1, np.int64)
        owner[needed] = np.arange(len(rows))
        return np.stack((columns, rows, columns + 1, rows + 1), 1), owner
    stride = needed.shape[1] + 1  # A cell that is not needed ends each row, a row of them the grid.
    free = bytearray(np.pad(needed, ((0, 1), (0, 1))).astype(np.uint8).tobytes())
    owner = np.full(needed.shape, -1, np.int64)
    boxes: list[tuple[int, int, int, int]] = []
    widest = max(1, int((2 * most) ** 0.5))
    at = free.find(1)
    while at >= 0:
        row, column = divmod(at, stride)
        width = 1
        while width < widest and free[at + width]:
            width += 1
        whole, height = b"\1" * width, 1
        while (height + 1) * width <= most and free[at + height * stride : at + height * stride + width] == whole:
            height += 1
        for line in range(at, at + height * stride, stride):
            free[line : line + width] = bytes(width)
        owner[row : row + height, column : column + width] = len(boxes)
        boxes.append((column, row, column + width, row + height))
        at = free.find(1, at)
    return np.array(boxes, np.int64), owner


def _pairs(
    left: NDArray[np.int64],
    top: NDArray[np.int64],
    right: NDArray[np.int64],
    bottom: NDArray[np.int64],
    owner: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which tile meets which rectangle, each pair once, by rectangle, then tile."""
    found = []
    for down in range(int((bottom - top).max()) + 1):
        for across in range(int((right - left).max()) + 1):
            tile = np.flatnonzero((top + down <= bottom) & (left + across <= right))
            found.append(owner[top[tile] + down, left[tile] + across] * len(left) + tile)
    pairs = np.sort(np.concatenate(found))
    box, tile = np.divmod(pairs[np.append(True, pairs[1:] != pairs[:-1])], len(left))
    return tile, box
