"""What a comparison of `slidegrad verify` is about: a case, and the model and the slides that both of its sides share.

Nothing here encodes, aggregates or talks to other ranks; `single` and `parallel` do, each in a way of its
own. One thing to know before changing it: everything follows from the case alone, so that every process makes the same
model and the same pixels.
"""

import copy
import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.aggregators import build_aggregator
from trainer.batchnorm import BatchNorm
from trainer.config import Aggregator, AggregatorName, Encoder
from trainer.encoders.encoder import build_encoder
from trainer.sampler import StepPlan

Fault = Literal["none", "scale", "drop", "swap", "group"]
DType = Literal["float64", "float32", "bf16"]
TILE_PX = 32
_HIDDEN = 16
_COLUMNS = 6
"""Tiles in a row of a slide's grid."""
_RATES = {"frozen": 0.1, "virtual": 0.01}
"""Learning rate, as a share of the parameters' mean size, by what BatchNorm does. Five large steps through BatchNorm
over a few tiles are chaos: they make up to 10^6 of one rounding, in a single process too."""
"""Learning rate, as a share of the mean size of a half's parameters: five steps move them by 7 to 22 %, so that the
parameters after them tell something. At 0.2 a vision transformer's float32 is off by more than 1e-5."""
_JITTER = 0.1
_GAIN = 3.0
"""Of GMA's parameters: its attention as it starts is nearly the same for all tiles."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison: a model and slides, and a way to spread them over processes."""

    encoder: str
    aggregator: AggregatorName = "gma"
    dtype: DType
    num_tiles: tuple[int, ...]
    """Of each slide of a step."""
    num_steps: int
    batchnorm: Literal["frozen", "virtual"] = "frozen"
    num_groups: int = 1
    num_ranks: int
    """Encoder ranks of a group."""
    num_virtual: int
    """Virtual ranks of a slide, over all encoder ranks of a group."""
    is_shared: bool = False
    """The aggregator is one of the encoder ranks, not one process more."""
    keep: int | None = None
    """Virtual ranks of a rank whose graph is kept; all if None."""
    fault: Fault = "none"

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.num_groups * (self.num_ranks + (not self.is_shared))

    @property
    def autocast(self) -> torch.dtype | None:
        """Of the encoder; parameters, and the aggregator, are float32 then."""
        return torch.bfloat16 if self.dtype == "bf16" else None


def build_halves(case: Case) -> tuple[nn.Module, nn.Module, int]:
    """The case's encoder and aggregator, the same in every process, and the features' width; fresh at each call."""
    encoder, aggregator, width = _build_once(case.encoder, case.aggregator)
    dtype = torch.float64 if case.dtype == "float64" else torch.float32
    return copy.deepcopy(encoder).to(dtype), copy.deepcopy(aggregator).to(dtype), width


def build_optimizer(halves: Iterable[nn.Module], case: Case) -> torch.optim.AdamW:
    """AdamW over the halves that a process holds; a step moves a half by some hundredths or thousandths of itself."""
    groups = []
    for half in halves:
        sizes = torch.cat([p.detach().abs().flatten() for p in half.parameters()])
        groups.append({"params": list(half.parameters()), "lr": _RATES[case.batchnorm] * sizes.mean().item()})
    return torch.optim.AdamW(groups, fused=True)


def plan_step(case: Case, step: int) -> list[StepPlan]:
    """The step's slides, numbered on over the steps."""
    first = step * len(case.num_tiles)
    return [StepPlan(0, first + i, f"slide {first + i}", num, num) for i, num in enumerate(case.num_tiles)]


def draw_slide(case: Case, plan: StepPlan) -> tuple[Tensor, Tensor, int]:
    """A slide's tiles uint8 (K, px, px, 3), their cells (K, 2), and its class; another one for each slide's number.

    A tile is some noise over one of eight colours. Tiles that look alike would have gradients alike: to swap them would
    change nothing, and the gradients of attention would be what is left when large terms cancel, mostly rounding.
    """
    generator = torch.Generator().manual_seed(plan.index)
    corner_K113 = torch.randint(0, 2, (plan.num_rows, 1, 1, 3), generator=generator)
    noise_KHWC = torch.rand(plan.num_rows, TILE_PX, TILE_PX, 3, generator=generator)
    tiles_KHWC = (255 * (0.8 * corner_K113 + 0.2 * noise_KHWC)).to(torch.uint8)
    places_K = torch.arange(plan.num_rows, dtype=torch.int32)
    cells_K2 = torch.stack([places_K % _COLUMNS, places_K // _COLUMNS], 1)
    return tiles_KHWC, cells_K2, plan.index % len(case.num_tiles) % 2


class _Scaled(nn.Module):
    """uint8 NHWC tiles to a model that takes NCHW in [-1, 1]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tiles_NHWC: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        features_ND: Tensor = self.model(tiles_NHWC.permute(0, 3, 1, 2).to(dtype) / 127.5 - 1)
        return features_ND


@functools.cache
def _build_once(encoder: str, aggregator: AggregatorName) -> tuple[nn.Module, nn.Module, int]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if encoder == "linear":
            half: nn.Module = _Scaled(nn.Sequential(nn.Flatten(), nn.Linear(3 * TILE_PX**2, 16), nn.ReLU()))
            width = 16
        elif encoder == "conv":
            layers: list[nn.Module] = []
            for inputs, outputs in itertools.pairwise((3, 8, 16, 24)):
                layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            half, width = _Scaled(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())), 24
        else:
            known = build_encoder(Encoder(name=encoder), TILE_PX, initial=False)
            half, width = known, known.num_features
        other = build_aggregator(Aggregator(name=aggregator, hidden=_HIDDEN), width, 2)
        _unsettle(half)
        for parameter in other.parameters() if aggregator == "gma" else ():
            parameter.data *= _GAIN
        for module in (*half.modules(), *other.modules()):
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
    return half, other, width


@torch.no_grad()
def _unsettle(half: nn.Module) -> None:
    """Moves what starts at 0 or 1, as after some training: a branch with a gain of 0 has no gradients to compare."""
    for parameter in half.parameters():
        if parameter.ndim < 2:
            parameter.add_(torch.randn_like(parameter), alpha=_JITTER)
    for module in half.modules():
        if isinstance(module, BatchNorm) and module.running_mean is not None and module.running_var is not None:
            module.running_mean += _JITTER * torch.randn_like(module.running_mean)
            module.running_var *= 1 + _JITTER * torch.rand_like(module.running_var)
