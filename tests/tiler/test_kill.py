"""`slidegrad tile` killed at random moments and started again: every slide ends with one whole manifest."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifests import LocalManifests, read_manifest
from manifests.catalog import read_paths


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


@pytest.mark.slow
def test_ctrl_c_ends_at_once_and_the_catalogue_tells_what_is_there(small_cohort: Path, tmp_path: Path) -> None:
    archive, out = tmp_path / "archive", tmp_path / "M"
    archive.mkdir()
    for i in range(400):
        shutil.copy(small_cohort / "slides" / f"synth_{i % 12:04d}.svs", archive / f"s{i}.svs")
    words = ["tile", str(archive), "--out", str(out), "--tile-px", "32", "--mpp", "2.0", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "slidegrad", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    while len(list((out / "tiles").glob("??/*.parquet"))) < 20:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    assert "interrupted; what was finished is kept" in stderr
    files = sorted((out / "tiles").glob("??/*.parquet"))
    assert 20 <= len(files) < 400
    assert sorted(LocalManifests(out)) == sorted(read_manifest(file).slide.slide_id for file in files)
