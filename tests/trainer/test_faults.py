"""A run that is killed, crashed or told to stop gives, once it went on, what an undisturbed run gives: bit for bit."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.trainer.test_train import arguments, losses, weights
from trainer.checkpoint import list_checkpoints
from trainer.journal import read_events

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("--optim.epochs", "2", "--tiles.k", "8", "--optim.slides-per-step", "1", "--machine.save-every", "2")
FLAGS += ("--machine.keep", "1", "--optim.ema", "0.9", "--optim.clip", "1", "--encoder.drop-path", "0.1")
NUM_RANKS = 3


def run_faulty(
    words: list[str], faults: str, done: Path, *, num_ranks: int = NUM_RANKS, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """The trainer under torchrun, with faults (see `faulty_rank`)."""
    elastic = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    launcher = [*elastic, "--max-restarts", str(restarts)] if num_ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "tests.trainer.faulty_rank", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400", "NO_COLOR": "1"}
    if faults:
        done.mkdir()
        env |= {"FAULTS": faults, "FAULTS_DONE": str(done)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)


@pytest.fixture(scope="module")
def words(small_manifests: Path, small_cohort: Path) -> Callable[..., list[str]]:
    """The command line of a run, by its folder."""
    return lambda out, *more: arguments(small_manifests, small_cohort / "labels.csv", out, *FLAGS, *more)


@pytest.fixture(scope="module")
def undisturbed(words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("faults") / "undisturbed"
    ended = run_faulty(words(run), "", run)
    assert ended.returncode == 0, ended.stderr
    return run


def assert_same(run: Path, undisturbed: Path) -> None:
    """Weights, losses and result are those of the other run, bit for bit."""
    true, found = weights(undisturbed), weights(run)
    assert [name for name in true if not torch.equal(true[name], found[name])] == []
    assert losses(run) == losses(undisturbed)
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, undisturbed)]
    for result in results:
        for name in ("run", "heatmap", "report"):
            result.pop(name)
    assert results[0] == results[1]
    assert list((run / "checkpoints").glob(".*.tmp")) == []


PHASES = {"forward": (1, 2), "gather": (0, 1, 2), "backward": (1, 2), "optimizer": (0, 1, 2), "checkpoint": (0, 1, 2)}
"""And the ranks that come there."""


@pytest.mark.slow
@pytest.mark.torture
def test_ranks_that_are_killed_in_every_phase(
    words: Callable[..., list[str]], undisturbed: Path, tmp_path: Path, times: Callable[[int, int], int]
) -> None:
    """torchrun starts all ranks again, from the newest checkpoint, five times in a run."""
    rng, num_killed = random.Random(0), 0
    for i in range(times(1, 20)):
        run, done = tmp_path / f"run{i}", tmp_path / f"done{i}"
        faults = [f"kill:{phase}:{rng.choice(ranks)}:{rng.randint(2, 4)}" for phase, ranks in PHASES.items()]
        ended = run_faulty(words(run), ",".join(faults), done, restarts=len(faults))
        assert ended.returncode == 0, f"{faults}\n{ended.stderr}"
        assert sorted(file.name for file in done.iterdir()) == sorted(faults)
        assert_same(run, undisturbed)
        num_killed += len(faults)
    print(f"killed {num_killed} times, {num_killed // len(PHASES)} in each phase; all runs equal the undisturbed one")


@pytest.mark.slow
@pytest.mark.torture
def test_one_killed_rank_ends_all(words: Callable[..., list[str]], tmp_path: Path) -> None:
    """Where nobody starts them again."""
    run, done = tmp_path / "run", tmp_path / "done"
    ended = run_faulty(words(run), "kill:backward:2:3", done)
    took_s = time.time() - next(done.iterdir()).stat().st_mtime
    assert ended.returncode == 1
    assert "(SIGKILL)" in ended.stderr
    assert "slidegrad: another rank has ended" in ended.stderr
    assert run_faulty(words(run, "--resume"), "", done).returncode == 0
    print(f"all ranks had ended {took_s:.1f} s after one was killed")


@pytest.mark.slow
@pytest.mark.torture
def test_a_file_system_that_stalls_is_waited_for(
    words: Callable[..., list[str]],
    undisturbed: Path,
    tmp_path: Path,
    times: Callable[[int, int], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, stall_s = tmp_path / "run", times(3, 30)
    monkeypatch.setenv("STALL_S", str(stall_s))
    ended = run_faulty(words(run), "stall:read:1:9", tmp_path / "done")
    assert ended.returncode == 0, ended.stderr
    assert_same(run, undisturbed)
    waited_s = max(event["data_wait_s"] for event in read_events(run) if event["event"] == "step")
    assert waited_s > stall_s / 2
    print(f"a read that stalled for {stall_s} s: the run equals the undisturbed one")


@pytest.mark.slow
@pytest.mark.torture
def test_a_run_that_is_told_to_stop(
    words: Callable[..., list[str]], undisturbed: Path, tmp_path: Path, times: Callable[[int, int], int]
) -> None:
    """By one rank's signal all stop; each on another number of ranks of the same machine would do as well."""
    rng = random.Random(0)
    for i in range(times(1, 20)):
        run, done = tmp_path / f"run{i}", tmp_path / f"done{i}"
        fault = f"{rng.choice(['term', 'usr1'])}:{rng.choice(['optimizer', 'checkpoint'])}:{rng.randrange(3)}:3"
        stopped = run_faulty(words(run), fault, done)
        assert "exitcode  : 75" in stopped.stderr
        assert "run it again with --resume to go on" in stopped.stderr
        assert not (run / "result.json").exists()
        ended = run_faulty(words(run, "--resume"), "", done)
        assert ended.returncode == 0, f"{fault}\n{ended.stderr}"
        assert_same(run, undisturbed)
    print(f"told to stop: {times(1, 20)} of {times(1, 20)} runs equal the undisturbed one")


