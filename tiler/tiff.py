"""What a TIFF's directories say of its pyramid, read once when a slide is opened. No pixel, no description is kept.

Not for reading tiles (tiler/backends) and not for judging bytes (tiler/integrity).
"""

import contextlib
import hashlib
import logging
import struct
from dataclasses import dataclass
from pathlib import Path

import tifffile

from tiler.errors import TilerError
from tiler.ome import OmeFields, parse_ome_xml

# Its warnings repeat file names; where nobody asks for them they would go to stderr.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

MINISWHITE, MINISBLACK, RGB, PALETTE, YCBCR = 0, 1, 2, 3, 6
"""TIFF PhotometricInterpretation, as far as a brightfield slide may have it."""
_TABLES = (273, 279, 324, 325)
"""Tags: StripOffsets, StripByteCounts, TileOffsets, TileByteCounts."""
_NDPI_FORMAT = 65420
"""A tag that Hamamatsu's NDPI has and no other."""
_UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0}
"""TIFF ResolutionUnit: 2 is inch, 3 is centimetre."""
_PARSE_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error, OverflowError)
"""What tifffile raises at damaged directories; its own TiffFileError is a ValueError."""


@dataclass(frozen=True, kw_only=True)
class PageFacts:
    """One directory: sizes in px, TIFF codes as in the file, `mpp` by its resolution tags or None."""

    width: int
    height: int
    tile: tuple[int, int] | None
    dtype: str
    samples: int
    is_planar: bool
    photometric: int
    compression: int
    predictor: int
    is_reduced: bool
    mpp: tuple[float, float] | None

    @property
    def is_tiled(self) -> bool:
        """Stored in tiles, not in strips."""
        return self.tile is not None

    @property
    def compression_name(self) -> str:
        """JPEG, LZW, …"""
        try:
            return str(tifffile.COMPRESSION(self.compression).name).replace("_", " ")
        except ValueError:
            return f"code {self.compression}"


@dataclass(frozen=True, kw_only=True)
class TiffFacts:
    """A TIFF's directories.

    `pages` are those of the main chain; `ome` the fields of an OME-XML, None where it has none; `tables` a digest of
    all tables of offsets and byte counts; `is_whole`: the chain of directories ends where it should.
    """

    pages: tuple[PageFacts, ...]
    has_subifds: bool
    ome: OmeFields | None
    tables: bytes
    is_whole: bool

    @property
    def pyramid(self) -> tuple[PageFacts, ...]:
        """The pages that may be levels: the tiled ones, or the first alone where it is not tiled."""
        return tuple(page for page in self.pages if page.is_tiled) if self.pages[0].is_tiled else self.pages[:1]

    def find_page(self, size: tuple[int, int]) -> PageFacts | None:
        """The page of this size (width, height), in px."""
        return next((page for page in self.pages if (page.width, page.height) == size), None)


def read_tiff(path: Path) -> TiffFacts | None:
    """A TIFF's directories; None if the file is no TIFF or they cannot be read.

    About a millisecond, and a nanosecond for each byte of the tables.
    """
    if not path.is_file():
        return None
    try:
        with open_tiff(path) as tiff:
            pages = list(tiff.pages)
            return TiffFacts(
                pages=tuple(_page_facts(page) for page in pages),
                has_subifds=bool(pages[0].subifds),
                ome=parse_ome_xml(tiff.ome_metadata) if tiff.is_ome else None,
                tables=_hash_tables(tiff, pages),
                is_whole=_ends(tiff, pages[-1]),
            )
    except _PARSE_ERRORS:
        return None


def open_tiff(path: Path) -> tifffile.TiffFile:
    """A TIFF by tifffile, which goes by the file's name: an NDPI, whose links have 64 bits, is known by its tag here.

    Raises:
        OSError, ValueError, …: whatever tifffile raises at damaged directories.
    """
    by_name = path.suffix.lower() == ".ndpi"
    trouble: Exception = ValueError("neither an NDPI nor another TIFF")
    for is_ndpi in (by_name, not by_name):
        with contextlib.ExitStack() as unless_right:
            try:
                tiff = unless_right.enter_context(tifffile.TiffFile(path, is_ndpi=is_ndpi))
                if (_NDPI_FORMAT in tiff.pages.first.tags) == is_ndpi:
                    unless_right.pop_all()
                    return tiff
            except _PARSE_ERRORS as error:
                trouble = error
    raise trouble


