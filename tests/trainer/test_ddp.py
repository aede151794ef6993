"""The paper's way, DDP around the encoder and a pseudo-loss N · Σ f · g, beside the explicit sum; and DDP's trap."""

import contextlib
import copy
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from manifests import part_bounds
from trainer.aggregators import build_aggregator
from trainer.comm import Comm
from trainer.config import Aggregator
from trainer.ranks import run_ranks
from trainer.sampler import StepPlan
from trainer.shards import Shard, SlideInput
from trainer.step import Engine
from trainer.topology import Topology

Way = Literal["paper", "no factor", "trap", "no_sync"]
NUM_RANKS = 3


def encoder_of(px: int) -> nn.Module:
    """Without BatchNorm: one answer for any split."""
    torch.manual_seed(0)
    layers = (nn.Flatten(), nn.Linear(3 * px * px, 24), nn.Tanh(), nn.Linear(24, 12), nn.Tanh())
    return nn.Sequential(*layers).double()


class Scaled(nn.Module):
    """An encoder of bytes."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, tiles_NHWC: Tensor) -> Tensor:
        features: Tensor = self.layers(tiles_NHWC.double() / 255)
        return features


def both_ways(rank: int, world_size: int, way: Way, num_tiles: int, num_virtual: int) -> tuple[float, float]:
    """A slide's encoder gradients by DDP and by our step on one rank.

    Returns:
        Relative L1 distance of DDP's gradients from ours, and how many times as large they are; 0 and 1 on rank 0.
    """
    topology = Topology.make(world_size, "dedicated", num_virtual)
    comm = Comm(topology, rank, torch.device("cpu"))
    ours, theirs = Scaled(encoder_of(8)), Scaled(encoder_of(8))
    aggregator = build_aggregator(Aggregator(hidden=8), 12, 2).double()
    generator = torch.Generator().manual_seed(1)
    tiles = torch.randint(0, 256, (num_tiles, 8, 8, 3), dtype=torch.uint8, generator=generator)
    chunks = [tiles[slice(*part_bounds(num_tiles, v, num_virtual))] for v in topology.virtual_of(rank)]

    shards = [Shard(v, c, torch.zeros(len(c), 2).int()) for v, c in zip(topology.virtual_of(rank), chunks, strict=True)]
    halves = (ours if comm.is_encoder else None, copy.deepcopy(aggregator) if comm.is_aggregator else None)
    engine = Engine(comm, *halves, num_features=12, seed=0)
    engine.set_training(True)
    plan = StepPlan(0, 0, "slide", num_tiles, num_tiles)
    engine.step([SlideInput(plan, shards, (1.0,))])

    ddp = DistributedDataParallel(theirs, process_group=comm.encoder_group) if comm.is_encoder else None
    unsynced = ddp.no_sync if ddp is not None and way == "no_sync" else contextlib.nullcontext
    with unsynced():
        features = [ddp(chunk) for chunk in chunks] if ddp is not None else []
    mine = torch.cat([torch.zeros(0, 12).double(), *(f.detach() for f in features)])
    all_KD = comm.gather_rows(mine, num_tiles)
    gradient_KD = None
    if all_KD is not None:
        outputs_C, _ = aggregator(all_KD.requires_grad_())
        nn.functional.cross_entropy(outputs_C[None], torch.tensor([1])).backward()
        gradient_KD = all_KD.grad
    gradient_ND = comm.scatter_rows(gradient_KD, mine)
    if ddp is None:
        return 0.0, 1.0
    factor = 1 if way == "no factor" else topology.num_encoders
    pieces = gradient_ND.split([len(f) for f in features])
    with unsynced():
        for f, g in list(zip(features, pieces, strict=True))[: -1 if way == "no_sync" else None]:
            (factor * (f * g).sum()).backward()
    if way == "no_sync":  # The last chunk's forward and backward pass, beside each other, sum up what all left.
        (factor * (ddp(chunks[-1]) * pieces[-1]).sum()).backward()
    found, true = (torch.cat([p.grad.flatten() for p in half.parameters()]) for half in (theirs, ours))  # type: ignore[union-attr]
    return ((found - true).abs().sum() / true.abs().sum()).item(), (found.norm() / true.norm()).item()


@pytest.mark.parametrize("num_tiles", [24, 23, 4])
def test_ddp_and_the_factor_n_give_the_explicit_sum(num_tiles: int) -> None:
    """Equal and uneven shards."""
    for distance, _ in run_ranks(both_ways, NUM_RANKS + 1, "paper", num_tiles, NUM_RANKS):
        assert distance <= 1e-12


def test_without_the_factor_gradients_are_n_times_too_small() -> None:
    for _, ratio in run_ranks(both_ways, NUM_RANKS + 1, "no factor", 23, NUM_RANKS)[1:]:
        assert ratio == pytest.approx(1 / NUM_RANKS)


@pytest.mark.slow
def test_several_chunks_through_ddp_are_wrong_without_a_word_and_right_under_no_sync() -> None:
    """DDP sums when the first chunk's backward is through; what comes after stays every rank's own. Ours is the truth.

    Should a later DDP sum all chunks, the first assertion fails: then this trap is gone, and its name in the docs too.
    """
    wrong = run_ranks(both_ways, NUM_RANKS + 1, "trap", 23, 2 * NUM_RANKS)[1:]
    assert all(distance > 0.05 for distance, _ in wrong), wrong
    for distance, _ in run_ranks(both_ways, NUM_RANKS + 1, "no_sync", 23, 2 * NUM_RANKS):
        assert distance <= 1e-12
