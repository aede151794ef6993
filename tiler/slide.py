"""Opening a slide: which reader is the right one, chosen per file, and one face for all of them."""

import math
import struct
from pathlib import Path
from typing import cast

import numpy as np
import openslide
from numpy.typing import NDArray

from manifests.geometry import level_to_l0
from tiler.backends import (
    PAD_VALUE,
    CucimPixels,
    OpenslidePixels,
    Pixels,
    TifffilePixels,
    ZarrPixels,
    why_not_cucim,
)
from tiler.config import Backend
from tiler.errors import ReadError, TilerError
from tiler.fingerprint import fingerprint, fingerprint_with
from tiler.jpeg import JpegTiles, can_decode
from tiler.scale import MppReading, Stated, read_mpp, vendor_field
from tiler.tiff import TiffFacts, read_tiff, refuse_other_images
from tiler.tiff_tables import TileTable, find_table, read_tables

__all__ = ["Slide", "fingerprint", "open_slide"]

_NO_VENDOR = ("", "generic-tiff")
_MOVED = ("leica", "trestle", "ventana")
"""Vendors whose tiles do not lie on a plain grid."""
_DAMAGE = (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, struct.error)
"""What readers written in Python raise at numbers that make no sense: a table too short, a width of 0."""
_READ_ERRORS = (*_DAMAGE, RuntimeError, OSError, openslide.OpenSlideError, MemoryError)


