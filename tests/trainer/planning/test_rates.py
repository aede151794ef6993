"""Seconds follow from operations and bytes as the roofline says, and the roofline from what others measured."""

import statistics

import pytest

from trainer.config import Aggregator, Encoder
from trainer.planning.costs import Operator, count_aggregator, count_encoder
from trainer.planning.rates import DEVICES, Device, RateInputs, predict_rates, roofline_s

TOY = Device(title="toy", memory_gb=1, tflops={"bf16": 4, "tf32": 2, "float32": 1}, gb_per_s=100)
PUBLISHED = {"resnet18": 3_481.78, "resnet50": 1_218.01, "vit_small_patch16_224": 1_057.92, "vit_base_patch16_224": 393}
"""Images/s of a training step on an RTX 3090, AMP, channels last: huggingface/pytorch-image-models,
results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv."""


@pytest.mark.parametrize(
    ("operator", "seconds"),
    [
        (Operator(4e12, 1, "bf16"), 1.0),
        (Operator(4e12, 1, "tf32"), 2.0),
        (Operator(4e12, 1, "float32"), 4.0),
        (Operator(4e12, 3e11, "bf16"), 3.0),  # Waits for memory.
        (Operator(0, 1e11, "float32"), 1.0),
    ],
)
def test_an_operator_takes_its_arithmetic_or_its_traffic(operator: Operator, seconds: float) -> None:
    assert roofline_s([operator], TOY, 1.0) == pytest.approx(seconds)
    assert roofline_s([operator, operator], TOY, 0.5) == pytest.approx(4 * seconds)


def test_the_usual_share_is_that_of_published_training() -> None:
    """0.64 to 0.81 of the roofline; the default lies between."""
    shares = []
    for name, images_per_s in PUBLISHED.items():
        costs = count_encoder(Encoder(name=name), 224, "bf16")
        shares.append(images_per_s * roofline_s(costs.forward + costs.backward, DEVICES["rtx3090"], 1.0))
    assert statistics.fmean(shares) == pytest.approx(RateInputs().share, abs=0.03)
    assert all(0.6 < share < 0.85 for share in shares)


def test_predicted_rates_are_those_of_the_inputs() -> None:
    encoder = count_encoder(Encoder(name="test_resnet"), 32, "float32")
    aggregator = count_aggregator(Aggregator(), encoder.num_features)
    inputs = RateInputs(
        share=0.5,
        operator_us=2,
        link_gb_per_s=3,
        latency_us=7,
        storage_gb_per_s=2,
        tile_kb=8,
        core_tiles_per_s=100,
        cores=5,
    )
    rates = predict_rates(encoder, aggregator, TOY, inputs)
    assert (rates.read_s, rates.storage_s) == (pytest.approx(1 / 500), pytest.approx(4e-6))
    assert (rates.link_bytes_per_s, rates.latency_s) == (3e9, pytest.approx(7e-6))
    assert rates.forward_s == pytest.approx(2 * roofline_s(encoder.forward, TOY, 1.0))
    assert rates.forward_pass_s == pytest.approx(2e-6 * len(encoder.forward))
    assert rates.update_s == pytest.approx(7 * max(encoder.parameter_bytes, aggregator.held_bytes / 4) / 1e11 / 0.5)
