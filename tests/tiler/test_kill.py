"""`slidegrad tile` killed at random moments and started again: every slide ends with one whole manifest."""

import os
import random
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
    out = tmp_path / "M"
    words = ["tile", str(small_cohort / "slides"), "--out", str(out), "--tile-px", "32", "--mpp", "2.0"]
    command = [sys.executable, "-m", "slidegrad", *words, "--workers", "1"]
    rng = random.Random(0)
    killed = 0
    for _ in range(times(3, 40)):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        # Half of the kills while it starts, half while it writes.
        time.sleep(rng.uniform(0.1, 1.2))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
        for file in (out / "tiles").glob("??/*.parquet"):
            read_manifest(file)  # Whatever has its name is whole.
    assert killed
    ended = slidegrad(*words)
    assert ended.code == 0, ended.stderr
    slides = sorted(file.stem for file in (small_cohort / "slides").glob("*.svs"))
    assert list(LocalManifests(out)) == slides
    assert sorted(read_paths(out)) == slides
    assert len(list((out / "tiles").glob("??/*.parquet"))) == len(slides)
    print(f"killed {killed} times; {len(slides)} of {len(slides)} manifests whole")
