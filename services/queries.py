"""What can be asked of a catalogue and of a manifest, as pure functions over tables and arrays.

Knows no file and no HTTP. All coordinates are level-0 px; tile extents come from the manifest: no geometry here.
"""

import unicodedata
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from manifests import Manifest, sample_tiles, shard
from services.errors import BadQueryError, NothingToSampleError

_MAX_L0 = 2**31 - 1


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
        try:
            x0, y0, x1, y1 = (int(part) for part in text.split(","))
        except ValueError:
            raise BadQueryError(
                f"bbox is {text[:80]!r}, expected four whole numbers x0,y0,x1,y1 in level-0 px"
            ) from None
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


@dataclass(frozen=True, kw_only=True, eq=False)
class SlidePage:
    """One page of the slide list."""

    slides: pa.Table
    num_matched: int
    """Slides that match, on all pages."""
    next_cursor: str | None
    """What to ask for the next page with; None at the end."""


def find_slides(catalog: pa.Table, *, status: str | None, q: str, limit: int, cursor: str | None) -> SlidePage:
    """Filters and pages the catalogue, which is sorted by slide_id.

    The cursor is the last slide id of the page before: slides that appear in between neither repeat nor hide others.

    Args:
        catalog: a table in `manifests.schema.CATALOG_SCHEMA`.
        status: only slides of this status.
        q: only slides whose id holds this text, whatever its case.
        limit: slides per page.
        cursor: `next_cursor` of the page before.
    """
    matched = catalog
    if status is not None:
        matched = matched.filter(pc.equal(matched["status"], status))
    if q:
        text = unicodedata.normalize("NFC", q)
        matched = matched.filter(pc.match_substring(matched["slide_id"], text, ignore_case=True))
    rest = matched if cursor is None else matched.filter(pc.greater(matched["slide_id"], cursor))
    page = rest.slice(0, limit)
    next_cursor = page["slide_id"][-1].as_py() if len(rest) > len(page) else None
    return SlidePage(slides=page, num_matched=len(matched), next_cursor=next_cursor)


def find_tiles(manifest: Manifest, *, bbox: BBox | None, min_tissue: float) -> NDArray[np.int64]:
    """Rows, ascending, of the tiles that intersect `bbox` and hold at least `min_tissue` (a share, 0 to 1)."""
    keep = manifest.tissue >= min_tissue
    if bbox is not None:
        width, height = manifest.footprint_l0
        # x < x1 and x + width > x0, with the sum on the side of Python's unbounded integers.
        keep &= (manifest.x_l0 < bbox.x1) & (manifest.x_l0 > bbox.x0 - width)
        keep &= (manifest.y_l0 < bbox.y1) & (manifest.y_l0 > bbox.y0 - height)
    return np.flatnonzero(keep)


def draw_tiles(manifest: Manifest, draw: Draw) -> NDArray[np.int64]:
    """Rows of a sample, or of one part of it: what the local functions give.

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
    rows = sample_tiles(len(manifest), k=draw.k, seed=draw.seed, epoch=draw.epoch, slide_id=slide.slide_id)
    return shard(rows, part=draw.part, num_parts=draw.num_parts)
