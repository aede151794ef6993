"""Writes a pyramid as an Aperio-style SVS file: JPEG-tiled levels and a stripped thumbnail.

Not for pixels. tifffile lays out the file, OpenCV encodes the JPEGs: each carries its own tables, so that no codec
package is needed. The file appears whole or not at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

from manifests.files import atomic_path

TILE_PX = 256
"""Side of a JPEG tile, on every level."""
_BIGTIFF_BYTES = 3_900_000_000
"""Above this many bytes of JPEG the offsets need 64 bits."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of a pyramid, encoded."""

    width_px: int
    """Width in px of this level."""
    height_px: int
    """Height in px of this level."""
    jpegs: Sequence[bytes]
    """JPEG tiles of 256 px, row by row; those at the right and lower edge are full tiles too."""


def encode_jpeg(rgb: NDArray[np.uint8], quality: int) -> bytes:
    """A baseline JPEG of an RGB picture: YCbCr, chroma halved both ways."""
    ok, jpeg = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert ok
    return bytes(jpeg)


def encode_level(pixels: NDArray[np.uint8], quality: int) -> Level:
    """Cuts a whole level (height, width, 3) into JPEG tiles; the last ones are filled by repeating the edge."""
    height, width = pixels.shape[:2]
    padding = ((0, -height % TILE_PX), (0, -width % TILE_PX), (0, 0))
    padded = np.pad(pixels, padding, mode="edge")
    corners = [(y, x) for y in range(0, height, TILE_PX) for x in range(0, width, TILE_PX)]
    jpegs = [encode_jpeg(padded[y : y + TILE_PX, x : x + TILE_PX], quality) for y, x in corners]
    return Level(width_px=width, height_px=height, jpegs=jpegs)


def write_svs(
    path: Path, levels: Sequence[Level], thumbnail: NDArray[np.uint8], *, mpp: float, app_mag: int, quality: int
) -> None:
    """Writes the pyramid.

    Args:
        path: The file to make; its folder exists.
        levels: From full resolution down; each is the level before reduced by a whole factor.
        thumbnail: RGB (height, width, 3), stored as Aperio stores its own: second, in one strip.
        mpp: Microns per pixel of level 0, the same in x and y.
        app_mag: Nominal magnification of level 0.
        quality: JPEG quality, for the description and the thumbnail.
    """
    base = levels[0]
    size = f"{base.width_px}x{base.height_px}"
    head, codec = "Aperio Image Library v12.0.0 \r\n", f"JPEG/YCC Q={quality}"
    descriptions = [f"{head}{size} [0,0 {size}] ({TILE_PX}x{TILE_PX}) {codec}|AppMag = {app_mag}|MPP = {mpp:.4f}"] + [
        f"{head}{size} [0,0 {size}] ({TILE_PX}x{TILE_PX}) -> {level.width_px}x{level.height_px} {codec}"
        for level in levels[1:]
    ]
    num_bytes = sum(len(jpeg) for level in levels for jpeg in level.jpegs)
    with atomic_path(path) as partial, tifffile.TiffWriter(partial, bigtiff=num_bytes > _BIGTIFF_BYTES) as tiff:
        for place, (level, description) in enumerate(zip(levels, descriptions, strict=True)):
            _write_page(tiff, level.jpegs, (level.height_px, level.width_px, 3), description, tile=(TILE_PX, TILE_PX))
            if place == 0:
                height, width = thumbnail.shape[:2]
                strip = [encode_jpeg(thumbnail, quality)]
                _write_page(tiff, strip, thumbnail.shape, f"{head}{size} -> {width}x{height} - ", rowsperstrip=height)


def _write_page(
    tiff: tifffile.TiffWriter, jpegs: Sequence[bytes], shape: tuple[int, ...], description: str, **layout: object
) -> None:
    tiff.write(
        iter(jpegs),
        shape=shape,
        dtype=np.uint8,
        photometric="ycbcr",
        compression="jpeg",
        subsampling=(2, 2),
        description=description,
        metadata=None,
        software=False,
        subfiletype=0,
        **layout,
    )
