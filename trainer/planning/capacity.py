"""The largest number of tiles whose training step, in one graph, fits a device: searched for by trying.

This is Fig. 1a, b of the paper: how many tiles one GPU encodes, with a gradient, at once. A trial is a whole step:
forward, backward, AdamW. On a GPU its allocator says when memory is full; on a CPU a cap on the bytes of live tensors
does (`trainer.memory.LiveBytes`), so that the machine is never really full, and what operators take within themselves
does not count. The tiles are black: values change no memory.

The paper's numbers of ViT-base are what attention allows that keeps its matrices: counted so, a tile takes 140.6 MB,
under autocast 101.6, and 94.5 % of 80 GB hold 528 and 728. Fused, as torch does it today, attention keeps none.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from trainer.batchnorm import own_layers, virtual_rank_pass
from trainer.config import Encoder
from trainer.encoders.encoder import build_encoder
from trainer.memory import LiveBytes
from trainer.planning.costs import EncoderCosts, Precision

PAPER_TILES: dict[tuple[str, Precision], int] = {
    ("resnet50", "float32"): 840,
    ("resnet50", "bf16"): 1_848,
    ("vit_base_patch16_224", "float32"): 528,
    ("vit_base_patch16_224", "bf16"): 728,
}
"""Of an H100 with 80 GB, read from the paper's text on Fig. 1; its AMP stands beside bf16 here."""
FINENESS = 128
"""A search ends when it knows the number to one part in so many."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Tiles that fit, by encoder and precision."""

    encoder: str
    precision: Precision
    predicted: int
    """If tensors filled the whole memory, without gaps; gradients count in full, though they come as the graph goes."""
    measured: int | None = None
    trials: int = 0

    @property
    def paper(self) -> int | None:
        """The paper's number, for 80 GB; None where it has none."""
        return PAPER_TILES.get((self.encoder, self.precision))


def predict_capacity(costs: EncoderCosts, num_bytes: float) -> int:
    """Tiles that fit into `num_bytes` beside what training holds."""
    room = num_bytes - costs.held_bytes - costs.memory.peak.fixed
    return max(0, int(room // max(1.0, costs.memory.peak.per_tile)))


def largest(fits: Callable[[int], bool], most: int, fineness: int = FINENESS) -> tuple[int, int]:
    """The largest number that fits, where a smaller one fits too: by doubling, then by halving the gap.

    Args:
        fits: tries a number.
        most: no larger number is tried.
        fineness: the gap that is left, as a part of the number; below that many, none.

    Returns:
        The number, 0 if not even 1 fits, and how many were tried.
    """
    good, bad, trials = 0, most + 1, 0
    while bad - good > max(1, good // fineness):
        tried = min(max(1, 2 * good), most) if bad > most else (good + bad) // 2
        trials += 1
        if fits(tried):
            good = tried
        else:
            bad = tried
    return good, trials


def measure_capacity(
    config: Encoder, tile_px: int, precision: Precision, device: torch.device, num_bytes: float, most: int
) -> tuple[int, int]:
    """Searches on the device at hand.

    Args:
        config: the encoder; its weights are not read.
        tile_px: side of the tiles, px.
        precision: float32, or bf16 for autocast.
        device: where.
        num_bytes: a cap on memory; of a GPU at most what it has.
        most: no more tiles are tried.

    Returns:
        The number of tiles, and of trials.

    Raises:
        TrainerError: unknown encoder, or tiles that it cannot take.
    """
    with torch.random.fork_rng(devices=[]):
        encoder = build_encoder(config, tile_px, initial=False).to(device).train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.0)
    for parameter in encoder.parameters():  # So that AdamW makes its moments, which are held from then on.
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    def fits(num_tiles: int) -> bool:
        try:
            with _capped(encoder, optimizer, device, num_bytes):
                _step(encoder, optimizer, num_tiles, tile_px, precision, device)
        except torch.OutOfMemoryError:
            return False
        finally:
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":  # What a cycle may hold of a graph that broke off, and what the allocator keeps.
                gc.collect()
                torch.cuda.empty_cache()
        return True

    return largest(fits, most)


def _step(
    encoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    num_tiles: int,
    tile_px: int,
    precision: Precision,
    device: torch.device,
) -> None:
    tiles_NHWC = torch.zeros(num_tiles, tile_px, tile_px, 3, dtype=torch.uint8, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with autocast, virtual_rank_pass(own_layers(encoder), num_tiles, moves_stats=True):
        features_ND = encoder(tiles_NHWC)
    features_ND.float().sum().backward()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _capped(
    encoder: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, num_bytes: float
) -> Iterator[None]:
    """Raises torch.OutOfMemoryError within as soon as more than `num_bytes` are taken."""
    if device.type != "cuda":
        states = [value for state in optimizer.state.values() for value in state.values()]
        held = sum(tensor.nbytes for tensor in (*encoder.parameters(), *encoder.buffers(), *states))
        with _CappedBytes(held, num_bytes):
            yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


class _CappedBytes(LiveBytes):
    """Counts live bytes, and refuses more than a cap, as a GPU's allocator does.

    Args:
        held: bytes that lived before.
        cap: bytes that may live.
    """

    def __init__(self, held: int, cap: float) -> None:
        super().__init__()
        self.now = self.most = held
        self._cap = cap

    def __torch_dispatch__(self, func: object, types: object, args: object = (), kwargs: object = None) -> object:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.now > self._cap:
            raise torch.OutOfMemoryError("live tensors are larger than the cap")
        return out
