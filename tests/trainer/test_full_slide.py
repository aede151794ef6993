"""Training on full slides of 20,000 and more tiles, by the recipe of the paper: only tiles and encoder are small."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manifests import read_manifest
from manifests.files import tiles_path
from tests.benchmarks.big_slides import write_big_slide
from tiler.archive import Job, tile_archive
from tiler.config import TilerConfig
from trainer.checkpoint import list_checkpoints, load_half
from trainer.cli import Train
from trainer.config import RunConfig
from trainer.journal import read_events
from trainer.sampler import SlideSampler
from trainer.topology import Topology

TILE_PX = 32
MAX_TILES = 45_056
ACROSS = {"capped": 213, "train": 142, "val_0": 143, "val_1": 144, "test": 145}
"""Slide to tiles in a row and in a column of it."""
SPLITS = {"capped": "train", "train": "train", "val_0": "val", "val_1": "val", "test": "test"}
CHANGED = ("--encoder.name", "test_resnet", "--optim.epochs", "2")
"""All that is not the recipe's, beside the tiles' size."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides of JPEG tiles, manifests of all their tiles, and labels."""
    root = tmp_path_factory.mktemp("full_slides")
    (root / "slides").mkdir()
    for name, across in ACROSS.items():
        write_big_slide(root / "slides" / f"{name}.svs", across * TILE_PX)
    config = TilerConfig(tile_px=TILE_PX, mpp=0.5, min_tissue=0)
    tile_archive(str(root / "slides"), root / "manifests", config, Job(num_workers=0))
    rows = [f"{name},{i % 2},{SPLITS[name]}" for i, name in enumerate(ACROSS)]
    (root / "labels.csv").write_text("\n".join(["slide_id,label,split", *rows]) + "\n")
    return root


def words(cohort: Path, run: Path, *more: str) -> list[str]:
    paths = ("--manifests", cohort / "manifests", "--labels", cohort / "labels.csv", "--out", run)
    return ["breast_full_slide", *map(str, paths), *more]


@pytest.fixture(scope="module")
def whole(cohort: Path, slidegrad: Callable[..., Any]) -> Path:
    """A run of two epochs that was never stopped, by an aggregator and two encoder ranks."""
    ended = slidegrad("train", *words(cohort, cohort / "whole", *CHANGED, "--nproc", "3"))
    assert ended.code == 0, ended.stderr
    return cohort / "whole"


def stopped(whole: Path, run: Path) -> Path:
    """The run as it lay there between its epochs."""
    shutil.copytree(whole, run)
    shutil.rmtree(list_checkpoints(run)[-1])
    log = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(log[: log.index('"epoch": 1') + 20])
    for name in ("result.json", "report.html", "scores.parquet"):
        (run / name).unlink()
    return run


def weights(run: Path, epoch: int = -1) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a checkpoint's halves, the newest by default."""
    folder = list_checkpoints(run)[epoch]
    return {
        f"{half}.{name}": value.double()
        for half in ("encoder", "aggregator")
        for name, value in load_half(folder, half)["model"].items()
    }


def steps(run: Path) -> list[dict[str, Any]]:
    """The run's steps in order, of two lines for one the last."""
    found = {event["step"]: event for event in read_events(run) if event["event"] == "step"}
    return [found[number] for number in sorted(found)]


def test_the_slides_are_full_ones_that_cucim_reads(cohort: Path) -> None:
    counts = {}
    for name in ACROSS:
        manifest = read_manifest(tiles_path(cohort / "manifests", name))
        assert manifest.slide.backend == "cucim"
        counts[name] = len(manifest)
    assert counts == {name: across**2 for name, across in ACROSS.items()}
    assert all(20_000 <= count <= 50_000 for count in counts.values())
    assert counts["capped"] > MAX_TILES


def test_a_run_differs_from_the_recipe_in_encoder_and_epochs_alone(whole: Path) -> None:
    ours = RunConfig.from_yaml((whole / "config.yaml").read_text(), "config.yaml")
    recipe = Train.parse(["breast_full_slide", "--manifests", "-", "--labels", "-", "--out", "-"]).config
    assert ours.differences(recipe) == ["encoder.name", "optim.epochs"]


