"""Every benchmark runs, tiny, so that it cannot rot; no number is judged here."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tiler.synth import CohortConfig


def load(name: str) -> ModuleType:
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_read() -> None:
    config = CohortConfig(width_px=(1024, 1024), height_px=(1024, 1024), scant_every=0)
    result = load("bench_read").main(num_rounds=1, config=config)
    assert result["num_tiles"] > 0
    assert min(result["tiles_per_s"].values()) > 0


@pytest.mark.slow
def test_batchnorm() -> None:
    flags = ("--optim.epochs", "1", "--tiles.k", "4", "--cohort.test-fraction", "0.3")
    result = load("bench_batchnorm").main(num_slides=8, ways=("calibrated",), flags=flags)
    assert 0 <= result["calibrated"]["attention_auc"] <= 1
