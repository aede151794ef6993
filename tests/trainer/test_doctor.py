"""The command: it works without torch, says what a setting would not do, and what it found, without a path."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiler.doctor.decoding
import tiler.doctor.machine
import tiler.doctor.storage
import trainer.projection
from manifests import SlidegradError
from trainer.doctor import Doctor
from trainer.projection import EncodingRate

ROOT = Path(__file__).resolve().parents[2]
RATE = EncodingRate(both_s=0.03, forward_s=0.01, num_tiles=64, is_gpu=False)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures shorter; the encoder not at all."""
    monkeypatch.setattr(tiler.doctor.decoding, "_LEAST_S", 0.01)
    monkeypatch.setattr(tiler.doctor.storage, "_WARM_S", 0.01)
    monkeypatch.setattr(tiler.doctor.storage, "_ENOUGH_S", 0.01)
    monkeypatch.setattr(trainer.projection, "measure_encoding", lambda *_: RATE)


_HIDE = """
import sys
from importlib.machinery import PathFinder

hidden, find_spec = sys.argv.pop(1).split(), PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] in hidden else find_spec(name, *rest)

import slidegrad

slidegrad.console()
"""


def _without(packages: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`slidegrad doctor …` where some packages are not installed."""
    command = [sys.executable, "-c", _HIDE, packages, "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow  # starts a process
def test_without_the_train_extra_machine_and_slide_are_looked_at(small_cohort: Path) -> None:
    path = small_cohort / "slides" / "synth_0000.svs"
    ended = _without("torch timm sklearn matplotlib safetensors tensorboard", str(path))
    assert ended.returncode == 0
    found = json.loads(ended.stdout)
    assert found["slide"]["decoding"]["rates"][0]["tiles_per_s"] > 0
    assert found["slide"]["slide_id"] == "synth_0000"
    assert found["problems"] == found["slide"]["problems"] == []
    assert str(small_cohort) not in ended.stdout + ended.stderr


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize("package", ["torch", "timm"])
def test_a_recipe_without_the_train_extra_is_one_sentence(package: str) -> None:
    ended = _without(package, "--recipe", "demo")
    assert ended.returncode == 2
    assert ended.stderr == f"slidegrad: --recipe needs {package}; pip install 'slidegrad[train]'\n"


@pytest.mark.slow  # starts a process
def test_help_imports_no_tiler() -> None:
    lines = "import slidegrad, sys\ntry:\n    slidegrad.main(['doctor', '--help'])\nfinally:\n    print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, cwd=ROOT, check=True)
    imported = set(told.stdout.splitlines()[-1].split())
    assert "trainer.doctor" in imported
    assert not imported & {"tiler", "cv2", "openslide", "torch", "timm", "yaml", "trainer.config"}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"recipe": "dmeo"}, "unknown recipe 'dmeo'; one of demo"),
        ({"nproc": 3}, "--nproc 3 would have no effect: it needs --recipe"),
        ({"threads": 3}, "--threads 3 would have no effect: it needs a SLIDE or --manifests"),
        ({"default_mpp": 0.25, "recipe": "demo"}, "--default-mpp 0.25 would have no effect: it needs a SLIDE"),
        ({"mpp": 0.5, "recipe": "demo"}, "--mpp 0.5 would have no effect: it needs a SLIDE, and no --manifests"),
        ({"tile_px": 32}, "--tile-px 32 would have no effect: it needs a SLIDE or --recipe"),
        ({"tile_px": 32, "manifests": Path("m")}, "it needs no --manifests, which say it"),
        ({"nproc": 0, "recipe": "demo"}, "--nproc 0: expected at least 1"),
        ({"slide": Path("nowhere/case.svs")}, "case.svs: no such file"),
        ({"slide": Path(__file__) / "case.svs"}, "case.svs: no such file"),
        ({"slide": Path("x" * 300)}, "cannot be looked at (File name too long)"),
        ({"slide": Path(__file__), "mpp": 1e6}, "--mpp 1000000.0: expected microns per px"),
        ({"slide": Path(__file__), "tile_px": 100_000}, "--tile-px 100000: expected 1 to 65,536 px"),
        ({"recipe": "demo", "tile_px": 100_000}, "--tile-px 100000: expected 1 to 65,536 px"),
        ({"manifests": Path("nowhere")}, "nowhere: no manifests"),
    ],
)
def test_a_setting_that_does_not_fit_is_one_sentence(
    settings: dict[str, Any], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SlidegradError) as raised:
        Doctor(**settings).run()
    assert sentence in str(raised.value)
    assert "nowhere/" not in str(raised.value)
    assert capsys.readouterr().err == ""  # Nothing is measured or told before.


def test_a_folder_is_not_taken_for_a_slide(
    small_cohort: Path, small_manifests: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(small_cohort)
    for folder, sentence in (
        (small_cohort / "slides", "slides is a folder; name a slide in it"),
        (Path(""), ". is a folder; name a slide in it"),
        (small_manifests, f"{small_manifests.name} is a folder of manifests; give it as --manifests"),
    ):
        with pytest.raises(SlidegradError) as raised:
            Doctor(slide=folder).run()
        assert str(raised.value) == sentence
    assert capsys.readouterr().err == ""


def test_a_file_that_is_no_slide_is_a_problem_beside_the_machines_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1e3, 0.0, 0.0))
    (tmp_path / "empty.svs").touch()
    (tmp_path / "text.svs").write_text("no slide")
    (tmp_path / "hollow.zarr").mkdir()
    for name, sentence in (
        ("empty.svs", "slide empty: empty file (0 bytes)"),
        ("text.svs", "slide text: not a slide that can be opened"),
        ("hollow.zarr", "slide hollow: "),
    ):
        found, code = Doctor(slide=tmp_path / name).run()
        err = capsys.readouterr().err
        (problem,) = found["slide"]["problems"]
        assert problem.startswith(sentence)
        assert (code, found["problems"][-1], found["slide"]["decoding"]) == (1, problem, None)
        assert found["cores"] > 0
        assert f"problem: {sentence}" in err
        assert "other work is going on" not in err  # Nothing is measured.
        assert str(tmp_path) not in json.dumps(found) + err


def test_settings_of_0_are_not_taken_for_none(small_cohort: Path) -> None:
    path = small_cohort / "slides" / "synth_0000.svs"
    for settings in ({"mpp": 0.0}, {"default_mpp": 0.0}, {"tile_px": 0}, {"threads": 0}):
        with pytest.raises(SlidegradError, match="0: expected"):
            Doctor(slide=path, **settings).run()


def test_a_slide_without_a_scale_needs_one(
    real_slides: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1e3, 0.0, 0.0))
    path = real_slides / "TCGA-CR-7395-01A-01-TS1.svs"
    found, code = Doctor(slide=path).run()
    assert (code, found["slide"]["storage"], found["slide"]["decoding"]) == (1, None, None)
    err = capsys.readouterr().err
    assert "problem: the slide does not say its scale; give --default-mpp" in err
    assert "other work is going on" not in err
    assert "mpp_other" not in err
    assert "not measured: without a scale there are no tiles" in err
    found, code = Doctor(slide=path, default_mpp=0.25, threads=1, tile_px=256).run()
    assert (code, found["slide"]["problems"]) == (0, [])
    assert found["slide"]["storage"]["kind"] == "compressed tiles"
    assert found["slide"]["decoding"]["tile_px"] == 256
    assert [rate["threads"] for rate in found["slide"]["decoding"]["rates"]] == [1]
    assert str(real_slides) not in json.dumps(found) + capsys.readouterr().err


def test_a_damaged_slide_is_a_problem(small_cohort: Path, tmp_path: Path) -> None:
    path = tmp_path / "case.svs"
    content = (small_cohort / "slides" / "synth_0000.svs").read_bytes()
    path.write_bytes(content.replace(b"\xff\xd9", b"\xff\x00"))  # No JPEG has an end any more.
    found, code = Doctor(slide=path).run()
    assert code == 1
    assert any("are damaged" in problem for problem in found["slide"]["problems"])
    assert found["slide"]["decoding"] is None


def test_an_epoch_is_projected_from_the_cohorts_manifests(
    small_manifests: Path, small_cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, code = Doctor(recipe="demo", manifests=small_manifests, nproc=3).run()
    err, projection = capsys.readouterr().err, found["projection"]
    assert code == 0
    # Read with the manifests' own tiles, of a slide of middling size.
    assert found["slide"]["slide_id"].startswith("synth_")
    assert (found["slide"]["decoding"]["tile_px"], projection["tile_px"]) == (32, 32)
    assert 8 < found["slide"]["decoding"]["num_tiles_of_slide"] < 26
    assert (projection["num_slides"], projection["is_cohort_assumed"]) == (12, False)
    assert projection["tiles"]["num_encoded"] == round(12 * 0.5 * 96)
    assert projection["tiles"]["num_read"] < 12 * 0.5 * 26
    assert [(e["num_processes"], e["num_encoders"]) for e in projection["epochs"]] == [(1, 1), (3, 2)]
    rates = found["slide"]["decoding"]["rates"]
    assert projection["reading"]["decode"] == rates[-1]["tiles_per_s"]
    assert "12 slides\n" in err
    assert "the bottleneck is" in err
    assert "3 processes" in err
    assert str(small_cohort) not in json.dumps(found) + err


def test_without_manifests_a_cohort_is_assumed_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = Doctor(recipe="breast_full_slide").run()
    err, projection = capsys.readouterr().err, found["projection"]
    assert projection["tiles"] == {"num_encoded": 3_250_000, "num_read": 3_250_000, "num_scored": 1_500_000}
    assert (projection["num_slides"], projection["is_cohort_assumed"], projection["reading"]) == (1_000, True, None)
    assert "1,000 slides of 10,000 tiles, assumed for want of --manifests" in err
    assert "reading was not measured" in err
    assert projection["epochs"][0]["epoch_s"] == pytest.approx(3_250_000 * 0.03 + 1_500_000 * 0.01)


def test_slides_that_are_gone_are_a_problem_and_the_rest_is_told(small_manifests: Path, tmp_path: Path) -> None:
    shutil.copytree(small_manifests, tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / "paths")
    found, code = Doctor(recipe="demo", manifests=tmp_path / "m").run()
    assert code == 1
    assert "slide" not in found
    assert found["problems"] == [
        "none of the manifests' slides is to be found from here; give a SLIDE, to measure reading"
    ]
    assert found["projection"]["tiles"]["num_encoded"] == 576
    assert found["projection"]["reading"] is None


def test_of_the_cohorts_slides_one_that_is_there_is_read(
    small_cohort: Path, small_manifests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slides = {f"synth_{i:04}": small_cohort / "elsewhere" / f"synth_{i:04}.svs" for i in range(12)}
    slides["synth_0003"] = small_cohort / "slides" / "synth_0003.svs"
    monkeypatch.setattr("manifests.catalog.read_paths", lambda _root: slides)
    monkeypatch.setattr("trainer.doctor._MOST_TRIED", 12)
    found, code = Doctor(manifests=small_manifests).run()
    assert (code, found["slide"]["slide_id"]) == (0, "synth_0003")


def test_a_slide_that_changed_since_it_was_tiled_is_a_problem(
    small_manifests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiler.slide.fingerprint_with", lambda *_: "other")
    found, code = Doctor(manifests=small_manifests).run()
    assert code == 1
    assert any("changed since it was tiled" in problem for problem in found["slide"]["problems"])


def test_fewer_gpus_than_processes_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H100")
    found, _ = Doctor(recipe="breast_full_slide", nproc=12).run()
    assert found["projection"]["device"] == "NVIDIA H100"
    assert "1 GPU here, and 12 processes: projected as if each had a GPU like it" in capsys.readouterr().err


def test_gpus_that_torch_cannot_use_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiler.doctor.machine, "list_gpus", lambda: ["NVIDIA A40"])
    monkeypatch.setattr(tiler.doctor.machine, "gpu_problems", lambda *_: [])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    found, code = Doctor(recipe="demo").run()
    assert code == 1
    (problem,) = found["projection"]["problems"]
    assert "the driver lists 1 GPU, torch can use none (CUDA_VISIBLE_DEVICES is '7')" in problem


def test_other_work_on_the_machine_is_told(
    small_cohort: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for load, is_told in ((0.0, False), (1e3, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        found, _ = Doctor(slide=small_cohort / "slides" / "synth_0000.svs", threads=1).run()
        assert found["slide"]["mpp_other"] is None
        assert ("other work is going on" in capsys.readouterr().err) == is_told
    Doctor().run()  # Measures nothing.
    assert "other work is going on" not in capsys.readouterr().err


def test_a_slide_is_read_as_the_cohort_was_tiled(small_cohort: Path, small_manifests: Path) -> None:
    found, code = Doctor(slide=small_cohort / "slides" / "synth_0001.svs", manifests=small_manifests).run()
    decoding = found["slide"]["decoding"]
    assert (code, found["slide"]["slide_id"]) == (0, "synth_0001")
    assert (decoding["tile_px"], decoding["tile_mpp"]) == (32, 2.0)
