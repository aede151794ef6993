"""The projection is the formula of its docstring, and what goes into it is measured as it says."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import trainer.projection
from trainer.config import Cohort, RunConfig, Tiles
from trainer.projection import (
    EncodingRate,
    EpochTiles,
    Projection,
    ReadingRate,
    count_epoch,
    in_words,
    measure_encoding,
    project,
    shard_size,
)
from trainer.recipes import get_recipe
from trainer.topology import Topology

TILES = EpochTiles(num_encoded=1_000, num_read=800, num_scored=200)
GPU = EncodingRate(both_s=0.03, forward_s=0.01, num_tiles=64, is_gpu=True)
CPU = dataclasses.replace(GPU, is_gpu=False)


def on(num_processes: int, num_virtual: int | None = None) -> Topology:
    return Topology.make(num_processes, "auto", num_virtual)


def test_on_a_gpu_reading_hides_behind_encoding_or_encoding_behind_reading() -> None:
    quick = project(TILES, ReadingRate(decode=500, storage=500), GPU, on(1), "all")  # 4 ms a tile.
    assert quick == Projection(
        num_processes=1,
        num_encoders=1,
        reading_s=pytest.approx(4.0),
        encoding_s=pytest.approx(32.0),
        epoch_s=pytest.approx(32.0),
        bottleneck="encoding",
    )
    slow = project(TILES, ReadingRate(decode=100, storage=20), GPU, on(1), "all")  # 60 ms a tile.
    assert (slow.epoch_s, slow.bottleneck) == (pytest.approx(60.0), "storage")
    # Validation is bound by reading where training is not.
    mixed = project(TILES, ReadingRate(decode=50), GPU, on(1), "all")  # 20 ms a tile.
    assert (mixed.epoch_s, mixed.bottleneck) == (pytest.approx(30.0 + 4.0), "encoding")


def test_on_a_cpu_decoding_takes_its_time_from_encoding() -> None:
    alone = project(TILES, ReadingRate(decode=100), CPU, on(1), "all")
    assert alone.epoch_s == pytest.approx(1_000 * 0.01 + 32.0)
    assert project(TILES, ReadingRate(decode=100), CPU, on(4), "all").epoch_s == alone.epoch_s
    # Storage is waited for meanwhile.
    waits = project(TILES, ReadingRate(decode=100, storage=10), CPU, on(1), "all")
    assert (waits.epoch_s, waits.bottleneck) == (pytest.approx(1_000 * 0.11), "storage")
    assert project(TILES, ReadingRate(decode=10, storage=1_000), CPU, on(1), "all").bottleneck == "decoding"


@pytest.mark.parametrize(
    ("num_processes", "num_virtual", "share"),
    [(1, 11, 1.0), (3, 11, 6 / 11), (12, 11, 1 / 11), (13, 11, 1 / 11), (5, None, 1 / 4)],
)
def test_the_busiest_rank_is_waited_for(num_processes: int, num_virtual: int | None, share: float) -> None:
    projected = project(TILES, None, GPU, on(num_processes, num_virtual), "all")
    assert projected.epoch_s == pytest.approx(32.0 * share)
    assert (projected.reading_s, projected.bottleneck) == (None, "")


@pytest.mark.parametrize(("keep", "twice"), [("auto", 0), ("all", 0), (11, 0), (6, 0), (4, 2 / 6), (0, 1)])
def test_tiles_whose_graph_is_not_kept_are_encoded_twice(keep: int | str, twice: float) -> None:
    projected = project(TILES, None, GPU, on(3, 11), keep)
    assert projected.encoding_s == pytest.approx(6 / 11 * (32.0 + 10.0 * twice))


def test_an_epochs_tiles_follow_from_the_recipe() -> None:
    cohort = Cohort(val_fraction=0.1, test_fraction=0.3, fraction_per_epoch=0.5)
    slides = [50] * 100 + [500] * 100
    every = RunConfig(cohort=cohort, tiles=Tiles(tiles="all", max_tiles=200))
    assert count_epoch(slides, every) == EpochTiles(num_encoded=7_500, num_read=7_500, num_scored=2_500)
    # 100 of a slide of 50 are drawn with replacement: read once. Validation takes the whole slides.
    fixed = RunConfig(cohort=cohort, tiles=Tiles(tiles="fixed", k=100, max_tiles=200))
    assert count_epoch(slides, fixed) == EpochTiles(num_encoded=6_000, num_read=4_500, num_scored=2_500)


class _Clock:
    """A clock that only work moves on."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class _Encoder(nn.Module):
    """Takes 10 ms a tile forward and 20 ms backward; more than `most` tiles do not fit."""

    def __init__(self, clock: _Clock, most: int) -> None:
        super().__init__()
        self.weight, self.clock, self.most = nn.Parameter(torch.ones(())), clock, most
        self.modes: list[bool] = []

    def forward(self, tiles_NHWC: Tensor) -> Tensor:
        if len(tiles_NHWC) > self.most:
            raise torch.OutOfMemoryError
        self.modes.append(self.training)
        self.clock.now_s += 0.01 * len(tiles_NHWC)
        features_ND = self.weight * tiles_NHWC.float().mean((1, 2))

        def backward(gradient_ND: Tensor) -> None:
            self.clock.now_s += 0.02 * len(gradient_ND)

        if features_ND.requires_grad:
            features_ND.register_hook(backward)
        return features_ND


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[EncodingRate, _Encoder]]:
    """What is measured of an encoder of which so many tiles fit, in shards of so many."""

    def measure(most: int, shard: int = 4_096) -> tuple[EncodingRate, _Encoder]:
        clock = _Clock()
        encoder = _Encoder(clock, most)
        monkeypatch.setattr("time.perf_counter", clock)
        monkeypatch.setattr(trainer.projection, "build_encoder", lambda *_, **__: encoder)
        return measure_encoding(get_recipe("demo"), 8, shard, torch.device("cpu"), num_threads=1), encoder

    return measure


