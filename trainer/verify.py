"""Gradient equivalence: ranks and virtual ranks against one process (the paper's Fig. 3, for one step).

The reference is a plain loop in this file: one model, one backward, nothing from `step.py` or `comm.py`. Each way of
being wrong that a gather/scatter step knows (a factor, a lost shard, swapped shards) can be put in on purpose, to see
that the comparison notices.
"""

import copy
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifests import part_bounds
from trainer.aggregators import build_aggregator
from trainer.comm import Comm
from trainer.config import Aggregator, Encoder
from trainer.encoders import build_encoder
from trainer.ranks import run_ranks
from trainer.sampler import StepPlan
from trainer.step import Engine, Shard, SlideInput
from trainer.topology import Topology

Fault = Literal["none", "scale", "drop", "swap"]
TILE_PX = 32
TOLERANCE = {"float64": (1e-12, 1e-12), "float32": (1e-5, 5e-5)}
"""(whole model, worst tensor)."""
BUILT_IN = ("linear", "conv", "vit_tiny_patch16_224")
NUM_TILES = (23, 2)
"""23 never splits evenly; 2 leaves shards empty as soon as there are three."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison."""

    encoder: str
    dtype: str
    num_tiles: int
    num_ranks: int
    """Encoder ranks; the aggregator is one more process."""
    num_virtual: int
    batchnorm: Literal["frozen", "virtual"] = "frozen"
    keep: int | None = None
    fault: Fault = "none"


@dataclass(frozen=True)
class Result:
    """Errors of a case: relative L1 over the whole model, and of the worst tensor."""

    case: Case
    whole: float
    worst: float

    @property
    def holds(self) -> bool:
        """Both errors are within the tolerance of the dtype."""
        whole, worst = TOLERANCE[self.case.dtype]
        return self.whole <= whole and self.worst <= worst


def verify(cases: list[Case]) -> Iterator[Result]:
    """Runs the cases, those with the same number of ranks in one group of processes.

    Raises:
        TrainerError: an encoder that timm does not know.
    """
    for num_ranks in sorted({case.num_ranks for case in cases}):
        group = [case for case in cases if case.num_ranks == num_ranks]
        for case in group:  # Built here once, so that an unknown name is refused before processes start.
            build_halves(case.encoder, case.dtype)
        by_rank = run_ranks(gradients_of_rank, num_ranks + 1, group)
        for i, case in enumerate(group):
            found = {**by_rank[0][i], **by_rank[1][i]}
            yield Result(case, *compare(found, _reference(_without_ranks(case))))


def compare(found: dict[str, Tensor], true: dict[str, Tensor]) -> tuple[float, float]:
    """(whole, worst): relative L1 error over all tensors together, and of the worst single one.

    Some true gradients are zero; so a tensor's error is measured against at least a thousandth of what would be its
    share of the whole gradient by its size.
    """
    assert found.keys() == true.keys(), "both sides hold the same parameters"
    total = sum(g.abs().sum().item() for g in true.values())
    numel = sum(g.numel() for g in true.values())
    deltas = {name: (found[name] - g).abs().sum().item() for name, g in true.items()}
    floor = {name: max(g.abs().sum().item(), 1e-3 * total * g.numel() / numel) for name, g in true.items()}
    return sum(deltas.values()) / total, max(deltas[name] / floor[name] for name in true)


def build_halves(encoder: str, dtype: str) -> tuple[nn.Module, nn.Module, int]:
    """The same encoder and GMA in every process, and the features' width; fresh at each call."""
    half, aggregator, width = _build_once(encoder, dtype)
    return copy.deepcopy(half), copy.deepcopy(aggregator), width


@functools.cache
def _build_once(encoder: str, dtype: str) -> tuple[nn.Module, nn.Module, int]:
    torch.manual_seed(0)
    if encoder == "linear":
        half: nn.Module = _Scaled(nn.Sequential(nn.Flatten(), nn.Linear(3 * TILE_PX**2, 16), nn.ReLU()))
        width = 16
    elif encoder == "conv":
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 8), (8, 16), (16, 24)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        half, width = _Scaled(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())), 24
    else:
        known = build_encoder(Encoder(name=encoder), TILE_PX)
        half, width = known, known.num_features
    aggregator = build_aggregator(Aggregator(hidden=16), width, 2)
    return half.to(getattr(torch, dtype)), aggregator.to(getattr(torch, dtype)), width


