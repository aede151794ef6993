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
    result = load("bench_read").main(num_rounds=1, most_px=1024, most_tiles_px=1024)
    assert result["memory"]["num_tiles"] == 16
    for name, slide in result["slides"].items():
        assert f"_{slide['file_tile'][0]}" in name
        assert slide["read_size"] == ((448, 448) if "resampled" in name else (224, 224))
        left_out = {"limit_aligned"} if slide["compression"] != "JPEG" else set()
        assert set(slide["why_not"]) == left_out
        for share in slide["shares"]:
            assert {"read_tiles_1", "regions", "regions_bare", "limit"} <= set(share["readers"])
            assert {name for name, rates in share["readers"].items() if rates is None} == left_out


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
def test_damage() -> None:
    sizes = {"num_damaged": 1, "side_px": 1024, "big_side_px": 2048, "num_rounds": 1, "num_readings": 2}
    result = load("bench_damage").main(**sizes, formats=("Aperio JPEG, RGB", "TIFF LZW"))
    assert result["detection"]["Aperio JPEG, RGB"]["kinds"]["undecodable"]["refused"] == 1
    assert all(counts["num_suspected"] == 0 for counts in result["false_alarms"].values())
    assert result["training"]["ratio_inside"] > 0


@pytest.mark.slow
def test_step() -> None:
    bench = load("bench_step")
    result = bench.main(num_rounds=1, num_tiles=8, sizes=(64,), encoder="test_resnet", tile_px=32, budget_mb=50)
    assert {"bare", "step_all", "step_half", "step_none", "single_pass"} <= set(result["time"]["ways"])
    assert result["time"]["ratios"]["bare / step_all"]["median"] > 0
    (none,), (every,), (auto,) = (result["memory"][way] for way in ("none kept", "all kept", "auto"))
    assert none["tensors_mb"] < every["tensors_mb"]
    assert auto["kept"] == auto["num_virtual"] == 2
    assert f"| auto | 64 | 2 | 50 | 2 | {auto['predicted_mb']} |" in bench.draw(result)


@pytest.mark.slow
def test_plan() -> None:
    bench = load("bench_plan")
    result = bench.main(num_slides=40, side_px=2_048, num_rounds=2)
    assert {found["num_steps"] for found in result["cohort"].values()} == {20}
    assert [(found["num_tiles"], found["num_rows"]) for found in result["step"]] == [(81, 81), (81, 40)] * 2
    assert result["flat_table"]["slide_s_by_names"] > 0
    assert "| 81 | 40 |" in bench.draw(result)


@pytest.mark.slow
def test_full_slide() -> None:
    bench = load("bench_full_slide")
    result = bench.main(device="cpu", num_tiles=400, num_rounds=1, memory_gb=0.05)
    none, some, from_file = result["ways"]
    assert (none["kept"], from_file["kept"]) == (0, 0)
    assert 1 <= some["kept"] <= 10
    errors = {found["precision"]: found["relative_l1"] for found in result["exact"]}
    assert 0 < errors["float64"] <= 1e-12 < errors["float32"] <= 1e-5
    assert 0 < result["exact"][0]["step_error"] <= 1e-5
    assert "| file | float32 | 0 |" in bench.draw(result)


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


@pytest.mark.slow
def test_service() -> None:
    bench = load("bench_service")
    result = bench.main(side=12, num_slides=400, num_ranks=8, seconds=0.2, num_rounds=1)
    assert set(result["versus"]) == {"whole slide", "sample", "box"}
    assert result["ranks"]["manifests_read_of"] == [2, 2]
    assert result["catalogue"]["num_tiles"] == 4_000_000
    assert "| whole slide |" in bench.draw(result)
