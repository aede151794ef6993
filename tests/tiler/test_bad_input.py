"""Damaged and odd files, some fifty: each has its own outcome, one sentence, and costs no other slide anything."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from manifests import SlideRecord, read_manifest
from manifests.files import mask_path, tiles_path
from tests.tiler.odd_files import LONG, ODD, Odd
from tiler.archive import Job, Tiled, tile_archive
from tiler.config import TilerConfig

CONFIG = TilerConfig(tile_px=64, max_bad=0.5)


@pytest.fixture(scope="module")
def archive(small_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("Jane Doe")
    for odd in ODD:
        (folder / odd.name).parent.mkdir(parents=True, exist_ok=True)
        odd.make(folder / odd.name, small_cohort / "slides" / "synth_0000.svs")
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("manifests")


@pytest.fixture(scope="module")
def told() -> list[str]:
    """What the user is told; filled by `tiled`."""
    return []


@pytest.fixture(scope="module")
def tiled(archive: Path, out: Path, told: list[str]) -> Tiled:
    job = Job(num_workers=2, time_s=60)
    done = tile_archive(str(archive), out, CONFIG, job, on_start=lambda plan: told.extend(plan.notes))
    told.extend(done.notes)
    return done


@pytest.fixture(scope="module")
def records(tiled: Tiled) -> dict[str, SlideRecord]:
    return {row["slide_id"]: SlideRecord(**row) for row in tiled.catalog.to_pylist()}


def test_there_is_an_outcome_for_each_slide_and_for_nothing_else(records: dict[str, SlideRecord]) -> None:
    assert set(records) == {odd.slide_id for odd in ODD if odd.status}
    assert len(ODD) >= 50


@pytest.mark.parametrize("odd", [odd for odd in ODD if odd.status], ids=lambda odd: odd.name[:40])
def test_each_has_its_outcome(odd: Odd, records: dict[str, SlideRecord], out: Path, archive: Path) -> None:
    record = records[odd.slide_id]
    assert record.status == odd.status, record.error
    manifest = read_manifest(tiles_path(out, odd.slide_id))
    assert manifest.slide == record
    assert mask_path(out, odd.slide_id).exists() == (odd.status != "failed")
    if odd.status == "failed":
        assert record.error.startswith(f"slide {odd.slide_id}: ")
        sentence = record.error.removeprefix(f"slide {odd.slide_id}: ")
        assert len(sentence) >= 10
        assert re.search(odd.message, sentence), record.error
        assert "Jane Doe" not in record.error
        assert str(archive) not in record.error
        assert "\n" not in record.error
    else:
        assert record.error == ""
        assert (len(manifest) > 0) == (odd.status == "ok")


def test_what_is_special_is_recorded(records: dict[str, SlideRecord]) -> None:
    assert (records["mpp_xy"].mpp_x, records["mpp_xy"].mpp_y) == pytest.approx((0.5, 0.25))
    assert (records["mpp_xy"].read_w, records["mpp_xy"].read_h) == (64, 128)
    assert records["few_damaged"].num_bad_tiles > 0
    good = records["two.dots"]
    assert records["few_damaged"].num_tiles + records["few_damaged"].num_bad_tiles == good.num_tiles
    assert records["suffix_tif"].num_tiles == records[LONG].num_tiles == good.num_tiles


@pytest.mark.usefixtures("tiled")
def test_the_user_is_told_of_names_and_copies(told: list[str]) -> None:
    notes = " | ".join(told)
    assert "file names appear more than once: their slide ids hold folders or suffixes too" in notes
    assert "slides are copies of one another" in notes


def _without_rights(command: list[str]) -> list[str]:
    """The command as one who may read only what the mode bits allow: root too, without its right to read all."""
    if os.geteuid() != 0:
        return command
    if shutil.which("setpriv") is None:
        pytest.skip("root reads everything, and setpriv, which takes that right away, is not installed")
    rights = "-dac_override,-dac_read_search"
    return ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", *command]


@pytest.mark.slow  # starts processes
def test_what_may_not_be_read_is_told(small_cohort: Path, tmp_path: Path) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    (archive / "closed").mkdir(parents=True)
    for name in ("good.svs", "secret.svs", "closed/inside.svs"):
        shutil.copy(small_cohort / "slides" / "synth_0000.svs", archive / name)
    (archive / "secret.svs").chmod(0)
    (archive / "closed").chmod(0)
    words = [sys.executable, "-m", "slidegrad", "tile", str(archive), "--out", str(out), "--workers", "1"]
    try:
        done = subprocess.run(_without_rights(words), capture_output=True, text=True, timeout=120)
    finally:
        (archive / "closed").chmod(0o755)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["num_slides"] == 2
    assert "failed: slide secret: no permission to read it" in done.stderr
    assert "1 folders may not be read; slides in them are missing here" in done.stderr
