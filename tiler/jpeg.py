"""JPEG tiles of a TIFF, decoded from their own bytes: at the limit of libjpeg-turbo, and strictly.

The fast way in for the training loader, beside the readers of whole regions (tiler/backends). Why not by cuCIM, which
opens the slide and reads its other pixels: it does not raise at a damaged JPEG but returns what lay in memory, and the
guards against that cost a tenth; and its speed is luck. libjpeg-turbo writes rows past the cache where a buffer begins
at a multiple of 32 bytes, and what was written past the cache comes back slowly: 176 us a tile of 256 px instead of
122 on one machine. cuCIM takes its buffers from malloc, 16 bytes off such a multiple or not. Ours always are.

Measured, full slide and random 40 % and 5 % of its tiles, as shares of decoding each JPEG once and nothing else: this
0.86, 0.92, 0.93; regions by cuCIM, guarded, 0.69, 0.71, 0.73 (tests/benchmarks/results/read_cpu_202611.md).
"""

import os
import threading
import weakref
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from tiler.errors import ReadError
from tiler.tiff_tables import TileTable

_JPEG = 7
_RGB = 2
_IS_RGB = bytes.fromhex("ffee000e41646f626500640000000000")
"""Adobe's marker with transform 0 (ITU-T T.872): without one, libjpeg takes three components for YCbCr."""


class JpegTiles:
    """The JPEG tiles of one level.

    Args:
        path: the slide file.
        table: where they lie; one for which `can_decode` is true.
    """

    def __init__(self, path: Path, table: TileTable) -> None:
        self._table, self._columns = table, table.shape[1]
        self._offsets, self._num_bytes = table.offsets.ravel(), table.num_bytes.ravel()
        # What goes before a tile's data, in place of its own first marker; nothing where it is a whole JPEG already.
        head = table.jpeg_head + (_IS_RGB if table.photometric == _RGB else b"")
        self._head = head if not head or table.jpeg_head else b"\xff\xd8" + head
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._mine = threading.local()

    def read(self, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """A region that lies in one tile, RGB (height, width, 3), valid until this thread reads the next.

        Args:
            x, y, width, height: px of the level.

        Raises:
            ReadError: the tile's bytes end too early, or do not decode without a complaint.
            OSError: the disk does not give them.
        """
        table = self._table
        column, row = x // table.tile_w, y // table.tile_h
        left, top = x - column * table.tile_w, y - row * table.tile_h
        index = row * self._columns + column
        num_bytes = int(self._num_bytes[index])
        tile = os.pread(self._descriptor, num_bytes, int(self._offsets[index]))
        try:
            if len(tile) < num_bytes:
                raise ValueError(f"the file ends within its {num_bytes} bytes")
            whole = self._head + tile[2:] if self._head else tile
            decoded = simplejpeg.decode_jpeg(whole, "RGB", buffer=self._buffer(), strict=True)
        except ValueError as error:
            raise ReadError(f"JPEG tile {index}: {error}") from None
        # Whole, or as much of it as lies in the picture.
        inside = table.height - row * table.tile_h, table.width - column * table.tile_w
        sizes = zip(decoded.shape, (table.tile_h, table.tile_w), inside, strict=False)
        if not all(px in (full, min(full, some)) for px, full, some in sizes):
            raise ReadError(f"JPEG tile {index}: {decoded.shape[1]} x {decoded.shape[0]} px")
        region: NDArray[np.uint8] = decoded[top : top + height, left : left + width]
        return region

    def _buffer(self) -> NDArray[np.uint8]:
        """This thread's, 16 bytes past a multiple of 32."""
        if not hasattr(self._mine, "buffer"):
            room = np.empty(self._table.tile_w * self._table.tile_h * 3 + 64, np.uint8)
            self._mine.buffer = room[(16 - room.ctypes.data) % 32 :]
        buffer: NDArray[np.uint8] = self._mine.buffer
        return buffer


def can_decode(table: TileTable) -> bool:
    """Whether a level's tiles are JPEGs of 8-bit colour, one for each place of the grid."""
    is_plain = table.is_tiled and not table.has_intervals and table.offsets.shape[0] == 1
    return is_plain and table.is_8bit and table.compression == _JPEG and table.samples == 3
