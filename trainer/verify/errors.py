"""How far two sides of a comparison are apart: relative L1 norms, and the limits that they must keep.

Sums are taken where a tensor is, and put together here, so that no tensor travels between processes. One thing to know
before changing it: the limits are fixed, rounding is not. BatchNorm over a few values, and attention over tiles that
look alike, make much of little; so what is compared (`cases`) is a model and slides where that stays small.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.verify.cases import Case, DType

What = Literal["loss", "gradients", "worst_tensor", "parameters", "buffers"]
WHAT: tuple[What, ...] = ("loss", "gradients", "worst_tensor", "parameters", "buffers")
"""loss: of all slides of all steps. gradients: of the first step, the whole model. worst_tensor: of the first step, the
worst single one. parameters: after the last step. buffers: BatchNorm's statistics after the last step."""
LIMITS: dict[DType, dict[What, float]] = {
    "float64": dict.fromkeys(WHAT, 1e-12),
    "float32": {**dict.fromkeys(WHAT, 1e-5), "worst_tensor": 5e-5},
    "bf16": dict.fromkeys(WHAT, 3e-2),
}
_FLOOR = 1e-3
Errors = dict[What, float]
Named = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What some optimiser steps left behind; tensors by half and name, as "encoder.backbone.conv1.weight"."""

    losses: Named
    """Of each slide, in order; float64, under one name."""
    gradients: Named
    """Of the first step."""
    parameters: Named
    """After the last step."""
    buffers: Named
    """BatchNorm's running statistics after the last step."""


@dataclass(frozen=True)
class Sums:
    """L1 norms of a tensor's error and of its true value, and its elements."""

    error: float
    true: float
    numel: int


@dataclass(frozen=True, kw_only=True)
class Distance:
    """The sums of all tensors of one trace against another, as the trace is ordered."""

    losses: dict[str, Sums]
    gradients: dict[str, Sums]
    parameters: dict[str, Sums]
    buffers: dict[str, Sums]

    @property
    def errors(self) -> Errors:
        """As the table has them; no buffers where there are none."""
        errors: Errors = {
            "loss": relative(self.losses),
            "gradients": relative(self.gradients),
            "worst_tensor": worst_tensor(self.gradients),
            "parameters": relative(self.parameters),
        }
        return {**errors, "buffers": relative(self.buffers)} if self.buffers else errors


@dataclass(frozen=True)
class Result:
    """What a case's comparison found."""

    case: Case
    errors: Errors
    moved: float = 0.0
    """How far the steps moved the parameters, relative L1: an error far below says something."""

    @property
    def exceeded(self) -> list[What]:
        """What is above its limit, or not a number."""
        return [what for what, error in self.errors.items() if not error <= LIMITS[self.case.dtype][what]]

    @property
    def holds(self) -> bool:
        """All errors are within their limits."""
        return not self.exceeded


def compare(found: Trace, true: Trace) -> Distance:
    """The distance of what was found, which may be a part of what is true."""
    return Distance(
        losses=sum_up(found.losses, true.losses),
        gradients=sum_up(found.gradients, true.gradients),
        parameters=sum_up(found.parameters, true.parameters),
        buffers=sum_up(found.buffers, true.buffers),
    )


def merge(by_rank: Iterable[Distance]) -> Distance:
    """All ranks' distances together: of ranks that hold the same tensor, the largest."""
    ranks = list(by_rank)
    return Distance(
        losses=_merge(r.losses for r in ranks),
        gradients=_merge(r.gradients for r in ranks),
        parameters=_merge(r.parameters for r in ranks),
        buffers=_merge(r.buffers for r in ranks),
    )


def sum_up(found: Named, true: Named) -> dict[str, Sums]:
    """The sums of each tensor that was found, in float64."""
    return {
        name: Sums(_l1(value.double() - true[name].double()), _l1(true[name].double()), value.numel())
        for name, value in found.items()
    }


def relative(sums: Mapping[str, Sums]) -> float:
    """The relative L1 error over all tensors together."""
    return sum(s.error for s in sums.values()) / (sum(s.true for s in sums.values()) or 1.0)


def worst_tensor(sums: Mapping[str, Sums]) -> float:
    """The relative L1 error of the worst tensor.

    Some true gradients are zero; so a tensor's error is measured against at least a thousandth of what would be its
    share of the whole by its size.
    """
    per_element = sum(s.true for s in sums.values()) / sum(s.numel for s in sums.values())
    return max(s.error / (max(s.true, _FLOOR * per_element * s.numel) or 1.0) for s in sums.values())


def _merge(by_rank: Iterable[dict[str, Sums]]) -> dict[str, Sums]:
    held: dict[str, list[Sums]] = {}
    for sums in by_rank:
        for name, ours in sums.items():
            held.setdefault(name, []).append(ours)
    # What is not a number is the largest error.
    return {name: max(alike, key=lambda s: (math.isnan(s.error), s.error)) for name, alike in held.items()}


def _l1(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, 1))
