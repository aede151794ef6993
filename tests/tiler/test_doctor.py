"""The doctor notices what will not work, says the way out, and sees in a slide what the readers see."""

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tifffile

import tiler.doctor
from tests.tiler import formats
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
    assert found["why"] == "cuCIM reads this format, and is the fastest"
    assert [level[2] for level in found["levels"]] == [1, 4]
    assert (found["file_tile"], found["compression"]) == ((256, 256), "JPEG")
    assert [name for name, told in found["readers"].items() if told == "opens"] == ["cucim", "openslide", "tifffile"]
    assert set(found["readers"]) == {"cucim", "openslide", "tifffile"}
    assert set(found["parity"]) == {"cucim-openslide", "cucim-tifffile", "openslide-tifffile"}
    for differences in found["parity"].values():
        assert len(differences) == 2
        assert max(differences) < 1.5
    assert found["problems"] == []
    assert json.loads(json.dumps(found))["backend"] == "cucim"


def test_real_slides_look_alike_to_all_readers(real_slides: Path) -> None:
    found = examine_slide(real_slides / "CMU-1-Small-Region.svs")
    assert len(found["parity"]) == 3
    assert max(max(differences) for differences in found["parity"].values()) < 1
    assert (found["file_tile"], found["problems"]) == ((240, 240), [])
    found = examine_slide(real_slides / "TCGA-CR-7395-01A-01-TS1.svs")
    assert found["mpp"] is None
    assert found["mpp_source"] == "none (MPP, XResolution tried)"
    assert found["compression"] == "APERIO JP2000 RGB"
    assert max(max(differences) for differences in found["parity"].values()) < 1
    (problem,) = found["problems"]
    assert problem == "the slide does not say its scale; give --default-mpp or --mpp-csv"


def test_a_reader_with_wrong_pixels_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = formats.write_philips(tmp_path / "case.tiff", formats.draw_picture(), more=1)
    monkeypatch.setattr("tiler.slide._same_grid", lambda *_: True)  # The guard that keeps cuCIM off such a slide.
    found = examine_slide(path)
    assert found["backend"] == "cucim"
    assert max(found["parity"]["cucim-openslide"]) == found["parity"]["cucim-openslide"][1] > 3
    assert found["parity"]["openslide-tifffile"] == [pytest.approx(0, abs=0.1), None]  # tifffile sees the white columns
    (problem,) = (sentence for sentence in found["problems"] if sentence.startswith("cucim-openslide"))
    assert re.fullmatch(
        r"cucim-openslide differ by [0-9.]+ grey levels at level 1, expected at most 3: .* with --backend", problem
    )


def test_a_scale_in_doubt_is_told(tmp_path: Path) -> None:
    head = "Aperio Image Library v12.0.0 \r\n512x384 [0,0 512x384] (128x128) JPEG/RGB Q=95"
    for text, expected in (
        ("0.5", "scale: vendor says 0.5 mpp, another field 0.25"),
        ("0", "scale: MPP = 0 is absurd"),
    ):
        with tifffile.TiffWriter(tmp_path / "case.svs") as tiff:
            formats.write_page(
                tiff,
                formats.draw_picture(),
                description=f"{head}|AppMag = 40|MPP = {text}",
                resolution=(40_000, 40_000),
                resolutionunit="CENTIMETER",
            )
        (problem,) = examine_slide(tmp_path / "case.svs")["problems"]
        assert problem.startswith(expected)


def test_a_folder_is_examined_too(tmp_path: Path) -> None:
    found = examine_slide(formats.write_ome_zarr(tmp_path / "case.zarr", formats.draw_picture()))
    assert (found["backend"], found["file_tile"], found["compression"], found["parity"]) == ("zarr", (128, 128), "", {})
    assert found["problems"] == []


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
