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


@pytest.mark.slow
def test_check() -> None:
    result = load("bench_check").main(num_rounds=1, side_px=2048, huge_px=4096, num_damaged=3)
    assert result["false_alarms"] == {"markers": 0, "decode": 0, "sample": 0}


@pytest.mark.slow
def test_archive() -> None:
    result = load("bench_archive").main(num_slides=2_000)
    assert result["resume_scan"]["seconds"] > 0
    assert result["manifest_stats"]["peak_gb"] > 0


@pytest.mark.slow
def test_tile() -> None:
    result = load("bench_tile").main(side_px=2_048, big_side_px=16_384, num_rounds=1)
    assert result["slidegrad"]["num_tiles"] > 0
    assert result["big"]["num_tiles"] > result["slidegrad"]["num_tiles"]


@pytest.mark.slow
def test_tissue() -> None:
    config = CohortConfig(width_px=(1024, 1024), height_px=(1024, 1024), scant_every=0)
    result = load("bench_tissue").main(2, 2048, 1, config)
    assert result["overlap"]["otsu"]["pen"]["min"] > 0.9
