"""What the tests of several rooms share: real slides, a small synthetic cohort with its manifests, the command line."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings

from tiler.archive import Job, tile_archive
from tiler.config import TilerConfig
from tiler.synth import CohortConfig, make_cohort

ROOT = Path(__file__).resolve().parent.parent
NUM_SLIDES = 12

# A busy machine is no fault of the code: no test fails for being slow.
settings.register_profile("slidegrad", deadline=None)
settings.load_profile("slidegrad")

# One core for each of several workers: ranks and threads of one test otherwise wait for those of another, spinning.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

# Shells start jobs in the background with Ctrl-C ignored, and what is started from here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make torture` runs the fault tests with full counts."""
    parser.addoption("--full-counts", action="store_true", help="run fault tests as often as `make torture` does")


@pytest.fixture
def times(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """How often a fault test repeats: `times(small, full)`."""
    return lambda small, full: full if request.config.getoption("--full-counts") else small


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    result: dict[str, Any] | None
    """The last line of stdout, if it is JSON."""
    stderr: str


@pytest.fixture(scope="session")
def real_slides() -> Path:
    """The folder of real slides; SLIDEGRAD_SLIDES names it."""
    folder = Path(os.environ.get("SLIDEGRAD_SLIDES", ROOT / "../shared/slides"))
    if not folder.is_dir():
        pytest.skip(f"no real slides: {folder} is no folder; set SLIDEGRAD_SLIDES")
    return folder


@pytest.fixture(scope="session")
def small_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve labelled slides of about 960 x 770 px: slides/, truth/, labels.csv. Pair 6, 7 has pen marks."""
    out = tmp_path_factory.mktemp("small_cohort")
    config = CohortConfig(width_px=(768, 1152), height_px=(640, 896))
    make_cohort(out, NUM_SLIDES, seed=3, config=config, num_workers=1)
    return out


@pytest.fixture(scope="session")
def small_manifests(small_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifests of `small_cohort`: 8 to 26 tiles of 32 px at 2 mpp a slide."""
    out = tmp_path_factory.mktemp("small_manifests")
    tile_archive(str(small_cohort / "slides"), out, TilerConfig(tile_px=32, mpp=2.0), Job(num_workers=0))
    return out


@pytest.fixture(scope="session")
def slidegrad() -> Callable[..., Ended]:
    """Runs the real command line in a process of its own: `slidegrad("tile", archive, "--out", out)`."""

    def run(*arguments: str | Path, module: str = "slidegrad", timeout_s: float = 300) -> Ended:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        # Wide, so that no sentence is broken over two lines.
        env = {**os.environ, "COLUMNS": "400", "NO_COLOR": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=timeout_s)
        try:
            result = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            result = None
        return Ended(done.returncode, result, done.stderr)

    return run
