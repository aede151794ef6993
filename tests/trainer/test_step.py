"""One answer: a slide's gradients do not depend on how its virtual ranks are spread over processes, nor on memory."""

import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manifests import part_bounds
from trainer import config
from trainer.aggregators import build_aggregator
from trainer.comm import Comm
from trainer.config import Aggregator, Augment
from trainer.encoders.encoder import build_encoder
from trainer.loading.shards import NO_CELLS, Reads, Shard, SlideInput
from trainer.ranks import run_ranks
from trainer.sampler import StepPlan
from trainer.step import Engine
from trainer.topology import Topology

NUM_VIRTUAL, NUM_TILES = 6, 23


class Encoder(nn.Module):
    """Convolution, BatchNorm and dropout over uint8 NHWC tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Conv2d(8, 12, 3, 2, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    def forward(self, tiles_NHWC: Tensor) -> Tensor:
        features: Tensor = self.layers(tiles_NHWC.permute(0, 3, 1, 2).double() / 255)
        return features


def shards_of(tiles: Tensor, topology: Topology, rank: int) -> list[Shard]:
    """A rank's shards of a slide, six tiles in a row of its grid."""
    bounds = {v: part_bounds(len(tiles), v, topology.num_virtual) for v in topology.virtual_of(rank)}
    places = torch.arange(len(tiles), dtype=torch.int32)
    cells = torch.stack([places % 6, places // 6], 1)
    return [Shard(v, tiles[begin:end], cells[begin:end]) for v, (begin, end) in bounds.items()]


def make_engine(comm: Comm, encoder: nn.Module, aggregator: nn.Module, **given: Any) -> Engine:
    """The halves that this rank holds."""
    halves = (encoder if comm.is_encoder else None, aggregator if comm.is_aggregator else None)
    return Engine(comm, *halves, **({"num_features": 12, "seed": 5} | given))


def one_step(
    rank: int, world_size: int, mode: str, num_virtual: int, num_tiles: int, keep: int | None, steps: int = 1
) -> dict[str, Tensor]:
    """What this rank holds after `steps` steps of plain SGD: gradients, parameters, buffers by name, and the loss."""
    torch.manual_seed(0)
    encoder, aggregator = Encoder().double(), build_aggregator(Aggregator(hidden=8, dropout=0.2), 12, 2).double()
    comm = Comm(Topology.make(world_size, mode, num_virtual), rank, torch.device("cpu"))  # type: ignore[arg-type]
    engine = make_engine(comm, encoder, aggregator, keep=keep, augment=Augment())
    engine.set_training(True)
    halves = {"encoder": engine.encoder, "aggregator": engine.aggregator}
    generator = torch.Generator().manual_seed(1)
    tiles = torch.randint(0, 256, (num_tiles, 16, 16, 3), dtype=torch.uint8, generator=generator)
    found: dict[str, Tensor] = {}
    for index in range(steps):
        plan = StepPlan(index, 0, "slide", num_tiles, num_tiles)
        (outcome,) = engine.step([SlideInput(plan, shards_of(tiles, comm.topology, rank), (1,))])
        assert not outcome.error
        for name, half in halves.items():
            for key, parameter in half.named_parameters() if half is not None else ():
                assert parameter.grad is not None
                found[f"{name}.{key}.grad"] = parameter.grad.clone()
                with torch.no_grad():
                    parameter -= 0.1 * parameter.grad
                parameter.grad = None
    for name, half in halves.items():
        if half is not None:
            found |= {f"{name}.{key}": value.clone() for key, value in half.state_dict().items()}
    if comm.is_aggregator:
        found["loss"] = torch.tensor(outcome.loss, dtype=torch.float64)
    return found


def merged(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The halves of all ranks together; ranks that hold the same half must agree to the last bit."""
    whole: dict[str, Tensor] = {}
    for result in results:
        for name, value in result.items():
            assert name not in whole or torch.equal(whole[name], value), name
            whole[name] = value
    return whole


def assert_close(found: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    assert found.keys() == true.keys()
    for name, value in true.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
def test_v6_on_one_two_and_three_encoder_ranks_is_one_answer() -> None:
    """BatchNorm, dropout and augmentation on, float64, three steps."""
    arguments: tuple[Any, ...] = (NUM_VIRTUAL, NUM_TILES, None, 3)
    alone = one_step(0, 1, "shared", *arguments)
    assert alone["encoder.layers.1.num_batches_tracked"] == 3
    for world_size, mode in ((2, "dedicated"), (3, "dedicated"), (4, "dedicated"), (2, "shared"), (3, "shared")):
        assert_close(merged(run_ranks(one_step, world_size, mode, *arguments)), alone)


@pytest.mark.parametrize("keep", [0, 1, 4])
@pytest.mark.parametrize("num_tiles", [NUM_TILES, 4, 1])
def test_graphs_that_are_not_kept_change_nothing(keep: int, num_tiles: int) -> None:
    """23 tiles never split evenly into 6; 4 leave shards empty; 1 is normalised by running statistics."""
    assert_close(
        one_step(0, 1, "shared", NUM_VIRTUAL, num_tiles, keep), one_step(0, 1, "shared", NUM_VIRTUAL, num_tiles, None)
    )


class Passing:
    """Shards whose memory is used for something else as soon as the next is asked for."""

    reads = Reads()

    def __init__(self, tiles: list[Tensor], num_again: int) -> None:
        self._tiles, self._num_again = tiles, num_again

    def first(self) -> Iterator[Shard]:
        yield from self._pass(range(len(self._tiles)))

    def again(self) -> Iterator[Shard]:
        yield from self._pass(reversed(range(self._num_again)))

    def will_reread(self) -> bool:
        return self._num_again > 0

    def _pass(self, which: Iterable[int]) -> Iterator[Shard]:
        for v in which:
            passing = self._tiles[v].clone()
            yield Shard(v, passing, torch.zeros(len(passing), 2, dtype=torch.int32))
            passing.fill_(255)


@pytest.mark.parametrize("keep", [None, 0, 1])
@pytest.mark.parametrize("augment", [None, Augment(), Augment(stain=0.1, blur=0.5)])
def test_no_graph_needs_the_memory_of_its_tiles(keep: int | None, augment: Augment | None) -> None:
    """With the encoder of real runs: what autograd saves is its floating-point copy."""

    def gradients(is_passing: bool) -> list[Tensor]:
        torch.manual_seed(0)
        encoder = build_encoder(config.Encoder(name="test_resnet"), 32).double()
        aggregator = build_aggregator(Aggregator(hidden=8), encoder.num_features, 2).double()
        comm = Comm(Topology.make(1, "shared", 3), 0, torch.device("cpu"))
        engine = Engine(
            comm, encoder, aggregator, num_features=encoder.num_features, seed=0, keep=keep, augment=augment
        )
        engine.set_training(True)
        generator = torch.Generator().manual_seed(1)
        tiles = [torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=generator) for _ in range(3)]
        plan = StepPlan(0, 0, "slide", 12, 12)
        source = Passing(tiles, 0 if keep is None else 3 - keep)
        held = SlideInput(plan, shards_of(torch.cat(tiles), comm.topology, 0), (1,))
        (outcome,) = engine.step([SlideInput(plan, source.first(), (1,), source) if is_passing else held])
        assert not outcome.error
        return [p.grad for half in (encoder, aggregator) for p in half.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


def agreeing(rank: int, world_size: int) -> tuple[str, list[list[float]]]:
    comm = Comm(Topology.make(world_size, "dedicated", 2), rank, torch.device("cpu"))
    return comm.agree("", 2.0**40 + rank, rank / 4)


def test_all_ranks_know_each_others_numbers_exactly() -> None:
    for error, by_rank in run_ranks(agreeing, 3):
        assert not error
        assert by_rank == [[2.0**40 + rank, rank / 4] for rank in range(3)]


def test_running_statistics_move_once_per_tile() -> None:
    """Virtual ranks of equal size: the mean of what each alone would have made of them."""
    whole = one_step(0, 1, "shared", 2, 8, 0)
    torch.manual_seed(0)
    encoder = Encoder().double()
    encoder.layers[3].p = 0.0  # type: ignore[assignment]
    start = encoder.layers[1].running_mean.clone()  # type: ignore[operator,union-attr]
    assert not torch.equal(whole["encoder.layers.1.running_mean"], start)
    generator = torch.Generator().manual_seed(1)
    tiles = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8, generator=generator)
    # The first layer's statistics are those of its convolution's output: flips change which pixels meet the stride,
    # so compare with the momentum alone: 0.9 of the start and a tenth of something of the size of the batch mean.
    mean = encoder.layers[0](tiles.permute(0, 3, 1, 2).double() / 255).mean((0, 2, 3))
    moved = whole["encoder.layers.1.running_mean"] - 0.9 * start
    torch.testing.assert_close(moved, 0.1 * mean, rtol=0.2, atol=0.01)


def calibrated_step(rank: int, world_size: int, mode: str, is_frozen: bool = False) -> dict[str, Tensor]:
    """BatchNorm calibrated on two slides, then a step on both with it frozen."""
    torch.manual_seed(0)
    encoder, aggregator = Encoder().double(), build_aggregator(Aggregator(hidden=8), 12, 2).double()
    comm = Comm(Topology.make(world_size, mode, NUM_VIRTUAL), rank, torch.device("cpu"))  # type: ignore[arg-type]
    engine = make_engine(comm, encoder, aggregator, is_frozen=is_frozen, augment=Augment(), batchnorm="calibrated")
    encoder.requires_grad_(not is_frozen)
    slides = [slide_input(comm.topology, rank, f"slide {i}", num_tiles, i) for i, num_tiles in enumerate((23, 8))]
    engine.calibrate(slides)
    engine.set_training(True)
    outcomes = engine.step(slides)
    found = {name: value.clone() for name, value in engine.encoder.state_dict().items()} if engine.encoder else {}
    for half in (engine.encoder, engine.aggregator):
        for name, parameter in half.named_parameters() if half is not None else ():
            if parameter.requires_grad:
                assert parameter.grad is not None
                found[f"{name}.grad"] = parameter.grad.clone()
    if comm.is_aggregator:
        found["losses"] = torch.tensor([outcome.loss for outcome in outcomes])
    return found


def slide_input(topology: Topology, rank: int, name: str, num_tiles: int, label: int, index: int = 0) -> SlideInput:
    """Random tiles of a slide, as this rank's shards."""
    generator = torch.Generator().manual_seed(num_tiles)
    tiles = torch.randint(0, 256, (num_tiles, 16, 16, 3), dtype=torch.uint8, generator=generator)
    plan = StepPlan(0, index, name, num_tiles, num_tiles)
    return SlideInput(plan, shards_of(tiles, topology, rank), (label,))


@pytest.mark.parametrize("is_frozen", [False, True])
def test_calibration_is_one_answer_and_then_frozen(is_frozen: bool) -> None:
    alone = calibrated_step(0, 1, "shared", is_frozen)
    start = Encoder().layers[1]
    assert not torch.equal(alone["layers.1.running_mean"], start.running_mean)  # type: ignore[union-attr]
    assert_close(merged(run_ranks(calibrated_step, 3, "dedicated", is_frozen)), alone)


def calibrated_beside_a_bad_slide(rank: int, world_size: int, with_bad: bool) -> list[Tensor]:
    """BatchNorm's statistics after a calibration on one slide, and on another that some rank cannot read to its end."""
    torch.manual_seed(0)
    comm = Comm(Topology.make(world_size, "auto", NUM_VIRTUAL), rank, torch.device("cpu"))
    encoder = Encoder().double() if comm.is_encoder else None
    half = None if comm.is_encoder else build_aggregator(Aggregator(hidden=8), 12, 2).double()
    engine = Engine(comm, encoder, half, num_features=12, seed=5, batchnorm="calibrated")
    slides = [slide_input(comm.topology, rank, f"slide {i}", num_tiles, i) for i, num_tiles in enumerate((23, 31))]
    if NUM_VIRTUAL - 1 in comm.topology.virtual_of(rank):
        last = Shard(NUM_VIRTUAL - 1, torch.zeros(0, 1, 1, 3, dtype=torch.uint8), NO_CELLS, "slide 1: no")
        slides[1] = slides[1]._replace(shards=[*list(slides[1].shards)[:-1], last])
    engine.calibrate(slides[: 1 + with_bad])
    return [buffer.clone() for buffer in encoder.buffers()] if encoder is not None else []


def test_a_slide_that_cannot_be_read_whole_leaves_no_trace_in_the_calibration() -> None:
    without = run_ranks(calibrated_beside_a_bad_slide, 3, False)
    beside = run_ranks(calibrated_beside_a_bad_slide, 3, True)
    assert without[1]
    for ours, theirs in zip(without[1] + without[2], beside[1] + beside[2], strict=True):
        assert torch.equal(ours, theirs)


def test_the_gradient_of_a_step_is_the_mean_over_its_slides() -> None:
    def gradients(which: tuple[int, ...]) -> list[Tensor]:
        torch.manual_seed(0)
        encoder, aggregator = Encoder().double(), build_aggregator(Aggregator(hidden=8), 12, 2).double()
        topology = Topology.make(1, "shared", 2)
        comm = Comm(topology, 0, torch.device("cpu"))
        engine = Engine(comm, encoder, aggregator, num_features=12, seed=0, batchnorm="frozen")
        engine.set_training(True)
        slides = [slide_input(topology, 0, f"slide {i}", 6 + i, i % 2) for i in range(3)]
        bad = SlideInput(
            slides[0].plan, [Shard(0, torch.zeros(0, 1, 1, 3, dtype=torch.uint8), NO_CELLS, "no")] * 2, (0,)
        )
        outcomes = engine.step([*(slides[i] for i in which), bad])
        assert [bool(outcome.error) for outcome in outcomes] == [False] * len(which) + [True]
        halves = (encoder, aggregator)
        return [p.grad for half in halves for p in half.parameters() if p.grad is not None]

    together = gradients((0, 1, 2))
    apart = [gradients((i,)) for i in range(3)]
    for mean, *singles in zip(together, *apart, strict=True):
        torch.testing.assert_close(mean, torch.stack(singles).mean(0), rtol=1e-12, atol=1e-14)


def grouped_step(
    rank: int, world_size: int, mode: str, num_groups: int, aggregator: str, bad: int | None = None
) -> dict[str, Tensor]:
    """Three slides in one step, one of them perhaps unreadable on some rank: gradients, buffers, losses."""
    torch.manual_seed(0)
    config = Aggregator(name=aggregator, hidden=8, dropout=0.2)  # type: ignore[arg-type]
    encoder, half = Encoder().double(), build_aggregator(config, 12, 2).double()
    topology = Topology.make(world_size, mode, NUM_VIRTUAL, num_groups)  # type: ignore[arg-type]
    comm = Comm(topology, rank, torch.device("cpu"))
    engine = make_engine(comm, encoder, half, keep=1, augment=Augment())
    engine.set_training(True)
    slides = [slide_input(topology, rank, f"slide {i}", n, i % 2, i) for i, n in enumerate((23, 2, 9))]
    if bad is not None and 0 in topology.virtual_of(rank):
        failed = Shard(0, torch.zeros(0, 1, 1, 3, dtype=torch.uint8), NO_CELLS, f"slide {bad}: no")
        slides[bad] = slides[bad]._replace(shards=[failed, *list(slides[bad].shards)[1:]])
    outcomes = engine.step(s for s in slides if topology.group_of_slide(s.plan.index) == comm.group)
    assert [o.plan.slide_id for o in outcomes] == ["slide 0", "slide 1", "slide 2"]
    assert [bool(o.error) for o in outcomes] == [i == bad for i in range(3)]
    found = {f"encoder.{k}": v.clone() for k, v in engine.encoder.state_dict().items()} if engine.encoder else {}
    for name, module in (("encoder", engine.encoder), ("aggregator", engine.aggregator)):
        for key, parameter in module.named_parameters() if module is not None else ():
            assert parameter.grad is not None
            found[f"{name}.{key}.grad"] = parameter.grad.clone()
    if comm.is_main:
        found["losses"] = torch.tensor([o.loss for o in outcomes if not o.error], dtype=torch.float64)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "mode", "num_groups", "aggregator", "bad"),
    [
        (2, "shared", 2, "transmil", None),
        (4, "dedicated", 2, "transmil", None),
        (4, "shared", 2, "gma", 1),
        (4, "shared", 4, "gma", 0),  # One group has no slide.
        (6, "dedicated", 3, "gma", None),
    ],
)
def test_groups_of_ranks_give_the_answer_of_one_process(
    world_size: int, mode: str, num_groups: int, aggregator: str, bad: int | None
) -> None:
    """Gradients are the mean over the slides that could be read; BatchNorm moves by all their tiles."""
    alone = grouped_step(0, 1, "shared", 1, aggregator, bad)
    assert_close(merged(run_ranks(grouped_step, world_size, mode, num_groups, aggregator, bad)), alone)


def frozen_step(rank: int, world_size: int, num_groups: int) -> dict[str, Tensor]:
    """Two slides, the encoder frozen: the aggregator's gradients, and whether the encoder was left alone."""
    torch.manual_seed(0)
    encoder, half = Encoder().double(), build_aggregator(Aggregator(hidden=8), 12, 2).double()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.requires_grad_(False)
    comm = Comm(Topology.make(world_size, "auto", NUM_VIRTUAL, num_groups), rank, torch.device("cpu"))
    engine = make_engine(comm, encoder, half, is_frozen=True, augment=Augment(), batchnorm="frozen")
    engine.set_training(True)
    encoder.layers[3].p = 0.0  # type: ignore[assignment]
    slides = [slide_input(comm.topology, rank, f"slide {i}", n, i % 2, i) for i, n in enumerate((23, 4))]
    outcomes = engine.step(s for s in slides if comm.topology.group_of_slide(s.plan.index) == comm.group)
    assert not any(outcome.error for outcome in outcomes)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    return {name: p.grad.clone() for name, p in half.named_parameters() if p.grad is not None}


def test_a_frozen_encoder_is_left_alone_and_the_aggregator_learns() -> None:
    alone = frozen_step(0, 1, 1)
    assert len(alone) == 7
    assert_close(merged(run_ranks(frozen_step, 3, 1)), alone)
    assert_close(merged(run_ranks(frozen_step, 4, 2)), alone)


class MeanOverRanks(nn.SyncBatchNorm):
    """What `nn.SyncBatchNorm`, which needs GPUs, does: one set of statistics over all encoder ranks."""

    group: Any = None

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x_NCHW)
        ours = torch.stack([x_NCHW.sum((0, 2, 3)), x_NCHW.square().sum((0, 2, 3))])
        count = x_NCHW.new_full((1, x_NCHW.shape[1]), x_NCHW.numel() / x_NCHW.shape[1])
        total, square, num = torch.distributed.nn.functional.all_reduce(torch.cat([ours, count]), group=self.group)
        mean, var = total / num, square / num - (total / num).square()
        if self.track_running_stats:
            for buffer, value in ((self.running_mean, mean), (self.running_var, var * num / (num - 1))):
                assert buffer is not None
                assert self.momentum is not None
                buffer.lerp_(value.detach(), self.momentum)
            self.num_batches_tracked += 1  # type: ignore[operator]
        scaled: Tensor = (x_NCHW - mean[:, None, None]) * (var[:, None, None] + self.eps).rsqrt()
        return scaled * self.weight[:, None, None] + self.bias[:, None, None]


