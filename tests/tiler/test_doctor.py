"""The doctor notices what will not work, says the way out, and sees in a slide what the readers see."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiler.doctor
from tiler.doctor import examine_machine, examine_slide, find_shadows


def _distribution(folder: Path, name: str, package: str) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "top_level.txt").write_text(f"{package}\n")


def test_nothing_is_amiss_here() -> None:
    assert find_shadows() == []


def test_another_distribution_with_our_package_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _distribution(tmp_path, "floor-tiler", "tiler")
    _distribution(tmp_path, "harmless", "tilers")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_shadows() == ["package 'tiler' is also installed by floor-tiler; pip uninstall floor-tiler"]
    assert find_shadows()[0] in examine_machine()["problems"]


def test_a_package_that_python_finds_elsewhere_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "services", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (sentence,) = find_shadows()
    assert f"package 'services' is found at {tmp_path}/services/__init__.py, not beside the tiler" in sentence


def test_a_machine_without_cucim_is_told_what_it_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cucim" else find_spec(name))
    (problem,) = examine_machine()["problems"]
    assert "cucim is not installed: OpenSlide reads all slides" in problem
    assert "pip install 'slidegrad[cu13]'" in problem


def test_both_builds_of_cucim_are_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiler.doctor, "_version", lambda _name: "26.10")
    assert any("overwrite each other; uninstall one" in problem for problem in examine_machine()["problems"])


def test_what_is_seen_in_a_slide(small_cohort: Path) -> None:
    found = examine_slide(small_cohort / "slides" / "synth_0000.svs")
    assert (found["backend"], found["vendor"], found["mpp"], found["mpp_source"]) == (
        "cucim",
        "aperio",
        (0.5, 0.5),
        "vendor",
    )
    assert [level[2] for level in found["levels"]] == [1, 4]
    assert len(found["parity"]) == 2
    assert max(found["parity"]) < 1.5


def test_real_slides_look_alike_to_both_readers(real_slides: Path) -> None:
    assert max(examine_slide(real_slides / "CMU-1-Small-Region.svs")["parity"]) < 1
    found = examine_slide(real_slides / "TCGA-CR-7395-01A-01-TS1.svs")
    assert found["mpp"] is None
    assert found["mpp_source"] == "none (MPP, XResolution tried)"
    assert max(found["parity"]) < 2.5


@pytest.mark.slow  # starts a process
def test_the_command_line_exits_with_1_where_there_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slidegrad: Callable[..., Any]
) -> None:
    _distribution(tmp_path, "floor-tiler", "tiler")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ended = slidegrad("doctor")
    assert ended.code == 1
    assert "pip uninstall floor-tiler" in ended.result["problems"][0]
    assert "floor-tiler" in ended.stderr
