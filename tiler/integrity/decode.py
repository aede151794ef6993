"""A strict decode of compressed tiles: what their decoder notices, warnings included.

JPEG: libjpeg goes on after corrupt data, with a warning that OpenCV leaves on descriptor 2 and that tifffile's codec
swallows. So we watch the descriptor. Grey at an eighth of the size decodes all entropy-coded data but little else:
twice as fast as a whole decode, and it goes to the end of the tile, where left-over data shows; OpenSlide's does not.
JPEG 2000: decoders take any bytes as coefficients, so we look for what an encoder never writes. Deflate has a checksum.
LZW notices impossible codes and lengths. Without compression there is nothing to notice.
"""

import contextlib
import os
import re
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from tiler.integrity.cover import Grid
from tiler.integrity.markers import JPEG, JPEG2000
from tiler.tiff_tables import TileTable

_ZERO_RUN_BYTES = 512
"""A hole in a file is 512 zero bytes or a multiple; the longest run in JPEG 2000 one byte per empty packet, some 20."""
_NUM_PROBED = 16
"""Where all tiles are refused: how many others are tried, to tell bad tiles from a codec that is not known."""
_NEVER_IN_JPEG2000 = re.compile(rb"\xff[\x94-\xd8\xda-\xff]")
_LIBJPEG = re.compile(
    rb"Corrupt JPEG|Premature end of JPEG|Invalid |Inconsistent progression|Unknown Adobe|Application transferred|"
    rb"Warning: unknown JFIF|Unsupported marker"
)
"""How libjpeg's warnings begin: https://github.com/libjpeg-turbo/libjpeg-turbo/blob/main/src/jerror.h."""
_ONE_DESCRIPTOR = threading.Lock()

Accepts = Callable[[bytes, int], bool]
"""Whether a decoder takes a tile's bytes (at a place in the table) without complaint."""


def bad_decodes(path: Path, table: TileTable, wanted: Grid) -> Grid | None:
    """Tiles that their decoder does not take; None if it takes no other of the picture either: then it is not theirs.

    Args:
        path: the slide file.
        table: one of its pictures.
        wanted: which of its tiles to decode.
    """
    with contextlib.ExitStack() as stack:
        accepts: Accepts = partial(_is_clean, table)
        if table.compression in JPEG and table.is_8bit:
            accepts = partial(_is_clean_jpeg, table, stack.enter_context(_stderr_watched()))
        bad = _sweep(path, table, wanted, accepts)
        if wanted.any() and bad[wanted].all():
            others = np.zeros(table.shape, bool)
            at = np.flatnonzero(~wanted)
            others.flat[at[np.linspace(0, len(at) - 1, min(len(at), _NUM_PROBED)).astype(int)]] = True
            if _sweep(path, table, others, accepts)[others].all():
                return None
    return bad


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


def _is_clean_jpeg(table: TileTable, said: Callable[[], bytes], tile: bytes, index: int) -> bool:
    if table.has_intervals:
        tile = table.jpeg_head + tile + b"\xff\xd9"
    elif table.jpeg_head:
        tile = table.jpeg_head + tile[2:]
    bytes_ = np.frombuffer(tile, np.uint8)
    said()
    # Twice, if something was said: another thread may have written there.
    for _ in range(2):
        picture = cv2.imdecode(bytes_, cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_IGNORE_ORIENTATION)
        if picture is None or not _fits(table, index, picture.shape):
            return False
        if not said():
            return True
    return False


def _fits(table: TileTable, index: int, shape: tuple[int, ...]) -> bool:
    """Whether a picture at an eighth has the size of a tile, or of what of it lies inside, as some writers cut it."""
    row, column = divmod(index % (table.shape[0] * table.shape[1]), table.shape[1])
    inside = table.height - row * table.tile_h, table.width - column * table.tile_w
    whole = table.tile_h, table.tile_w
    return all(px in (-(-all_ // 8), -(-some // 8)) for px, all_, some in zip(shape, whole, inside, strict=False))


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


@contextlib.contextmanager
def _stderr_watched() -> Iterator[Callable[[], bytes]]:
    """Sends descriptor 2 to a nameless file; the function it yields gives what came since it was last asked.

    What does not come from libjpeg is passed on at the end.
    """
    with _ONE_DESCRIPTOR, tempfile.TemporaryFile(buffering=0) as caught, contextlib.ExitStack() as stack:
        sys.stderr.flush()
        kept = os.dup(2)
        stack.callback(os.close, kept)
        place, parts = 0, []

        def news() -> bytes:
            nonlocal place
            end = os.fstat(caught.fileno()).st_size
            if end == place:
                return b""
            text = os.pread(caught.fileno(), end - place, place)
            place = end
            parts.append(text)
            return text

        def restore() -> None:
            os.dup2(kept, 2)
            news()
            lines = b"".join(parts).splitlines(keepends=True)
            os.write(2, b"".join(line for line in lines if not _LIBJPEG.match(line)))

        os.dup2(caught.fileno(), 2)
        stack.callback(restore)
        yield news
