"""How fast a slide's tiles come through the reader here: a sample of a few seconds, so a rough number."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from manifests.schema import Manifest
from tiler.build import build_manifest
from tiler.config import TilerConfig
from tiler.errors import TilerError
from tiler.guard import guarded
from tiler.reader import read_tiles
from tiler.slide import Slide

_LEAST_S = 1.5
_TRIAL_TILES, _MOST_TILES, _MOST_BYTES = 32, 2_048, 500_000_000


def build_sample(path: Path, config: TilerConfig) -> Manifest:
    """The tiles of a slide, as the tiler finds them; every tile where it finds no tissue.

    Raises:
        SlidegradError: the slide cannot be used, or is smaller than a tile.
    """
    with guarded():  # What cuCIM prints of damage is not for people.
        manifest = build_manifest(path, path.stem, config).manifest
        if not len(manifest):
            manifest = build_manifest(path, path.stem, dataclasses.replace(config, min_tissue=0.0)).manifest
    if not len(manifest):
        raise TilerError(
            f"slide {path.stem}: no tile of {config.tile_px} px at {config.mpp:g} mpp fits in; give a smaller --tile-px"
        )
    return manifest


def measure_decoding(slide: Slide, manifest: Manifest, num_threads: int) -> dict[str, Any]:
    """Tiles per second of `read_tiles`, from the middle of the manifest, with the file in this machine's memory.

    Args:
        slide: the open slide.
        manifest: its tiles, at least one.
        num_threads: threads of the second pass; the first has one.

    Raises:
        TilerError: tiles that cannot be read.
    """
    record = manifest.slide
    tile_bytes = 3 * record.tile_px**2
    most = max(1, min(len(manifest), _MOST_TILES, _MOST_BYTES // tile_bytes))
    num_trial = min(most, _TRIAL_TILES)
    middle = (len(manifest) - most) // 2
    rows, out = np.arange(middle, middle + most), np.empty((most, record.tile_px, record.tile_px, 3), np.uint8)
    started = time.perf_counter()
    read_tiles(slide, manifest, rows[:num_trial], out[:num_trial], num_threads)
    rate = num_trial / (time.perf_counter() - started)
    # About a second's work with all threads: a larger sample is nearer to what training reads at once.
    num_tiles = min(most, max(num_trial, round(rate)))
    read_tiles(slide, manifest, rows[:num_tiles], out[:num_tiles], num_threads)  # The file comes into memory.
    rates = []
    for threads in sorted({1, num_threads}):
        started, num_read = time.perf_counter(), 0
        while (elapsed_s := time.perf_counter() - started) < _LEAST_S:
            read_tiles(slide, manifest, rows[:num_tiles], out[:num_tiles], threads)
            num_read += num_tiles
        rates.append({"threads": threads, "tiles_per_s": num_read / elapsed_s})
    return {
        "tile_px": record.tile_px,
        "tile_mpp": record.tile_mpp,
        "num_tiles": num_tiles,
        "num_tiles_of_slide": len(manifest),
        "rates": rates,
    }
