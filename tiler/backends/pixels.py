"""What every reader answers, and the arithmetic that our own two readers (tifffile, zarr) share. No IO."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

PAD_VALUE = 255
"""Every backend shows this past the edge of a slide."""


@dataclass(frozen=True)
class Level:
    """One level of the pyramid: its size in px, its px per tile of the file, level-0 px per px."""

    width: int
    height: int
    tile_w: int
    tile_h: int
    downsample: float


class Pixels(Protocol):
    """What a backend answers."""

    name: str
    levels: tuple[Level, ...]

    def read(self, x_l0: int, y_l0: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        """RGB, (height, width, 3). Origin in level-0 px, size in px of `level`."""

    def is_exact(self, level: int) -> bool:
        """A region's pixels do not depend on where the read that holds it began."""


def make_levels(sizes: Sequence[tuple[int, int]], tiles: Sequence[tuple[int, int]]) -> tuple[Level, ...]:
    """Levels from their sizes and tile sizes (width, height), finest first."""
    return tuple(Level(*size, *tile, find_downsample(sizes[0], size)) for size, tile in zip(sizes, tiles, strict=True))


def find_downsample(size_l0: tuple[int, int], size: tuple[int, int]) -> float:
    """Level-0 px per px of a level: the whole number that its size was rounded from, else the mean of both axes.

    769 px halved are 384 or 385 px: 2, not 2.0026, which would be half a px off at the far edge.
    """
    ratios = [a / b for a, b in zip(size_l0, size, strict=True)]
    whole = round(sum(ratios) / 2)
    if whole and all(b in (a // whole, -(-a // whole)) for a, b in zip(size_l0, size, strict=True)):
        return float(whole)
    return sum(ratios) / 2


def read_inside(
    level: Level,
    corner_l0: tuple[int, int],
    size: tuple[int, int],
    read: Callable[[int, int, int, int], NDArray[np.uint8]],
) -> NDArray[np.uint8]:
    """A region of a level, `PAD_VALUE` where it reaches past the edge.

    Args:
        level: the level.
        corner_l0: (x, y) in level-0 px; px of the level are floor(x_l0 / downsample).
        size: (width, height) in px of the level.
        read: called with left, top, right, bottom in px of the level, wholly inside it; answers RGB.
    """
    left, top = (math.floor(at / level.downsample) for at in corner_l0)
    region = np.full((size[1], size[0], 3), PAD_VALUE, np.uint8)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + size[0], level.width), min(top + size[1], level.height)
    if x0 < x1 and y0 < y1:
        region[y0 - top : y1 - top, x0 - left : x1 - left] = read(x0, y0, x1, y1)
    return region


def to_rgb(samples: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB (h, w, 3) from (h, w, 1 | 3 | 4): grey in three equal channels, wholly transparent px white."""
    if samples.shape[2] == 1:
        return np.repeat(samples, 3, axis=2)
    if samples.shape[2] == 3:
        return samples
    return np.where(samples[..., 3:] == 0, np.uint8(PAD_VALUE), samples[..., :3])
