"""Damaging single compressed tiles of a slide, and telling which tiles of a manifest touch them.

Shared by the tests of tiler/integrity.
"""

from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from manifests import Manifest
from tiler import TilerConfig, build_manifest, open_slide
from tiler.config import Backend, Check
from tiler.integrity import find_damage
from tiler.slide import Slide
from tiler.tiff_tables import TileTable, read_tables

CHECKS: tuple[Check, ...] = ("markers", "decode", "sample")
CONFIG = TilerConfig(tile_px=48, mpp=0.5, min_tissue=0, check="none")
Opened = tuple[Slide, Manifest]


def open_built(path: Path, config: TilerConfig = CONFIG, backend: Backend = "auto") -> Opened:
    return open_slide(path, backend), build_manifest(path, "case", config).manifest


def bad_of(opened: Opened, check: Check) -> NDArray[np.bool_]:
    return find_damage(*opened, check).bad


def place(path: Path, index: int, table: int = 0) -> tuple[int, int]:
    found = read_tables(path)[table]
    return int(found.offsets.flat[index]), int(found.num_bytes.flat[index])


def overwrite(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(content)


def harm(path: Path, kind: str, index: int, table: int = 0) -> None:
    """Damages one compressed tile."""
    at, length = place(path, index, table)
    half = length // 2
    if kind == "all zeros":
        overwrite(path, at, bytes(length))
    elif kind == "no start":
        overwrite(path, at, b"\0")
    elif kind == "end lost":
        overwrite(path, at + half, bytes(length - half))
    elif kind == "second half zeros":
        overwrite(path, at + half, bytes(length - half - 2))
    elif kind == "wrong place":
        retag(path, 324, index, at + 7)
    elif kind == "past the end":
        retag(path, 324, index, path.stat().st_size - 10)
    elif kind == "too short":
        retag(path, 325, index, length - 100)
    elif kind == "no length":
        retag(path, 325, index, 0)
    else:
        assert kind == "another tile"
        other = path.read_bytes()[slice(*np.cumsum(place(path, index + 1, table)))]
        retag(path, 325, index, len(other))
        overwrite(path, at, other)


def retag(path: Path, code: int, index: int, value: int) -> None:
    """Changes an entry of the tables of level 0."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tag = tiff.pages[0].tags[code]
        tag.overwrite([*tag.value[:index], value, *tag.value[index + 1 :]])


def touching(opened: Opened, *indices: int) -> list[bool]:
    """Which tiles touch these tiles of the file, one by one and by every corner of a px."""
    slide, manifest = opened
    level, record = slide.levels[manifest.slide.level], manifest.slide
    across = -(-level.width // level.tile_w)
    found = []
    for x_l0, y_l0 in zip(manifest.x_l0.tolist(), manifest.y_l0.tolist(), strict=True):
        x, y = int(x_l0 // level.downsample), int(y_l0 // level.downsample)
        columns = {px // level.tile_w for px in range(x, x + record.read_w)}
        rows = {px // level.tile_h for px in range(y, y + record.read_h)}
        found.append(any(i // across in rows and i % across in columns for i in indices))
    return found


CODECS = {"jpeg": "jpeg", "jpeg2000": "jpeg2000", "lzw": "lzw", "deflate": "zlib", "none": None}


APERIO_CODECS = {"JPEG": 7, "JPEG 2000, YCbCr": 33003, "JPEG 2000": 33005, "Deflate": 8, "LZW": 5, "none": 1}
"""What cuCIM reads: TIFF's numbers, the second and third Aperio's own."""


def draw_texture() -> NDArray[np.uint8]:
    """RGB (256, 512, 3)."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)
    return np.asarray(cv2.resize(noise, (512, 256)))


def cut(pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Tiles of 128 px, row by row."""
    corners = [(y, x) for y in range(0, pixels.shape[0], 128) for x in range(0, pixels.shape[1], 128)]
    return [np.ascontiguousarray(pixels[y : y + 128, x : x + 128]) for y, x in corners]


def write_aperio(path: Path, codec: str) -> Path:
    """A slide that cuCIM reads: 8 tiles and, half as large, 2."""
    compression = APERIO_CODECS[codec]
    with tifffile.TiffWriter(path) as tiff:
        for step in (1, 2):
            pixels: Any = draw_texture()[::step, ::step]
            shape = pixels.shape
            if codec == "JPEG 2000, YCbCr":
                pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
            if codec.startswith("JPEG 2000"):  # tifffile writes Aperio's only if they come encoded.
                is_rgb = codec == "JPEG 2000"
                tiles = [imagecodecs.jpeg2k_encode(tile, 40, codecformat="j2k", mct=is_rgb) for tile in cut(pixels)]
                pixels = iter(tiles)
            tiff.write(
                pixels,
                shape=shape,
                dtype=np.uint8,
                photometric="rgb",
                compression=compression,
                tile=(128, 128),
                description="Aperio Image Library v12.0.0 \r\n512x256 (128x128)|AppMag = 20|MPP = 0.5",
                metadata=None,
            )
    return path


def write_codec(path: Path, codec: str, *, levels: int = 1, **layout: Any) -> TileTable:
    """A TIFF of 8 tiles or 16 strips, with texture: its first table."""
    pixels = draw_texture()
    layout = layout or {"tile": (128, 128)}
    with tifffile.TiffWriter(path) as tiff:
        for i in range(levels):
            shrunk = pixels[:: 2**i, :: 2**i]
            tiff.write(shrunk, photometric="rgb", compression=CODECS[codec], subfiletype=min(i, 1), **layout)
    return read_tables(path)[0]