class Slide:
    """An open slide.

    Attributes:
        path: the file, or the folder of an OME-Zarr.
        backend: "cucim" | "openslide" | "tifffile" | "zarr".
        why: why this backend, one clause.
        vendor: as OpenSlide names it; "ome-tiff" | "ome-zarr"; "" if nobody knows.
        levels: the pyramid, finest first.
        mpp: microns per level-0 px (x, y), or None where the slide does not say.
        mpp_source: "vendor" | "tiff" | "".
        scale: all that it says of its scale.
        fingerprint: see tiler/fingerprint.py.
    """

    def __init__(
        self, path: Path, pixels: Pixels, *, vendor: str, why: str, scale: MppReading, tiff: TiffFacts | None
    ) -> None:
        self.path, self._pixels, self.vendor, self.why, self.scale = path, pixels, vendor, why, scale
        self.backend, self.levels = pixels.name, pixels.levels
        self.mpp, self.mpp_source = scale.mpp, scale.source
        self.fingerprint = fingerprint_with(path, tiff)
        self._jpeg_tiles: dict[int, JpegTiles | None] = {}

    @property
    def size_l0(self) -> tuple[int, int]:
        """(width, height) in level-0 px."""
        return self.levels[0].width, self.levels[0].height

    def is_exact(self, level: int) -> bool:
        """A region's pixels do not depend on where the read that holds it began."""
        return self._pixels.is_exact(level)

    def table(self, level: int) -> TileTable | None:
        """Where the compressed tiles of a level lie in a TIFF; None where a level is no picture's plain grid.

        Raises:
            TilerError: the tables make no sense.
        """
        size = self.levels[level].width, self.levels[level].height
        return None if self.vendor in _MOVED else find_table(read_tables(self.path), *size)

    def jpeg_tiles(self, level: int) -> JpegTiles | None:
        """The way in to a level's own tiles, where they are JPEGs that show, bit for bit, what its reader shows."""
        if level not in self._jpeg_tiles:
            table = self.table(level) if self.is_exact(level) else None
            tiles = JpegTiles(self.path, table) if table is not None and can_decode(table) else None
            self._jpeg_tiles[level] = tiles if tiles is not None and self._shows(tiles, table, level) else None
        return self._jpeg_tiles[level]

    def _shows(self, tiles: JpegTiles, table: TileTable | None, index: int) -> bool:
        """Whether JPEG tiles decode to what the reader shows, by one of them; by others where that is damaged."""
        assert table is not None, "there are no tiles without it"
        level = self.levels[index]
        sizes = table.num_bytes.ravel()
        by_size = np.argsort(sizes, kind="stable")[np.count_nonzero(sizes == 0) :]
        for share in (0.75, 0.5, 0.9) if len(by_size) else ():
            row, column = divmod(int(by_size[int(share * len(by_size))]), table.shape[1])
            x, y = column * table.tile_w, row * table.tile_h
            size = min(table.tile_w, level.width - x), min(table.tile_h, level.height - y)
            x_l0, y_l0 = level_to_l0(np.array([x, y]), level.downsample).tolist()
            try:
                ours, theirs = tiles.read(x, y, *size), self.read(x_l0, y_l0, index, *size)
            except ReadError:
                continue
            if np.array_equal(ours, theirs):
                return True
        return False

    def reopen(self) -> None:
        """A fresh handle for the same file.

        Raises:
            TilerError: it cannot be opened any more, or is another file now.
        """
        anew = open_slide(self.path, cast(Backend, self.backend))
        if anew.fingerprint != self.fingerprint:
            raise TilerError(f"{self.path.name}: the file changed while it was open; tile it again")
        self._pixels, self._jpeg_tiles = anew._pixels, {}

    def read(self, x_l0: int, y_l0: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        """One region, RGB (height, width, 3); white past the edge.

        Raises:
            ReadError: the backend could not read it.
        """
        try:
            region = self._pixels.read(x_l0, y_l0, level, width, height)
        except _READ_ERRORS as error:
            raise ReadError(f"region {width}x{height} at ({x_l0}, {y_l0}), level {level}: {error}") from None
        # cuCIM pads generic TIFF with 0, SVS with 255: paint the outside ourselves, alike for every backend.
        down, size = self.levels[level].downsample, self.levels[level]
        left, top = math.floor(x_l0 / down), math.floor(y_l0 / down)
        if left < 0 or top < 0 or left + width > size.width or top + height > size.height:
            inside = np.zeros((height, width), bool)
            inside[max(0, -top) : max(0, size.height - top), max(0, -left) : max(0, size.width - left)] = True
            region = np.where(inside[..., None], region, np.uint8(PAD_VALUE))
        return region


def open_slide(path: str | Path, backend: Backend = "auto") -> Slide:
    """Opens a slide.

    Args:
        path: the slide file, or the folder of an OME-Zarr.
        backend: "auto" takes cuCIM where its pixels are right and it sees the same levels as OpenSlide, else
            OpenSlide; tifffile for OME-TIFF and for TIFFs that no other opens, zarr for OME-Zarr.

    Raises:
        TilerError: no such file, no right to read it, empty, not a slide, no brightfield picture of 8 bits, or not
            readable by the backend asked for.
    """
    path = Path(path)
    if not path.exists():
        raise TilerError(f"{path.name}: no such file")
    if path.is_dir():
        return _open_folder(path, backend)
    if not path.is_file():
        raise TilerError(f"{path.name}: not a file")
    try:
        with path.open("rb") as stream:
            if not stream.read(1):
                raise TilerError(f"{path.name}: empty file (0 bytes)")
    except PermissionError:
        raise TilerError(f"{path.name}: no permission to read it") from None
    except OSError as error:
        raise TilerError(f"{path.name}: cannot be read ({error.strerror})") from None
    if backend == "zarr":
        raise TilerError(f"{path.name}: not a folder, and zarr reads OME-Zarr folders alone; give --backend auto")
    tiff = read_tiff(path)
    known, trouble = _try_openslide(path)
    vendor = known.vendor if known is not None else openslide.OpenSlide.detect_format(path) or ""
    try:
        if tiff is not None:
            is_ome_reader = tiff.ome is not None and backend in ("auto", "tifffile")
            refuse_other_images(tiff, may_have_more=vendor not in _NO_VENDOR or is_ome_reader)
        pixels, why = _choose(path, vendor, tiff, known, trouble, backend)
    except TilerError as error:
        raise TilerError(f"{path.name}: {error}") from None
    except _DAMAGE as error:
        raise TilerError(f"{path.name}: damaged directories ({type(error).__name__}: {error})") from None
    scale = _read_scale(pixels, vendor, tiff, known)
    if tiff is not None and tiff.ome is not None and vendor in _NO_VENDOR:
        vendor = "ome-tiff"
    return Slide(path, pixels, vendor=vendor, why=why, scale=scale, tiff=tiff)


def _open_folder(path: Path, backend: Backend) -> Slide:
    if backend not in ("auto", "zarr") or not path.name.lower().endswith(".zarr"):
        raise TilerError(f"{path.name}: not a file")
    try:
        pixels = ZarrPixels(path)
    except TilerError as error:
        raise TilerError(f"{path.name}: {error}") from None
    scale = read_mpp(Stated("coordinateTransformations", pixels.multiscale.mpp))
    return Slide(path, pixels, vendor="ome-zarr", why="an OME-Zarr folder", scale=scale, tiff=None)


def _try_openslide(path: Path) -> tuple[OpenslidePixels | None, str]:
    """OpenSlide if it opens the file, else why it does not."""
    try:
        return OpenslidePixels(path), ""
    except openslide.OpenSlideError as error:
        return None, str(error).replace(str(path), path.name)


def _choose(
    path: Path, vendor: str, tiff: TiffFacts | None, known: OpenslidePixels | None, trouble: str, backend: Backend
) -> tuple[Pixels, str]:
    """The reader for a file, and why it is the one.

    Raises:
        TilerError: nobody reads it, or the one asked for does not.
    """
    if backend == "tifffile":
        return _open_tifffile(path, tiff), "asked for"
    if backend == "auto" and vendor in _NO_VENDOR and tiff is not None:
        if tiff.ome is not None or tiff.has_subifds:
            return _open_tifffile(path, tiff), "its pyramid is in sub-directories, as OME-TIFF has it"
        if known is None:
            return _open_tifffile(path, tiff), f"OpenSlide does not open it ({trouble})"
    if known is None:
        raise TilerError(f"not a slide that can be opened ({trouble})")
    if backend == "openslide":
        return known, "asked for"
    if why := why_not_cucim(tiff, vendor):
        if backend == "cucim":
            raise TilerError(f"{why}; give --backend auto")
        return known, why
    assert tiff is not None  # Else there is a reason against cuCIM.
    return _try_cucim(path, tiff, known, must=backend == "cucim")


def _open_tifffile(path: Path, tiff: TiffFacts | None) -> TifffilePixels:
    if tiff is None:
        raise TilerError("not a TIFF, or damaged directories, and tifffile reads TIFF alone; give --backend auto")
    if not tiff.is_whole:
        raise TilerError("damaged directories (cut file, or they go round in a circle); restore it from its source")
    try:
        return TifffilePixels(path, tiff)
    except (*_DAMAGE, OSError, RuntimeError, MemoryError) as error:
        raise TilerError(f"not a slide that can be opened ({type(error).__name__}: {error})") from None


def _try_cucim(path: Path, tiff: TiffFacts, fallback: OpenslidePixels, *, must: bool) -> tuple[Pixels, str]:
    """cuCIM if it opens the slide and sees the levels that OpenSlide sees; else the fallback, or an error."""
    try:
        pixels = CucimPixels(path, tiff)
    except ImportError:
        if must:
            raise TilerError("backend cucim: not installed; pip install 'slidegrad[cu13]' (or [cu12])") from None
        return fallback, "cuCIM is not installed"
    except (RuntimeError, ValueError) as error:
        if must:
            raise TilerError(f"cuCIM cannot open it ({error}); give --backend openslide") from None
        return fallback, "cuCIM cannot open it"
    seen, expected = ([(lv.width, lv.height) for lv in p.levels] for p in (pixels, fallback))
    if seen == expected and _same_places(pixels, fallback) and _same_grid(pixels, tiff):
        return pixels, "cuCIM reads this format, and is the fastest"
    why = f"cuCIM sees levels {seen}, OpenSlide {expected}" if seen != expected else "cuCIM misplaces its levels"
    if must:
        raise TilerError(f"{why}; give --backend openslide")
    return fallback, why


def _same_places(a: Pixels, b: Pixels) -> bool:
    """Levels of one size lie in one place: a level-0 px at the far edge is less than one px of the level apart."""
    far = max(a.levels[0].width, a.levels[0].height)
    return all(abs(far / x.downsample - far / y.downsample) < 1 for x, y in zip(a.levels, b.levels, strict=True))


def _same_grid(pixels: Pixels, tiff: TiffFacts) -> bool:
    """Each level has as many tiles as its directory.

    Philips fills levels up with white, and cuCIM takes the true size for the stored one: were a whole column of tiles
    white, it would read each row of tiles from the wrong place.
    """
    if len(pixels.levels) != len(tiff.pyramid):
        return False
    pages = sorted(tiff.pyramid, key=lambda page: -page.width)
    return all(
        page.tile == (level.tile_w, level.tile_h)
        and -(-page.width // level.tile_w) == -(-level.width // level.tile_w)
        and -(-page.height // level.tile_h) == -(-level.height // level.tile_h)
        for level, page in zip(pixels.levels, pages, strict=True)
    )


def _read_scale(pixels: Pixels, vendor: str, tiff: TiffFacts | None, known: OpenslidePixels | None) -> MppReading:
    """What the file says of its scale, whoever reads the pixels."""
    size = pixels.levels[0].width, pixels.levels[0].height
    tags = None
    if tiff is not None:
        page = tiff.find_page(size)
        tags = Stated("XResolution", page.mpp if page is not None else None, "tiff")
    if tiff is None or vendor not in _NO_VENDOR:
        properties = known.properties if known is not None else {}
        return read_mpp(vendor_field(vendor, properties, is_tiff=tiff is not None), tags)
    if tiff.ome is None:
        return read_mpp(tags)
    image = tiff.ome.find(size)
    return read_mpp(Stated("PhysicalSizeX", image.mpp if image is not None else None), tags)
