"""Ways to trade time and memory give the same gradients, or say by how much they do not."""

import dataclasses

import pytest
import torch
from torch import Tensor

from trainer.comm import Comm
from trainer.config import Encoder, Machine, Optim, RunConfig
from trainer.errors import TrainerError
from trainer.heads import Head
from trainer.loading.shards import Shard, SlideInput
from trainer.memory import LiveBytes
from trainer.model import build_engine
from trainer.sampler import StepPlan
from trainer.step import Engine
from trainer.topology import Topology

TILE_PX = 32


def make(machine: Machine, encoder: str = "test_vit", precision: str = "float32", drop_path: float = 0.2) -> Engine:
    optim = Optim(precision=precision)  # type: ignore[arg-type]
    config = RunConfig(virtual_ranks=2, encoder=Encoder(name=encoder, drop_path=drop_path), optim=optim)
    comm = Comm(Topology.make(1, "auto", 2), 0, torch.device("cpu"))
    config = dataclasses.replace(config, machine=machine)
    return build_engine(config, comm, tile_px=TILE_PX, head=Head.of_classes(2))


def gradients(engine: Engine, num_tiles: int = 10) -> Tensor:
    """Of the encoder, as one vector, after one step."""
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 256, (num_tiles, TILE_PX, TILE_PX, 3), dtype=torch.uint8, generator=generator)
    halves = zip(tiles.chunk(2), torch.zeros(num_tiles, 2, dtype=torch.int32).chunk(2), strict=True)
    shards = [Shard(v, *half) for v, half in enumerate(halves)]
    engine.set_training(True)
    engine.step([SlideInput(StepPlan(0, 0, "slide", num_tiles, num_tiles), shards, (1,))])
    assert engine.encoder is not None
    return torch.cat([p.grad.flatten() for p in engine.encoder.parameters() if p.grad is not None])


def distance(found: Tensor, true: Tensor) -> float:
    return float((found - true).abs().sum() / true.abs().sum())


def test_recomputed_blocks_give_the_same_bits_from_less_memory() -> None:
    peaks, found = [], []
    for recompute in (False, True):
        engine = make(Machine(recompute=recompute, keep="all"))
        with LiveBytes() as live:
            found.append(gradients(engine, num_tiles=200))
        peaks.append(live.most)
    assert torch.equal(*found)
    assert peaks[1] < 0.7 * peaks[0]


@pytest.mark.parametrize("encoder", ["test_resnet", "test_efficientnet"])
def test_recomputing_is_refused_where_it_would_be_wrong(encoder: str) -> None:
    with pytest.raises(TrainerError, match=r"machine\.recompute with encoder\.name .*expected a model in blocks"):
        make(Machine(recompute=True), encoder, drop_path=0.0)


@pytest.mark.slow
def test_a_compiled_encoder_gives_the_gradients_to_rounding_and_the_same_weights_to_save() -> None:
    plain, compiled = make(Machine(), drop_path=0.0), make(Machine(compile=True), drop_path=0.0)
    assert distance(gradients(compiled), gradients(plain)) < 1e-5
    assert plain.encoder is not None
    assert compiled.encoder is not None
    assert list(compiled.encoder.state_dict()) == list(plain.encoder.state_dict())


@pytest.mark.parametrize(("precision", "most"), [("bf16", 3e-2), ("fp16", 5e-3), ("tf32", 0.0)])
def test_half_precisions_are_near_float32(precision: str, most: float) -> None:
    """On the CPU TF32 is float32."""
    true = gradients(make(Machine(), drop_path=0.0))
    engine = make(Machine(), precision=precision, drop_path=0.0)
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision == "tf32")
    assert distance(gradients(engine), true) <= most
