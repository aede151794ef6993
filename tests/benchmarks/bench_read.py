"""Tiles per second of `read_tiles` beside reading tile by tile with OpenSlide and with cuCIM.

The number is 224-px tiles of one synthetic slide at its own scale, every tissue tile once, in manifest order, one
thread unless said; the median of the rounds, each round running all readers, so that the ratios share a machine state.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide

from manifests import Manifest
from tiler import TilerConfig, build_manifest, open_slide, read_tiles
from tiler.slide import Slide
from tiler.synth import CohortConfig, make_cohort


def main(num_rounds: int = 5, config: CohortConfig | None = None) -> dict[str, object]:
    """Runs the comparison and returns tiles/s by reader and the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        (path,) = make_cohort(Path(folder), 1, seed=0, config=config, num_workers=1)
        manifest = build_manifest(path, "slide", TilerConfig(min_tissue=0.05)).manifest
        readers: dict[str, Callable[[], object]] = {
            "openslide_per_tile": lambda: _openslide_per_tile(path, manifest),
            "cucim_per_tile": lambda: _per_tile(open_slide(path, "cucim"), manifest),
            "read_tiles_1_thread": lambda: _blocks(open_slide(path), manifest, 1),
            "read_tiles_2_threads": lambda: _blocks(open_slide(path), manifest, 2),
        }
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(num_rounds):
            for name, read in readers.items():
                start = time.perf_counter()
                read()
                seconds[name].append(time.perf_counter() - start)
    rates = {name: len(manifest) / statistics.median(values) for name, values in seconds.items()}
    ours = rates["read_tiles_1_thread"]
    return {
        "num_tiles": len(manifest),
        "num_rounds": num_rounds,
        "tiles_per_s": {name: round(rate) for name, rate in rates.items()},
        "spread": {name: round((max(v) - min(v)) / statistics.median(v), 2) for name, v in seconds.items()},
        "ratio_to_openslide_per_tile": round(ours / rates["openslide_per_tile"], 2),
        "ratio_to_cucim_per_tile": round(ours / rates["cucim_per_tile"], 2),
        "ratio_2_threads_to_1": round(rates["read_tiles_2_threads"] / ours, 2),
    }


def _openslide_per_tile(path: Path, manifest: Manifest) -> None:
    slide = openslide.OpenSlide(path)
    for x, y in zip(manifest.x_l0.tolist(), manifest.y_l0.tolist(), strict=True):
        np.asarray(slide.read_region((x, y), 0, (224, 224)))[..., :3].copy()


def _per_tile(slide: Slide, manifest: Manifest) -> None:
    for x, y in zip(manifest.x_l0.tolist(), manifest.y_l0.tolist(), strict=True):
        slide.read(x, y, 0, 224, 224).copy()


def _blocks(slide: Slide, manifest: Manifest, num_threads: int) -> None:
    read_tiles(slide, manifest, np.arange(len(manifest)), num_threads=num_threads)


if __name__ == "__main__":
    big = (
        CohortConfig(width_px=(16384, 16384), height_px=(12288, 12288), scant_every=0) if "--big" in sys.argv else None
    )
    print(json.dumps(main(config=big)))
