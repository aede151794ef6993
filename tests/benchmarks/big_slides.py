"""Big slides for benchmarks: one synthetic slide of 8,192 px laid side by side until it fills the size asked for."""

import tempfile
from pathlib import Path

import numpy as np
import tifffile

from tiler.synth import CohortConfig, make_cohort
from tiler.synth.svs import Level, write_svs

_PATTERN_PX = 8_192


def write_big_slide(path: Path, side_px: int, *, share_bytes: bool = False) -> None:
    """Writes an Aperio-like slide of `side_px` x `side_px` at 0.5 mpp: levels 1, 4, 16, JPEG tiles of 256 px.

    Args:
        path: where to.
        side_px: width and height of level 0, px.
        share_bytes: keep each JPEG once and let the tile tables repeat it: 100,000 px in a few dozen MB, read alike.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = CohortConfig(width_px=(_PATTERN_PX, _PATTERN_PX), height_px=(_PATTERN_PX, _PATTERN_PX), scant_every=0)
        (source,) = make_cohort(Path(folder), 1, seed=1, config=config, num_workers=1)
        with tifffile.TiffFile(source) as tiff, source.open("rb") as stream:
            levels, repeats = [], []
            for page in [page for page in tiff.pages if page.is_tiled]:
                jpegs = []
                for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True):
                    stream.seek(offset)
                    jpegs.append(stream.read(size))
                down = _PATTERN_PX // page.imagewidth
                side = side_px // down
                across = _PATTERN_PX // down // 256
                index = np.arange(-(-side // 256)) % across
                repeat = (index[:, None] * across + index[None, :]).ravel()
                repeats.append((side, repeat))
                stored = (page.imagewidth, jpegs) if share_bytes else (side, [jpegs[i] for i in repeat])
                levels.append(Level(width_px=stored[0], height_px=stored[0], jpegs=stored[1]))
    write_svs(path, levels, np.full((64, 64, 3), 240, np.uint8), mpp=0.5, app_mag=20, quality=85)
    if share_bytes:
        _stretch(path, repeats)


def _stretch(path: Path, repeats: list[tuple[int, np.ndarray]]) -> None:
    """Rewrites sizes and tile tables so that each page repeats its tiles over the whole side."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for page, (side, repeat) in zip([page for page in tiff.pages if page.is_tiled], repeats, strict=True):
            offsets, sizes = np.array(page.dataoffsets)[repeat], np.array(page.databytecounts)[repeat]
            page.tags["ImageWidth"].overwrite(side)
            page.tags["ImageLength"].overwrite(side)
            page.tags["TileOffsets"].overwrite(offsets.tolist())
            page.tags["TileByteCounts"].overwrite(sizes.tolist())
            text = page.tags["ImageDescription"].value.replace(f"{_PATTERN_PX}x{_PATTERN_PX}", f"{side}x{side}")
            page.tags["ImageDescription"].overwrite(text)