ALONE = ("--nproc", "1", "--optim.precision", "float64")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["optimizer", "validation"])
def test_one_process_that_is_told_to_stop(place: str, words: Callable[..., list[str]], tmp_path: Path) -> None:
    """Exit code 75, and the checkpoint says where it stood."""
    run, done = tmp_path / "run", tmp_path / "done"
    stopped = run_faulty(words(run, *ALONE), f"term:{place}:0:3", done, num_ranks=1)
    assert stopped.returncode == 75, stopped.stderr
    assert "stopped by SIGTERM, " in stopped.stderr
    assert "run it again with --resume to go on" in stopped.stderr
    expected = {"optimizer": "epoch_0000_slide_000003", "validation": "epoch_0001_slide_000006"}
    assert list_checkpoints(run)[-1].name == expected[place]
    ended = run_faulty(words(run, "--resume"), "", done, num_ranks=1)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_a_slide_that_crashes_its_reader_twice_is_read_no_more(words: Callable[..., list[str]], tmp_path: Path) -> None:
    """The first two times the process dies with it; the third time all ranks skip it, and say so."""
    run = tmp_path / "run"
    for i, more in enumerate(([], ["--resume"])):
        died = run_faulty(words(run, *more), "crash:read:0:2", tmp_path / f"done{i}", num_ranks=1)
        assert died.returncode == -11, died.stderr
    ended = run_faulty(words(run, "--resume"), "", run, num_ranks=1)
    assert ended.returncode == 1, ended.stderr
    (crashed,) = json.loads((run / "in_hand" / "crashes.json").read_text()).items()
    assert crashed[1] == 2
    (told,) = json.loads((run / "result.json").read_text())["skipped"]
    assert told.startswith(f"slide {crashed[0]}: reading it crashed the process, more than once; check the file")
    assert sorted(f.name for f in (run / "in_hand").iterdir()) == ["crashes.json"]


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_with_the_same_slides_and_tiles(
    words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoder ranks 1, 2, 4 and 1 again, each stopped after some slides, against one process; float64."""
    whole, run = tmp_path / "whole", tmp_path / "run"

    def log_reads(name: str) -> Path:
        folder = tmp_path / f"reads_{name}"
        folder.mkdir(exist_ok=True)
        monkeypatch.setenv("READ_LOG", str(folder))
        return folder

    def read_log(folder: Path) -> str:
        """What all processes read, each once, in order; of what was read ahead and not used, again."""
        return "".join(sorted({line for file in folder.iterdir() for line in file.open()}))

    reads = log_reads("whole")
    flags = ("--optim.precision", "float64", "--virtual-ranks", "4")
    assert run_faulty(words(whole, *flags), "", run, num_ranks=1).returncode == 0
    resumed = log_reads("run")
    for i, (num_ranks, count) in enumerate(((1, 3), (3, 3), (5, 4), (1, 0))):
        fault = f"term:optimizer:0:{count}" if count else ""
        ended = run_faulty(words(run, *(["--resume"] if i else flags)), fault, tmp_path / f"{i}", num_ranks=num_ranks)
        assert (ended.returncode == 0) == (not fault), ended.stderr
    assert read_log(resumed) == read_log(reads)
    assert len({line.split("\t")[1] for line in read_log(reads).splitlines()}) > 5
    true, found = weights(whole), weights(run)
    assert max(float((true[n] - found[n]).abs().sum() / true[n].abs().sum().clamp(min=1e-30)) for n in true) < 1e-10
    assert [slide for slide, _ in losses(run)] == [slide for slide, _ in losses(whole)]
    num_ranks = {e["world_size"] for e in read_events(run) if e["event"] == "run"}
    assert num_ranks == {1, 3, 5}