def synced_step(rank: int, world_size: int, batchnorm: str, bad: bool = False) -> dict[str, Tensor]:
    """Slides of 23 and of 2 tiles, as many virtual ranks as encoder ranks, no dropout in the encoder."""
    torch.manual_seed(0)
    encoder, half = Encoder().double(), build_aggregator(Aggregator(hidden=8, dropout=0.2), 12, 2).double()
    encoder.layers[3].p = 0.0  # type: ignore[assignment]
    topology = Topology.make(world_size, "auto", None)
    comm = Comm(topology, rank, torch.device("cpu"))
    for i, layer in enumerate(encoder.layers) if batchnorm == "sync" else ():
        if isinstance(layer, nn.BatchNorm2d):
            encoder.layers[i] = MeanOverRanks(layer.num_features).double()
            encoder.layers[i].load_state_dict(layer.state_dict())
            encoder.layers[i].group = comm.encoder_group  # type: ignore[assignment]
    engine = make_engine(comm, encoder, half, batchnorm=batchnorm)
    engine.set_training(True)
    slides = [slide_input(topology, rank, f"slide {i}", n, i % 2, i) for i, n in enumerate((23, 2))]
    if bad:
        shards = list(slides[0].shards)
        if rank == world_size - 1:
            shards = [Shard(s.virtual_rank, s.tiles_NHWC[:0], s.cells_N2[:0], "slide 0: no") for s in shards]
        slides.insert(0, slides[0]._replace(shards=shards))
    outcomes = engine.step(slides)
    assert [bool(outcome.error) for outcome in outcomes] == [True] * bad + [False, False]
    found = {}
    for name, module in (("encoder", engine.encoder), ("aggregator", engine.aggregator)):
        if module is not None:
            found |= {
                f"{name}.{key}.grad": p.grad.clone() for key, p in module.named_parameters() if p.grad is not None
            }
            found |= {f"{name}.{key}": value.clone() for key, value in module.named_buffers()}
    return found