def refuse_other_images(tiff: TiffFacts, *, may_have_more: bool) -> None:
    """Raises if a TIFF holds no brightfield picture of 8 bits: one sentence that says what it holds.

    Args:
        tiff: its directories.
        may_have_more: its reader can tell several pictures of one size apart.

    Raises:
        TilerError: another depth, another number of channels, other colours, or a stack.
    """
    first = tiff.pages[0]
    for page in tiff.pyramid:
        if page.dtype != "uint8":
            raise TilerError(f"its pixels are {page.dtype}, expected 8-bit brightfield; export it as 8-bit RGB")
        if page.samples not in (1, 3, 4):
            raise TilerError(f"it has {page.samples} channels, expected RGB, RGBA or grey; export it as RGB")
        if page.photometric not in (MINISWHITE, MINISBLACK, RGB, PALETTE, YCBCR):
            raise TilerError(f"its colours are TIFF photometric {page.photometric}, expected RGB or grey")
    alike = sum(not p.is_reduced and (p.width, p.height) == (first.width, first.height) for p in tiff.pages)
    if alike > 1 and not may_have_more:
        raise TilerError(f"it is a stack of {alike} pictures of one size, expected one brightfield picture")


def _page_facts(page: tifffile.TiffPage) -> PageFacts:
    return PageFacts(
        width=page.imagewidth,
        height=page.imagelength,
        tile=(page.tilewidth, page.tilelength) if page.is_tiled else None,
        dtype=str(page.dtype),
        samples=page.samplesperpixel,
        is_planar=page.planarconfig == 2 and page.samplesperpixel > 1,
        photometric=int(page.photometric),
        compression=int(page.compression),
        predictor=int(page.predictor),
        is_reduced=bool(page.is_reduced),
        mpp=_find_mpp(page),
    )


def _find_mpp(page: tifffile.TiffPage) -> tuple[float, float] | None:
    """Microns per px by the resolution tags, where they state a length."""
    unit = _UM_PER_UNIT.get(int(page.tags.valueof(296, 2)))
    try:
        (xn, xd), (yn, yd) = page.tags[282].value, page.tags[283].value
    except (KeyError, TypeError, ValueError):
        return None
    if unit is None or 0 in (xn, xd, yn, yd):
        return None
    if (xn / xd, yn / yd) in ((72.0, 72.0), (96.0, 96.0), (1.0, 1.0)):
        return None  # A screen's resolution or a writer's placeholder, not a scanner's.
    return unit * xd / xn, unit * yd / yn


def _hash_tables(tiff: tifffile.TiffFile, pages: list[tifffile.TiffPage]) -> bytes:
    """Digest of the raw bytes of all pages' tables, those of sub-directories too."""
    digest = hashlib.blake2b(digest_size=16)
    for page in pages:
        for part in (page, *(page.pages or ())):
            for tag in (part.tags.get(code) for code in _TABLES):
                if tag is not None:
                    tiff.filehandle.seek(tag.valueoffset)
                    digest.update(tiff.filehandle.read(tag.valuebytecount))
    return digest.digest()


def _ends(tiff: tifffile.TiffFile, last: tifffile.TiffPage) -> bool:
    """The last directory says that none follows; tifffile passes over one that should but lies past the file's end."""
    layout, stream = tiff.tiff, tiff.filehandle
    stream.seek(last.offset)
    (count,) = struct.unpack(layout.tagnoformat, stream.read(layout.tagnosize))
    stream.seek(last.offset + layout.tagnosize + count * layout.tagsize)
    return not any(stream.read(layout.offsetsize))
