"""The two readers behind one small interface: cuCIM, and OpenSlide for what cuCIM does not read.

Both are only asked for pixels of the pyramid; label and macro images are never opened. A handle is cheap to open, is
used from many threads (both libraries allow that), and never crosses a process border.
"""

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import openslide
from numpy.typing import NDArray

PAD_VALUE = 255
"""Every backend shows this past the edge of a slide."""


@dataclass(frozen=True)
class Level:
    """One level of the pyramid: its size in px, its px per tile of the file, level-0 px per px."""

    width: int
    height: int
    tile_w: int
    tile_h: int
    downsample: float


class Pixels(Protocol):
    """What a backend answers."""

    name: str
    levels: tuple[Level, ...]

    def read(self, x_l0: int, y_l0: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        """RGB, (height, width, 3). Origin in level-0 px, size in px of `level`."""

    def is_exact(self, level: int) -> bool:
        """A region's pixels do not depend on where the read that holds it began."""


class CucimPixels:
    """cuCIM: releases the GIL, and maps level-0 px to level px by floor(x_l0 / downsample)."""

    name = "cucim"

    def __init__(self, path: Path) -> None:
        self._slide = _open_cucim(path)
        r = self._slide.resolutions
        self.levels = tuple(
            Level(w, h, tw, th, d)
            for (w, h), (tw, th), d in zip(
                r["level_dimensions"], r["level_tile_sizes"], r["level_downsamples"], strict=True
            )
        )

    def read(self, x_l0: int, y_l0: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        region = self._slide.read_region((x_l0, y_l0), (width, height), level)
        return np.asarray(region)[..., :3]

    def is_exact(self, level: int) -> bool:  # noqa: ARG002 - the protocol's signature
        return True


_first_open = threading.Lock()
_has_opened = False


def _open_cucim(path: Path) -> Any:
    """Opens a slide with cuCIM. At the first one its C code complains where there is no GPU: not shown."""
    global _has_opened
    os.environ.setdefault("CUFILE_LOGFILE_PATH", os.devnull)  # Else it leaves a cufile.log where the user stands.
    with contextlib.ExitStack() as stack:
        if not _has_opened:
            stack.enter_context(_first_open)
            stack.enter_context(_no_output())
        import cucim

        slide = cucim.CuImage(str(path))  # type: ignore[attr-defined]
        _has_opened = True
    return slide


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    """Sends what C code writes to descriptors 1 and 2 nowhere, what it holds in its buffers included."""
    flush = ctypes.CDLL(None).fflush
    flush(None)
    kept, nowhere = (os.dup(1), os.dup(2)), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        flush(None)
        for descriptor, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(nowhere)


class OpenslidePixels:
    """OpenSlide: interpolates where x_l0 / downsample is no whole number; exact at whole downsamples only."""

    name = "openslide"

    def __init__(self, path: Path) -> None:
        self._slide = openslide.OpenSlide(path)
        self.properties = prop = dict(self._slide.properties)
        self.levels = tuple(
            Level(
                w,
                h,
                int(prop.get(f"openslide.level[{i}].tile-width", 256)),
                int(prop.get(f"openslide.level[{i}].tile-height", 256)),
                d,
            )
            for i, ((w, h), d) in enumerate(
                zip(self._slide.level_dimensions, self._slide.level_downsamples, strict=True)
            )
        )

    def read(self, x_l0: int, y_l0: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        rgba = np.asarray(self._slide.read_region((x_l0, y_l0), level, (width, height)))
        rgb = np.ascontiguousarray(rgba[..., :3])
        rgb[rgba[..., 3] == 0] = PAD_VALUE  # Transparent: past the edge, or never scanned.
        return rgb

    def is_exact(self, level: int) -> bool:
        return float(self.levels[level].downsample).is_integer()