def test_the_batch_grows_until_it_takes_half_a_second(
    measured: Callable[..., tuple[EncodingRate, _Encoder]],
) -> None:
    rate, encoder = measured(10_000)
    assert rate == EncodingRate(both_s=pytest.approx(0.03), forward_s=pytest.approx(0.01), num_tiles=32, is_gpu=False)
    assert encoder.modes[0]
    assert not encoder.modes[-1]


def test_a_batch_that_does_not_fit_is_halved(measured: Callable[..., tuple[EncodingRate, _Encoder]]) -> None:
    rate, _ = measured(9)
    assert (rate.num_tiles, rate.both_s) == (8, pytest.approx(0.03))


@pytest.mark.parametrize(("shard", "num_tiles"), [(1, 2), (12, 12), (33, 32)])
def test_no_more_tiles_are_measured_at_once_than_training_encodes(
    shard: int, num_tiles: int, measured: Callable[..., tuple[EncodingRate, _Encoder]]
) -> None:
    rate, _ = measured(10_000, shard)
    assert rate.num_tiles == num_tiles


def test_a_shard_is_a_virtual_ranks_share_of_a_slide() -> None:
    assert shard_size([50, 150], get_recipe("demo"), num_virtual=2) == 48
    assert shard_size([1_000, 100_000], get_recipe("breast_full_slide"), 11) == round((1_000 + 45_056) / 2 / 11)
    per_rank = RunConfig(tiles=Tiles(tiles="fixed", k_per_rank=7))
    assert shard_size([5], per_rank, num_virtual=3) == 7
    assert shard_size([5], RunConfig(), num_virtual=11) == 1


def test_an_encoder_is_measured_as_the_recipe_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.projection, "_FEW_S", 0.0)
    num_threads = torch.get_num_threads()
    config = get_recipe("demo")
    # Its weights' file need not be here: they change no time.
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, weights=Path("nowhere.pth")))
    for precision in ("float32", "bf16", "float64"):
        optim = dataclasses.replace(config.optim, precision=precision)
        rate = measure_encoding(dataclasses.replace(config, optim=optim), 32, 64, torch.device("cpu"), num_threads + 1)
        assert min(rate.both_s, rate.forward_s) > 0
        assert rate.num_tiles == 2
    assert torch.get_num_threads() == num_threads


def test_the_projection_is_told_with_its_limits() -> None:
    epochs = [project(TILES, ReadingRate(decode=500), GPU, on(n, 11), "all") for n in (1, 12)]
    lines = in_words(TILES, GPU, epochs)
    assert lines["1 process"] == "about 32 s (encoding 32 s, reading 2 s; the bottleneck is encoding)"
    assert lines["12 processes"].startswith("about 3.1 s (")
    assert "projection" in lines["note"]
    unread = in_words(TILES, GPU, [project(TILES, None, GPU, on(1), "all")])
    assert "reading was not measured: give a SLIDE, or --manifests" in unread["1 process"]
