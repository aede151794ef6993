"""Max-pool MIL: which tiles the model chooses, and that they outlive a stop, another number of ranks, a lost slide."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manifests import LocalManifests
from manifests.catalog import read_paths
from manifests.errors import Stopped
from tests.trainer.test_train import arguments, losses, weights
from tiler import open_slide, read_tiles
from tiler.archive import Job, tile_archive
from tiler.config import TilerConfig
from trainer.checkpoint import list_checkpoints, read_state
from trainer.cli import Train
from trainer.comm import Comm
from trainer.heads import Head
from trainer.journal import read_events
from trainer.loop import Loop
from trainer.model import build_engine, load_weights
from trainer.prepare import open_run, prepare_run
from trainer.ranking import highest
from trainer.step import Engine
from trainer.stopping import listening
from trainer.topology import Topology

K = 3
FLAGS = ("--tiles.k", str(K), "--optim.epochs", "2", "--optim.slides-per-step", "1", "--optim.warmup-epochs", "0")
FLAGS += ("--optim.lr", "0.003", "--optim.precision", "float64", "--machine.save-every", "2", "--machine.keep", "all")


def words(manifests: Path, labels: Path, run: Path, *more: str) -> list[str]:
    return ["demo+max_pool", *arguments(manifests, labels, run)[1:], *more]


def train(*args: Any) -> Loop:
    """Up to the last epoch, in this process: no test slides, no report."""
    parsed, comm = Train.parse(words(*args)), Comm(Topology.make(1, "auto", 2), 0, torch.device("cpu"))
    prepare_run(
        parsed.out,
        parsed.config,
        manifests=parsed.manifests,
        labels=parsed.labels,
        topology=comm.topology,
        resume=parsed.resume,
    )
    with listening(), closing(Loop(open_run(parsed.out), comm, lambda **_: None)) as loop:
        loop.run()
    return loop


def train_until(method: str, count: int, *args: Any) -> str:
    """SIGTERM at the `count`-th call of the engine's method; what is said then."""
    own, calls = getattr(Engine, method), []

    def called(*given: Any) -> Any:
        calls.append(method)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(*given)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Engine, method, called)
        with pytest.raises(Stopped) as caught:
            train(*args)
    return str(caught.value)


@pytest.fixture(scope="module")
def labels(small_cohort: Path) -> Path:
    return small_cohort / "labels.csv"


