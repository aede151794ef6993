"""What gives other features has another digest; what gives the same has the same."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from manifests import Manifest, SlideRecord
from trainer.config import Encoder, Optim, RunConfig
from trainer.encoders.encoder import TileEncoder, build_encoder
from trainer.features.key import describe_key, digest_of, hash_read_plan, hash_weights

CONFIG = RunConfig(encoder=Encoder(name="test_resnet"))


def encoder() -> TileEncoder:
    torch.manual_seed(0)
    return build_encoder(CONFIG.encoder, 32)


def move_statistics(model: TileEncoder) -> None:
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).running_mean += 1e-3  # type: ignore[operator]


def move_one_weight(model: TileEncoder) -> None:
    with torch.no_grad():
        next(model.parameters())[0] += 1e-6


def recolour(model: TileEncoder) -> None:
    model.mean_C += 0.01


def pool(model: TileEncoder) -> None:
    model.pooling = "mean"


@pytest.mark.parametrize("change", [move_statistics, move_one_weight, recolour, pool, TileEncoder.double])
def test_another_encoder_has_another_key(change: Callable[[TileEncoder], object]) -> None:
    other = encoder()
    change(other)
    assert key(other) != key(encoder()) == key(encoder())


def test_other_tiles_or_another_precision_have_another_key() -> None:
    config = dataclasses.replace(CONFIG, optim=Optim(precision="bf16"))
    renamed = dataclasses.replace(CONFIG, encoder=Encoder(name="resnet18"))
    words = [
        describe_key(encoder(), CONFIG, 32, 2.0),
        describe_key(encoder(), CONFIG, 64, 2.0),
        describe_key(encoder(), CONFIG, 32, 1.0),
        describe_key(encoder(), config, 32, 2.0),
        describe_key(encoder(), renamed, 32, 2.0),
    ]
    assert len({digest_of(each) for each in words}) == len(words)


def test_neither_layout_nor_seed_nor_aggregator_has_a_part_in_it() -> None:
    plain = encoder()
    assert hash_weights(plain.to(memory_format=torch.contiguous_format)) == hash_weights(encoder())
    config = dataclasses.replace(CONFIG, seed=5, encoder=Encoder(name="test_resnet", freeze="all"))
    assert digest_of(describe_key(encoder(), config, 32, 2.0)) == key(encoder())


def test_weights_of_any_dtype_and_shape_have_a_digest() -> None:
    tensors = [torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(1, 2), torch.tensor(0)]
    digests = set()
    for tensor in tensors:
        module = nn.Module()
        module.register_buffer("x", tensor)
        digests.add(hash_weights(module))
    assert len(digests) == len(tensors)


def test_a_slides_digest_covers_its_file_its_read_plan_and_its_tiles() -> None:
    record = SlideRecord(slide_id="a", status="ok", num_tiles=2, fingerprint="f", level=1, read_w=32, read_h=32)
    x, tissue = np.array([0, 64], np.int32), np.ones(2, np.float32)
    plan = Manifest(record, x, x, tissue)
    others = [
        Manifest(dataclasses.replace(record, fingerprint="g"), x, x, tissue),
        Manifest(dataclasses.replace(record, level=0), x, x, tissue),
        Manifest(dataclasses.replace(record, read_w=64), x, x, tissue),
        Manifest(dataclasses.replace(record, backend="openslide"), x, x, tissue),
        Manifest(record, x + 1, x, tissue),
        Manifest(record, x, x[::-1].copy(), tissue),
    ]
    assert len({hash_read_plan(each) for each in (plan, *others)}) == 1 + len(others)
    tiled_again = Manifest(dataclasses.replace(record, version="9", config_hash="c"), x, x, tissue / 2)
    assert hash_read_plan(tiled_again) == hash_read_plan(plan)


def key(model: TileEncoder) -> str:
    return digest_of(describe_key(model, CONFIG, 32, 2.0))
