"""Tiles per second of `read_tiles` beside cuCIM, OpenSlide and the limit, as `slidegrad bench read` measures them.

The slides are synthetic tissue (tests/benchmarks/big_slides.py), the tiles those of 224 px at 0.5 mpp that are tissue.
What the numbers mean is told in tiler/bench. Besides: `regions` is
one thread that reads JPEG as `read_tiles` reads other codecs, in regions by cuCIM, under the guards against damage that
it does not raise (tiler/guard.py); `regions_bare` the same without the guards: their cost. `memory` is the most that
`read_tiles` takes beside its output while it reads the largest full slide of the method's authors, 45,056 tiles, in one
call.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from manifests import Manifest
from tests.benchmarks.big_slides import write_big_slide
from tiler import TilerConfig, build_manifest, open_slide
from tiler.bench.measure import bench_slide, measure_peak
from tiler.bench.readers import Work
from tiler.bench.table import draw_table
from tiler.reader import plan_tiles, read_plan
from tiler.slide import Slide

SLIDES: dict[str, dict[str, Any]] = {
    "jpeg_256": {"side_px": 20_000},
    "jpeg_240": {"side_px": 10_000, "tile_px": 240},
    "jpeg_512": {"side_px": 10_000, "tile_px": 512},
    "jpeg_256_resampled": {"side_px": 20_000, "mpp": 0.25},
    "jpeg2000_256": {"side_px": 8_000, "codec": "jpeg2000"},
}
SHARES = {"jpeg_256": (1.0, 0.4, 0.05)}
"""All tiles of the others."""
MOST_TILES = 45_056
MOST_TILES_PX = 213 * 224
"""Side of a slide with a few more."""


def main(num_rounds: int = 5, most_px: int = 20_000, most_tiles_px: int = MOST_TILES_PX) -> dict[str, Any]:
    """Measures all slides.

    Args:
        num_rounds: how often.
        most_px: slides are cut down to this side.
        most_tiles_px: side of the slide that memory is measured with.
    """
    found: dict[str, Any] = {"num_rounds": num_rounds, "slides": {}}
    with tempfile.TemporaryDirectory() as folder:
        found["memory"] = _measure_memory(Path(folder, "most_tiles.svs"), most_tiles_px)
        for name, options in SLIDES.items():
            path = Path(folder, f"{name}.svs")
            write_big_slide(path, **{**options, "side_px": min(options["side_px"], most_px)})
            found["slides"][name] = result = bench_slide(
                open_slide(path),
                build_manifest(path, name, TilerConfig()).manifest,
                shares=SHARES.get(name, (1.0,)),
                num_rounds=num_rounds,
                more={"regions": _regions, "regions_bare": _regions_bare},
            )
            path.unlink()
            Console(file=sys.stderr).print(draw_table(result))
    return found


def _regions(work: Work) -> Callable[[], object]:
    def run() -> None:
        plan = plan_tiles(work.slide, work.manifest, work.rows, in_regions=True)
        read_plan(work.slide, work.manifest, plan, work.out, 1)

    return run


def _regions_bare(work: Work) -> Callable[[], object]:
    def run() -> None:
        with mock.patch.multiple("tiler.reader", **_OFF):
            read()

    read = _regions(work)
    return run


def _sees_nothing(*_: object) -> bool:
    return False


def _finds_nothing(_slide: Slide, _manifest: Manifest, rows: NDArray[np.int64], **_: bool) -> NDArray[np.bool_]:
    return np.zeros(len(rows), bool)


_OFF = {"guarded": contextlib.nullcontext, "is_poisoned": _sees_nothing, "bad_mark_rows": _finds_nothing}
"""What stands for the guards while they are off."""


def _measure_memory(path: Path, side_px: int) -> dict[str, Any]:
    write_big_slide(path, side_px, share_bytes=True)
    manifest = build_manifest(path, "most_tiles", TilerConfig(min_tissue=0)).manifest
    rows = np.arange(min(len(manifest), MOST_TILES))
    peaks = {num: measure_peak(open_slide(path), manifest, rows, num) for num in (1, 2)}
    tile_bytes = 3 * manifest.slide.tile_px**2
    return {
        "num_tiles": len(rows),
        "output_mb": round(len(rows) * tile_bytes / 1e6),
        "peak_mb_by_threads": peaks,
    }


if __name__ == "__main__":
    print(json.dumps(main()))
