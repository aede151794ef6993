"""Which of a file's own tiles the tiles of a manifest touch, and back: arithmetic on rectangles, pure.

A grid is bool (rows, columns) over the file's tiles of one level. Sums over rectangles come from summed-area tables:
F. C. Crow, Summed-area tables for texture mapping, 1984. So the cost does not grow with the size of a tile.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Grid = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Cover:
    """The rectangle of file tiles under each tile of a manifest: first and last row and column, each int64 (n,)."""

    top: NDArray[np.int64]
    bottom: NDArray[np.int64]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    shape: tuple[int, int]
    """(rows, columns) of the file's tiles."""

    def touched(self) -> Grid:
        """The file tiles that any tile of the manifest touches."""
        steps = np.zeros((self.shape[0] + 1, self.shape[1] + 1), np.int64)
        for row, column, step in (
            (self.top, self.left, 1),
            (self.bottom + 1, self.right + 1, 1),
            (self.top, self.right + 1, -1),
            (self.bottom + 1, self.left, -1),
        ):
            np.add.at(steps, (row, column), step)
        return np.asarray(steps.cumsum(0).cumsum(1)[:-1, :-1] > 0)

    def touching(self, bad: Grid) -> NDArray[np.bool_]:
        """The tiles of the manifest, (n,), that touch one of the `bad` file tiles."""
        sums = np.zeros((self.shape[0] + 1, self.shape[1] + 1), np.int64)
        sums[1:, 1:] = bad.cumsum(0).cumsum(1)
        below, right = self.bottom + 1, self.right + 1
        counts = sums[below, right] - sums[self.top, right] - sums[below, self.left] + sums[self.top, self.left]
        return np.asarray(counts > 0)


def cover(
    x_level: NDArray[np.int64],
    y_level: NDArray[np.int64],
    read_size: tuple[int, int],
    file_tile: tuple[int, int],
    shape: tuple[int, int],
) -> Cover:
    """Lays tiles on a file's own.

    Args:
        x_level, y_level: corners in px of the read level, (n,).
        read_size: (width, height) of one tile at that level, px.
        file_tile: (width, height) of the file's own tiles there, px.
        shape: (rows, columns) of the file's own tiles; what lies past them touches the last.
    """
    rows, columns = shape
    return Cover(
        np.clip(y_level // file_tile[1], 0, rows - 1),
        np.clip((y_level + read_size[1] - 1) // file_tile[1], 0, rows - 1),
        np.clip(x_level // file_tile[0], 0, columns - 1),
        np.clip((x_level + read_size[0] - 1) // file_tile[0], 0, columns - 1),
        shape,
    )
