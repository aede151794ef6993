"""One slide of 45,056 tiles, the method's authors' largest: encoder and GMA, forward and backward, in one process.

`ways` are whole steps (`Engine.step`), each in a process of its own: with no graph kept, and with as many as
`machine.keep=auto` makes of the memory it is given; of noise in memory, and on a CPU also, with no graph kept, of a
slide file through the loader that training uses. `peak_mb` is what a step takes at most beyond what the process held
before it, the tiles in memory among that: resident memory on a CPU, what torch allocated on a GPU, where the tiles are.

`exact` compares the gradients of such a step, BatchNorm frozen, with those of one pass over all tiles in one graph: as
many tiles as the memory given holds at once. Errors are relative L1 over the whole model; in float32 both are also set
beside the step in float64, as one long sum of float32 is no truth to measure by.

On a GPU: 224-px tiles by ResNet18, and the share of the card's dense peak that the floating-point operations of one
forward and one backward pass reach (`useful_share`), and those besides that encode again (`share`). float32 there is
torch's default, convolutions in TF32.

    python -m tests.benchmarks.bench_full_slide [--device cuda]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.in_memory import (
    GIVES_BACK,
    both_halves,
    clear_gradients,
    draw_rows,
    make_engine,
    make_slide,
    make_tiles,
    resident_mb,
)
from trainer.loading.shards import SlideInput
from trainer.memory import measure_cost, most_tiles, settle_keep
from trainer.sampler import StepPlan, shards_of
from trainer.step import Engine

NUM_TILES = 45_056
SHAPES: dict[str, dict[str, Any]] = {
    "cpu": {"encoder": "test_resnet", "tile_px": 32, "num_virtual": 11},
    "cuda": {"encoder": "resnet18", "tile_px": 224, "num_virtual": 88},
}
"""One GPU holds no graph of the 4,096 tiles that are a virtual rank of eleven: 512 instead."""
WAYS: dict[str, list[dict[str, Any]]] = {
    "cpu": [
        {"source": source, "keep": keep, "precision": "float32"}
        for source, keep in (("memory", 0), ("memory", "auto"), ("file", 0))
    ],
    "cuda": [
        {"source": "memory", "keep": keep, "precision": precision}
        for precision in ("bf16", "float32")
        for keep in (0, "auto")
    ],
}
EXACT = {"float32": NUM_TILES, "float64": 2_816}
"""At most so many tiles: beyond a few thousand, float64 only takes longer."""
MEMORY_GB = 4.0
"""What graphs may take on a CPU."""
PEAK_TFLOPS = {
    ("H100 80GB HBM3", "bf16"): 989,
    ("H100 80GB HBM3", "float32"): 495,
    ("H200", "bf16"): 989,
    ("H200", "float32"): 495,
    ("A100-SXM4", "bf16"): 312,
    ("A100-SXM4", "float32"): 156,
}
"""Dense, float32 as TF32, by a part of the card's name (NVIDIA's data sheets of H100 SXM, H200 SXM and A100)."""


def main(
    device: str = "auto", num_tiles: int = NUM_TILES, num_rounds: int = 2, memory_gb: float = MEMORY_GB
) -> dict[str, Any]:
    """Measures all ways and how exact they are.

    Args:
        device: cpu, cuda, or auto: the GPU if there is one.
        num_tiles: of the slide.
        num_rounds: steps of each way.
        memory_gb: for graphs, on a CPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SHAPES[device]
    common = {"device": device, "num_tiles": num_tiles, "memory_gb": memory_gb, **shape}
    ways = [_run_apart("measure_way", **common, **way, num_rounds=num_rounds) for way in WAYS[device]]
    exact = [
        _run_apart("measure_error", **{**common, "num_tiles": min(most, num_tiles)}, precision=precision)
        for precision, most in EXACT.items()
    ]
    card = torch.cuda.get_device_name() if device == "cuda" else None
    return {"card": card, "torch": torch.__version__, **common, "ways": ways, "exact": exact}


