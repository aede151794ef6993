"""Big slides for benchmarks: one synthetic slide of 8,192 px laid side by side until it fills the size asked for."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import cv2
import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from tiler.synth import CohortConfig, make_cohort
from tiler.synth.svs import encode_jpeg

Codec = Literal["jpeg", "jpeg2000"]

_PATTERN_PX = 8_192
_DOWNSAMPLES = (1, 4, 16)
_JPEG2000_DB = 44
"""Quality of JPEG 2000, peak signal to noise: 1.5 bits a px on tissue; a slide of TCGA has 1.6."""
_LAYOUTS = {
    "jpeg": {"compression": "jpeg", "photometric": "ycbcr", "subsampling": (2, 2)},
    "jpeg2000": {"compression": 33005, "photometric": "rgb"},
}
"""JPEG with chroma halved both ways; raw JPEG 2000 code-streams of RGB, which Aperio calls 33005."""


def write_big_slide(
    path: Path,
    side_px: int,
    *,
    codec: Codec = "jpeg",
    quality: int = 80,
    tile_px: int = 256,
    mpp: float = 0.5,
    share_bytes: bool = False,
) -> None:
    """Writes an Aperio-like slide of `side_px` x `side_px`: levels 1, 4, 16.

    Args:
        path: where to.
        side_px: width and height of level 0, px.
        codec: of the compressed tiles.
        quality: of JPEG, 1 to 100.
        tile_px: side of a compressed tile, at most 512 px.
        mpp: microns per level-0 px that the slide states; it is drawn at 0.5, whatever this is.
        share_bytes: keep each tile once and let the tile tables repeat it: 100,000 px in a few dozen MB, read alike.
    """
    # Whole tiles on every level, where it is repeated.
    period_px = _PATTERN_PX // (16 * tile_px) * 16 * tile_px if side_px > _PATTERN_PX else _PATTERN_PX
    drawn = _draw(min(side_px, period_px))[:period_px, :period_px]
    sides, indices, stored = [], [], []
    for down in _DOWNSAMPLES:
        picture = cv2.resize(drawn, None, fx=1 / down, fy=1 / down, interpolation=cv2.INTER_AREA)
        across = -(-picture.shape[1] // tile_px)
        sides.append(side_px // down)
        index = np.arange(-(-sides[-1] // tile_px)) % across
        indices.append((index[:, None] * across + index[None, :]).ravel())
        stored.append(_encode(picture, tile_px, codec, quality))
    shown = stored if share_bytes else [[tiles[i] for i in at] for tiles, at in zip(stored, indices, strict=True)]
    _write(path, sides, shown, tile_px, mpp, codec)
    if share_bytes:
        _repeat(path, sides, indices)


def _draw(side_px: int) -> NDArray[np.uint8]:
    """A square picture of tissue, RGB, at least `side_px` wide."""
    side_px = max(512, -(-side_px // 128) * 128)
    config = CohortConfig(width_px=(side_px, side_px), height_px=(side_px, side_px), scant_every=0)
    with tempfile.TemporaryDirectory() as folder:
        (source,) = make_cohort(Path(folder), 1, seed=1, config=config, num_workers=1)
        return tifffile.imread(source, key=0)


def _encode(picture: NDArray[np.uint8], tile_px: int, codec: Codec, quality: int) -> list[bytes]:
    """The compressed tiles of a level, row by row; the last ones are filled by repeating the edge."""
    height, width = picture.shape[:2]
    padded = np.pad(picture, ((0, -height % tile_px), (0, -width % tile_px), (0, 0)), mode="edge")
    corners = [(y, x) for y in range(0, height, tile_px) for x in range(0, width, tile_px)]
    tiles = [np.ascontiguousarray(padded[y : y + tile_px, x : x + tile_px]) for y, x in corners]
    if codec == "jpeg":
        return [encode_jpeg(tile, quality) for tile in tiles]
    return [imagecodecs.jpeg2k_encode(tile, level=_JPEG2000_DB, codecformat="j2k", mct=True) for tile in tiles]


def _write(
    path: Path, sides: Sequence[int], levels: Sequence[Sequence[bytes]], tile_px: int, mpp: float, codec: Codec
) -> None:
    """Lays out the file as Aperio does: level 0, a thumbnail in one strip, the other levels.

    A level of fewer tiles than its size asks for is written as a row of them; see `_repeat`.
    """
    size = f"{sides[0]}x{sides[0]}"
    head = f"Aperio Image Library v12.0.0 \r\n{size} [0,0 {size}] ({tile_px}x{tile_px})"
    common = {"dtype": np.uint8, "metadata": None, "software": False, "subfiletype": 0}
    big = sum(len(tile) for tiles in levels for tile in tiles) > 3_900_000_000
    thumbnail = np.full((64, 64, 3), 240, np.uint8)
    with tifffile.TiffWriter(path, bigtiff=big) as tiff:
        for i, (side, tiles) in enumerate(zip(sides, levels, strict=True)):
            told = f" -> {side}x{side}" if i else f"|AppMag = {round(10 / mpp)}|MPP = {mpp:.4f}"
            is_whole = len(tiles) == (-(-side // tile_px)) ** 2
            shape = (side, side, 3) if is_whole else (tile_px, tile_px * len(tiles), 3)
            tiff.write(
                iter(tiles), shape=shape, tile=(tile_px, tile_px), description=head + told, **_LAYOUTS[codec], **common
            )
            if i == 0:
                strip = iter([encode_jpeg(thumbnail, 80)])
                tiff.write(
                    strip, shape=thumbnail.shape, rowsperstrip=64, description=head, **_LAYOUTS["jpeg"], **common
                )


def _repeat(path: Path, sides: Sequence[int], indices: Sequence[NDArray[np.int64]]) -> None:
    """Rewrites sizes and tile tables so that each level repeats its tiles over its whole side."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        pages = [page for page in tiff.pages if page.is_tiled]
        for page, side, index in zip(pages, sides, indices, strict=True):
            offsets, sizes = np.array(page.dataoffsets)[index], np.array(page.databytecounts)[index]
            page.tags["ImageWidth"].overwrite(side)
            page.tags["ImageLength"].overwrite(side)
            page.tags["TileOffsets"].overwrite(offsets.tolist())
            page.tags["TileByteCounts"].overwrite(sizes.tolist())
