"""cuCIM: the fastest reader, for the few formats that it reads right, and the guard that keeps it off the others."""

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiler.backends.pixels import Level
from tiler.tiff import RGB, YCBCR, TiffFacts

_VENDORS = ("aperio", "philips", "generic-tiff")
_LZW = 5
_DEFLATE = (8, 32946)
_COMPRESSIONS = (1, _LZW, 7, *_DEFLATE, 33003, 33005)
"""TIFF Compression: none, LZW, JPEG, Deflate (two codes), Aperio's JPEG 2000 (two codes)."""


def why_not_cucim(tiff: TiffFacts | None, vendor: str) -> str:
    """Why cuCIM is not let near a file, "" where its pixels are right.

    Measured with cuCIM 26.10: grey, RGBA, planar, 16-bit and striped files go through its slow path, which gives wrong
    pixels away from the slide's corner; Deflate with a predictor kills the process (segmentation fault).
    """
    if vendor not in _VENDORS or tiff is None:
        return f"cuCIM does not read {vendor or 'this format'}"
    for page in tiff.pyramid:
        if not page.is_tiled or page.is_planar or page.samples != 3 or page.photometric not in (RGB, YCBCR):
            return "cuCIM reads nothing but tiled RGB right"
        if page.compression not in _COMPRESSIONS:
            return f"cuCIM does not read {page.compression_name}"
        if page.predictor != 1 and (page.predictor, page.compression) != (2, _LZW):
            return f"cuCIM dies of {page.compression_name} with a predictor"
    return ""


class CucimPixels:
    """cuCIM: releases the GIL, and maps level-0 px to level px by floor(x_l0 / downsample)."""

    name = "cucim"

    def __init__(self, path: Path, tiff: TiffFacts) -> None:
        # Its libtiff complains of every Deflate file, with its path, and reads it all the same.
        self._slide = open_cucim(path, quiet=any(page.compression in _DEFLATE for page in tiff.pyramid))
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


def open_cucim(path: Path, *, quiet: bool) -> Any:
    """Opens a slide with cuCIM. At the first one its C code complains where there is no GPU: not shown."""
    global _has_opened
    os.environ.setdefault("CUFILE_LOGFILE_PATH", os.devnull)  # Else it leaves a cufile.log where the user stands.
    with contextlib.ExitStack() as stack:
        if quiet or not _has_opened:
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