def reference_gradients(case: Case) -> dict[str, Tensor]:
    """Gradients of one process: all tiles in one pass, or virtual rank by virtual rank where BatchNorm is theirs."""
    encoder, aggregator, _ = build_halves(case.encoder, case.dtype)
    encoder.eval()
    tiles = _tiles(case.num_tiles)
    if case.batchnorm == "virtual":
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0  # A single tile is normalised by the statistics from before the step.
        features = []
        for part in range(case.num_virtual):
            begin, end = part_bounds(len(tiles), part, case.num_virtual)
            encoder.train(end - begin > 1)  # A single tile has no statistics of its own.
            features += [encoder(tiles[begin:end])] if end > begin else []
        features_ND = torch.cat(features)
    else:
        features_ND = encoder(tiles)
    logits_C, _ = aggregator(features_ND)
    F.cross_entropy(logits_C[None], torch.tensor([1])).backward()
    return _named_gradients(encoder, aggregator)


def _without_ranks(case: Case) -> Case:
    """The case as the reference sees it: ranks do not matter, nor virtual ranks where BatchNorm is frozen."""
    num_virtual = case.num_virtual if case.batchnorm == "virtual" else 1
    return dataclasses.replace(case, num_ranks=1, num_virtual=num_virtual, keep=None, fault="none")


_reference = functools.cache(reference_gradients)


def gradients_of_rank(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, Tensor]]:
    """One rank's gradients for each case: the aggregator's on rank 0, the encoder's on the others."""
    torch.use_deterministic_algorithms(True)
    out = []
    for case in cases:
        topology = Topology.make(world_size, "dedicated", case.num_virtual)
        comm = _FaultyComm(topology, rank, case.fault)
        encoder, aggregator, width = build_halves(case.encoder, case.dtype)
        engine = Engine(
            comm,
            encoder if comm.is_encoder else None,
            aggregator if comm.is_aggregator else None,
            num_features=width,
            seed=0,
            keep=case.keep,
            batchnorm=case.batchnorm,
        )
        engine.set_training(True)
        plan = StepPlan(0, 0, "verify", case.num_tiles, case.num_tiles)
        engine.step([SlideInput(plan, _shards(case, topology, rank), 1)])
        out.append(_named_gradients(engine.encoder, engine.aggregator))
    return out


class _Scaled(nn.Module):
    """uint8 NHWC tiles to a model that takes NCHW in [-1, 1]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tiles_NHWC: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        features_ND: Tensor = self.model(tiles_NHWC.permute(0, 3, 1, 2).to(dtype) / 127.5 - 1)
        return features_ND


class _FaultyComm(Comm):
    """A `Comm` that does one thing wrong."""

    def __init__(self, topology: Topology, rank: int, fault: Fault) -> None:
        super().__init__(topology, rank, torch.device("cpu"))
        self._fault = fault

    def scatter_rows(self, all_KD: Tensor | None, mine_ND: Tensor) -> Tensor:
        """Drops the last encoder rank's gradient, or hands every row's gradient to the opposite row."""
        if all_KD is not None and self._fault == "drop":
            last = self.topology.rows_of(self.topology.encoder_ranks[-1], len(all_KD))
            all_KD[last] = 0
        if all_KD is not None and self._fault == "swap":
            all_KD = all_KD.flip(0)
        return super().scatter_rows(all_KD, mine_ND)

    def sum_over_encoders(self, tensors: object) -> None:
        """Applies DDP's factor the wrong way round: gradients N + 1 times too large."""
        listed = list(tensors)  # type: ignore[call-overload]
        super().sum_over_encoders(listed)
        for tensor in listed if self._fault == "scale" else ():
            tensor *= self.topology.num_encoders + 1


def _tiles(num_tiles: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (num_tiles, TILE_PX, TILE_PX, 3), dtype=torch.uint8, generator=generator)


def _shards(case: Case, topology: Topology, rank: int) -> list[Shard]:
    tiles = _tiles(case.num_tiles)
    bounds = [(v, part_bounds(case.num_tiles, v, case.num_virtual)) for v in topology.virtual_of(rank)]
    return [Shard(v, tiles[begin:end]) for v, (begin, end) in bounds]


def _named_gradients(*halves: nn.Module | None) -> dict[str, Tensor]:
    return {
        f"{type(half).__name__}.{name}": torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for half in halves
        if half is not None
        for name, p in half.named_parameters()
    }