@pytest.mark.parametrize("bad", [False, True])
def test_synchronised_statistics_are_those_of_the_whole_slide(bad: bool) -> None:
    """A rank without tiles, and one that cannot read its own, keep nobody waiting."""
    together = merged(run_ranks(synced_step, 4, "sync", bad))
    assert_close(together, synced_step(0, 1, "running"))


def failing_step(rank: int, world_size: int) -> tuple[str, int]:
    """Rank 2 cannot read the first slide; all ranks skip it and go on with the second."""
    torch.manual_seed(0)
    encoder, aggregator = Encoder().double(), build_aggregator(Aggregator(hidden=8), 12, 2).double()
    comm = Comm(Topology.make(world_size, "dedicated", 2), rank, torch.device("cpu"))
    engine = Engine(
        comm, encoder if comm.is_encoder else None, aggregator if comm.is_aggregator else None, num_features=12, seed=0
    )
    engine.set_training(True)
    shards = shards_of(torch.zeros(8, 16, 16, 3, dtype=torch.uint8), comm.topology, rank)
    error = "slide bad: no" if rank == 2 else ""
    bad, good = engine.step(
        [
            SlideInput(
                StepPlan(0, 0, "bad", 8, 8),
                [Shard(s.virtual_rank, s.tiles_NHWC, s.cells_N2, error) for s in shards],
                (0,),
            ),
            SlideInput(StepPlan(0, 1, "good", 8, 8), shards, (0,)),
        ]
    )
    half = engine.encoder or engine.aggregator
    assert half is not None
    return bad.error + good.error, sum(p.grad is not None for p in half.parameters())


def test_a_slide_that_one_rank_cannot_read_is_skipped_by_all() -> None:
    for error, num_gradients in run_ranks(failing_step, 3):
        assert error == "slide bad: no"
        assert num_gradients > 0


def raising(rank: int, world_size: int) -> None:
    if rank == 0:
        raise ValueError(f"of {world_size}")


def test_run_ranks_tells_which_rank_failed() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 0 of 1.*ValueError: of 1"):
        run_ranks(raising, 1)


def killed(*_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_run_ranks_does_not_wait_for_a_rank_that_was_killed() -> None:
    with pytest.raises(TimeoutError, match="a rank was killed"):
        run_ranks(killed, 2)