def _run_apart(function: str, **what: Any) -> dict[str, Any]:
    """A function of this file in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_full_slide", "--apart", json.dumps([function, what])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **GIVES_BACK})
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_way(
    device: str,
    encoder: str,
    tile_px: int,
    num_tiles: int,
    num_virtual: int,
    keep: int | str,
    precision: str,
    source: str,
    memory_gb: float,
    num_rounds: int,
) -> dict[str, Any]:
    """Seconds and memory of a slide's step; the fastest of the rounds, and all of them.

    Args:
        device: cpu or cuda.
        encoder: its name in timm.
        tile_px: side of the tiles, px.
        num_tiles: of the slide.
        num_virtual: virtual ranks.
        keep: graphs kept, or auto.
        precision: float32 or bf16.
        source: memory or file.
        memory_gb: for graphs, on a CPU.
        num_rounds: steps.
    """
    engine = _make_engine(device, encoder, tile_px, num_virtual, precision)
    engine.step([make_slide(make_tiles(8 * num_virtual, tile_px).to(device), num_virtual)])  # Warms up.
    if keep == "auto":
        cpu_bytes = round(1e6 * resident_mb("VmRSS") + 1e9 * memory_gb)
        settle_keep(engine, most_rows=num_tiles, tile_px=tile_px, cpu_bytes=cpu_bytes)
    else:
        engine.side.keep = int(keep)
    kept = num_virtual if engine.side.keep is None else min(engine.side.keep, num_virtual)
    seconds, waits_s, peaks_mb = [], [], []
    with _slides(source, engine, tile_px, num_tiles, num_rounds) as next_slide:
        for _ in range(num_rounds):
            clear_gradients(engine)
            held = _watch_memory(device)
            start = time.perf_counter()
            (outcome,) = engine.step([next_slide()])
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            peaks_mb.append(_peak_mb(device) - held)
            waits_s.append(outcome.wait_s)
            assert not outcome.error, outcome.error
    best = min(seconds)
    return {
        "source": source,
        "keep": keep,
        "precision": precision,
        "kept": kept,
        "seconds": [round(s, 2) for s in seconds],
        "tiles_per_s": round(num_tiles / best),
        "wait_s": [round(s, 3) for s in waits_s],
        "peak_mb": round(max(peaks_mb)),
        **(_shares(engine, tile_px, num_tiles, kept, best, precision) if device == "cuda" else {}),
    }


def _make_engine(
    device: str, encoder: str, tile_px: int, num_virtual: int, precision: str, batchnorm: str = "running"
) -> Engine:
    autocast = torch.bfloat16 if precision == "bf16" else None
    dtype = torch.float64 if precision == "float64" else torch.float32
    where = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
    return make_engine(encoder, tile_px, num_virtual, batchnorm=batchnorm, dtype=dtype, device=where, autocast=autocast)


@contextmanager
def _slides(
    source: str, engine: Engine, tile_px: int, num_tiles: int, num_rounds: int
) -> Iterator[Callable[[], SlideInput]]:
    """Gives the same slide in every round."""
    num_virtual = engine.comm.topology.num_virtual
    if source == "memory":
        tiles_NHWC = make_tiles(num_tiles, tile_px).to(engine.comm.device)
        yield lambda: make_slide(tiles_NHWC, num_virtual)
        return
    # What reads slides is not installed on every GPU machine.
    from tests.benchmarks.big_slides import write_big_slide
    from tiler import TilerConfig, build_manifest
    from trainer.loading.loader import TileLoader

    across = next(n for n in range(1, num_tiles + 1) if n * n >= num_tiles)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "full.svs")
        write_big_slide(path, across * tile_px)
        manifest = build_manifest(path, "full", TilerConfig(tile_px=tile_px, min_tissue=0)).manifest
        loader = TileLoader({"full": manifest}, {"full": path}, tile_px=tile_px, num_threads=1, budget_bytes=10**9)
        steps = [StepPlan(0, index, "full", len(manifest), num_tiles) for index in range(num_rounds)]
        remaining = iter(steps)
        plans = shards_of(steps, engine.comm.topology, 0, seed=0)
        with loader.read(plans, keep=engine.side.keep) as reading:

            def next_slide() -> SlideInput:
                step = next(remaining)
                tiles = reading.slide(step)
                return SlideInput(step, tiles.first(), (1,), tiles)

            yield next_slide


def _watch_memory(device: str) -> float:
    """Begins to watch; returns what is held now, MB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6
    return resident_mb("VmRSS", reset_peak=True)


