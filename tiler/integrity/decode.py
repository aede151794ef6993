"""A strict decode of compressed tiles: what their decoder notices, warnings included.

JPEG: libjpeg goes on after corrupt data, with a warning; simplejpeg raises it, where OpenCV prints it and tifffile's
codec swallows it. Grey at an eighth of the size decodes all entropy-coded data but little else: it notices what a whole
decode notices (5,400 damaged tiles of 15 kinds of JPEG) in half to three quarters of the time, and it goes to the end
of the tile, where left-over data shows; OpenSlide's does not.
JPEG 2000: decoders take any bytes as coefficients, so we look for what an encoder never writes. Deflate has a checksum.
LZW notices impossible codes and lengths. Without compression there is nothing to notice.

Any number of threads may decode at once.
"""

import os
import re
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg

from tiler.integrity.cover import Grid
from tiler.integrity.markers import JPEG, JPEG2000
from tiler.tiff_tables import TileTable

_ZERO_RUN_BYTES = 512
"""A hole in a file is 512 zero bytes or a multiple; the longest run in JPEG 2000 one byte per empty packet, some 20."""
_NUM_PROBED = 16
"""Where all tiles are refused: how many others are tried, to tell bad tiles from a codec that is not known."""
_AN_EIGHTH = {"min_height": 1, "min_width": 1, "strict": True}
"""The smallest size that libjpeg decodes to."""
_NEVER_IN_JPEG2000 = re.compile(rb"\xff[\x94-\xd8\xda-\xff]")

Accepts = Callable[[bytes, int], bool]
"""Whether a decoder takes a tile's bytes (at a place in the table) without complaint."""


def bad_decodes(path: Path, table: TileTable, wanted: Grid) -> Grid | None:
    """Tiles that their decoder does not take; None if it takes no other of the picture either: then it is not theirs.

    Args:
        path: the slide file.
        table: one of its pictures.
        wanted: which of its tiles to decode.
    """
    is_jpeg = table.compression in JPEG and table.is_8bit
    accepts: Accepts = partial(_is_clean_jpeg if is_jpeg else _is_clean, table)
    bad = _sweep(path, table, wanted, accepts)
    if wanted.any() and bad[wanted].all():
        others = np.zeros(table.shape, bool)
        at = np.flatnonzero(~wanted)
        others.flat[at[np.linspace(0, len(at) - 1, min(len(at), _NUM_PROBED)).astype(int)]] = True
        if _sweep(path, table, others, accepts)[others].all():
            return None
    return bad


def bad_streams(path: Path, table: TileTable, wanted: Grid) -> Grid:
    """JPEG 2000 tiles whose bytes no encoder writes: looked through, not decoded. Arguments as for `bad_decodes`."""
    return _sweep(path, table, wanted, lambda tile, _: _is_clean_jpeg2000(tile))


def _sweep(path: Path, table: TileTable, wanted: Grid, accepts: Accepts) -> Grid:
    index = np.flatnonzero(np.broadcast_to(wanted, table.offsets.shape))
    offsets, num_bytes = table.offsets.ravel(), table.num_bytes.ravel()
    index = index[np.argsort(offsets[index], kind="stable")]
    flat = np.zeros(table.offsets.size, bool)
    verdicts: dict[tuple[int, int], bool] = {}  # A file may show the same bytes in many places.
    with path.open("rb", buffering=0) as stream:
        for i in index.tolist():
            place = int(offsets[i]), int(num_bytes[i])
            if place[1] and place not in verdicts:
                verdicts[place] = not accepts(os.pread(stream.fileno(), place[1], place[0]), i)
            flat[i] = verdicts.get(place, False)  # Left out by the scanner: nothing to decode.
    return np.asarray(flat.reshape(table.offsets.shape).any(0))


def _is_clean_jpeg(table: TileTable, tile: bytes, index: int) -> bool:
    if table.has_intervals:
        tile = table.jpeg_head + tile + b"\xff\xd9"
    elif table.jpeg_head:
        tile = table.jpeg_head + tile[2:]
    try:
        # Its size first, in a microsecond: a damaged one may ask for 12 GB and 30 s (65,500 px square, progressive).
        height, width, *_ = simplejpeg.decode_jpeg_header(tile, **_AN_EIGHTH)
        if not _fits(table, index, (height, width)):
            return False
        simplejpeg.decode_jpeg(tile, "GRAY", **_AN_EIGHTH)
    except ValueError:
        return False
    return True


def _fits(table: TileTable, index: int, size: tuple[int, int]) -> bool:
    """Whether a picture at an eighth has the (height, width) of a tile, or of what of it lies inside the slide."""
    row, column = divmod(index % (table.shape[0] * table.shape[1]), table.shape[1])
    inside = table.height - row * table.tile_h, table.width - column * table.tile_w
    whole = table.tile_h, table.tile_w
    return all(px in (-(-all_ // 8), -(-some // 8)) for px, all_, some in zip(size, whole, inside, strict=True))


def _is_clean(table: TileTable, tile: bytes, index: int) -> bool:
    try:
        table.decode(tile, index)
    except (ValueError, RuntimeError, TypeError, LookupError, MemoryError, ArithmeticError, struct.error):
        return False
    return table.compression not in JPEG2000 or _is_clean_jpeg2000(tile)


def _is_clean_jpeg2000(tile: bytes) -> bool:
    """No hole, and no marker where none can be: ITU-T T.800 B.10.1 and C.2 keep 0xFF 0x90 and above out of the data."""
    start = tile.find(b"\xff\x93")
    if bytes(_ZERO_RUN_BYTES) in tile[start:]:
        return False
    has_one_part = tile.count(b"\xff\x90\x00\x0a") == 1  # Headers between parts may hold anything.
    return not (has_one_part and _NEVER_IN_JPEG2000.search(tile, start))
