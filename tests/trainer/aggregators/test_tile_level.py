"""Tile-level learning against plain loops over tiles: losses, gradients, and what a slide's prediction is."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.aggregators import build_aggregator
from trainer.comm import Comm
from trainer.config import Aggregator
from trainer.heads import Head
from trainer.loading.shards import Shard, SlideInput
from trainer.sampler import StepPlan
from trainer.step import Engine
from trainer.targets import Task
from trainer.topology import Topology

NAN = math.nan
HEADS = {
    "classes": Head(task="classes", num_outputs=3, weights=(0.5, 1.0, 2.0)),
    "multilabel": Head(task="multilabel", num_outputs=3, weights=(1.0, 3.0, 0.5)),
    "regression": Head(task="regression", num_outputs=3, means=(10.0, 0.0, -2.0), stds=(4.0, 1.0, 0.5)),
}
TARGETS: dict[str, tuple[float, ...]] = {
    "classes": (2.0,),
    "multilabel": (1.0, NAN, 0.0),
    "regression": (12.0, 0.5, NAN),
}
TASKS: tuple[Task, ...] = ("classes", "multilabel", "regression")
NUM_FEATURES = 5


def built(name: str, task: Task) -> nn.Module:
    torch.manual_seed(0)
    aggregator = build_aggregator(Aggregator(name=name), NUM_FEATURES, 3, task)  # type: ignore[arg-type]
    return aggregator.double()


def random_features(num_tiles: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(num_tiles)
    return scale * torch.randn(num_tiles, NUM_FEATURES, generator=generator, dtype=torch.float64)


def tile_loss(outputs_C: Tensor, task: Task) -> Tensor:
    """Of one tile, by hand."""
    head, targets = HEADS[task], TARGETS[task]
    if task == "classes":
        label = int(targets[0])
        return -head.weights[label] * outputs_C.softmax(0)[label].log()
    of_columns = []
    for i, target in enumerate(targets):
        if math.isnan(target):
            continue
        if task == "multilabel":
            p = outputs_C[i].sigmoid()
            of_columns.append(-head.weights[i] * target * p.log() - (1 - target) * (1 - p).log())
        else:
            of_columns.append((outputs_C[i] - (target - head.means[i]) / head.stds[i]) ** 2)
    return torch.stack(of_columns).mean()


class Mean(nn.Module):
    """Tiles of one grey each to features: its weights times the grey."""

    num_features = NUM_FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-1, 1, NUM_FEATURES, dtype=torch.float64))

    def forward(self, tiles_NHWC: Tensor) -> Tensor:
        return torch.tanh(tiles_NHWC.double().mean((1, 2, 3))[:, None] / 100 * self.scale)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["tile_mean", "tile_max"])
def test_a_step_is_the_mean_over_tiles_of_their_losses_and_gradients(name: str, task: Task) -> None:
    """Of the real engine, over three virtual ranks of which one has no graph, against a loop of one tile at a time."""
    greys = [10, 200, 35, 140, 90, 255, 0]
    tiles_NHWC = torch.stack([torch.full((4, 4, 3), grey, dtype=torch.uint8) for grey in greys])
    cells_N2 = torch.zeros(7, 2, dtype=torch.int32)
    parts = [slice(0, 2), slice(2, 4), slice(4, 7)]
    shards = [Shard(i, tiles_NHWC[part], cells_N2[part]) for i, part in enumerate(parts)]
    encoder, aggregator = Mean(), built(name, task)
    comm = Comm(Topology.make(1, "auto", 3), 0, torch.device("cpu"))
    engine = Engine(comm, encoder, aggregator, num_features=NUM_FEATURES, seed=0, head=HEADS[task], keep=2)
    engine.set_training(True)
    (outcome,) = engine.step([SlideInput(StepPlan(0, 0, "s", 7, 7), shards, TARGETS[task])])

    plain_encoder, plain = Mean(), built(name, task)
    losses = []
    for tile_HWC in tiles_NHWC:
        loss = tile_loss(plain.classify(plain_encoder(tile_HWC[None])[0]), task)  # type: ignore[operator]
        (loss / len(tiles_NHWC)).backward()
        losses.append(loss.item())
    assert outcome.loss == pytest.approx(sum(losses) / 7, rel=1e-12)
    pairs = [*zip(encoder.parameters(), plain_encoder.parameters(), strict=True)]
    pairs += zip(aggregator.parameters(), plain.parameters(), strict=True)
    for ours, theirs in pairs:
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)


@torch.no_grad()
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("num_tiles", [1, 2, 30])
def test_a_slides_prediction_is_the_mean_of_its_tiles(task: Task, num_tiles: int) -> None:
    aggregator, features_ND = built("tile_mean", task).eval(), random_features(num_tiles)
    outputs_C, _ = aggregator(features_ND)
    of_tiles = [HEADS[task].predict(aggregator.classify(feature_D)) for feature_D in features_ND]  # type: ignore[operator]
    assert outputs_C.shape == (3,)
    torch.testing.assert_close(HEADS[task].predict(outputs_C), torch.stack(of_tiles).mean(0), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("num_tiles", [1, 2, 30])
def test_of_classes_the_highest_tile_is_that_most_probable_of_any_but_the_first(num_tiles: int) -> None:
    aggregator, features_ND = built("tile_max", "classes").eval(), random_features(num_tiles)
    outputs_C, shares_N = aggregator(features_ND)
    probs = [aggregator.classify(feature_D).softmax(0).tolist() for feature_D in features_ND]  # type: ignore[operator]
    highest = max(range(num_tiles), key=lambda i: max(probs[i][1:]))
    assert HEADS["classes"].predict(outputs_C).tolist() == pytest.approx(probs[highest], rel=1e-12)
    found = [max(p[1:]) for p in probs]
    assert shares_N.tolist() == pytest.approx([value / sum(found) for value in found], rel=1e-12)


@torch.no_grad()
def test_of_columns_each_has_its_own_highest_tile() -> None:
    aggregator, features_ND = built("tile_max", "multilabel").eval(), random_features(30)
    outputs_C, shares_N = aggregator(features_ND)
    probs_NC = aggregator.classify(features_ND).sigmoid()  # type: ignore[operator]
    assert len(set(probs_NC.argmax(0).tolist())) > 1
    torch.testing.assert_close(HEADS["multilabel"].predict(outputs_C), probs_NC.amax(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(shares_N, probs_NC.amax(1) / probs_NC.amax(1).sum(), rtol=1e-12, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("task", TASKS)
def test_predictions_beyond_what_probabilities_can_hold_stay_numbers(task: Task) -> None:
    """Outputs of some hundreds, in float32: probabilities are 0 and 1 to the last bit, their logarithms are not."""
    aggregator = built("tile_mean", task).float().eval()
    outputs_C, shares_N = aggregator(random_features(9, scale=500).float())
    assert outputs_C.isfinite().all()
    assert shares_N.isfinite().all()
    assert HEADS[task].predict(outputs_C).isfinite().all()


@torch.no_grad()
def test_tiles_that_are_all_sure_in_float32_are_still_told_apart() -> None:
    aggregator = built("tile_max", "classes").float().eval()
    nn.init.zeros_(aggregator.classify.weight)  # type: ignore[arg-type,union-attr]
    nn.init.zeros_(aggregator.classify.bias)  # type: ignore[arg-type,union-attr]
    aggregator.classify.weight[1, 0] = 1.0  # type: ignore[index,operator,union-attr]
    features_ND = torch.zeros(3, NUM_FEATURES)
    features_ND[:, 0] = torch.tensor([20.0, 30.0, 25.0])
    assert len(set(aggregator.classify(features_ND).softmax(1)[:, 1].tolist())) == 1  # type: ignore[operator]
    assert aggregator(features_ND)[1].argsort(descending=True).tolist() == [1, 2, 0]


@torch.no_grad()
def test_of_numbers_shares_are_what_stands_above_the_lowest_tile() -> None:
    aggregator, features_ND = built("tile_mean", "regression").eval(), random_features(6)
    sums_N = F.linear(features_ND, *aggregator.classify.parameters()).sum(1)  # type: ignore[arg-type,union-attr]
    above_N = sums_N - sums_N.min()
    torch.testing.assert_close(aggregator(features_ND)[1], above_N / above_N.sum())
    assert aggregator(features_ND[:1])[1].tolist() == [1.0]  # One tile stands above none.
