"""`slidegrad tile` killed at random moments and started again: every slide ends with one whole manifest."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from manifests import LocalManifests, read_manifest
from manifests.catalog import read_catalog, read_paths


@pytest.mark.slow
@pytest.mark.torture
def test_killed_at_random_moments_and_restarted(
    small_cohort: Path, tmp_path: Path, slidegrad: Callable[..., Any], times: Callable[[int, int], int]
) -> None:
    archive, out = tmp_path / "archive", tmp_path / "M"
    archive.mkdir()
    for i in range(60):
        shutil.copy(small_cohort / "slides" / f"synth_{i % 12:04d}.svs", archive / f"s{i:02d}.svs")
    words = ["tile", str(archive), "--out", str(out), "--tile-px", "32", "--mpp", "2.0"]
    # With --overwrite there is always work to be killed at.
    command = [sys.executable, "-m", "slidegrad", *words, "--workers", "2", "--overwrite"]
    rng = random.Random(0)
    killed = 0
    for _ in range(times(5, 100)):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        # Some of the kills while it starts, most while it writes.
        time.sleep(rng.uniform(0.5, 2.8))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
        for file in (out / "tiles").glob("??/*.parquet"):
            read_manifest(file)  # Whatever has its name is whole.
    assert killed
    ended = slidegrad(*words)
    assert ended.code == 0, ended.stderr
    slides = sorted(file.stem for file in archive.iterdir())
    assert list(LocalManifests(out)) == slides
    assert sorted(read_paths(out)) == slides
    assert len(list((out / "tiles").glob("??/*.parquet"))) == len(slides)
    print(f"killed {killed} times; {len(slides)} of {len(slides)} manifests whole")


@pytest.fixture
def tiling(small_cohort: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A running `slidegrad tile` of 400 slides in a process group of its own, and its --out."""
    archive, out = tmp_path / "archive", tmp_path / "M"
    archive.mkdir()
    for i in range(400):
        os.link(small_cohort / "slides" / f"synth_{i % 12:04d}.svs", archive / f"s{i}.svs")
    words = ["tile", str(archive), "--out", str(out), "--tile-px", "32", "--mpp", "2.0", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "slidegrad", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process, out
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_the_catalogue_tells_what_is_there(
    how: signal.Signals, tiling: tuple[subprocess.Popen[str], Path]
) -> None:
    process, out = tiling
    while len(list((out / "tiles").glob("??/*.parquet"))) < 20:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(how)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    assert "interrupted; what was finished is kept" in stderr
    files = sorted((out / "tiles").glob("??/*.parquet"))
    assert 20 <= len(files) < 400
    ids = sorted(read_manifest(file).slide.slide_id for file in files)
    assert sorted(read_catalog(out).column("slide_id").to_pylist()) == ids


@pytest.mark.slow
def test_ctrl_c_while_its_processes_start_is_one_sentence(tiling: tuple[subprocess.Popen[str], Path]) -> None:
    process, _ = tiling
    assert process.stderr is not None
    told = ""
    while "slides to tile" not in told:
        told += process.stderr.readline()
    time.sleep(0.3)  # They import.
    os.killpg(process.pid, signal.SIGINT)  # As a terminal does: to all of them.
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in told + stderr
