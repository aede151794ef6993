"""S, the single process of the paper's Fig. 3: a plain loop that `slidegrad verify` holds everything else against.

One model, one loss, one backward pass a step; nothing from `step`, `encode`, `comm` or `batchnorm`, so that a mistake
there cannot be made here too. One thing to know before changing it: all tiles of a slide are one pass, but where a
virtual rank is something of its own: where BatchNorm normalises by its tiles, and in half precision, where a sum over
tiles rounds by how many they are.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifests import part_bounds
from trainer.verify.cases import Case, build_halves, build_optimizer, draw_slide, plan_step
from trainer.verify.errors import Named, Trace


def run_single(case: Case) -> Trace:
    """The case's steps in this process, as if there were no ranks, no groups and memory for all."""
    encoder, aggregator, _ = build_halves(case)
    halves = {"encoder": encoder, "aggregator": aggregator}
    optimizer = build_optimizer(halves.values(), case)
    losses: list[Tensor] = []
    gradients: Named = {}
    for step in range(case.num_steps):
        optimizer.zero_grad()
        with _own_statistics(encoder, case) as layers:
            of_step = []
            for plan in plan_step(case, step):
                tiles_KHWC, cells_K2, label = draw_slide(case, plan)
                outputs, _ = aggregator(_encode(encoder, tiles_KHWC, case, layers), cells_K2)
                rows_RC = outputs.reshape(-1, outputs.shape[-1])  # One of the slide, or one of each tile.
                of_step.append(F.cross_entropy(rows_RC, torch.full((len(rows_RC),), label)))
            torch.stack(of_step).mean().backward()
        losses += of_step
        gradients = gradients or named_gradients(halves)
        optimizer.step()
    told = torch.tensor([loss.item() for loss in losses], dtype=torch.float64)
    return Trace(losses={"": told}, gradients=gradients, **named_state(halves))


def as_single(case: Case) -> Case:
    """The case as the single process sees it: cases that differ in ranks alone are one."""
    has_parts = case.batchnorm == "virtual" or case.autocast is not None
    num_virtual = case.num_virtual if has_parts else 1
    return replace(case, num_groups=1, num_ranks=1, num_virtual=num_virtual, is_shared=True, keep=None, fault="none")


def named_gradients(halves: Mapping[str, nn.Module]) -> Named:
    """Gradients by name; zeros where there is none."""
    return {
        f"{name}.{key}": torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, half in halves.items()
        for key, p in half.named_parameters()
    }


def named_state(halves: Mapping[str, nn.Module]) -> dict[str, Any]:
    """A trace's parameters, and its buffers: BatchNorm's running means and variances."""
    found: dict[str, Named] = {"parameters": {}, "buffers": {}}
    for name, half in halves.items():
        found["parameters"] |= {f"{name}.{key}": p.detach().clone() for key, p in half.named_parameters()}
        found["buffers"] |= {
            f"{name}.{key}": buffer.clone()
            for key, buffer in half.named_buffers()
            if key.rpartition(".")[2] in ("running_mean", "running_var")
        }
    return found


def _encode(encoder: nn.Module, tiles_KHWC: Tensor, case: Case, layers: "list[_Layer]") -> Tensor:
    """A slide's features (K, D), in the parameters' dtype."""
    features = []
    for part in range(case.num_virtual):
        begin, end = part_bounds(len(tiles_KHWC), part, case.num_virtual)
        if begin == end:
            continue
        for layer in layers:
            layer.begin(end - begin)
        with torch.autocast("cpu", case.autocast) if case.autocast else contextlib.nullcontext():
            features.append(encoder(tiles_KHWC[begin:end]))
    return torch.cat(features).to(torch.float64 if case.dtype == "float64" else torch.float32)


class _Layer:
    """A BatchNorm layer whose running statistics stand still through a step, and move once at its end.

    They move by the mean, over all tiles of the step, of what each virtual rank alone would have made of them: by its
    mean and its unbiased variance. A virtual rank of a single tile has no statistics of its own: it is normalised by
    the running ones, and asks for no change.
    """

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        self._layer, self._num, self._momentum = layer, 0, layer.momentum or 0.0
        self._mean, self._var, self._total = torch.zeros(()), torch.zeros(()), 0
        self._hook = layer.register_forward_pre_hook(self._look)
        layer.momentum = 0.0

    def begin(self, num_tiles: int) -> None:
        """Before a virtual rank of so many tiles."""
        self._num = num_tiles
        self._total += num_tiles
        self._layer.train(num_tiles > 1)

    @torch.no_grad()
    def _look(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        mean, var = self._layer.running_mean, self._layer.running_var
        if self._num > 1:
            values_CM = inputs[0].transpose(0, 1).flatten(1).to(self._layer.weight.dtype)
            mean, var = values_CM.mean(1), values_CM.var(1)
        assert mean is not None
        assert var is not None
        self._mean, self._var = self._mean + self._num * mean, self._var + self._num * var

    @torch.no_grad()
    def end(self) -> None:
        """After the step."""
        self._hook.remove()
        self._layer.momentum = self._momentum
        assert self._layer.running_mean is not None
        assert self._layer.running_var is not None
        self._layer.running_mean.lerp_(self._mean / self._total, self._momentum)
        self._layer.running_var.lerp_(self._var / self._total, self._momentum)


@contextlib.contextmanager
def _own_statistics(encoder: nn.Module, case: Case) -> Iterator[list[_Layer]]:
    """A step's BatchNorm layers, if they normalise by a virtual rank's tiles; else none, and all are frozen."""
    encoder.eval()
    is_own = case.batchnorm == "virtual"
    found = [_Layer(module) for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)] if is_own else []
    yield found
    for layer in found:
        layer.end()