def test_every_tile_of_a_slide_is_used_once_and_no_more_than_the_most(whole: Path) -> None:
    """Half of the two training slides are drawn in each epoch: one, and then the other."""
    assert [(step["slide_id"], step["num_tiles"]) for step in steps(whole)] == [
        ("capped", MAX_TILES),
        ("train", 142**2),
    ]
    config = RunConfig.from_yaml((whole / "config.yaml").read_text(), "config.yaml")
    num_tiles = {"capped": ACROSS["capped"] ** 2, "train": ACROSS["train"] ** 2}
    topology = Topology.make(3, "auto", config.virtual_ranks)
    for epoch, step in enumerate(steps(whole)):
        drawn = []
        for rank in range(topology.world_size):
            sampler = SlideSampler(num_tiles, topology, rank, seed=config.seed, fraction=0.5, tiles=config.tiles)
            sampler.set_epoch(epoch)
            drawn += [plan.rows for plan in sampler]
        rows = np.concatenate(drawn)
        assert len(drawn) == config.virtual_ranks == 11
        assert len(rows) == step["num_tiles"]
        assert (np.diff(rows) > 0).all()
        assert 0 <= rows[0] <= rows[-1] < num_tiles[step["slide_id"]]


def test_a_run_validates_learns_and_leaves_a_result(whole: Path) -> None:
    epochs = [event for event in read_events(whole) if event["event"] == "epoch"]
    assert [epoch["epoch"] for epoch in epochs] == [0, 1]
    assert all(0 < epoch["val_loss"] < 10 for epoch in epochs)
    assert all(epoch["val_auc"] in (0, 0.5, 1) for epoch in epochs)
    first, last = weights(whole, 0), weights(whole)
    assert all(not torch.equal(first[name], value) for name, value in last.items() if name.endswith("weight"))
    result = json.loads((whole / "result.json").read_text())
    assert (result["split"], result["num_slides"], result["num_skipped"]) == ("test", 1, 0)
    assert (whole / "report.html").exists()


def test_a_resumed_run_is_bit_equal_on_as_many_processes(
    whole: Path, cohort: Path, slidegrad: Callable[..., Any]
) -> None:
    run = stopped(whole, cohort / "three")
    ended = slidegrad("train", *words(cohort, run, "--resume", "--nproc", "3"))
    assert ended.code == 0, ended.stderr
    found = weights(run)
    assert all(torch.equal(found[name], value) for name, value in weights(whole).items())
    assert [step["loss"] for step in steps(run)] == [step["loss"] for step in steps(whole)]


def test_a_run_resumed_on_one_process_ends_where_three_would(
    whole: Path, cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one thread, as each of the three had: then every tile's features are the same bits, in bf16 too."""
    run, num_threads = stopped(whole, cohort / "one"), torch.get_num_threads()
    monkeypatch.setattr("trainer.loop.cores_per_rank", lambda _: 1)
    _, code = Train.parse(words(cohort, run, "--resume")).run()
    torch.set_num_threads(num_threads)
    assert code == 0
    starts = [event for event in read_events(run) if event["event"] == "run"]
    assert [(start["num_encoder_ranks"], start["virtual_ranks"]) for start in starts] == [(2, 11), (1, 11)]
    assert [(s["slide_id"], s["num_tiles"]) for s in steps(run)] == [
        (s["slide_id"], s["num_tiles"]) for s in steps(whole)
    ]
    start, true, found = weights(whole, 0), weights(whole), weights(run)
    assert [step["loss"] for step in steps(run)] == [step["loss"] for step in steps(whole)]
    for of_parameters in (True, False):  # And BatchNorm's statistics.
        names = [name for name in true if name.endswith(("weight", "bias")) is of_parameters]
        moved = sum((true[name] - start[name]).abs().sum() for name in names)
        apart = sum((true[name] - found[name]).abs().sum() for name in names)
        assert apart <= 1e-4 * moved
