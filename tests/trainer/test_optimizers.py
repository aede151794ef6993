"""Optimisers: the same as ever with one rate, block by block with decay, and only of what is trained."""

import pytest
import torch
from torch import nn

from trainer.aggregators import build_aggregator
from trainer.config import Aggregator, Encoder, Optim, RunConfig
from trainer.encoders.encoder import build_encoder
from trainer.optimizers import build_optimizer, set_rates


def encoder_of(config: RunConfig) -> nn.Module:
    torch.manual_seed(0)
    return build_encoder(config.encoder, 32)


def rates(optimizer: torch.optim.Optimizer, half: nn.Module, key: str = "lr") -> dict[str, float]:
    """Name of a parameter to its group's learning rate; each parameter stands in one group."""
    of = {id(p): group[key] for group in optimizer.param_groups for p in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in optimizer.param_groups)
    return {name: of[id(p)] for name, p in half.named_parameters() if id(p) in of}


def test_one_rate_everywhere_is_bit_equal_to_plain_adamw() -> None:
    config = RunConfig(encoder=Encoder(name="test_resnet"), optim=Optim(lr=3e-3, weight_decay=0.05))
    ours, theirs = encoder_of(config), encoder_of(config)
    optimizer = build_optimizer(ours, config, "encoder")
    assert optimizer is not None
    assert len(optimizer.param_groups) == 1
    plain = torch.optim.AdamW(theirs.parameters(), lr=3e-3, weight_decay=0.05)
    tiles = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for factor in (0.25, 1.0, 0.6):
        set_rates(optimizer, factor, 0.05)
        plain.param_groups[0]["lr"] = 3e-3 * factor
        for half, stepper in ((ours, optimizer), (theirs, plain)):
            stepper.zero_grad()
            half(tiles).square().sum().backward()
            stepper.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(ours.parameters(), encoder_of(config).parameters(), strict=True))


def test_each_block_learns_slower_than_the_one_above() -> None:
    config = RunConfig(encoder=Encoder(name="test_vit", layer_decay=0.5), optim=Optim(lr=1.0, weight_decay=0.05))
    half = encoder_of(config)
    optimizer = build_optimizer(half, config, "encoder")
    assert optimizer is not None
    found = rates(optimizer, half)
    assert len(found) == len(list(half.parameters()))
    for name, depth in (("cls_token", 6), ("pos_embed", 6), ("patch_embed.proj.bias", 6), ("norm.weight", 0)):
        assert found[f"backbone.{name}"] == 0.5**depth
    assert [found[f"backbone.blocks.{i}.attn.qkv.weight"] for i in range(6)] == [0.5 ** (5 - i) for i in range(6)]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.05}


def test_what_stands_above_the_blocks_learns_like_the_last_of_them() -> None:
    config = RunConfig(encoder=Encoder(name="test_convnext", layer_decay=0.5), optim=Optim(lr=1.0))
    half = encoder_of(config)
    optimizer = build_optimizer(half, config, "encoder")
    assert optimizer is not None
    found = rates(optimizer, half)
    last = max(name for name in found if "blocks" in name)
    assert found["backbone.head.norm.weight"] == found[last] == 1.0
    assert found["backbone.stem.0.weight"] == min(found.values()) < 1.0


def test_frozen_blocks_are_left_out_and_change_no_rate_above_them() -> None:
    config = RunConfig(encoder=Encoder(name="test_vit", layer_decay=0.5, freeze=2), optim=Optim(lr=1.0))
    half = encoder_of(config)
    optimizer = build_optimizer(half, config, "encoder")
    assert optimizer is not None
    found = rates(optimizer, half)
    assert {name.split(".")[1] for name in found} == {"blocks", "norm"}
    assert {name.split(".")[2] for name in found if "blocks" in name} == {"2", "3", "4", "5"}
    assert found["backbone.blocks.2.attn.qkv.weight"] == 0.5**3


def test_nothing_to_train_is_no_optimiser() -> None:
    config = RunConfig(encoder=Encoder(name="test_resnet", freeze="all"))
    assert build_optimizer(encoder_of(config), config, "encoder") is None


def test_rates_follow_their_peaks_through_a_checkpoint() -> None:
    config = RunConfig(encoder=Encoder(name="test_resnet", layer_decay=0.7), optim=Optim(lr=2e-4))
    half = encoder_of(config)
    optimizer = build_optimizer(half, config, "encoder")
    again = build_optimizer(half, config, "encoder")
    assert optimizer is not None
    assert again is not None
    set_rates(optimizer, 0.5, 0.05)
    again.load_state_dict(optimizer.state_dict())
    set_rates(again, 0.25, 0.05)
    peaks = rates(again, half, "peak")
    assert len(set(peaks.values())) == 5
    assert rates(again, half) == {name: peak * 0.25 for name, peak in peaks.items()}


def test_a_checkpoint_from_before_there_were_peaks_goes_on() -> None:
    config = RunConfig(encoder=Encoder(name="test_resnet"), optim=Optim(lr=2e-4))
    half = encoder_of(config)
    old = torch.optim.AdamW(half.parameters(), lr=2e-4)
    old.param_groups[0]["lr"] = 1e-9
    optimizer = build_optimizer(half, config, "encoder")
    assert optimizer is not None
    optimizer.load_state_dict(old.state_dict())
    set_rates(optimizer, 0.5, 0.05)
    assert set(rates(optimizer, half).values()) == {1e-4}


@pytest.mark.parametrize(("own", "peak"), [(None, 2e-4), (3e-3, 3e-3)])
def test_the_aggregator_has_a_rate_of_its_own_and_no_decay(own: float | None, peak: float) -> None:
    config = RunConfig(encoder=Encoder(layer_decay=0.5), optim=Optim(lr=2e-4, aggregator_lr=own, weight_decay=0.1))
    half = build_aggregator(Aggregator(hidden=4), 8, 2)
    optimizer = build_optimizer(half, config, "aggregator")
    assert optimizer is not None
    (group,) = optimizer.param_groups
    assert (group["peak"], group["lr"], group["weight_decay"]) == (peak, peak, 0.1)
    assert len(group["params"]) == len(list(half.parameters()))
