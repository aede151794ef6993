"""A model of random weights and slides of noise in memory: what the benchmarks of the step work on."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from manifests import part_bounds
from tests.benchmarks import absent  # noqa: F401 - before the trainer
from trainer.aggregators import build_aggregator
from trainer.comm import Comm
from trainer.config import Aggregator, Augment, Encoder
from trainer.encoders.encoder import build_encoder
from trainer.loading.shards import Shard, SlideInput
from trainer.sampler import StepPlan
from trainer.step import Engine
from trainer.topology import Topology

_ACROSS = 64
"""Tiles in a row of a slide's grid."""
CPU = torch.device("cpu")
GIVES_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment of processes whose memory is measured: glibc takes from the system whatever is 64 kB or larger, and gives
it back at once, so that their peak is no memory kept for later."""


def make_engine(
    encoder: str,
    tile_px: int,
    num_virtual: int,
    *,
    keep: int | None = None,
    batchnorm: str = "running",
    augment: Augment | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    autocast: torch.dtype | None = None,
) -> Engine:
    """An engine in this process alone, in training mode: an encoder of timm and GMA, the same weights at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        half = build_encoder(Encoder(name=encoder), tile_px)
        aggregator = build_aggregator(Aggregator(), half.num_features, 2)
    engine = Engine(
        Comm(Topology.make(1, "shared", num_virtual), 0, device),
        half.to(device, dtype),
        aggregator.to(device, dtype),
        num_features=half.num_features,
        seed=0,
        keep=keep,
        augment=augment,
        autocast=autocast,
        batchnorm=batchnorm,
    )
    engine.set_training(True)
    return engine


def make_tiles(num_tiles: int, tile_px: int) -> torch.Tensor:
    """Noise, uint8 (num_tiles, tile_px, tile_px, 3)."""
    shape = (num_tiles, tile_px, tile_px, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def make_slide(tiles_NHWC: torch.Tensor, num_virtual: int, index: int = 0) -> SlideInput:
    """A slide of these tiles, as the shards of all virtual ranks."""
    num_tiles = len(tiles_NHWC)
    places = torch.arange(num_tiles, dtype=torch.int32)
    cells_N2 = torch.stack([places % _ACROSS, places // _ACROSS], 1)
    bounds = [part_bounds(num_tiles, v, num_virtual) for v in range(num_virtual)]
    shards = [Shard(v, tiles_NHWC[begin:end], cells_N2[begin:end]) for v, (begin, end) in enumerate(bounds)]
    return SlideInput(StepPlan(0, index, "bench", num_tiles, num_tiles), shards, (1,))


def both_halves(engine: Engine) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Encoder and aggregator."""
    assert engine.encoder is not None, "alone, a rank has both halves"
    assert engine.aggregator is not None, "alone, a rank has both halves"
    return engine.encoder, engine.aggregator


def clear_gradients(engine: Engine) -> None:
    """As before every step."""
    for half in both_halves(engine):
        half.zero_grad(set_to_none=True)


def alternate(
    ways: Mapping[str, Callable[[], object]], num_rounds: int, *, before_each: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of each way in each round; one round before them does not count.

    By the wall clock; with one thread by processor time, which changes little with what else the machine does.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for counts in (False, *[True] * num_rounds):
        for way, run in ways.items():
            before_each()
            start = clock()
            run()
            if counts:
                seconds[way].append(clock() - start)
    return seconds


def resident_mb(field: str, *, reset_peak: bool = False) -> float:
    """Resident memory of this process: VmRSS, what it holds, or VmHWM, the most that it held; MB."""
    if reset_peak:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))


def draw_rows(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """A Markdown table for a report: the columns' names, and each row's values by them; what it lacks stays empty."""
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"
