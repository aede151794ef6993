"""The read planner: which regions to read so that each compressed tile of the file is decoded about once. Pure.

Neighbouring tiles share one read where that decodes fewer of the file's own tiles (usually 256 px, JPEG) than reading
them apart. A quadtree over blocks of 8x8 tiles decides: a node is read as one region if its cost is no more than the
sum of its children's. The plan never changes which tiles are read or their order, and a tile's pixels never depend on
what was read with it: blocks are only cropped, resampling comes after.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BLOCK_TILES = 8
_CALL_COST = 0.35
"""Cost of one read call, in decoded file tiles: about 70 us beside 190 us for a 256-px JPEG tile."""


@dataclass(frozen=True)
class BlockRead:
    """One region to read and the tiles it serves.

    `x_l0`, `y_l0` is the region's corner in level-0 px; `width`, `height` its size in px of the read level; tile
    `members[i]` lies at (`left[i]`, `top[i]`) in the region.
    """

    x_l0: int
    y_l0: int
    width: int
    height: int
    members: NDArray[np.int64]
    left: NDArray[np.int64]
    top: NDArray[np.int64]


def plan_reads(
    x_l0: NDArray[np.int32],
    y_l0: NDArray[np.int32],
    x_level: NDArray[np.int64],
    y_level: NDArray[np.int64],
    read_size: tuple[int, int],
    file_tile: tuple[int, int],
    *,
    may_share: bool = True,
) -> list[BlockRead]:
    """Plans the reads of distinct tiles of one slide at one level.

    Args:
        x_l0, y_l0: corners in level-0 px, (n,).
        x_level, y_level: the same corners in px of the read level, (n,).
        read_size: (width, height) of one tile at the read level, px.
        file_tile: (width, height) of the file's own compressed tiles at that level, px.
        may_share: False reads every tile alone.

    Returns:
        Reads whose members are a partition of range(n).
    """
    width, height = read_size
    reads: list[BlockRead] = []

    def emit(members: NDArray[np.int64]) -> None:
        xs, ys = x_level[members], y_level[members]
        x0, y0 = int(xs.min()), int(ys.min())
        reads.append(
            BlockRead(
                # The level-0 corner of the leftmost (topmost) member is the one that maps to x0 (y0) for every reader.
                int(x_l0[members].min()),
                int(y_l0[members].min()),
                int(xs.max()) - x0 + width,
                int(ys.max()) - y0 + height,
                members,
                xs - x0,
                ys - y0,
            )
        )

    def cost(members: NDArray[np.int64]) -> float:
        xs, ys = x_level[members], y_level[members]
        across = (int(xs.max()) + width - 1) // file_tile[0] - int(xs.min()) // file_tile[0] + 1
        down = (int(ys.max()) + height - 1) // file_tile[1] - int(ys.min()) // file_tile[1] + 1
        return across * down + _CALL_COST

    def split(members: NDArray[np.int64], cells: int) -> tuple[float, list[NDArray[np.int64]]]:
        """The cheapest way to read `members`, which lie in a square of `cells` x `cells` tile places."""
        whole = cost(members)
        if len(members) == 1:
            return whole, [members]
        if cells == 1:  # Tiles that overlap so much that they share a place.
            parts = [split(members[i : i + 1], 1) for i in range(len(members))]
        else:
            half = cells // 2
            quadrant = (col[members] // half % 2) + 2 * (row[members] // half % 2)
            parts = [split(members[quadrant == q], half) for q in range(4) if (quadrant == q).any()]
        apart = sum(part_cost for part_cost, _ in parts)
        if whole <= apart:
            return whole, [members]
        return apart, [group for _, groups in parts for group in groups]

    if not may_share:
        for i in range(len(x_level)):
            emit(np.array([i]))
        return reads
    col, row = x_level // width, y_level // height
    block = (row // _BLOCK_TILES) * (int(col.max(initial=0)) // _BLOCK_TILES + 1) + col // _BLOCK_TILES
    order = np.argsort(block, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(block[order])) + 1):
        if len(members):
            for group in split(members, _BLOCK_TILES)[1]:
                emit(group)
    return reads
