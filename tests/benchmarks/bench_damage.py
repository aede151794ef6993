"""Which damage is noticed under tiles that were sound when the slide was tiled, false alarms, and what noticing costs.

Detection: one compressed tile of a slide is damaged in place, so that the file keeps its size; then the tiles that
touch it are read. Given are shares of those damaged tiles whose pixels changed at all, by format and kind of damage
(tests/tiler/damaged_slides.py): noticed by the fingerprint; by an error that cuCIM raises; by what it prints; by memory
that was never written; by marks; by a strict decode of the bytes; and by all that `read_tiles` does together, the
fingerprint left out: `refused`. It decodes JPEG from its bytes and asks cuCIM only where tiles reach past the slide:
`refused_in_regions`. Of a miss, the share of the compressed tile's px that are wrong is given.

False alarms: regions under suspicion on undamaged slides. Suspicion: `read_tiles` of some 64 tiles, none, one or all of
its regions suspected for nothing. Reading: all tiles of a slide by one thread in regions, with some of the guards, as a
ratio to none. Training: forward and backward of a ResNet18 at 96 px on the CPU inside `guarded()`, as a ratio to
outside. Times are processor times of one thread, which change little with what else the machine does; every round runs
all ways one after another; a ratio is the median of the rounds' ratios.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tifffile
from numpy.typing import NDArray

from manifests import Manifest
from tests.benchmarks.big_slides import write_big_slide
from tests.benchmarks.noticing import detect
from tests.tiler import damaged_slides as slides
from tests.tiler import readings
from tiler import Slide, TilerConfig, build_manifest, guard, open_slide, plan_tiles, read_plan
from tiler.guard import guarded
from tiler.synth import CohortConfig, make_cohort

_BATCH = 64


def main(
    num_damaged: int = 60,
    side_px: int = 4096,
    big_side_px: int = 8192,
    num_rounds: int = 7,
    num_readings: int = 200,
    formats: Sequence[str] = tuple(slides.FORMATS),
    real_slides: Path | None = None,
) -> dict[str, object]:
    """Measures all of it.

    Args:
        num_damaged: damaged tiles for each format and kind of damage.
        side_px: side of the slides that are damaged.
        big_side_px: side of the slides whose reading is timed.
        num_rounds: how often what is timed is repeated.
        num_readings: how often rows of each sound slide are read, looking for suspicions.
        formats: which of `slides.FORMATS`.
        real_slides: a folder of slides that are read for suspicions too.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        picture = _draw(folder, side_px)
        sound = {fmt: _write(folder, fmt, picture) for fmt in formats}
        detection = {fmt: detect(fmt, path, _tile(path), num_damaged) for fmt, path in sound.items()}
        real = sorted(real_slides.glob("*.svs")) if real_slides is not None else []
        alarms = {fmt: _count_alarms(path, num_readings) for fmt, path in sound.items()}
        alarms |= {path.stem: _count_alarms(path, num_readings) for path in real}
        suspicion = {fmt: _time_suspicion(path, num_rounds) for fmt, path in sound.items()}
        reading = {}
        for codec, side in (("jpeg", big_side_px), ("jpeg2000", big_side_px // 4)):
            path = folder / f"big_{codec}.svs"
            write_big_slide(path, side, codec=codec)  # type: ignore[arg-type]
            reading[codec] = _time_reading(path, num_rounds)
    return {
        "num_damaged": num_damaged,
        "side_px": side_px,
        "num_rounds": num_rounds,
        "detection": detection,
        "false_alarms": alarms,
        "suspicion": suspicion,
        "reading": reading,
        "training": _time_training(num_rounds),
    }


def _draw(folder: Path, side_px: int) -> NDArray[np.uint8]:
    config = CohortConfig(
        width_px=(side_px, side_px), height_px=(side_px, side_px), scant_every=0, tissue_fraction=(0.55, 0.6)
    )
    (source,) = make_cohort(folder, 1, seed=0, config=config, num_workers=1)
    return tifffile.imread(source, key=0)


def _write(folder: Path, fmt: str, picture: NDArray[np.uint8]) -> Path:
    return slides.write(folder / f"{fmt}{slides.FORMATS[fmt].suffix}", fmt, picture)


def _tile(path: Path, **settings: Any) -> Manifest:
    return build_manifest(path, "slide", TilerConfig(**{"min_tissue": 0, "check": "none", **settings})).manifest


# False alarms, and what a suspicion costs.


def _count_alarms(path: Path, num_readings: int) -> dict[str, int]:
    """Regions that were read, and those that came under suspicion."""
    counts = {}
    for tile_px in (224, 96):
        manifest = _tile(path, tile_px=tile_px, default_mpp=0.5)
        for way in ("as planned", "in regions"):
            num_reads, num_doubtful = readings.count_suspicions(path, manifest, way, num_readings)
            counts["num_reads"] = counts.get("num_reads", 0) + num_reads
            counts["num_suspected"] = counts.get("num_suspected", 0) + num_doubtful
    return counts


def _time_suspicion(path: Path, num_rounds: int) -> dict[str, float]:
    """Seconds of reading some tiles in regions, as a ratio to those without suspicion."""
    slide, manifest = open_slide(path), _tile(path)
    plan = plan_tiles(slide, manifest, np.arange(min(_BATCH, len(manifest))), in_regions=True)
    counts = {"none": 0, "one": 1, "all": len(plan.reads)}
    ways = {name: partial(_read_suspecting, slide, manifest, plan, count) for name, count in counts.items()}
    seconds = _time(ways, num_rounds)
    return {
        "num_tiles": len(plan.unique),
        "num_reads": len(plan.reads),
        "seconds_without": round(statistics.median(seconds["none"]), 4),
        **{f"ratio_{name}": _ratio(seconds[name], seconds["none"]) for name in ("one", "all")},
    }


def _read_suspecting(slide: Slide, manifest: Manifest, plan: Any, num_suspected: int) -> None:
    """Reads a plan, its first regions suspected for nothing."""
    answers = iter([True] * num_suspected)

    def answer(*_: object) -> bool:
        return next(answers, False)

    with mock.patch("tiler.reader.is_poisoned", answer):
        read_plan(slide, manifest, plan, num_threads=1)


# Cost.


def _do_nothing(*_: object) -> None:
    pass


@contextlib.contextmanager
def _only(*guards: str) -> Iterator[None]:
    """Reads with some of the guards: "marks", "watch", "poison"."""
    with contextlib.ExitStack() as stack:
        if "marks" not in guards:
            stack.enter_context(mock.patch("tiler.reader.bad_mark_rows", readings.GUARDS["bad_mark_rows"]))
        if "watch" not in guards:
            stack.enter_context(mock.patch("tiler.reader.noise", readings.GUARDS["noise"]))
            stack.enter_context(mock.patch.object(guard, "_turn_aside", _do_nothing))
        if "poison" not in guards:
            stack.enter_context(mock.patch("tiler.reader.is_poisoned", readings.GUARDS["is_poisoned"]))
            stack.enter_context(mock.patch.object(guard, "_poison", _do_nothing))
        yield


def _time_reading(path: Path, num_rounds: int) -> dict[str, object]:
    slide, manifest = open_slide(path), _tile(path)
    rows = np.arange(len(manifest))
    batches = [some for some in np.array_split(rows, -(-len(rows) // 512)) if len(some)]
    out = np.zeros((len(batches[0]), manifest.slide.tile_px, manifest.slide.tile_px, 3), np.uint8)

    def read(way: str, *guards: str) -> None:
        with _only(*guards):
            for some in batches:
                read_plan(slide, manifest, readings.plan(slide, manifest, some, way), out[: len(some)], num_threads=1)

    ways: dict[str, Callable[[], object]] = {
        "none": lambda: read("in regions"),
        "marks": lambda: read("in regions", "marks"),
        "watch": lambda: read("in regions", "watch"),
        "poison": lambda: read("in regions", "poison"),
        "watch_and_poison": lambda: read("in regions", "watch", "poison"),
        "all": lambda: read("in regions", "marks", "watch", "poison"),
        "as_planned": lambda: read("as planned", "marks", "watch", "poison"),
    }
    seconds = _time(ways, num_rounds)
    return {
        "num_tiles": len(manifest),
        "tiles_per_s": {name: round(len(manifest) / statistics.median(values)) for name, values in seconds.items()},
        "spread": {name: _spread(values) for name, values in seconds.items()},
        "ratio_to_none": {name: _ratio(values, seconds["none"]) for name, values in seconds.items()},
    }


def _time_training(num_rounds: int) -> dict[str, float]:
    """Seconds of one step of a small ResNet inside the guards and outside."""
    import torch
    from torchvision.models import resnet18

    model = resnet18(num_classes=2)
    tiles = torch.rand(16, 3, 96, 96)

    def step() -> None:
        model.zero_grad()
        model(tiles).sum().backward()

    def guarded_step() -> None:
        with guarded():
            step()

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Threads that wait for one another spend time too.
    seconds = _time({"outside": step, "inside": guarded_step}, 2 * num_rounds)
    torch.set_num_threads(num_threads)
    return {
        "seconds_outside": round(statistics.median(seconds["outside"]), 4),
        "spread": _spread(seconds["outside"]),
        "ratio_inside": _ratio(seconds["inside"], seconds["outside"]),
    }


def _time(ways: Mapping[str, Callable[[], object]], num_rounds: int) -> dict[str, list[float]]:
    """Core-seconds of each way by round, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(num_rounds + 1):
        for name, run in ways.items():
            start = time.process_time()
            run()
            if i:
                seconds[name].append(time.process_time() - start)
    return seconds


def _ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(seconds, base, strict=True)), 3)


def _spread(seconds: Sequence[float]) -> float:
    return round((max(seconds) - min(seconds)) / statistics.median(seconds), 2)


def _print_table(result: Mapping[str, Any]) -> None:
    for fmt, found in result["detection"].items():
        print(f"\n{fmt}: {found['num_file_tiles']} tiles of {found['median_bytes']} bytes", file=sys.stderr)
        for kind, cell in found["kinds"].items():
            shares = " ".join(f"{name} {value}" for name, value in cell.items())
            print(f"  {kind:16}{shares}", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--damaged", type=int, default=60)
    parser.add_argument("--readings", type=int, default=200)
    parser.add_argument("--real-slides", type=Path, default=os.environ.get("SLIDEGRAD_SLIDES"))
    options = parser.parse_args()
    outcome = main(options.damaged, num_readings=options.readings, real_slides=options.real_slides)
    _print_table(outcome)
    print(json.dumps(outcome))