def _peak_mb(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else resident_mb("VmHWM")


def _shares(
    engine: Engine, tile_px: int, num_tiles: int, kept: int, seconds: float, precision: str
) -> dict[str, float | None]:
    """Share of the card's peak, None for a card that is not in the table."""
    encoder, _ = both_halves(engine)
    tiles_NHWC = make_tiles(8, tile_px).to(engine.comm.device)
    with FlopCounterMode(display=False) as counter:
        features_ND = encoder(tiles_NHWC)
        forward = counter.get_total_flops() / len(tiles_NHWC)
        features_ND.sum().backward()
        both = counter.get_total_flops() / len(tiles_NHWC)
    name = torch.cuda.get_device_name()
    peak = next((1e12 * t for (card, kind), t in PEAK_TFLOPS.items() if card in name and kind == precision), None)
    again = forward * (1 - kept / engine.comm.topology.num_virtual)
    found = {"gflop_per_tile": both / 1e9, "tflops": num_tiles * both / seconds / 1e12}
    shares = {"useful_share": both, "share": both + again}
    return {
        **{name: round(value, 3) for name, value in found.items()},
        **{name: round(num_tiles * f / seconds / peak, 3) if peak else None for name, f in shares.items()},
    }


def measure_error(
    device: str, encoder: str, tile_px: int, num_tiles: int, num_virtual: int, precision: str, memory_gb: float
) -> dict[str, Any]:
    """Relative L1 error of a step's gradients, no graph kept, against one pass over all tiles in one graph.

    Args: as `measure_way`; precision is float32 or float64, and fewer tiles are used where one graph would not fit.

    Returns:
        `relative_l1`; and for float32 how far the step (`step_error`) and the one pass (`one_pass_error`) each are from
        the same step in float64.
    """
    torch.backends.cudnn.allow_tf32 = False
    engine = _make_engine(device, encoder, tile_px, num_virtual, precision, batchnorm="frozen")
    free = torch.cuda.mem_get_info()[0] * 0.5 if device == "cuda" else 1e9 * memory_gb
    num_tiles = min(num_tiles, most_tiles(measure_cost(engine.side, tile_px), round(free)))
    tiles_NHWC = make_tiles(num_tiles, tile_px).to(device)
    step = _step_gradients(engine, tiles_NHWC)
    model, aggregator = both_halves(engine)
    outputs_C, _ = aggregator(model(tiles_NHWC))
    F.cross_entropy(outputs_C, torch.tensor(1, device=device)).backward()
    one_pass = _take_gradients(engine)
    found = {"precision": precision, "num_tiles": num_tiles, "relative_l1": _error(step, one_pass)}
    if precision == "float32":
        exact = _make_engine(device, encoder, tile_px, num_virtual, "float64", batchnorm="frozen")
        true = _step_gradients(exact, tiles_NHWC)
        found |= {"step_error": _error(step, true), "one_pass_error": _error(one_pass, true)}
    return found


def _step_gradients(engine: Engine, tiles_NHWC: torch.Tensor) -> list[torch.Tensor]:
    engine.side.keep = 0
    engine.step([make_slide(tiles_NHWC, engine.comm.topology.num_virtual)])
    return _take_gradients(engine)


def _error(found: list[torch.Tensor], true: list[torch.Tensor]) -> float:
    """Relative L1 over all tensors together."""
    deltas = (torch.abs(a - b).sum().item() for a, b in zip(found, true, strict=True))
    return float(sum(deltas) / sum(gradient.abs().sum().item() for gradient in true))


def _take_gradients(engine: Engine) -> list[torch.Tensor]:
    """All gradients, in float64; the model's are cleared."""
    parameters = [parameter for half in both_halves(engine) for parameter in half.parameters()]
    gradients = [parameter.grad.double() for parameter in parameters if parameter.grad is not None]
    assert len(gradients) == len(parameters), "all is trained"
    clear_gradients(engine)
    return gradients


def draw(result: dict[str, Any]) -> str:
    """The report's tables."""
    columns = ("source", "precision", "kept", "seconds", "tiles_per_s", "wait_s", "peak_mb")
    shares = ("tflops", "useful_share", "share") if result["device"] == "cuda" else ()
    return "\n".join(
        (
            draw_rows((*columns, *shares), result["ways"]),
            draw_rows(("precision", "num_tiles", "relative_l1", "step_error", "one_pass_error"), result["exact"]),
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--memory-gb", type=float, default=MEMORY_GB, help="for graphs, on a CPU")
    parser.add_argument("--apart", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.apart is not None:
        function, arguments = given.apart
        print(json.dumps({"measure_way": measure_way, "measure_error": measure_error}[function](**arguments)))
    else:
        found = main(given.device, memory_gb=given.memory_gb)
        print(draw(found), file=sys.stderr)
        print(json.dumps(found))
