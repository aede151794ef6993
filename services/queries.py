"""What can be asked of a manifest, as pure functions over arrays; finding slides is in `services.search`.

Knows no file and no HTTP. All coordinates are level-0 px; tile extents come from the manifest: no geometry here.
"""

import re
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from manifests import Manifest, sample_tiles
from services.errors import BadQueryError, NothingToSampleError

_MAX_L0 = 2**31 - 1
BBOX = re.compile(r"-?[0-9]{1,10}(,-?[0-9]{1,10}){3}")
"""`int` alone would read 1_000, blanks, and digits of other scripts too."""


@dataclass(frozen=True, kw_only=True)
class BBox:
    """A half-open rectangle [x0, x1) x [y0, y1) in level-0 px."""

    x0: int
    y0: int
    x1: int
    y1: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `x0,y0,x1,y1`; raises BadQueryError for anything else and for empty rectangles."""
        if not BBOX.fullmatch(text):
            raise BadQueryError(f"bbox is {text[:80]!r}, expected four whole numbers x0,y0,x1,y1 in level-0 px")
        x0, y0, x1, y1 = map(int, text.split(","))
        if not (-_MAX_L0 <= x0 < x1 <= _MAX_L0 and -_MAX_L0 <= y0 < y1 <= _MAX_L0):
            raise BadQueryError(f"bbox is {text[:80]!r}, expected x0 < x1 and y0 < y1, all within 2^31")
        return cls(x0=x0, y0=y0, x1=x1, y1=y1)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Which tiles a step uses: the arguments of `manifests.sample_tiles` and `manifests.shard`."""

    k: int
    seed: int
    epoch: int
    part: int
    num_parts: int


def find_tiles(manifest: Manifest, *, bbox: BBox | None, min_tissue: float) -> NDArray[np.int64]:
    """Rows, ascending, of the tiles that intersect `bbox` and hold at least `min_tissue` (a share, 0 to 1)."""
    keep = manifest.tissue >= min_tissue
    if bbox is not None:
        width, height = manifest.footprint_l0
        # x < x1 and x + width > x0, with the sum on the side of Python's unbounded integers.
        keep &= (manifest.x_l0 < bbox.x1) & (manifest.x_l0 > bbox.x0 - width)
        keep &= (manifest.y_l0 < bbox.y1) & (manifest.y_l0 > bbox.y0 - height)
    return np.flatnonzero(keep)


def check_draw(manifest: Manifest, draw: Draw) -> None:
    """Refuses what cannot be drawn.

    Raises:
        NothingToSampleError: a failed or empty slide.
        BadQueryError: no such part.
    """
    slide = manifest.slide
    if slide.status == "failed":
        raise NothingToSampleError(f"slide {slide.slide_id} failed when it was tiled: there is nothing to sample")
    if not len(manifest):
        raise NothingToSampleError(f"slide {slide.slide_id} has no tissue tiles: there is nothing to sample")
    if not 0 <= draw.part < draw.num_parts:
        raise BadQueryError(f"part is {draw.part} of {draw.num_parts}, expected 0 <= part < num_parts")


def draw_tiles(manifest: Manifest, draw: Draw) -> NDArray[np.int64]:
    """Rows of a whole sample: what the local function gives."""
    slide_id = manifest.slide.slide_id
    return sample_tiles(len(manifest), k=draw.k, seed=draw.seed, epoch=draw.epoch, slide_id=slide_id)
