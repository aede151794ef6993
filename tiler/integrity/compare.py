"""Two readers, one answer? Reading tiles of a manifest to see what raises, and comparing them with another reader."""

import cv2
import numpy as np
from numpy.typing import NDArray

from manifests.schema import Manifest
from tiler.config import Backend
from tiler.errors import ReadError, TilerError
from tiler.slide import Slide, open_slide

MAX_DIFFERENCE = 6.0
"""Mean absolute difference (0 to 255, over a tile at an eighth of its size, so that a shift by part of a px, which
OpenSlide makes at fractional downsamples, counts little) above which two readers disagree."""
_LEAST_SAMPLE = 64
_SAMPLE_SHARE = 0.01


def sample_rows(num_tiles: int, fingerprint: str) -> NDArray[np.int64]:
    """64 rows or 1 %, whichever is more, ascending: one at random from each of as many equal runs of the manifest.

    Args:
        num_tiles: how many rows there are; all of them if they are no more than 64.
        fingerprint: the slide's; the same slide gives the same rows.
    """
    count = min(num_tiles, max(_LEAST_SAMPLE, -(-num_tiles // round(1 / _SAMPLE_SHARE))))
    edges = np.linspace(0, num_tiles, count + 1).astype(np.int64)
    rng = np.random.default_rng(int(fingerprint or "0", 16))
    return np.asarray(rng.integers(edges[:-1], edges[1:]), np.int64)


def strict_reader(slide: Slide) -> Slide:
    """OpenSlide, which raises on damage that others pass over; the slide's own where OpenSlide cannot open it. Anew."""
    try:
        return open_slide(slide.path, "openslide")
    except TilerError:
        return _anew(slide)


def _anew(slide: Slide) -> Slide:
    """The same slide with a handle of its own: after one error OpenSlide's raises for ever."""
    backend: Backend = slide.backend  # type: ignore[assignment]
    return open_slide(slide.path, backend)


def difference(mine: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> float:
    """How far two readings of a region, uint8 (h, w, 3), are apart: see `MAX_DIFFERENCE`."""
    size = max(1, mine.shape[1] // 8), max(1, mine.shape[0] // 8)
    small, other = (cv2.resize(np.ascontiguousarray(p), size, interpolation=cv2.INTER_AREA) for p in (mine, theirs))
    return float(cv2.absdiff(small, other).mean())


def other_reader(slide: Slide) -> Slide | None:
    """A reader to compare with: OpenSlide, or tifffile where OpenSlide is the slide's own; None if there is none."""
    try:
        other = open_slide(slide.path, "tifffile" if slide.backend == "openslide" else "openslide")
    except TilerError:
        return None
    same_levels = [(a.width, a.height) for a in other.levels] == [(a.width, a.height) for a in slide.levels]
    return other if same_levels and other.backend != slide.backend else None


def unreadable(slide: Slide, manifest: Manifest, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the `rows` cannot be read by the strict reader, (len(rows),)."""
    reader, bad = strict_reader(slide), np.zeros(len(rows), bool)
    for i, row in enumerate(rows.tolist()):
        try:
            _read(reader, manifest, row)
        except ReadError:
            bad[i] = True
            reader = _anew(reader)
    return bad


def unequal(slide: Slide, other: Slide, manifest: Manifest, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the `rows` two readers do not agree on, (len(rows),); one that raises disagrees."""
    slide, other, bad = _anew(slide), _anew(other), np.zeros(len(rows), bool)
    for i, row in enumerate(rows.tolist()):
        try:
            apart = difference(*(_read(reader, manifest, row) for reader in (slide, other)))
        except ReadError:
            bad[i] = True
            slide, other = _anew(slide), _anew(other)
        else:
            bad[i] = apart > MAX_DIFFERENCE
    return bad


def _read(slide: Slide, manifest: Manifest, row: int) -> NDArray[np.uint8]:
    record = manifest.slide
    return slide.read(int(manifest.x_l0[row]), int(manifest.y_l0[row]), record.level, record.read_w, record.read_h)
