"""Phase 6: both halves take the step together, or neither does."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.aggregators import build_aggregator
from trainer.batchnorm import RunningStats
from trainer.comm import Comm
from trainer.config import Aggregator, Optim, RunConfig
from trainer.errors import TrainerError
from trainer.loading.shards import Shard, SlideInput
from trainer.sampler import StepPlan
from trainer.schedule import weight_decay
from trainer.step import Engine, Outcome
from trainer.topology import Topology
from trainer.update import Update

PLAN = StepPlan(0, 0, "slide_a", 6, 6)


class Encoder(nn.Module):
    """Mean colour, BatchNorm, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(3), nn.Linear(3, 4)

    def forward(self, tiles_NHWC: Tensor) -> Tensor:
        features: Tensor = self.layer(self.norm(tiles_NHWC.float().mean((1, 2)) / 255))
        return features


def make(optim: Optim, autocast: torch.dtype | None = None) -> tuple[Engine, Update]:
    torch.manual_seed(0)
    comm = Comm(Topology.make(1, "auto", 1), 0, torch.device("cpu"))
    aggregator = build_aggregator(Aggregator(hidden=4), 4, 2)
    engine = Engine(comm, Encoder(), aggregator, num_features=4, seed=0, autocast=autocast)
    engine.set_training(True)
    return engine, Update(engine, replace(RunConfig(), optim=optim))


def statistics(engine: Engine) -> list[Tensor]:
    """BatchNorm's running ones."""
    assert isinstance(engine.encoder, Encoder)
    norm = engine.encoder.norm
    return [value.detach().clone() for value in (norm.running_mean, norm.running_var) if value is not None]


def parameters(engine: Engine) -> list[Tensor]:
    assert engine.encoder is not None
    assert engine.aggregator is not None
    return [*engine.encoder.parameters(), *engine.aggregator.parameters()]


def step(engine: Engine, update: Update, number: int = 0, label: float = 1, **given: Any) -> list[Outcome]:
    """One step on six tiles; `given` puts something else than its own into the outcomes."""
    generator = torch.Generator().manual_seed(number)
    tiles = torch.randint(0, 256, (6, 4, 4, 3), dtype=torch.uint8, generator=generator)
    shard = Shard(0, tiles, torch.zeros(6, 2, dtype=torch.int32))
    update.begin(1.0, 0.01)
    outcomes = engine.step([SlideInput(PLAN, [shard], (label,))])
    update.finish([replace(outcome, **given) for outcome in outcomes], number)
    return outcomes


def test_the_norm_is_that_of_both_halves_and_clipping_shortens_both_alike() -> None:
    engine, update = make(Optim(clip=1e-3))
    (outcome,) = step(engine, update)
    free, freely = make(Optim())
    step(free, freely)
    squares = [float(p.grad.double().square().sum()) for p in parameters(free) if p.grad is not None]
    assert outcome.gradient_norm == pytest.approx(sum(squares) ** 0.5, rel=1e-5)
    assert outcome.gradient_norm > 1e-3
    for clipped, whole in zip(parameters(engine), parameters(free), strict=True):
        assert clipped.grad is not None
        assert whole.grad is not None
        torch.testing.assert_close(clipped.grad, whole.grad * (1e-3 / outcome.gradient_norm))


def test_a_gradient_within_the_limit_is_left_to_the_last_bit() -> None:
    (engine, update), (free, freely) = make(Optim(clip=1e6)), make(Optim())
    for number in range(3):
        step(engine, update, number)
        step(free, freely, number)
    assert all(torch.equal(a, b) for a, b in zip(parameters(engine), parameters(free), strict=True))


def test_averaged_weights_are_those_of_the_formula_and_are_scored_by() -> None:
    engine, update = make(Optim(ema=0.5, lr=0.1))
    states = []
    for number in range(3):
        step(engine, update, number)
        states.append([*(p.detach().clone() for p in parameters(engine)), *statistics(engine)])
    expected = [0.5 * (0.5 * a + 0.5 * b) + 0.5 * c for a, b, c in zip(*states, strict=True)]
    with update.averaged():
        found = [*(p.detach().clone() for p in parameters(engine)), *statistics(engine)]
        assert engine.side.encoder is engine.encoder
        assert isinstance(engine.encoder, Encoder)
    for value, true in zip(found, expected, strict=True):
        torch.testing.assert_close(value, true)
    now = [*parameters(engine), *statistics(engine)]
    assert all(torch.equal(a, b) for a, b in zip(now, states[-1], strict=True))


@pytest.mark.parametrize(("given", "what"), [({"loss": float("nan")}, "the loss"), ({}, "the gradient")])
def test_what_is_no_number_ends_the_run_before_anything_changes(given: dict[str, float], what: str) -> None:
    engine, update = make(Optim())
    step(engine, update)
    before = copy.deepcopy(update.state_dict())
    with pytest.raises(TrainerError, match=rf"^optimiser step 7, slide slide_a: {what} is not a number"):
        step(engine, update, 7, gradient_norm=float("inf"), **given)
    after = update.state_dict()
    for half, content in before.items():
        for name, value in content["model"].items():
            if "running" not in name and "tracked" not in name:
                assert torch.equal(after[half]["model"][name], value), name


def test_an_overflow_in_half_precision_halves_the_scale_and_leaves_everything_as_it_was() -> None:
    engine, update = make(Optim(precision="fp16"), torch.float16)
    assert engine.loss_scale == 2.0**16
    step(engine, update)
    before = copy.deepcopy(update.state_dict())
    engine.loss_scale = 3e38  # Too much for any gradient.
    step(engine, update, 1)
    assert engine.loss_scale == 1.5e38
    for half, content in update.state_dict().items():
        for name, value in content["model"].items():
            assert torch.equal(value, before[half]["model"][name]), name


def test_the_scale_of_the_loss_is_no_part_of_the_step() -> None:
    results = []
    for scale in (1.0, 2.0**16):
        engine, update = make(Optim(precision="fp16"), torch.float16)
        engine.loss_scale = scale
        (outcome,) = step(engine, update)
        results.append((outcome.gradient_norm, parameters(engine)))
    (norm, plain), (scaled_norm, scaled) = results
    assert scaled_norm == pytest.approx(norm, rel=1e-2)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_scale_grows_again_and_comes_back_with_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.update._GROWTH_STEPS", 2)
    engine, update = make(Optim(precision="fp16"), torch.float16)
    for number in range(3):
        step(engine, update, number)
    assert update.scale_state() == [2.0**17, 1]
    again, updated = make(Optim(precision="fp16"), torch.float16)
    updated.load_state_dict(copy.deepcopy(update.state_dict()), update.scale_state())
    for number in (3, 4):
        step(engine, update, number)
        step(again, updated, number)
    assert updated.scale_state() == update.scale_state() == [2.0**18, 1]
    assert all(torch.equal(a, b) for a, b in zip(parameters(again), parameters(engine), strict=True))


def test_weight_decay_goes_from_its_first_to_its_last_value() -> None:
    found = [weight_decay(i, num_steps=10, first=0.04, last=0.4) for i in (0, 5, 10, 11)]
    assert found == pytest.approx([0.04, 0.22, 0.4, 0.4])


@pytest.mark.parametrize("encoder", [Encoder(), nn.Linear(3, 4)])
def test_what_ranks_add_up_lies_with_the_gradients(encoder: nn.Module) -> None:
    """NCCL adds up what is on the GPU: also where there is no BatchNorm to measure."""
    stats = RunningStats(encoder.to("meta"))
    assert {tensor.device.type for tensor in (*stats.sums, stats.num_tiles)} == {"meta"}
