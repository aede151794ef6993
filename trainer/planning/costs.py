"""What a tile costs, counted from the model itself: bytes that autograd keeps, operations, and traffic to memory.

The model runs forward and backward on tensors that have shapes but no values (torch's FakeTensorMode), so that
ViT-base on an 80 GB card is counted in two seconds on a laptop. All operators but those of attention and normalisation
make the same tensors on every device; where a GPU is meant, layer norm under autocast keeps float32, as it does there.

Counted are tensors, as `trainer.memory` counts them in a run; not what an operator takes within itself, nor what an
allocator leaves unused. Depthwise convolutions: torch's formula for their backward pass counts too many operations.
"""

import contextlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from trainer.aggregators import build_aggregator
from trainer.config import Aggregator, Encoder
from trainer.encoders.encoder import build_encoder
from trainer.memory import Cost, Line, LiveBytes, measure_aggregator
from trainer.planning.rates import Unit

Precision = Literal["float32", "bf16"]

_SIZES = (64, 256)
"""Tiles of the two counts that a line is drawn through. The graph's is exact; the most of a pass is the longest of
several lines, and known within 1 % from some thirty tiles on; below them a pass may take a few MB more."""
_ROWS = 768
"""Of the slide whose aggregation is counted."""
_NUM_CLASSES = 2
_MAKES_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "detach"}
_CONVOLUTIONS = {"convolution", "convolution_backward"}
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
"""An operator whose operations torch does not count; those of other devices it does."""


@dataclass(frozen=True)
class Operator:
    """One operator's share of a tile: operations (a multiplication and an addition are two), bytes read and written."""

    flop: float
    num_bytes: float
    unit: Unit


@dataclass(frozen=True, kw_only=True)
class EncoderCosts:
    """What an encoder costs; operators are per tile, in their order."""

    name: str
    tile_px: int
    precision: Precision
    num_features: int
    num_parameters: int
    weight_bytes: int
    """Parameters and buffers; AdamW's two moments and the gradients are three times the parameters more."""
    parameter_bytes: int
    memory: Cost
    """Of a virtual rank: its graph, and the most of a forward and backward pass, the tiles themselves included."""
    forward: tuple[Operator, ...]
    backward: tuple[Operator, ...]

    @property
    def held_bytes(self) -> int:
        """What lies in memory throughout a step: weights, gradients, AdamW's moments."""
        return self.weight_bytes + 3 * self.parameter_bytes

    @property
    def forward_flop(self) -> float:
        """Operations of a tile's forward pass."""
        return sum(operator.flop for operator in self.forward)

    @property
    def backward_flop(self) -> float:
        """Operations of a tile's backward pass."""
        return sum(operator.flop for operator in self.backward)


@dataclass(frozen=True, kw_only=True)
class AggregatorCosts:
    """What an aggregator costs; `memory` is by the slide's tiles, `operators` per tile, forward and backward."""

    name: str
    held_bytes: int
    memory: Line
    operators: tuple[Operator, ...]


def count_encoder(
    config: Encoder, tile_px: int, precision: Precision, device_type: Literal["cuda", "cpu"] = "cuda"
) -> EncoderCosts:
    """Counts an encoder that is trained whole, BatchNorm by its own tiles.

    Args:
        config: which; its weights are not read.
        tile_px: side of the tiles, px.
        precision: float32, or bf16 for autocast.
        device_type: where it would run.

    Raises:
        TrainerError: unknown encoder, or tiles that it cannot take.
    """
    with torch.device("meta"):
        outline = build_encoder(config, tile_px, initial=False)
    with FakeTensorMode():
        # To fake tensors of a CPU: torch's autograd needs a device that is there.
        encoder: nn.Module = outline._apply(_without_values)  # type: ignore[no-untyped-call]
        encoder.train()
        for parameter in encoder.parameters():  # Held anyway: a pass adds to them.
            parameter.grad = torch.zeros_like(parameter)
        small, large = (_count(encoder, tile_px, size, precision, device_type) for size in _SIZES)
    parameter_bytes = sum(p.nbytes for p in encoder.parameters())
    return EncoderCosts(
        name=config.name,
        tile_px=tile_px,
        precision=precision,
        num_features=outline.num_features,
        num_parameters=sum(p.numel() for p in encoder.parameters()),
        weight_bytes=parameter_bytes + sum(b.nbytes for b in encoder.buffers()),
        parameter_bytes=parameter_bytes,
        memory=Cost(
            Line.through(_SIZES, (small.graph_bytes, large.graph_bytes)),
            Line.through(_SIZES, (small.most_bytes, large.most_bytes)),
        ),
        forward=large.forward,
        backward=large.backward,
    )


