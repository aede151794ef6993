"""What the step costs beside the bare encoder, in time and in memory: tiles in memory, one process that aggregates too.

`time`: 512 tiles of one slide. `bare` is the encoder's forward and backward pass over each virtual rank's tiles, one
after another, and nothing else; `bare_held` the same with all forward passes first, so that memory holds all graphs, as
the step does where it keeps them. `step_*` are `Engine.step` with all, half or none of the graphs kept, `step_flips`
with the flips that recipes train with; `*_whole` are for one virtual rank of all tiles. `single_pass` is the loop that
the step replaces: all tiles, aggregator and loss in one graph. `forward` is the encoder alone without a graph: what is
encoded again costs at least that.

`memory`: the most that one step takes, by the process's resident memory and by the tensors that live
(`trainer.memory`), beyond what the process held before the step, the tiles among it. Virtual ranks stay at 32 tiles and
the slide grows. Every size runs in a process of its own; its allocator is told to give freed memory back at once, else
the peak would tell what malloc keeps for later. `auto` sets beside it what `machine.keep=auto` predicts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.in_memory import (
    GIVES_BACK,
    alternate,
    both_halves,
    clear_gradients,
    draw_rows,
    make_engine,
    make_slide,
    make_tiles,
    resident_mb,
)
from trainer.config import Augment
from trainer.memory import LiveBytes, measure_aggregator, measure_cost, settle_keep
from trainer.step import Engine

ENCODER, TILE_PX = "resnet18", 96
NUM_TILES, TILES_PER_RANK = 512, 32
SIZES = (64, 128, 256, 512)
"""Tiles of the slides that memory is measured with; where every graph is kept, the last is left out."""
BUDGET_MB = 1_500
"""What `auto` may take beyond the process itself."""

RATIOS = (
    ("bare", "step_all"),
    ("bare_held", "step_all"),
    ("bare", "step_flips"),
    ("bare_whole", "step_whole"),
    ("step_none", "single_pass"),
    ("step_half", "single_pass"),
    ("step_all", "single_pass"),
)
"""Of seconds. The first four say what share of the bare encoder's tiles per second the step reaches."""


def main(
    num_rounds: int = 4,
    num_tiles: int = NUM_TILES,
    sizes: tuple[int, ...] = SIZES,
    encoder: str = ENCODER,
    tile_px: int = TILE_PX,
    budget_mb: int = BUDGET_MB,
) -> dict[str, Any]:
    """Measures time and memory.

    Args:
        num_rounds: how often each way is timed; every round times all ways.
        num_tiles: of the slide whose step is timed.
        sizes: tiles of the slides whose memory is measured.
        encoder: its name in timm.
        tile_px: side of the tiles, px.
        budget_mb: for `auto`.
    """
    model = {"encoder": encoder, "tile_px": tile_px}
    kept_sizes = sizes[:-1] if len(sizes) > 1 else sizes
    memory = {
        "none kept": [_run_apart(**model, num_tiles=n, keep=0) for n in sizes],
        "all kept": [_run_apart(**model, num_tiles=n, keep=None) for n in kept_sizes],
        "auto": [_run_apart(**model, num_tiles=n, keep=None, budget_mb=budget_mb) for n in kept_sizes[-2:]],
    }
    peaks = [found["peak_mb"] for found in memory["none kept"]]
    return {
        **model,
        "gflop": count_gflop(encoder, tile_px),
        "time": measure_time(encoder, tile_px, num_tiles, num_rounds),
        "memory": memory,
        "none_kept_spread": round((max(peaks) - min(peaks)) / statistics.median(peaks), 3),
    }


