"""Where the compressed tiles of a TIFF-based slide lie in its file: one look at the tables, no pixel.

For the checks of a slide's bytes (tiler/integrity), which ask for the same tables one after another, and of several
slides in turn while training: those of the last few files are kept. Not for finding levels or scale. Strips are tiles
as wide as the picture; the restart intervals of an NDPI's one big JPEG are tiles too, as tifffile has them.
"""

import contextlib
import errno
import functools
import logging
import stat
import struct
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiler.errors import TilerError
from tiler.tiff import open_tiff

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ANY_ERROR = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    struct.error,
)
"""What tifffile raises on tables that make no sense."""
_NUM_KEPT = 8
"""Files whose tables are kept: 16 bytes a compressed tile, so 2.6 MB for 100,000 px square, 21 MB in all."""
_is_quiet = ContextVar("is_quiet", default=False)
logging.getLogger("tifffile").addFilter(lambda record: not _is_quiet.get())  # noqa: ARG005


@dataclass(frozen=True, kw_only=True, eq=False)
class TileTable:
    """One picture of a TIFF.

    `width`, `height`: its size in px; `tile_w`, `tile_h`: px per compressed tile; `offsets`, `num_bytes`: int64
    (planes, rows, columns), where each tile lies in the file; `plane_bytes`: bytes of a whole tile without compression;
    `jpeg_head`: what is to be put before a tile (in place of its first marker) to make a JPEG of it.
    """

    width: int
    height: int
    tile_w: int
    tile_h: int
    is_tiled: bool
    """False: strips."""
    has_intervals: bool
    """Tiles are restart intervals of one JPEG: without a start marker of their own."""
    compression: int
    photometric: int
    """TIFF's numbers."""
    samples: int
    offsets: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    plane_bytes: int
    is_8bit: bool
    jpeg_head: bytes
    decode: Callable[[bytes, int], object]
    """tifffile's decoder: a tile's bytes and its place in the flattened table; raises where it notices damage."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of tiles."""
        return self.offsets.shape[1], self.offsets.shape[2]


def read_tables(path: Path) -> tuple[TileTable, ...]:
    """The tables of all pictures of a file, those under other pictures included; none if it is no TIFF.

    Raises:
        TilerError: the tables make no sense.
        OSError: there is no such file, or the disk does not give the bytes.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        return ()
    return _read_tables(path, state.st_ino, state.st_size, state.st_mtime_ns)


def find_table(tables: tuple[TileTable, ...], width: int, height: int) -> TileTable | None:
    """The table of a level, by its size in px; None if there is none.

    A picture may be larger by less than one tile: Philips pads its levels to whole tiles.
    """
    fits = [t for t in tables if 0 <= t.width - width < max(1, t.tile_w) and 0 <= t.height - height < max(1, t.tile_h)]
    fits = [t for t in fits if (t.width, t.height) == (width, height) or t.is_tiled]
    return min(fits, key=lambda t: t.width - width + t.height - height, default=None)


@functools.lru_cache(maxsize=_NUM_KEPT)
def _read_tables(path: Path, inode: int, size: int, mtime_ns: int) -> tuple[TileTable, ...]:
    """As `read_tables`; the further arguments tell when a file was replaced."""
    del inode, size, mtime_ns
    with path.open("rb") as stream:
        if stream.read(4) not in _MAGIC:
            return ()
    try:
        with _quiet(), open_tiff(path) as tiff:
            tables = [_table(page) for page in _pages(tiff.pages)]
    except _ANY_ERROR as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        sentence = " ".join(str(error).replace(str(path), "").replace(path.name, "").split())
        raise TilerError(f"{path.name}: damaged TIFF tables ({type(error).__name__}: {sentence})") from None
    if not tables:
        raise TilerError(f"{path.name}: damaged TIFF tables (no picture in them)")
    return tuple(table for table in tables if table is not None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """tifffile writes what it finds odd to its log; here only errors count, and they are raised.

    Other threads' lines pass.
    """
    was = _is_quiet.set(True)
    try:
        yield
    finally:
        _is_quiet.reset(was)


def _pages(pages: Any) -> Iterator[Any]:
    """The pages of a chain, each followed by those under it (pyramids of OME-TIFF)."""
    for page in pages:
        yield page
        if page.subifds:
            yield from _pages(page.pages)


def _table(page: Any) -> TileTable | None:
    """A page's table; None for a stripped page that is incomplete, as no level of a slide is."""
    width, height, is_tiled = int(page.imagewidth), int(page.imagelength), bool(page.is_tiled)
    tile_w, tile_h = (page.tilewidth, page.tilelength) if is_tiled else (width, page.rowsperstrip)
    planes = int(page.samplesperpixel) if page.planarconfig == 2 else 1
    if min(width, height, tile_w, tile_h, planes) < 1:
        raise ValueError(f"picture of {width}x{height} px in tiles of {tile_w}x{tile_h}")
    rows, columns = -(-height // tile_h), -(-width // tile_w)
    num_tiles = planes * rows * columns
    places = [np.asarray(numbers, np.int64)[:num_tiles] for numbers in (page.dataoffsets, page.databytecounts)]
    least = min(map(len, places))
    if least < num_tiles:
        if is_tiled:
            raise ValueError(f"picture of {width}x{height} px with {least} of {num_tiles} tiles")
        return None
    offsets, num_bytes = (numbers.reshape(planes, rows, columns) for numbers in places)
    return TileTable(
        width=width,
        height=height,
        tile_w=int(tile_w),
        tile_h=int(tile_h),
        is_tiled=is_tiled,
        has_intervals=page.jpegheader is not None,
        compression=int(page.compression),
        photometric=int(page.photometric),
        samples=int(page.samplesperpixel),
        offsets=offsets,
        num_bytes=num_bytes,
        plane_bytes=int(tile_w * tile_h * (page.samplesperpixel // planes) * np.max(page.bitspersample)) // 8,
        is_8bit=page.bitspersample == 8,
        jpeg_head=page.jpegheader or (page.jpegtables or b"")[:-2],
        decode=functools.partial(page.decode, jpegtables=page.jpegtables, jpegheader=page.jpegheader),
    )
