"""Opening a slide: cuCIM first, OpenSlide where cuCIM cannot, chosen per file.

OpenSlide, which knows every vendor's header, tells the scale and the vendor even where cuCIM reads the pixels.
"""

import hashlib
import math
from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray

from tiler.backends import PAD_VALUE, CucimPixels, OpenslidePixels, Pixels
from tiler.config import Backend
from tiler.errors import ReadError, TilerError
from tiler.scale import MppReading, read_mpp

_CUCIM_VENDORS = ("aperio", "philips", "generic-tiff")
_FINGERPRINT_BYTES = 64 * 1024


class Slide:
    """An open slide.

    Attributes:
        path: the file.
        backend: "cucim" | "openslide".
        vendor: as OpenSlide names it, "" if it does not know the file.
        levels: the pyramid, finest first.
        mpp: microns per level-0 px (x, y), or None where the slide does not say.
        mpp_source: "vendor" | "tiff" | "".
        fingerprint: hash of size, head and tail of the file; no clock.
    """

    def __init__(self, path: Path, pixels: Pixels, vendor: str, scale: MppReading) -> None:
        self.path, self._pixels, self.vendor, self.scale = path, pixels, vendor, scale
        self.backend, self.levels = pixels.name, pixels.levels
        self.mpp, self.mpp_source = scale.mpp, scale.source
        self.fingerprint = fingerprint(path)

    @property
    def size_l0(self) -> tuple[int, int]:
        """(width, height) in level-0 px."""
        return self.levels[0].width, self.levels[0].height

    def is_exact(self, level: int) -> bool:
        """A region's pixels do not depend on where the read that holds it began."""
        return self._pixels.is_exact(level)

    def read(self, x_l0: int, y_l0: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        """One region, RGB (height, width, 3); white past the edge.

        Raises:
            ReadError: the backend could not read it.
        """
        try:
            region = self._pixels.read(x_l0, y_l0, level, width, height)
        except (RuntimeError, ValueError, openslide.OpenSlideError, MemoryError) as error:
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
        path: the slide file.
        backend: "auto" takes cuCIM where it reads the format and sees the same levels as OpenSlide, else OpenSlide.

    Raises:
        TilerError: no such file, empty, not a slide, or not readable by the backend asked for.
    """
    path = Path(path)
    if not path.exists():
        raise TilerError(f"{path.name}: no such file")
    if not path.is_file():
        raise TilerError(f"{path.name}: not a file")
    if path.stat().st_size == 0:
        raise TilerError(f"{path.name}: empty file (0 bytes)")
    try:
        fallback = OpenslidePixels(path)
    except openslide.OpenSlideError as error:
        raise TilerError(f"{path.name}: not a slide that can be opened ({error})") from None
    vendor = fallback.properties.get("openslide.vendor", "")
    pixels: Pixels = fallback
    if backend == "cucim" or (backend == "auto" and vendor in _CUCIM_VENDORS):
        pixels = _try_cucim(path, fallback, must=backend == "cucim")
    return Slide(path, pixels, vendor, read_mpp(path, vendor, fallback.properties))


def _try_cucim(path: Path, fallback: OpenslidePixels, *, must: bool) -> Pixels:
    """cuCIM if it opens the slide and sees the levels that OpenSlide sees; else the fallback, or an error."""
    try:
        pixels = CucimPixels(path)
    except ImportError:
        if must:
            raise TilerError("backend cucim: not installed; pip install 'slidegrad[cu13]' (or [cu12])") from None
        return fallback
    except (RuntimeError, ValueError) as error:
        if must:
            raise TilerError(f"{path.name}: cuCIM cannot open it ({error}); give --backend openslide") from None
        return fallback
    seen, expected = ([(lv.width, lv.height) for lv in p.levels] for p in (pixels, fallback))
    if seen == expected:
        return pixels
    if must:
        raise TilerError(f"{path.name}: cuCIM sees levels {seen}, OpenSlide {expected}; give --backend openslide")
    return fallback


def fingerprint(path: Path) -> str:
    """32 hex digits over the file's size and its first and last 64 KiB."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as stream:
        digest.update(stream.read(_FINGERPRINT_BYTES))
        stream.seek(max(0, size - _FINGERPRINT_BYTES))
        digest.update(stream.read())
    return digest.hexdigest()
