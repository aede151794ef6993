"""The scripts for clusters do what they say: with stand-ins for the scheduler's commands, and real ranks."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trainer.test_train import arguments, losses
from trainer.checkpoint import list_checkpoints
from trainer.journal import read_events

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "trainer" / "launch"
FLAGS = ("--optim.epochs", "30", "--tiles.k", "8", "--optim.slides-per-step", "1")
NODE = 'setsid "$@" & echo $! >> "$PLACE/nodes"'
COMMANDS = {
    # Starts the step on two nodes, both here, and waits for them.
    "srun": f'shift; {NODE}; first=$!; {NODE}; wait "$first"; code=$?; wait $! && exit "$code"',
    # Passes signals on.
    "blaunch": f"""shift 2; {NODE}; {NODE}
trap 'while read -r node; do kill -USR1 -- "-$node"; done < "$PLACE/nodes"' USR1
code=0; while [ -n "$(jobs -r)" ]; do wait -n || code=$?; done; exit "$code\"""",
    # What the scheduler does: a signal to every process of the step.
    "scancel": 'while read -r node; do kill -USR1 -- "-$node"; done < "$PLACE/nodes"',
    "scontrol": 'case "$1" in show) echo localhost;; requeue) echo "$2" > "$PLACE/requeued";; esac',
}


@pytest.fixture
def cluster(tmp_path: Path, small_manifests: Path, small_cohort: Path) -> Iterator[dict[str, str]]:
    """The environment of a job."""
    shims = tmp_path / "bin"
    shims.mkdir()
    for name, body in COMMANDS.items():
        (shims / name).write_text(f"#!/bin/bash\n{body}\n")
        (shims / name).chmod(0o755)
    (tmp_path / "hosts").write_text("localhost\nlocalhost2\n")
    job = {
        "RECIPE": "demo",
        "MANIFESTS": small_manifests,
        "LABELS": small_cohort / "labels.csv",
        "RUN": tmp_path / "run",
    }
    slurm = {"SLURM_NNODES": 2, "SLURM_JOB_ID": 17, "SLURM_JOB_NODELIST": "localhost", "SLURM_SUBMIT_DIR": SCRIPTS}
    more = {"SCRIPTS": SCRIPTS, "LSB_DJOB_HOSTFILE": tmp_path / "hosts", "RANKS": 1, "RESTARTS": 0, "PLACE": tmp_path}
    path = f"{shims}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    more |= {"PATH": path, "OMP_NUM_THREADS": 1, "PORT": 29_000 + os.getpid() % 900}
    yield {**os.environ, **{name: str(value) for name, value in {**job, **slurm, **more}.items()}}
    for node in (tmp_path / "nodes").read_text().split() if (tmp_path / "nodes").exists() else ():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(node), signal.SIGKILL)


def start(script: str, env: dict[str, str], *flags: str) -> subprocess.Popen[str]:
    (Path(env["PLACE"]) / "nodes").write_text("")
    return subprocess.Popen(
        ["bash", str(SCRIPTS / script), *flags],
        env=env,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def find_rank(run: Path, rank: int) -> int:
    """The process id of one rank of a run."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            is_rank = f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0")
            if is_rank and b"trainer" in words and str(run).encode() in words:
                return int(folder.name)
    raise AssertionError(f"no rank {rank}")


def signal_after_a_step(process: subprocess.Popen[str], run: Path, number: int, of_rank: int | None = None) -> None:
    until = time.monotonic() + 120
    while not any(event["event"] == "step" for event in read_events(run)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "no step in two minutes"
        time.sleep(0.05)
    os.kill(process.pid if of_rank is None else find_rank(run, of_rank), number)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["slurm.sh", "lsf.sh"])
def test_a_job_saves_before_its_time_is_up_and_goes_on_in_the_next(
    script: str, cluster: dict[str, str], tmp_path: Path
) -> None:
    run, flags = tmp_path / "run", FLAGS
    if script == "lsf.sh":
        cluster["FLAGS"], flags = " ".join(FLAGS), ()
    process = start(script, cluster, *flags)
    signal_after_a_step(process, run, signal.SIGUSR1)
    told, _ = process.communicate(timeout=200)
    assert process.returncode == 75, told
    assert "stopped by SIG" in told
    num_done = len(losses(run))
    assert 0 < num_done < 180
    assert list_checkpoints(run)
    assert (tmp_path / "requeued").exists() == (script == "slurm.sh")
    process = start(script, cluster | {"SLURM_RESTART_COUNT": "1"}, *flags)
    told, _ = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert (run / "result.json").exists()
    assert len(losses(run)) == 180
    starts = [event for event in read_events(run) if event["event"] == "run"]
    assert [event["world_size"] for event in starts] == [2, 2]


@pytest.mark.slow
def test_a_rank_that_is_killed_on_one_node_has_those_of_all_nodes_started_again(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start("slurm.sh", cluster | {"RESTARTS": "1"}, *FLAGS)
    signal_after_a_step(process, run, signal.SIGKILL, of_rank=1)
    told, _ = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert len(losses(run)) == 180
    assert len([event for event in read_events(run) if event["event"] == "run"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_front_door_passes_a_signal_on_and_ends_with_75(
    number: signal.Signals, cluster: dict[str, str], tmp_path: Path
) -> None:
    words = arguments(Path(cluster["MANIFESTS"]), Path(cluster["LABELS"]), tmp_path / "run", *FLAGS, "--nproc", "2")
    command = [sys.executable, "-m", "slidegrad", "train", *words]
    process = subprocess.Popen(command, env=cluster, cwd=ROOT, text=True, stderr=subprocess.PIPE)
    signal_after_a_step(process, tmp_path / "run", number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 75, told
    assert f"stopped by {number.name}, after " in told
    assert list_checkpoints(tmp_path / "run")


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_save_and_end(cluster: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = arguments(Path(cluster["MANIFESTS"]), Path(cluster["LABELS"]), run, *FLAGS, "--nproc", "2")
    process = subprocess.Popen([sys.executable, "-m", "slidegrad", "train", *words], env=cluster, cwd=ROOT)
    signal_after_a_step(process, run, signal.SIGKILL)
    ranks = [Path("/proc") / str(find_rank(run, rank)) for rank in (0, 1)]
    process.wait()
    until = time.monotonic() + 60
    while any(rank.exists() for rank in ranks):
        assert time.monotonic() < until, "ranks outlive their launcher"
        time.sleep(0.1)
    assert list_checkpoints(run)
    assert not (run / "result.json").exists()


@pytest.mark.slow
def test_one_node_says_what_is_missing_and_passes_a_failure_on(cluster: dict[str, str]) -> None:
    words = ["bash", str(SCRIPTS / "torchrun.sh"), "--optim.lr", "-1"]
    env = {**cluster, "NODES": "1", "MEET": f"localhost:{cluster['PORT']}"}
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "optim.lr is -1.0: expected above 0" in done.stderr
    del env["RUN"]
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert "RUN: the run folder" in done.stderr


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sh", "lsf.sh"])
def test_scripts_are_sound_shell(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=False).returncode == 0
