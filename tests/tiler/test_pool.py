"""A reader that crashes, hangs or eats the memory costs its slide, never the run."""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifests.files import read_record, tiles_path
from tiler.build import Task
from tiler.config import TilerConfig
from tiler.errors import TilerError
from tiler.pool import Limits, run_in_processes, run_on_dask, share_memory

CONFIG = TilerConfig(tile_px=32, mpp=2.0)
LIMITS = Limits(time_s=3, memory_bytes=1_200_000_000)
FAULTS = {
    "segfault": r"its reader ended the process \(SIGSEGV\), twice",
    "abort": r"its reader ended the process \(SIGABRT\), twice",
    "exit": r"its reader ended the process \(exit code 3\), twice",
    "hang": "took longer than 3 s, twice",
    "stuck": "took longer than 3 s, twice",
    "leak": r"needed more than 1\.2 GB, twice",
}


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The faulty work, importable by worker processes too."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return importlib.import_module("faulty").work


def _tasks(names: list[str], small_cohort: Path) -> list[Task]:
    slides = sorted((small_cohort / "slides").glob("*.svs"))
    return [Task(slide_id=name, path=slides[i % len(slides)]) for i, name in enumerate(names)]


@pytest.mark.slow  # starts some twenty processes
@pytest.mark.torture
def test_every_fault_costs_its_slide_alone(
    work: Any, small_cohort: Path, tmp_path: Path, times: Callable[[int, int], int]
) -> None:
    rounds = times(1, 5)
    names = [f"{name}_{i}" for i in range(rounds) for name in ("good", *FAULTS, "once", "fine")]
    tasks = _tasks(names, small_cohort)
    done = {d.record.slide_id: d.record for d in run_in_processes(tasks, tmp_path, CONFIG, 2, LIMITS, work)}
    assert sorted(done) == sorted(names)
    for name, record in done.items():
        fault = name.split("_")[0]
        assert record == read_record(tiles_path(tmp_path, name))
        if fault in FAULTS:
            assert record.status == "failed"
            assert re.match(f"slide {name}: {FAULTS[fault]}", record.error), record.error
        else:
            assert record.status == "ok"
    print(f"{len(names)} slides, {rounds * len(FAULTS)} ended their process twice; every other one is whole")


@pytest.mark.slow  # starts a cluster
def test_a_dask_cluster_does_the_same(work: Any, small_cohort: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    tasks = _tasks(["good_0", "good_1", "exit_0", "hang_0", "good_2"], small_cohort)
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "silence_logs": 50}
    with distributed.LocalCluster(**options) as cluster:
        limits = Limits(time_s=2, memory_bytes=LIMITS.memory_bytes)
        done = list(run_on_dask(tasks, tmp_path, CONFIG, cluster.scheduler_address, limits, work))
    status = {d.record.slide_id: d.record.status for d in done}
    assert status == {"good_0": "ok", "good_1": "ok", "good_2": "ok", "exit_0": "failed", "hang_0": "failed"}
    errors = [d.record.error for d in done if d.record.status == "failed"]
    assert all("its process died again and again (KilledWorker)" in error for error in errors)


@pytest.mark.slow  # starts a cluster
def test_a_cluster_whose_workers_have_several_threads_is_refused(small_cohort: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 1, "threads_per_worker": 2, "dashboard_address": None, "silence_logs": 50}
    with distributed.LocalCluster(**options) as cluster:
        done = run_on_dask(_tasks(["good_0"], small_cohort), tmp_path, CONFIG, cluster.scheduler_address, LIMITS)
        with pytest.raises(TilerError, match="its workers have several threads; start them with --nthreads 1"):
            list(done)


@pytest.mark.slow  # starts a process
def test_what_is_not_the_slides_fault_ends_the_run(small_cohort: Path, tmp_path: Path) -> None:
    tasks = _tasks(["good_0"], small_cohort)
    (tmp_path / "tiles").write_text("no folder")
    with pytest.raises(OSError, match="tiles"):
        list(run_in_processes(tasks, tmp_path, CONFIG, 1, LIMITS))


def test_memory_is_shared_out_among_the_processes() -> None:
    assert share_memory(1) > share_memory(2) > 0
    assert share_memory(10_000) == 1_500_000_000
