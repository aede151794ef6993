"""An encoder that is spread over ranks gives what a whole one gives, and nobody waits for a pass that does not come."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from tests.trainer.test_step import shards_of
from tests.trainer.test_train import QUICK, arguments, losses, train, weights
from trainer import encode
from trainer.checkpoint import list_checkpoints
from trainer.cli import Train
from trainer.comm import Comm
from trainer.config import Encoder, Machine, Optim, RunConfig
from trainer.errors import TrainerError
from trainer.heads import Head
from trainer.loading.shards import NO_CELLS, Reads, Shard, SlideInput
from trainer.model import build_engine
from trainer.ranks import run_ranks
from trainer.sampler import StepPlan
from trainer.topology import Topology
from trainer.update import Update

SIZES = (23, 2, 9)
VIT = ("--encoder.name", "test_vit", "--encoder.batchnorm", "running", "--encoder.drop-path", "0.1")


class Lost:
    """A slide's tiles that cannot be read again, on one rank."""

    reads = Reads()

    def __init__(self, shards: list[Shard], *, is_mine: bool) -> None:
        self._shards, self._is_mine = shards, is_mine

    def will_reread(self) -> bool:
        return True

    def again(self) -> Iterator[Shard]:
        for shard in reversed(self._shards):
            yield _gone(shard) if self._is_mine else shard


def _gone(shard: Shard) -> Shard:
    return Shard(shard.virtual_rank, shard.tiles_NHWC[:0], NO_CELLS, "slide lost: gone")


def _lose(slide: SlideInput, fault: str, keep: int, *, is_mine: bool) -> SlideInput:
    """The slide, with tiles that cannot be read the first or the second time."""
    shards = list(slide.shards)
    if fault == "first":
        return slide._replace(shards=[_gone(shard) for shard in shards]) if is_mine else slide
    needed_again = [shard for shard in shards[: max(0, len(shards) - keep)] if len(shard.tiles_NHWC)]
    return slide._replace(source=Lost(needed_again, is_mine=is_mine))


def few_steps(rank: int, world_size: int, is_on: bool, keep: int, fault: str) -> dict[str, Tensor]:
    """AdamW steps over slides of 23, 2 and 9 tiles in five virtual ranks: norms, outputs, weights and moments."""
    encode._CHUNK = 2
    comm = Comm(Topology.make(world_size, "auto", 5), rank, torch.device("cpu"))
    config = RunConfig(
        encoder=Encoder(name="test_vit", drop_path=0.2),
        optim=Optim(precision="float64", clip=0.5, lr=1e-3),
        machine=Machine(fsdp=is_on, keep=keep),
    )
    engine = build_engine(config, comm, tile_px=32, head=Head.of_classes(2))
    assert isinstance(engine.encoder, FSDPModule) == (is_on and comm.is_encoder)
    update, found = Update(engine, config), dict[str, Tensor]()
    for step, num_tiles in enumerate(SIZES):
        tiles = torch.randint(0, 256, (num_tiles, 32, 32, 3), generator=torch.Generator().manual_seed(step)).byte()
        plan = StepPlan(0, step, f"slide{step}", num_tiles, num_tiles)
        slide = SlideInput(plan, shards_of(tiles, comm.topology, rank), (step % 2,))
        engine.set_training(True)
        update.begin(1.0, 0.01)
        if fault:
            (skipped,) = engine.step([_lose(slide, fault, keep, is_mine=rank == world_size - 1)])
            assert skipped.error == "slide lost: gone"
            update.begin(1.0, 0.01)
        outcomes = engine.step([slide])
        update.finish(outcomes, step)
        engine.set_training(False)
        scored = engine.score(slide)
        found[f"norm{step}"] = torch.tensor(outcomes[0].gradient_norm, dtype=torch.float64)
        if scored.outputs_C is not None:
            found[f"outputs{step}"] = scored.outputs_C
    is_written = {"encoder": comm.is_first_encoder, "aggregator": comm.is_main}
    for name, saved in update.state_dict().items():
        if is_written[name]:
            moments = saved["optimizer"]["state"]
            found |= {f"{name}.{key}": value for key, value in saved["model"].items()}
            found |= {f"{name}.{i}.{key}": value for i, of in moments.items() for key, value in of.items()}
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    (found,) = run_ranks(few_steps, 1, False, 5, "")
    return dict(found)


@pytest.mark.parametrize(("keep", "fault"), [(0, ""), (1, "second"), (5, "first")])
def test_spread_over_two_encoder_ranks_it_is_one_process_s(keep: int, fault: str, alone: dict[str, Tensor]) -> None:
    """Three and two virtual ranks, some empty, graphs kept or not; and slides that one rank cannot read."""
    spread: dict[str, Tensor] = {}
    for found in run_ranks(few_steps, 3, True, keep, fault):
        spread |= found
    assert spread.keys() == alone.keys()
    assert len(alone) > 100
    for name, value in alone.items():
        torch.testing.assert_close(spread[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.slow
def test_a_run_goes_on_with_and_without_it(
    small_manifests: Path, small_cohort: Path, tmp_path: Path, slidegrad: Callable[..., Any]
) -> None:
    """Checkpoints hold whole tensors: an epoch spread over two encoder ranks, the next in one process."""
    labels, whole, run = small_cohort / "labels.csv", tmp_path / "whole", tmp_path / "run"
    train(small_manifests, labels, whole, *QUICK, *VIT)
    ended = slidegrad("train", *arguments(small_manifests, labels, run, *QUICK, *VIT, "--machine.fsdp", "--nproc", "3"))
    assert ended.code == 0, ended.stderr
    true, found = weights(whole), weights(run)
    assert max(float((true[n] - found[n]).abs().max()) for n in true) < 1e-10
    shutil.rmtree(list_checkpoints(run)[-1])
    train(small_manifests, labels, run, "--resume", "--machine.no-fsdp")
    found = weights(run)
    assert max(float((true[n] - found[n]).abs().max()) for n in true) < 1e-10
    assert [slide for slide, _ in losses(run)] == [slide for slide, _ in losses(whole)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--encoder.name", "test_resnet"), "machine.fsdp with encoder.name 'test_resnet': expected a model in blocks"),
        ((*VIT, "--optim.ema", "0.9"), "optim.ema is 0.9: expected None, as machine.fsdp is on"),
        ((*VIT, "--machine.groups", "2"), "machine.groups is 2: expected 1, as machine.fsdp is on"),
    ],
)
def test_what_it_cannot_do_is_said(
    words: tuple[str, ...], sentence: str, small_manifests: Path, small_cohort: Path, tmp_path: Path
) -> None:
    given = arguments(small_manifests, small_cohort / "labels.csv", tmp_path / "run", "--machine.fsdp", *words)
    with pytest.raises(TrainerError, match=re.escape(sentence)):
        Train.parse([*given, "--encoder.batchnorm", "running"]).run()
