"""A slide to be damaged."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def path(small_cohort: Path, tmp_path: Path) -> Path:
    """A copy of a sound slide, to be damaged: 3 x 4 or so JPEG tiles at level 0."""
    shutil.copy(small_cohort / "slides" / "synth_0000.svs", tmp_path / "case.svs")
    return tmp_path / "case.svs"
