"""What is counted without a value is what a real step takes and does."""

import contextlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.aggregators import build_aggregator
from trainer.config import Aggregator, Encoder
from trainer.encoders.encoder import build_encoder
from trainer.memory import LiveBytes
from trainer.planning.costs import Precision, count_aggregator, count_encoder

MODELS = {"test_resnet": 32, "test_vit": 160}
"""A CNN and a vision transformer, and the side of their tiles, px."""
NUM_TILES = 40


def take_step(name: str, precision: Precision) -> tuple[int, int, int, int]:
    """Bytes of the graph and the most that lived, and operations forward and in all, of a real step's second time."""
    encoder = build_encoder(Encoder(name=name), MODELS[name]).train()
    for _ in range(2):
        with LiveBytes() as live, FlopCounterMode(display=False) as counter:
            tiles_NHWC = torch.zeros(NUM_TILES, MODELS[name], MODELS[name], 3, dtype=torch.uint8)
            with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext():
                features_ND = encoder(tiles_NHWC)
            graph, forward = live.now, counter.get_total_flops()
            features_ND.float().sum().backward()
        del features_ND
    return graph, live.most, forward, counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_counted_bytes_are_those_of_live_tensors(name: str, precision: Precision) -> None:
    """The graph to one part in a thousand; the most of a pass within 1 %: neither was counted at this size."""
    costs = count_encoder(Encoder(name=name), MODELS[name], precision, "cpu")
    graph, most, *_ = take_step(name, precision)
    assert costs.memory.graph.at(NUM_TILES) == pytest.approx(graph, rel=1e-3)
    assert costs.memory.peak.at(NUM_TILES) == pytest.approx(most, rel=0.01)


def test_counted_operations_are_those_of_a_real_step() -> None:
    costs = count_encoder(Encoder(name="test_resnet"), 32, "float32", "cpu")
    _, _, forward, both = take_step("test_resnet", "float32")
    assert costs.forward_flop * NUM_TILES == pytest.approx(forward)
    assert (costs.forward_flop + costs.backward_flop) * NUM_TILES == pytest.approx(both)


def test_attention_is_counted() -> None:
    """Torch leaves out the CPU's attention: two products of (tokens x width) and (width x tokens) in each layer."""
    _, _, without, _ = take_step("test_vit", "float32")
    costs = count_encoder(Encoder(name="test_vit"), 160, "float32", "cpu")
    backbone = build_encoder(Encoder(name="test_vit"), 160).backbone
    tokens, width = backbone.pos_embed.shape[1], backbone.embed_dim
    assert costs.forward_flop - without / NUM_TILES == pytest.approx(len(backbone.blocks) * 4 * tokens**2 * width)


def test_resnet18_has_its_published_size() -> None:
    """torchvision's documentation: 11.69 M parameters, of which 0.51 M are the head's, and 1.81 G multiply-adds."""
    costs = count_encoder(Encoder(name="resnet18"), 224, "float32")
    assert costs.num_parameters == pytest.approx(11.69e6 - 513_000, rel=1e-3)
    assert costs.forward_flop == pytest.approx(2 * 1.81e9, rel=0.01)
    assert costs.backward_flop == pytest.approx(2 * costs.forward_flop, rel=0.05)
    assert costs.held_bytes == pytest.approx(16 * costs.num_parameters, rel=0.01)


def test_half_precision_halves_most_of_the_graph_and_keeps_weights() -> None:
    full, half = (count_encoder(Encoder(name="resnet18"), 224, precision) for precision in ("float32", "bf16"))
    assert 0.5 < half.memory.graph.per_tile / full.memory.graph.per_tile < 0.6
    assert half.held_bytes == full.held_bytes
    # Weights are cast once a pass, for its graph.
    assert half.memory.graph.fixed == pytest.approx(full.parameter_bytes / 2, rel=0.02)
    assert {operator.unit for operator in full.forward if operator.flop} == {"tf32"}
    assert {operator.unit for operator in half.forward if operator.flop} == {"bf16"}


def test_on_a_gpu_layer_norm_stays_in_float32() -> None:
    """ConvNeXt normalises what its convolutions gave in half precision."""
    gpu, cpu = (count_encoder(Encoder(name="convnext_atto"), 64, "bf16", kind) for kind in ("cuda", "cpu"))
    assert gpu.memory.graph.per_tile > 1.05 * cpu.memory.graph.per_tile
    assert gpu.forward_flop == pytest.approx(cpu.forward_flop)


def test_an_aggregator_grows_with_the_slide() -> None:
    """GMA on D = 8 with a hidden layer of 4: two products of (K x 8) and (8 x 4), one of (K x 4) and (4 x 1), and
    attention times features; about twice that backward."""
    costs = count_aggregator(Aggregator(hidden=4), 8)
    forward = 2 * (2 * 8 * 4 + 4 + 8)
    assert 2.5 * forward < sum(operator.flop for operator in costs.operators) < 3.01 * forward
    assert costs.memory.at(10_000) > costs.memory.at(1_000) > 0
    assert costs.held_bytes == 16 * sum(p.numel() for p in build_aggregator(Aggregator(hidden=4), 8, 2).parameters())
