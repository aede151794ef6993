"""The command: what is refused before a run begins, and real runs that are killed, gone on with and put together."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from trainer.errors import TrainerError
from trainer.journal import read_events
from trainer.sweep.cli import Sweep
from trainer.sweep.states import run_folder

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def words(small_manifests: Path, small_cohort: Path, tmp_path: Path) -> list[str]:
    paths = {"--manifests": small_manifests, "--labels": small_cohort / "labels.csv", "--out": tmp_path / "sweep"}
    return ["demo", *(str(word) for pair in paths.items() for word in pair)]


def listed(*arguments: str) -> dict[str, str]:
    """The runs of a dry run, and how far each is."""
    result, code = Sweep.parse([*arguments, "--dry-run"]).run()
    assert code == 0
    assert result["num_runs"] == len(result["runs"])
    runs: dict[str, str] = result["runs"]
    return runs


def test_a_dry_run_lists_the_runs_and_touches_nothing(words: list[str], tmp_path: Path) -> None:
    runs = listed(*words, "--k", "8,all", "--precision", "float32,bf16", "--nproc", "1,3", "--optim.epochs", "2")
    assert set(runs) == {
        f"k{k}_{precision}_n{nproc}_end_to_end"
        for k in (8, "all")
        for precision in ("float32", "bf16")
        for nproc in (1, 3)
    }
    assert set(runs.values()) == {"open"}
    assert not (tmp_path / "sweep").exists()
    # Without axes it is the recipe itself.
    assert list(listed(*words)) == ["k96_float32_n1_end_to_end"]


def test_two_parts_are_all_runs_once(words: list[str]) -> None:
    grid = (*words, "--k", "8,16,24", "--precision", "float32,bf16")
    first, second = (listed(*grid, "--part", f"{i}/2") for i in (1, 2))
    assert not first.keys() & second.keys()
    assert first.keys() | second.keys() == listed(*grid).keys()
    assert len(first) == len(second) == 3


def test_splits_are_an_axis(words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "splits"
    folder.mkdir()
    for i in range(3):
        (folder / f"split_{i:03d}.csv").write_text(f"slide_id,split\n{i},train\n")
    runs = listed(*words, "--splits", str(folder), "--num-splits", "2")
    assert list(runs) == ["k96_float32_n1_s000_end_to_end", "k96_float32_n1_s001_end_to_end"]


def test_a_runs_command_line_is_what_a_user_would_type(words: list[str], tmp_path: Path) -> None:
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "split_003.csv").write_text("")
    more = [
        "--splits",
        str(splits),
        "--k",
        "8",
        "--jobs",
        "2",
        "--optim.lr=1e-3",
        "--seed",
        "5",
        "--augment.stain",
        "0.05",
    ]
    command = Sweep.parse([*words, *more])
    assert isinstance(command, Sweep)
    plan = command._plan()
    (point,) = plan.points
    task = command._tasks(plan).make(point, 2)
    given = " ".join(task.arguments)
    assert task.arguments[0] == "demo"
    assert f"--split {splits}/split_003.csv" in given
    assert "--nproc 1 --optim.precision float32 --tiles.tiles fixed --tiles.k 8 --tiles.k-per-rank None" in given
    assert given.endswith("--optim.lr=1e-3 --seed 5 --augment.stain 0.05")
    # Where several run at once, memory is shared too.
    budget = float(task.arguments[task.arguments.index("--machine.read-ahead-gb") + 1])
    assert 0 < budget <= 4
    assert "--machine.features" not in given
    assert plan.configs["end_to_end"].seed == 5


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--jobs", "0"], "--jobs 0: expected at least 1"),
        (["--num-splits", "3"], "--num-splits has no effect without --splits"),
        (["--splits", "nowhere"], "--splits nowhere: no split_000.csv here; slidegrad splits makes such files"),
        (["--tiles.k", "8"], "--tiles.k is the sweep's to set: give --k"),
        (["--tiles.k_per_rank=8"], "--tiles.k-per-rank is the sweep's to set: give --k"),
        (["--optim.precision", "bf16"], "--optim.precision is the sweep's to set: give --precision"),
        (["--k", "8,8"], "--k 8,8: expected values separated by commas, each once"),
        (["--k", "0"], "--k 0: expected numbers from 1 or all, separated by commas"),
        (["--precision", "half"], "--precision half: 'half' is none of float32, tf32, bf16"),
        (["--nproc", "x"], "--nproc x: expected numbers from 1, separated by commas"),
        (["--nproc", "3", "--machine.groups", "2"], "--nproc 3"),
        (["--method", "end_to_end,best"], "best"),
        (["--reference", "frozen_gma"], "--reference frozen_gma: expected a method of the sweep, one of end_to_end"),
        (["--features", "f"], "--features has no effect without a method of frozen encoders"),
        (["--part", "0/2"], "--part 0/2: expected I/N with I from 1 to N, or auto"),
        (["--optim.epochs", "0"], "optim.epochs is 0: expected at least 1"),
        (["--encoder.weights", "nowhere.pth"], "encoder.weights nowhere.pth: no such file or folder"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_run_begins(
    more: list[str], sentence: str, words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(TrainerError) as caught:
        Sweep.parse([*words, *more]).run()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sweep").exists()


def test_the_first_word_is_a_recipe(tmp_path: Path) -> None:
    for arguments, sentence in (
        ([], "sweep needs a recipe as its first word, one of demo, "),
        (["demo+frozen_gma"], "give the recipe alone, and methods as --method NAME"),
        (["no_such"], "unknown recipe 'no_such'"),
        (["--collect", str(tmp_path)], "no sweep here"),
    ):
        with pytest.raises(TrainerError, match=sentence):
            Sweep.parse(arguments).run()


def test_a_wrong_flag_is_told_with_the_commands_name(words: list[str], slidegrad: Callable[..., Any]) -> None:
    ended = slidegrad("sweep", *words, "--job", "2")
    assert ended.code == 2
    assert "slidegrad sweep demo" in ended.stderr
    assert "--jobs" in ended.stderr
    assert ended.result is None


def processes_of(sweep: Path) -> list[str]:
    """Command lines of runs that live."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if f"{sweep}/runs/" in line:
            found.append(line)
    return found


