"""How fast things go: what data sheets and measurements say, and the seconds that follow for a tile.

An operator takes as long as its arithmetic or its traffic to memory, whichever is longer (the roofline of Williams,
Waterman, Patterson, 2009), at a share of what the data sheet says. That share is 0.75: timm's published training
speeds on an RTX 3090 (results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv: resnet18 3,482 images/s, resnet50
1,218, vit_small 1,058, vit_base 393) are 0.80, 0.81, 0.64 and 0.75 of the roofline of our counts. The share of the
arithmetic peak alone, 0.41 to 0.59, would say less. A newer card may reach less: measure it, or give --rates.share.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:  # The command's help is there before torch is.
    from trainer.planning.costs import AggregatorCosts, EncoderCosts, Operator

Unit = Literal["bf16", "tf32", "float32"]
"""What computes an operator: matrix units in bf16, those in TF32 (convolutions of float32, torch's default), or plain
float32 arithmetic (its matrix products)."""

_ADAMW_PASSES = 7
"""Times that AdamW goes through memory as large as the parameters: four are read, three written."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """An accelerator by its data sheet."""

    title: str
    memory_gb: float
    tflops: dict[Unit, float]
    """Dense, by what computes."""
    gb_per_s: float
    """To and from its own memory."""


DEVICES = {
    "h100": Device(title="H100 SXM", memory_gb=80, tflops={"bf16": 989, "tf32": 495, "float32": 67}, gb_per_s=3_350),
    "h200": Device(title="H200 SXM", memory_gb=141, tflops={"bf16": 989, "tf32": 495, "float32": 67}, gb_per_s=4_800),
    "a100": Device(
        title="A100 SXM 80 GB", memory_gb=80, tflops={"bf16": 312, "tf32": 156, "float32": 19.5}, gb_per_s=2_039
    ),
    "rtx3090": Device(title="RTX 3090", memory_gb=24, tflops={"bf16": 71, "tf32": 35.6, "float32": 35.6}, gb_per_s=936),
}
"""NVIDIA's data sheets of H100, H200 and A100, and its GA102 white paper; products summed in float32."""


@dataclass(frozen=True, kw_only=True)
class RateInputs:
    """Rates that are not the device's own. Line rates are what hardware allows: give what you measured."""

    share: float = 0.75
    """Of the roofline that the device reaches, (0, 1]; trainer/planning/rates.py says whence."""
    operator_us: float = 5.0
    """What an operator costs besides, however few the tiles, us. Assumed: a CPU took 3 for an addition under autograd,
    a GPU's launch comes on top."""
    link_gb_per_s: float = 50.0
    """Each rank's network, one direction, GB/s: the line rate of 400 Gbit/s InfiniBand, one port for each GPU."""
    latency_us: float = 10.0
    """Of a message, us: about what NCCL reckons for a step of its ring over a network (src/graph/tuning.cc: 9.6)."""
    storage_gb_per_s: float = 12.5
    """Storage, for all ranks together, GB/s: the line rate of 100 Gbit/s."""
    tile_kb: float = 10.0
    """Of the slide's file for each tile, kB: 9.7 in CMU-1-Small-Region.svs (JPEG, 0.5 mpp) for 224 px."""
    core_tiles_per_s: float = 4_900.0
    """Tiles that one core reads and decodes, per second (tests/benchmarks/results/read_cpu_202611.md); `slidegrad
    doctor SLIDE` measures yours."""
    cores: int = 14
    """Cores that read for each encoder rank: 112 for 8 GPUs in a DGX H100."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the simulation of a step takes, in seconds, bytes, and tiles."""

    forward_s: float
    """Of a tile, on one rank."""
    backward_s: float
    forward_pass_s: float = 0.0
    """Of a virtual rank, however few its tiles."""
    backward_pass_s: float = 0.0
    aggregate_s: float = 0.0
    """Of a tile, forward and backward."""
    aggregate_pass_s: float = 0.0
    update_s: float = 0.0
    """The optimiser's, of a step."""
    read_s: float = 0.0
    """Of a tile, by one rank's cores, the bytes at hand."""
    storage_s: float = 0.0
    """Of a tile, until its bytes come, if nobody else asks."""
    link_bytes_per_s: float = math.inf
    sum_bytes_per_s: float | None = None
    """Of an all-reduce, where that is known: what nccl-tests calls bus bandwidth; None: the link's."""
    latency_s: float = 0.0
    num_cores: int | None = None
    """Cores that all ranks share, where they compute on a CPU; None: each has a device to itself."""


def roofline_s(operators: "Iterable[Operator]", device: Device, share: float) -> float:
    """Seconds that operators take one after another."""
    peak_s = (max(o.flop / (1e12 * device.tflops[o.unit]), o.num_bytes / (1e9 * device.gb_per_s)) for o in operators)
    return sum(peak_s) / share


def predict_rates(encoder: "EncoderCosts", aggregator: "AggregatorCosts", device: Device, inputs: RateInputs) -> Rates:
    """The rates of a data sheet."""
    operator_s = inputs.operator_us / 1e6
    update_bytes = _ADAMW_PASSES * max(encoder.parameter_bytes, aggregator.held_bytes // 4)
    return Rates(
        forward_s=roofline_s(encoder.forward, device, inputs.share),
        backward_s=roofline_s(encoder.backward, device, inputs.share),
        forward_pass_s=operator_s * len(encoder.forward),
        backward_pass_s=operator_s * len(encoder.backward),
        aggregate_s=roofline_s(aggregator.operators, device, inputs.share),
        aggregate_pass_s=operator_s * len(aggregator.operators),
        update_s=update_bytes / (1e9 * device.gb_per_s) / inputs.share,
        **given_rates(inputs),
    )


class GivenRates(TypedDict):
    """Those of `Rates` that no trial on one device can tell."""

    read_s: float
    storage_s: float
    link_bytes_per_s: float
    latency_s: float


def given_rates(inputs: RateInputs) -> GivenRates:
    """Reading and the network, as `Rates` has them."""
    return {
        "read_s": 1 / (inputs.core_tiles_per_s * inputs.cores),
        "storage_s": inputs.tile_kb / 1e6 / inputs.storage_gb_per_s,
        "link_bytes_per_s": 1e9 * inputs.link_gb_per_s,
        "latency_s": inputs.latency_us / 1e6,
    }
