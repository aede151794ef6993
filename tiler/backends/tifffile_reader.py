"""tifffile: OME-TIFF, whose pyramid lies in sub-directories, and TIFFs that neither cuCIM nor OpenSlide opens.

tifffile finds the pyramid and decodes one segment (tile or strip) at a time; which segments a region touches, and the
reading of their bytes by position, are ours, so that threads share one descriptor without a lock.
"""

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from tiler.backends.pixels import PAD_VALUE, make_levels, read_inside, to_rgb
from tiler.errors import TilerError
from tiler.ome import are_rgb
from tiler.tiff import MINISWHITE, PALETTE, YCBCR, TiffFacts, open_tiff

_JPEG = 7
_RAW_TILE = 256, 256
"""Raw rows are planned as if tiled: any rectangle of them costs its own bytes alone."""
_MAX_SEGMENT_PX = 64 << 20


class TifffilePixels:
    """tifffile: px of a level are floor(x_l0 / downsample), so every level is exact.

    Raises:
        TilerError: pictures that are no brightfield slide, or stored so that they cannot be read in parts.
    """

    name = "tifffile"

    def __init__(self, path: Path, facts: TiffFacts) -> None:
        with open_tiff(path) as tiff:
            largest = max(tiff.series, key=lambda series: series.keyframe.imagewidth * series.keyframe.imagelength)
            levels = [_planes(level) for level in largest.levels]
        levels.sort(key=lambda planes: -planes[0].width)
        self._levels = levels
        sizes = [(planes[0].width, planes[0].height) for planes in levels]
        image = facts.ome.find(sizes[0]) if facts.ome else None
        if len(levels[0]) == 3 and image is not None and not are_rgb(image.colours):
            raise TilerError(f"its channels are coloured {' '.join(image.colours)}, expected a brightfield picture")
        tiles = [_RAW_TILE if planes[0].is_raw else planes[0].segment for planes in levels]
        self.levels = make_levels(sizes, tiles)
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, x_l0: int, y_l0: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        def inside(x0: int, y0: int, x1: int, y1: int) -> NDArray[np.uint8]:
            planes = [plane.read(self._descriptor, x0, y0, x1, y1) for plane in self._levels[level]]
            return to_rgb(np.concatenate(planes, axis=2))

        return read_inside(self.levels[level], (x_l0, y_l0), (width, height), inside)

    def is_exact(self, level: int) -> bool:  # noqa: ARG002 - the protocol's signature
        return True


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plane:
    """One directory of the file: all samples of a level, or one of them. Sizes in px, `segment` (width, height)."""

    width: int
    height: int
    samples: int
    is_planar: bool
    is_raw: bool
    is_inverted: bool
    segment: tuple[int, int]
    offsets: Sequence[int]
    byte_counts: Sequence[int]
    jpeg_tables: bytes | None
    decode: Any

    def read(self, descriptor: int, x0: int, y0: int, x1: int, y1: int) -> NDArray[np.uint8]:
        """A rectangle inside the plane, (y1 - y0, x1 - x0, samples)."""
        read = self._read_rows if self.is_raw else self._read_segments
        samples = read(descriptor, x0, y0, x1, y1)
        return PAD_VALUE - samples if self.is_inverted else samples

    def _read_rows(self, descriptor: int, x0: int, y0: int, x1: int, y1: int) -> NDArray[np.uint8]:
        """From rows that lie in the file one after another, uncompressed."""
        row_bytes, num_bytes = self.width * self.samples, (x1 - x0) * self.samples
        start = self.offsets[0] + x0 * self.samples
        rows = [_pread(descriptor, start + row * row_bytes, num_bytes) for row in range(y0, y1)]
        return np.frombuffer(b"".join(rows), np.uint8).reshape(y1 - y0, x1 - x0, self.samples)

    def _read_segments(self, descriptor: int, x0: int, y0: int, x1: int, y1: int) -> NDArray[np.uint8]:
        """From the tiles or strips that the rectangle touches."""
        width, height = self.segment
        across, down = -(-self.width // width), -(-self.height // height)
        white = 0 if self.is_inverted else PAD_VALUE  # As stored.
        out = np.full((y1 - y0, x1 - x0, self.samples), white, np.uint8)
        for sample in range(self.samples if self.is_planar else 1):
            for row in range(y0 // height, -(-y1 // height)):
                for col in range(x0 // width, -(-x1 // width)):
                    index = (sample * down + row) * across + col
                    if not self.byte_counts[index]:
                        continue  # Never written: white, as OpenSlide shows it.
                    data = _pread(descriptor, int(self.offsets[index]), int(self.byte_counts[index]))
                    decoded = self.decode(data, index, jpegtables=self.jpeg_tables)[0][0]  # One focal plane deep.
                    top, left = row * height, col * width
                    bottom, right = min(y1, top + decoded.shape[0]), min(x1, left + decoded.shape[1])
                    part = decoded[max(y0 - top, 0) : bottom - top, max(x0 - left, 0) : right - left]
                    samples = slice(sample, sample + 1) if self.is_planar else slice(None)
                    out[max(top - y0, 0) : bottom - y0, max(left - x0, 0) : right - x0, samples] = part
        return out


def _pread(descriptor: int, offset: int, num_bytes: int) -> bytes:
    data = os.pread(descriptor, num_bytes, offset)
    if len(data) < num_bytes:
        raise ValueError(f"the file ends within the {num_bytes} bytes at {offset}")
    return data


def _planes(level: tifffile.TiffPageSeries) -> list[_Plane]:
    """The directories that hold one level: one with all samples, or one each for red, green and blue.

    Raises:
        TilerError: other pictures, or pictures that cannot be read in parts.
    """
    others = {axis: n for axis, n in zip(level.axes, level.shape, strict=True) if axis not in "YXSC" and n > 1}
    if others or len(level.pages) not in (1, 3) or None in level.pages or level.is_multifile:
        counts = ", ".join(f"{axis} {n}" for axis, n in others.items()) or f"{len(level.pages)} channels"
        raise TilerError(f"it is a stack of pictures ({counts}), expected one brightfield picture")
    key = level.keyframe
    if key.dtype != np.uint8 or key.samplesperpixel * len(level.pages) not in (1, 3, 4):
        raise TilerError(
            f"it has {key.samplesperpixel * len(level.pages)} channels of {key.dtype}, expected 8-bit RGB or grey"
        )
    if key.photometric == PALETTE or (key.photometric == YCBCR and key.compression != _JPEG):
        raise TilerError(f"its colours are {key.photometric.name} under {key.compression.name}; save it as RGB")
    segment = (key.tilewidth, key.tilelength) if key.is_tiled else (key.imagewidth, key.rowsperstrip)
    is_planar = key.planarconfig == 2 and key.samplesperpixel > 1
    is_raw = not key.is_tiled and not is_planar and key.is_contiguous and key.predictor == 1
    if not is_raw and segment[0] * segment[1] > _MAX_SEGMENT_PX:
        raise TilerError(f"it is compressed in pieces of {segment[0]} x {segment[1]} px; save it tiled")
    return [
        _Plane(
            width=key.imagewidth,
            height=key.imagelength,
            samples=key.samplesperpixel,
            is_planar=is_planar,
            is_raw=is_raw,
            is_inverted=key.photometric == MINISWHITE,
            segment=segment,
            offsets=page.dataoffsets,
            byte_counts=page.databytecounts,
            jpeg_tables=page.jpegtables,
            decode=key.decode,  # Made here: the first access is not safe from several threads.
        )
        for page in level.pages
    ]