@pytest.fixture(scope="module")
def undisturbed(small_manifests: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("ranking") / "undisturbed"
    train(small_manifests, labels, run, *FLAGS)
    return run


@pytest.fixture(scope="module")
def stopped(small_manifests: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Told to stop in the second epoch's third step, of six."""
    run = tmp_path_factory.mktemp("ranking") / "stopped"
    told = train_until("step", 6 + 3, small_manifests, labels, run, *FLAGS)
    assert "after 3 of 6 slides of epoch 1" in told
    return run


def chosen(run: Path) -> dict[str, list[int]]:
    """Of the newest checkpoint within an epoch."""
    within = [checkpoint for checkpoint in list_checkpoints(run) if "slide" in checkpoint.name]
    rows: dict[str, list[int]] = read_state(within[-1])["sampler"]["chosen"]
    return rows


def test_the_highest_rows_of_equal_ones_are_the_lower() -> None:
    rows = np.array([3, 5, 6, 9, 12])
    assert highest(rows, np.array([0.1, 0.4, 0.2, 0.4, 0.4]), 2).tolist() == [5, 9]
    assert highest(rows, np.array([0.1, 0.0, 0.2, 0.0, 0.4]), 2).tolist() == [6, 12]
    assert highest(rows, np.zeros(5), 9).tolist() == rows.tolist()


@torch.no_grad()
def test_the_rows_are_those_of_scoring_tile_by_tile_with_the_model_at_the_epochs_start(stopped: Path) -> None:
    """Read and encoded one by one, from the checkpoint of the epoch before."""
    first = stopped / "checkpoints" / "epoch_0000"
    assert list_checkpoints(stopped)[-1].name == "epoch_0001_slide_000003"
    job = open_run(stopped)
    head, comm = Head.for_cohort(job.config.head, job.cohort), Comm(Topology.make(1, "auto", 2), 0, torch.device("cpu"))
    engine = build_engine(job.config, comm, tile_px=job.tile_px, head=head, initial=False)
    load_weights(engine, first)
    assert engine.encoder is not None
    assert engine.aggregator is not None
    engine.set_training(False)
    found = chosen(stopped)
    assert set(found) == set(job.cohort.of("train"))
    for slide_id, rows in found.items():
        manifest = job.source[slide_id]
        probs = []
        for row in range(len(manifest)):
            tile = read_tiles(open_slide(job.paths[slide_id]), manifest, np.array([row]))
            logits_C = engine.aggregator.classify(engine.encoder(torch.from_numpy(tile)))[0]
            probs.append(float(logits_C.softmax(0)[1]))
        best = sorted(range(len(probs)), key=lambda row: (-probs[row], row))[:K]
        assert rows == sorted(best), slide_id
    assert any(rows != list(range(K)) for rows in found.values())


def test_an_epoch_trains_on_what_was_chosen_and_nothing_else(stopped: Path) -> None:
    steps = [event for event in read_events(stopped) if event["event"] == "step"]
    assert [step["num_tiles"] for step in steps] == [K] * 9


def test_resumed_within_an_epoch_it_goes_on_with_the_same_rows_bit_for_bit(
    stopped: Path, undisturbed: Path, small_manifests: Path, labels: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    train(small_manifests, labels, run, "--resume")
    true, found = weights(undisturbed), weights(run)
    assert [name for name in true if not torch.equal(true[name], found[name])] == []
    assert losses(run) == losses(undisturbed)
    assert chosen(run) == chosen(undisturbed) == chosen(stopped)


def test_told_to_stop_while_it_ranks_it_keeps_what_is_ranked(
    undisturbed: Path, small_manifests: Path, labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    told = train_until("score", 2, small_manifests, labels, run, *FLAGS)
    assert "with 2 of 6 slides of epoch 0 ranked; run it again with --resume" in told
    assert [checkpoint.name for checkpoint in list_checkpoints(run)] == ["epoch_0000_slide_000000"]
    kept = chosen(run)
    assert len(kept) == 2
    scored: list[str] = []
    own = Engine.score
    monkeypatch.setattr(Engine, "score", lambda self, slide: scored.append(slide.plan.slide_id) or own(self, slide))
    train(small_manifests, labels, run, "--resume")
    assert len(scored[:4]) == len(set(scored[:4]) - set(kept)) == 4
    assert losses(run) == losses(undisturbed)


def test_a_slide_that_cannot_be_ranked_is_skipped_in_that_epoch(
    small_cohort: Path, labels: Path, tmp_path: Path, undisturbed: Path
) -> None:
    slides, lost = tmp_path / "slides", min(chosen(undisturbed))
    shutil.copytree(small_cohort / "slides", slides)
    tile_archive(str(slides), tmp_path / "M", TilerConfig(tile_px=32, mpp=2.0), Job(num_workers=0))
    read_paths(LocalManifests(tmp_path / "M").root)[lost].unlink()
    run = tmp_path / "run"
    loop = train(tmp_path / "M", labels, run, *FLAGS, "--cohort.max-skipped", "0.5")
    (told,) = loop.standing.skipped.items()
    assert told[0] == lost
    assert told[1].startswith(f"slide {lost}: its file cannot be read")
    events = list(read_events(run))
    assert [(e["slide_id"], e["epoch"]) for e in events if e["event"] == "skip"] == [(lost, 0), (lost, 1)]
    trained = [event["slide_id"] for event in events if event["event"] == "step"]
    assert trained == [slide for slide, _ in losses(undisturbed) if slide != lost]
    assert chosen(run)[lost] == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [("--nproc", "3"), ("--nproc", "4", "--machine.groups", "2")])
def test_other_numbers_of_ranks_choose_the_same_rows(
    ranks: tuple[str, ...],
    undisturbed: Path,
    small_manifests: Path,
    labels: Path,
    tmp_path: Path,
    slidegrad: Callable[..., Any],
) -> None:
    """And give the same weights to rounding; a group's ranks know the rows of slides that the other group ranked."""
    run = tmp_path / "run"
    one = undisturbed
    flags = FLAGS
    if "--machine.groups" in ranks:
        one, flags = tmp_path / "one", (*FLAGS, "--optim.slides-per-step", "2", "--machine.save-every", "1")
        train(small_manifests, labels, one, *flags)
    ended = slidegrad("train", *words(small_manifests, labels, run, *flags, *ranks))
    assert ended.code == 0, ended.stderr
    assert chosen(run) == chosen(one)
    assert [slide for slide, _ in losses(run)] == [slide for slide, _ in losses(one)]
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(run)[name], value, rtol=1e-9, atol=1e-9, msg=name)
    assert json.loads((run / "result.json").read_text())["num_skipped"] == 0