@pytest.mark.slow
def test_a_sweep_is_stopped_goes_on_and_is_put_together(
    words: list[str], tmp_path: Path, slidegrad: Callable[..., Any]
) -> None:
    """Two K by two precisions. K 2 is too small for BatchNorm over two virtual ranks: these two runs fail."""
    sweep, grid = tmp_path / "sweep", ("--k", "8,2", "--precision", "float32,float64", "--optim.epochs", "15")
    good = [f"k8_{precision}_n1_end_to_end" for precision in ("float32", "float64")]
    command = [sys.executable, "-m", "slidegrad", "sweep", *words, *grid]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 200
    while not any(event["event"] == "step" for event in read_events(run_folder(sweep, good[0]))):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "no step in 200 s"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 75, err
    assert out == ""
    assert "1 runs end a step and save" in err
    assert "what was finished is kept, run it again to go on" in err
    assert processes_of(sweep) == []
    assert not (run_folder(sweep, good[0]) / "result.json").exists()

    ended = slidegrad("sweep", *words, *grid, "--jobs", "2")
    assert ended.code == 1, ended.stderr
    assert (ended.result["num_runs"], ended.result["num_done"], ended.result["num_failed"]) == (4, 2, 2)
    assert all("BatchNorm has nothing to measure" in reason for reason in ended.result["failed"].values())
    assert "failed: k2_float32_n1_end_to_end: tiles.k=2 over virtual_ranks=2" in ended.stderr
    starts = [event for event in read_events(run_folder(sweep, good[0])) if event["event"] == "run"]
    assert len(starts) == 2
    rows = {row["run"]: row for row in pq.read_table(sweep / "results.parquet").to_pylist()}
    assert [rows[name]["num_epochs"] for name in good] == [15, 15]
    for name in good:
        result = json.loads((run_folder(sweep, name) / "result.json").read_text())
        assert rows[name]["test_auc"] == result["auc"]
        assert rows[name]["best_val_auc"] == result["val_auc"]
    assert (sweep / "report.html").exists()
    assert "| end to end | 8 |" in Path(ended.result["table"]).read_text()

    written = {name: (run_folder(sweep, name) / "result.json").stat().st_mtime_ns for name in good}
    assert listed(*words, *grid)[good[0]] == "done"
    other, code = Sweep.parse(["--collect", str(sweep)]).run()
    assert (other["num_done"], code) == (2, 1)
    with pytest.raises(TrainerError, match=r"holds another sweep: optim\.epochs, seed differ"):
        Sweep.parse([*words, "--k", "8", "--seed", "7"]).run()
    assert written == {name: (run_folder(sweep, name) / "result.json").stat().st_mtime_ns for name in good}
