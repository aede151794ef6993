"""`machine.keep=auto`: how many virtual ranks' graphs fit into memory, measured on a few tiles before the first step.

A virtual rank of n tiles holds a graph of `graph(n)` bytes from its forward to its backward pass, and takes `peak(n)`
bytes at most while it goes through both; each grows with n along a line, which two small numbers of tiles give. With
j graphs kept the most that is ever needed is

    peak(n) + (j - 1) graph(n)

at the first backward pass; encoding a virtual rank again happens when kept graphs are gone, so the first one kept costs
nothing. On a GPU its allocator counts; on a CPU the tensors that come and go are counted here, without what an operator
takes within itself.
"""

import contextlib
import math
import resource
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.encode import EncoderSide
from trainer.errors import TrainerError
from trainer.fsdp import slice_of
from trainer.loading.shards import Shard
from trainer.sampler import StepPlan
from trainer.step import Engine

_SIZES = (4, 12)
"""Tiles of the two probes, and rows of the aggregator's by 64 as many."""
_ROWS_PER_TILE = 64
_SHARE = 0.9
"""Of the memory that there is: allocators leave gaps, and convolutions on a CPU take some that is not counted."""
_NO_LIMIT = 2**31
_NUM_STATES = 3
"""Copies of each parameter that come with training: its gradient, and AdamW's two moments."""


@dataclass(frozen=True)
class Line:
    """Bytes of so many tiles."""

    fixed: float
    per_tile: float

    def at(self, num_tiles: int) -> int:
        """Bytes of `num_tiles`."""
        return round(self.fixed + self.per_tile * num_tiles)

    @classmethod
    def through(cls, sizes: tuple[int, int], values: tuple[int, int]) -> "Line":
        """The line through two measurements; falling ones are noise, and count as level."""
        per_tile = max(0.0, (values[1] - values[0]) / (sizes[1] - sizes[0]))
        return cls(max(0.0, values[0] - per_tile * sizes[0]), per_tile)


@dataclass(frozen=True)
class Cost:
    """What virtual ranks take of memory, by their tiles."""

    graph: Line
    peak: Line


def count_kept(cost: Cost, num_tiles: int, num_bytes: int) -> int:
    """How many graphs of virtual ranks of `num_tiles` fit into `num_bytes`; 0 if not even one virtual rank does."""
    spare = num_bytes - cost.peak.at(num_tiles)
    return 1 + spare // max(1, cost.graph.at(num_tiles)) if spare >= 0 else 0