def count_gflop(encoder: str, tile_px: int, num_tiles: int = TILES_PER_RANK) -> dict[str, float]:
    """GFLOP of so many tiles, a multiplication and an addition as two: forward alone, and forward and backward."""
    (model, _), tiles_NHWC = both_halves(make_engine(encoder, tile_px, 1)), make_tiles(num_tiles, tile_px)
    found: dict[str, float] = {"num_tiles": num_tiles}
    with FlopCounterMode(display=False) as counter:
        features_ND = model(tiles_NHWC)
        found["forward"] = round(counter.get_total_flops() / 1e9, 3)
        features_ND.sum().backward()
        found["both"] = round(counter.get_total_flops() / 1e9, 3)
    return found


def measure_time(encoder: str, tile_px: int, num_tiles: int, num_rounds: int) -> dict[str, Any]:
    """Seconds of every way, and ratios: medians over the rounds of what two ways took in the same round."""
    num_virtual = max(2, num_tiles // TILES_PER_RANK)
    engine = make_engine(encoder, tile_px, num_virtual)
    whole, flips = (make_engine(encoder, tile_px, v, augment=a) for v, a in ((1, None), (num_virtual, Augment())))
    tiles_NHWC = make_tiles(num_tiles, tile_px)
    chunks = [shard.tiles_NHWC for shard in make_slide(tiles_NHWC, num_virtual).shards]
    model, aggregator = both_halves(engine)

    def bare(pieces: list[torch.Tensor]) -> None:
        for piece_NHWC in pieces:
            features_ND = model(piece_NHWC)
            features_ND.backward(torch.ones_like(features_ND))

    def bare_held() -> None:
        held = [model(piece_NHWC) for piece_NHWC in chunks]
        for features_ND in reversed(held):
            features_ND.backward(torch.ones_like(features_ND))

    def forward() -> None:
        with torch.no_grad():
            for piece_NHWC in chunks:
                model(piece_NHWC)

    def single_pass() -> None:
        outputs_C, _ = aggregator(model(tiles_NHWC))
        F.cross_entropy(outputs_C, torch.tensor(1)).backward()

    def step(which: Engine, keep: int | None) -> None:
        which.side.keep = keep
        which.step([make_slide(tiles_NHWC, which.comm.topology.num_virtual)])

    ways = {
        "bare": lambda: bare(chunks),
        "step_all": lambda: step(engine, None),
        "bare_held": bare_held,
        "step_flips": lambda: step(flips, None),
        "step_half": lambda: step(engine, num_virtual // 2),
        "step_none": lambda: step(engine, 0),
        "single_pass": single_pass,
        "bare_whole": lambda: bare([tiles_NHWC]),
        "step_whole": lambda: step(whole, None),
        "forward": forward,
    }

    def clear() -> None:
        for which in (engine, whole, flips):
            clear_gradients(which)

    seconds = alternate(ways, num_rounds, before_each=clear)
    return {
        "num_tiles": num_tiles,
        "num_virtual": num_virtual,
        "num_rounds": num_rounds,
        "num_threads": torch.get_num_threads(),
        "ways": {way: describe(taken, num_tiles) for way, taken in seconds.items()},
        "ratios": {f"{way} / {other}": compare(seconds, way, other) for way, other in RATIOS},
        "time_floor_none_kept": round(
            1 + statistics.median(seconds["forward"]) / statistics.median(seconds["bare"]), 3
        ),
    }


def describe(seconds: list[float], num_tiles: int) -> dict[str, float]:
    """Median seconds, tiles per second, and the spread, (max - min) / median."""
    median = statistics.median(seconds)
    return {
        "seconds": round(median, 4),
        "tiles_per_s": round(num_tiles / median, 1),
        "spread": round((max(seconds) - min(seconds)) / median, 3),
    }


def compare(seconds: Mapping[str, list[float]], way: str, other: str) -> dict[str, float]:
    """`way`'s seconds over `other`'s: the median of the rounds, the least and the greatest."""
    ratios = [a / b for a, b in zip(seconds[way], seconds[other], strict=True)]
    return {"median": round(statistics.median(ratios), 3), "from": round(min(ratios), 3), "to": round(max(ratios), 3)}


def _run_apart(**what: Any) -> dict[str, Any]:
    """`measure_memory` in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_step", "--memory", json.dumps(what)]
    env = {**os.environ, **GIVES_BACK}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_memory(
    encoder: str, tile_px: int, num_tiles: int, keep: int | None, budget_mb: int | None = None
) -> dict[str, Any]:
    """What one step takes at most beyond what this process held before it, MB.

    Args:
        encoder: its name in timm.
        tile_px: side of the tiles, px.
        num_tiles: of the slide.
        keep: graphs that are kept.
        budget_mb: lets `settle_keep` choose `keep`, so that a step takes no more beyond the process itself.
    """
    num_virtual = max(1, num_tiles // TILES_PER_RANK)
    engine, tiles_NHWC = make_engine(encoder, tile_px, num_virtual, keep=keep), make_tiles(num_tiles, tile_px)
    # The first pass chooses algorithms and sets up threads.
    engine.step([make_slide(make_tiles(2 * num_virtual, tile_px), num_virtual)])
    clear_gradients(engine)
    found: dict[str, Any] = {"num_tiles": num_tiles, "num_virtual": num_virtual}
    if budget_mb is not None:
        found |= _settle(engine, tile_px, num_tiles, budget_mb)
    before_mb = resident_mb("VmRSS", reset_peak=True)
    engine.step([make_slide(tiles_NHWC, num_virtual)])
    found["peak_mb"] = round(resident_mb("VmHWM") - before_mb, 1)
    clear_gradients(engine)
    with LiveBytes() as live:
        engine.step([make_slide(tiles_NHWC, num_virtual)])
    return {**found, "tensors_mb": round(live.most / 1e6, 1), "tiles_mb": round(tiles_NHWC.nbytes / 1e6, 1)}


def _settle(engine: Engine, tile_px: int, num_tiles: int, budget_mb: int) -> dict[str, Any]:
    """What `machine.keep=auto` makes of a budget, and the peak that follows from its own measurements."""
    num_virtual = engine.comm.topology.num_virtual
    per_rank = -(-num_tiles // num_virtual)
    cpu_bytes = round(1e6 * (resident_mb("VmRSS") + budget_mb))
    settle_keep(engine, most_rows=num_tiles, tile_px=tile_px, cpu_bytes=cpu_bytes)
    kept = num_virtual if engine.side.keep is None else engine.side.keep
    cost = measure_cost(engine.side, tile_px)
    model, aggregator = both_halves(engine)
    gradients = sum(p.nbytes for half in (model, aggregator) for p in half.parameters())
    rest = measure_aggregator(aggregator, engine.side.num_features, engine.side.dtype, engine.comm.device)
    predicted = cost.peak.at(per_rank) + (kept - 1) * cost.graph.at(per_rank) + rest.at(num_tiles) + gradients
    return {"budget_mb": budget_mb, "kept": kept, "predicted_mb": round(predicted / 1e6, 1)}


def draw(result: Mapping[str, Any]) -> str:
    """The report's tables."""
    times = result["time"]
    ways = [{"way": way, **found} for way, found in times["ways"].items()]
    ratios = [{"ratio of seconds": name, **found} for name, found in times["ratios"].items()]
    rows = [{"graphs": way, **row} for way, found in result["memory"].items() for row in found]
    columns = ("graphs", "num_tiles", "num_virtual", "budget_mb", "kept", "predicted_mb", "peak_mb", "tensors_mb")
    return "\n".join(
        (
            draw_rows(("way", "seconds", "tiles_per_s", "spread"), ways),
            draw_rows(("ratio of seconds", "median", "from", "to"), ratios),
            draw_rows(columns, rows),
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=json.loads, help="measure one step in this process: its arguments as JSON")
    given = parser.parse_args().memory
    if given is not None:
        print(json.dumps(measure_memory(**given)))
    else:
        found = main()
        print(draw(found), file=sys.stderr)
        print(json.dumps(found))
