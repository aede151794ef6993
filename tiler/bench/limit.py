"""The limit of reading tiles: each compressed tile under them decoded exactly once by a fast decoder, no more.

The bytes are read by position and decoded into one buffer, used again and again, so that it stays in the cache; nothing
is cut or copied. Where tiles are resampled, one INTER_AREA resize for each of them comes on top. JPEG is decoded by
libjpeg-turbo, JPEG 2000 by OpenJPEG, both through imagecodecs, the rest by tifffile's decoder, all on one thread.

The alignment of the buffer is part of the number. libjpeg-turbo's colour conversion writes a row with streaming stores,
past the cache, if its address is a multiple of 32, and with ordinary ones if not (jdcolext-avx2.asm). Measured, 256-px
tiles: 176 us each at a multiple of 32, 122 us at 16 more. So there are two limits, of the same work: at 16 modulo 64,
the faster, and at a multiple of 64, as OpenCV and most others allocate pictures. They differ only where a row of the
compressed tile is a multiple of 32 bytes: at 256 and 512 px, not at 240.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
from numpy.typing import NDArray

from manifests.geometry import l0_to_level
from manifests.schema import Manifest
from tiler.errors import TilerError
from tiler.integrity import lay
from tiler.integrity.cover import cover
from tiler.integrity.markers import JPEG, JPEG2000
from tiler.slide import Slide
from tiler.tiff_tables import TileTable

FASTEST, ALIGNED = 16, 0
"""Where the output buffer begins, bytes modulo 64."""
_Decode = Callable[[bytes, int, NDArray[np.uint8] | None], object]
"""Decodes a compressed tile's bytes, at a place of the flattened table, into a buffer; None makes a new one."""
_END = b"\xff\xd9"


@dataclass(frozen=True, kw_only=True, eq=False)
class Needed:
    """The compressed tiles under some tiles of a manifest.

    `index` int64, places in the flattened table, each once and in the table's order; those without bytes (glass that
    the scanner left out) are not among them. `num_bytes`: what they take in the file.
    """

    table: TileTable
    index: NDArray[np.int64]
    num_bytes: int

    @property
    def is_jpeg(self) -> bool:
        """Decoded by libjpeg-turbo, straight into the buffer."""
        table = self.table
        is_plain = table.is_tiled and table.is_8bit and not table.has_intervals and len(table.offsets) == 1
        return table.compression in JPEG and is_plain


def find_needed(slide: Slide, manifest: Manifest, rows: NDArray[np.int64]) -> Needed:
    """The compressed tiles under the tiles `rows` of a manifest.

    Raises:
        TilerError: they do not lie in a TIFF's tables.
    """
    under = lay(slide, manifest, rows)
    if under is None:
        raise TilerError("its compressed tiles are in no TIFF's tables")
    table, covered = under
    touched = np.broadcast_to(covered.touched(), table.offsets.shape)
    index = np.flatnonzero(touched & (table.num_bytes > 0))
    return Needed(table=table, index=index, num_bytes=int(table.num_bytes.flat[index].sum()))


def count_touched(slide: Slide, manifest: Manifest, rows: NDArray[np.int64]) -> int:
    """Compressed tiles that a reader decodes who reads tile by tile and keeps nothing: those under each, summed."""
    record, level = manifest.slide, slide.levels[manifest.slide.level]
    x, y = (l0_to_level(corner[rows], level.downsample) for corner in (manifest.x_l0, manifest.y_l0))
    shape = -(-level.height // level.tile_h), -(-level.width // level.tile_w)
    under = cover(x, y, (record.read_w, record.read_h), (level.tile_w, level.tile_h), shape)
    return int(((under.bottom - under.top + 1) * (under.right - under.left + 1)).sum())


def make_limit(path: Path, needed: Needed, manifest: Manifest, num_tiles: int, place: int) -> Callable[[], None]:
    """The work of the limit, ready to run.

    Args:
        path: the slide file.
        needed: which compressed tiles to decode.
        manifest: whose tiles they are.
        num_tiles: tiles to resample, where these are resampled.
        place: where the output buffer begins, bytes modulo 64.
    """
    table, record = needed.table, manifest.slide
    offsets, sizes = table.offsets.ravel(), table.num_bytes.ravel()
    places = [(i, int(offsets[i]), int(sizes[i])) for i in needed.index.tolist()]
    buffer = allocate((table.tile_h, table.tile_w, 3), place)
    sheet, tile = (np.zeros((*size, 3), np.uint8) for size in ((record.read_h, record.read_w), (record.tile_px,) * 2))
    num_resized = 0 if sheet.shape == tile.shape else num_tiles
    decode = _choose_decoder(path, needed)

    def run() -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            for i, offset, size in places:
                compressed = os.pread(descriptor, size, offset)
                try:
                    decode(compressed, i, buffer)
                except ValueError:  # Cut at the slide's edge: smaller than the buffer.
                    decode(compressed, i, None)
        finally:
            os.close(descriptor)
        for _ in range(num_resized):
            cv2.resize(sheet, (record.tile_px, record.tile_px), tile, interpolation=cv2.INTER_AREA)

    return run


def allocate(shape: tuple[int, ...], place: int) -> NDArray[np.uint8]:
    """Zeros whose first byte lies at `place` modulo 64."""
    num_bytes = int(np.prod(shape))
    raw = np.zeros(num_bytes + 64, np.uint8)
    start = (place - raw.ctypes.data) % 64
    return raw[start : start + num_bytes].reshape(shape)


def _choose_decoder(path: Path, needed: Needed) -> _Decode:
    table = needed.table
    if needed.is_jpeg and len(needed.index):
        return _choose_jpeg(path, needed)
    if table.compression in JPEG2000 and len(table.offsets) == 1:
        return lambda compressed, _, out: imagecodecs.jpeg2k_decode(compressed, numthreads=1, out=out)
    return lambda compressed, i, _: table.decode(compressed, i)


def _choose_jpeg(path: Path, needed: Needed) -> _Decode:
    """libjpeg-turbo, told the colours by which it agrees with tifffile's decoder: scanners may store RGB as it is.

    Where none gives the same pixels for the largest tile, tifffile's decoder itself.
    """
    table = needed.table
    largest = int(needed.index[table.num_bytes.flat[needed.index].argmax()])
    with path.open("rb") as stream:
        compressed = os.pread(stream.fileno(), int(table.num_bytes.flat[largest]), int(table.offsets.flat[largest]))
    expected = np.squeeze(table.decode(compressed, largest)[0])  # type: ignore[index]
    tables = table.jpeg_head + _END if table.jpeg_head else None
    for stored in (None, "RGB"):

        def decode(compressed: bytes, _: int, out: NDArray[np.uint8] | None, stored: str | None = stored) -> object:
            return imagecodecs.jpeg8_decode(compressed, tables=tables, colorspace=stored, outcolorspace="RGB", out=out)

        if np.array_equal(decode(compressed, largest, None), expected):  # type: ignore[arg-type]
            return decode
    return lambda compressed, i, _: table.decode(compressed, i)