def most_tiles(cost: Cost, num_bytes: int) -> int:
    """The largest virtual rank that fits into `num_bytes`; 0 if not one tile does."""
    return max(0, int((num_bytes - cost.peak.fixed) // max(1.0, cost.peak.per_tile)))


def settle_keep(engine: Engine, *, most_rows: int, tile_px: int, cpu_bytes: int) -> str:
    """Sets how many graphs the engine keeps: as many as fit, the same on all ranks, which call this together.

    Args:
        engine: in training mode.
        most_rows: tiles of the largest step.
        tile_px: side of the tiles, px.
        cpu_bytes: this rank's share of the machine's memory, without what reading takes.

    Returns:
        What was chosen, in a sentence; "" if no graph is ever kept.

    Raises:
        TrainerError: one virtual rank alone is too large; with the number that fits.
    """
    comm, side = engine.comm, engine.side
    if side.is_frozen:
        return ""
    num_virtual, device = comm.topology.num_virtual, comm.device
    num_tiles, kept, fitting, graph_bytes = math.ceil(most_rows / num_virtual), _NO_LIMIT, _NO_LIMIT, 0
    if engine.encoder is not None:
        cost = measure_cost(side, tile_px)
        room = free_bytes(device, cpu_bytes) - states_bytes(engine.encoder, engine.aggregator)
        if device.type == "cuda":  # The tiles at hand, and the next ones on their way.
            room -= 2 * num_tiles * 3 * tile_px**2
        if engine.aggregator is not None:
            room -= measure_aggregator(engine.aggregator, side.num_features, side.dtype, device).at(most_rows)
        kept, fitting = count_kept(cost, num_tiles, room), most_tiles(cost, room)
        graph_bytes = cost.graph.at(num_tiles)
    kept, fitting = comm.least(kept), comm.least(fitting)
    if not kept:
        way_out = (
            f"give another --out with --virtual-ranks {math.ceil(most_rows / fitting)} or more"
            if fitting
            else "not even one fits: give a smaller encoder, or a machine with more memory"
        )
        raise TrainerError(
            f"virtual_ranks={num_virtual} makes virtual ranks of {num_tiles:,} tiles, memory holds the graph of "
            f"{fitting:,}; {way_out}"
        )
    most_mine = max(len(comm.topology.virtual_of(rank)) for rank in comm.topology.encoder_ranks)
    side.keep = kept if kept < most_mine else None
    about = f", {graph_bytes / 1e9:.2g} GB each" if graph_bytes else ""
    return f"machine.keep=auto: {min(kept, most_mine)} of a rank's {most_mine} graphs are kept{about}"


def measure_cost(side: EncoderSide, tile_px: int) -> Cost:
    """Encodes noise forward and backward, a few tiles at a time, and sees what that takes. Leaves no gradient.

    Args:
        side: an encoder rank's, in training mode.
        tile_px: side of the tiles, px.
    """
    assert side.encoder is not None, "encoder ranks alone keep graphs"

    def run(num_tiles: int) -> tuple[int, int]:
        generator = torch.Generator().manual_seed(num_tiles)
        shape = (num_tiles, tile_px, tile_px, 3)
        tiles_NHWC = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        shard = Shard(0, tiles_NHWC, torch.zeros(num_tiles, 2, dtype=torch.int32))
        plan = StepPlan(0, 0, "probe", num_tiles, num_tiles)
        return _watch(lambda: side.encode(plan, shard, moves_stats=False), side.device)

    return _along_a_line(run, _SIZES, side.encoder)


def measure_aggregator(aggregator: nn.Module, num_features: int, dtype: torch.dtype, device: torch.device) -> Line:
    """Bytes that the aggregator takes at most, by the slide's tiles, features and their gradient included."""

    def run(num_rows: int) -> tuple[int, int]:
        features_KD = torch.zeros(num_rows, num_features, dtype=dtype, device=device, requires_grad=True)
        cells_K2 = torch.stack([torch.arange(num_rows) % 64, torch.arange(num_rows) // 64], 1).int().to(device)
        graph, peak = _watch(lambda: aggregator(features_KD, cells_K2)[0], device)
        return graph, peak + 2 * features_KD.numel() * features_KD.element_size()

    sizes = (_SIZES[0] * _ROWS_PER_TILE, _SIZES[1] * _ROWS_PER_TILE)
    return _along_a_line(run, sizes, aggregator).peak


def states_bytes(*halves: nn.Module | None) -> int:
    """Bytes of gradients and optimiser states that training will add on this rank."""
    trained = [slice_of(p) for half in halves if half is not None for p in half.parameters() if p.requires_grad]
    return _NUM_STATES * sum(p.numel() * p.element_size() for p in trained)


def free_bytes(device: torch.device, cpu_bytes: int) -> int:
    """Memory that this rank may fill.

    Args:
        device: where it works.
        cpu_bytes: its share of this machine's memory; what the process holds already goes off.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return round(_SHARE * (free + unused))
    return round(_SHARE * (cpu_bytes - _resident_bytes()))


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: of a GPU's memory, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident_bytes() -> int:
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("VmRSS:"))
    return 0


def _along_a_line(run: Callable[[int], tuple[int, int]], sizes: tuple[int, int], half: nn.Module) -> Cost:
    """Both lines, from runs of two sizes; the first run, which may choose algorithms, does not count."""
    gradients = [parameter.grad for parameter in half.parameters()]
    half.zero_grad(set_to_none=True)  # Not added to: they are another's.
    try:
        with torch.random.fork_rng([p.device for p in half.parameters() if p.is_cuda][:1]):
            run(sizes[0])
            (graph_1, peak_1), (graph_2, peak_2) = run(sizes[0]), run(sizes[1])
    finally:
        for parameter, gradient in zip(half.parameters(), gradients, strict=True):
            parameter.grad = gradient
    return Cost(Line.through(sizes, (graph_1, graph_2)), Line.through(sizes, (peak_1, peak_2)))


def _watch(forward: Callable[[], Tensor], device: torch.device) -> tuple[int, int]:
    """Bytes of the graph between forward and backward, and the most that both took, the parameters' gradients aside."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        out = forward()
        graph = torch.cuda.memory_allocated(device) - before
        out.sum().backward()
        torch.cuda.synchronize(device)
        return graph, torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        out = forward()
        graph = live.now
        out.sum().backward()
    return graph, live.most


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators make, while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in inputs:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key = id(storage)
        if key in self._seen:
            return
        num_bytes = storage.nbytes()

        def gone(_: Any) -> None:
            del self._seen[key]
            self.now -= num_bytes

        self._seen[key] = weakref.ref(storage, gone)
        self.now += num_bytes
        self.most = max(self.most, self.now)


@contextlib.contextmanager
def full_memory_told() -> Iterator[None]:
    """Makes a sentence of a GPU's full memory.

    Raises:
        TrainerError: it is full.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainerError(
            f"the GPU's memory is full ({str(error).splitlines()[0]}); give --resume with a smaller --machine.keep, or "
            "another --out with more --virtual-ranks"
        ) from None