def count_aggregator(config: Aggregator, num_features: int) -> AggregatorCosts:
    """Counts an aggregator of float32, by a slide of zeros on the CPU.

    Raises:
        TrainerError: TransMIL cannot have that width.
    """
    aggregator = build_aggregator(config, num_features, _NUM_CLASSES)
    parameter_bytes = sum(p.nbytes for p in aggregator.parameters())
    features_KD = torch.zeros(_ROWS, num_features, requires_grad=True)
    places = torch.arange(_ROWS)
    with torch.random.fork_rng(devices=[]), _Operators() as operators:
        outputs_C, _ = aggregator(features_KD, torch.stack([places % 64, places // 64], 1).int())
        outputs_C.sum().backward()
    return AggregatorCosts(
        name=config.name,
        held_bytes=4 * parameter_bytes,
        memory=measure_aggregator(aggregator, num_features, torch.float32, torch.device("cpu")),
        operators=operators.per_row(_ROWS),
    )


def _without_values(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


class _Count(NamedTuple):
    """Of a forward and backward pass; the operators are per tile."""

    graph_bytes: int
    most_bytes: int
    forward: tuple[Operator, ...]
    backward: tuple[Operator, ...]


def _count(encoder: nn.Module, tile_px: int, num_tiles: int, precision: Precision, device_type: str) -> _Count:
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    # The innermost sees an operator first.
    with LiveBytes() as live, _Operators() as operators:
        tiles_NHWC = torch.empty(num_tiles, tile_px, tile_px, 3, dtype=torch.uint8)
        with autocast, _GpuAutocast() if device_type == "cuda" and precision == "bf16" else contextlib.nullcontext():
            features_ND = encoder(tiles_NHWC)
        graph, forward = live.now, operators.per_row(num_tiles)
        features_ND.float().sum().backward()
    return _Count(graph, live.most, forward, operators.per_row(num_tiles)[len(forward) :])


class _GpuAutocast(TorchFunctionMode):
    """Where CUDA's autocast goes back to float32 and the CPU's does not, as far as encoders go.

    Source: torch's "Automatic Mixed Precision package", CUDA ops that autocast to float32.
    """

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.layer_norm, F.group_norm):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """Lists the operators that do something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen: list[Operator] = []

    def per_row(self, num_rows: int) -> tuple[Operator, ...]:
        """The operators so far, of a batch of so many rows, per row."""
        return tuple(Operator(o.flop / num_rows, o.num_bytes / num_rows, o.unit) for o in self._seen)

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        name = func._overloadpacket.__name__
        if outputs and not func.is_view and name not in _MAKES_NOTHING:
            num_bytes = sum(t.numel() * t.element_size() for t in (*inputs.values(), *outputs))
            is_half = outputs[0].dtype in (torch.bfloat16, torch.float16)
            unit: Unit = "bf16" if is_half else "tf32" if name in _CONVOLUTIONS else "float32"
            self._seen.append(Operator(_count_flop(func._overloadpacket, args, kwargs or {}, out), num_bytes, unit))
        return out


def _count_flop(packet: Any, args: Any, kwargs: Any, out: Any) -> float:
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=out))
    if packet.__name__ == _ATTENTION:
        return float(sdpa_flop_count(*(t.shape for t in args[:3])))
    if packet.__name__ == f"{_ATTENTION}_backward":
        return float(sdpa_backward_flop_count(*(t.shape for t in args[:4])))
    return 0.0
