"""Seconds and memory from a slide file to its manifest, beside LazySlide's `find_tissues` + `tile_tissues`.

The slide is a 20,000 x 20,000 px JPEG pyramid (levels 1, 4, 16) of synthetic tissue at 0.5 mpp, tiled at 224 px; the
work is all that `slidegrad tile` does for a slide with its default settings: opening, fingerprint, scale, thumbnail,
tissue, artefacts, grid, check of the bytes, writing mask and manifest. One core, the best and the median of the rounds,
both programs taking turns. Each program runs in a process of its own that imports and warms up first; its peak resident
memory is given. A 100,000 x 100,000 px slide is tiled once for its memory.

LazySlide needs an environment of its own: make one, `pip install lazyslide==0.13.*`, and name its python in
`--lazyslide`. Without it ours is measured alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from tests.benchmarks.big_slides import write_big_slide

_OURS = """
    import json, resource, sys, tempfile, time
    from pathlib import Path
    import cv2
    from tiler import TilerConfig
    from tiler.build import Task, tile_slide
    cv2.setNumThreads(1)
    out, task, config = Path(tempfile.mkdtemp()), Task(slide_id="s", path=Path(sys.argv[1])), TilerConfig()
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    seconds = []
    for _ in range(int(sys.argv[2])):
        started = time.perf_counter()
        record = tile_slide(task, out, config).record
        seconds.append(time.perf_counter() - started)
    assert record.status == "ok", record.error
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"seconds": seconds, "num_tiles": record.num_tiles, "idle_gb": idle, "peak_gb": peak}))
"""
_LAZYSLIDE = """
    import json, resource, sys, time, warnings
    warnings.filterwarnings("ignore")
    import cv2, lazyslide as zs
    from wsidata import open_wsi
    cv2.setNumThreads(1)
    seconds = []
    for _ in range(int(sys.argv[2])):
        started = time.perf_counter()
        slide = open_wsi(sys.argv[1], store=None)
        zs.pp.find_tissues(slide)
        zs.pp.tile_tissues(slide, tile_px=224, mpp=0.5)
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"seconds": seconds, "num_tiles": len(slide.shapes["tiles"]), "peak_gb": peak}))
"""


def main(
    side_px: int = 20_000, big_side_px: int = 100_000, num_rounds: int = 5, lazyslide: str | None = None
) -> dict[str, object]:
    """Runs the comparison; returns seconds, tiles and memory of each program and the ratio of their medians."""
    with tempfile.TemporaryDirectory() as folder:
        slide, big = Path(folder, "slide.svs"), Path(folder, "big.svs")
        write_big_slide(slide, side_px)
        write_big_slide(big, big_side_px, share_bytes=True)
        programs = {"slidegrad": (sys.executable, _OURS)}
        if lazyslide:
            programs["lazyslide"] = (lazyslide, _LAZYSLIDE)
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        result: dict[str, object] = {"side_px": side_px, "big_side_px": big_side_px}
        for _ in range(num_rounds):
            for name, (python, script) in programs.items():
                told = _run(python, script, slide, 3)
                seconds[name].extend(told["seconds"][1:])  # The first of each process warms up.
                result[name] = {
                    "best_s": round(min(seconds[name]), 3),
                    "median_s": round(sorted(seconds[name])[len(seconds[name]) // 2], 3),
                    "num_tiles": told["num_tiles"],
                    "peak_gb": round(told["peak_gb"], 3),
                }
        told = _run(sys.executable, _OURS, big, 1)
        result["big"] = {name: round(told[name], 3) for name in ("idle_gb", "peak_gb")}
        result["big"] |= {"seconds": round(told["seconds"][0], 2), "num_tiles": told["num_tiles"]}
    if lazyslide:
        result["ratio_to_lazyslide"] = round(result["lazyslide"]["median_s"] / result["slidegrad"]["median_s"], 2)
    return result


def _run(python: str, script: str, slide: Path, num_rounds: int) -> dict[str, object]:
    """One process on one core."""
    core = min(os.sched_getaffinity(0))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-c", textwrap.dedent(script), str(slide), str(num_rounds)],
        capture_output=True,
        text=True,
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lazyslide", metavar="PYTHON", help="python of an environment with LazySlide")
    arguments = parser.parse_args()
    print(json.dumps(main(num_rounds=arguments.rounds, lazyslide=arguments.lazyslide)))
