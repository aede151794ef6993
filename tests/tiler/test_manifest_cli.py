"""`slidegrad manifest …`: the answer, what is printed for people, and the exit code that goes with it."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manifests import Manifest, ManifestError, SlideRecord, open_manifests, read_manifest, write_manifest
from manifests.catalog import read_paths, rebuild_catalog
from manifests.files import tiles_path
from tiler.manifest_cli import Compact, Inspect, Stats, Validate

SIZE = {"width_l0": 448 * 4, "height_l0": 448, "mpp_x": 0.25, "mpp_y": 0.25, "tile_px": 224, "tile_mpp": 0.5}
SIZE |= {"read_w": 448, "read_h": 448}


def _write(root: Path, slide_id: str, num_tiles: int, **fields: Any) -> None:
    record = SlideRecord(**{"slide_id": slide_id, "status": "ok", "num_tiles": num_tiles, **SIZE, **fields})
    x = np.arange(num_tiles, dtype=np.int32) * 448
    write_manifest(tiles_path(root, slide_id), Manifest(record, x, x * 0, np.ones(num_tiles, np.float32)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Slides of 1, 2, 3 and 4 tiles edge to edge, an empty and a failed one."""
    root = tmp_path / "tree"
    for num_tiles in (1, 2, 3, 4):
        _write(root, f"s_{num_tiles}", num_tiles)
    _write(root, "nothing", 0, status="empty")
    _write(root, "broken", 0, status="failed", error="slide broken: cut file")
    rebuild_catalog(root)
    return root


def test_inspect_gives_the_record_and_shows_tiles(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, code = Inspect(manifests=str(root), slide_id="s_4").run()
    assert code == 0
    assert result == dataclasses.asdict(read_manifest(tiles_path(root, "s_4")).slide)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[1] == "{'x_l0': 448, 'y_l0': 0, 'tissue': 1.0}"
    with pytest.raises(ManifestError, match="no such manifest"):
        Inspect(manifests=str(root), slide_id="nobody").run()


def test_stats_count_slides_by_status_and_tiles_over_the_ok_ones(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, code = Stats(manifests=str(root)).run()
    assert code == 0
    counts = {name: result[name] for name in ("num_slides", "ok", "empty", "failed", "num_tiles")}
    assert counts == {"num_slides": 6, "ok": 4, "empty": 1, "failed": 1, "num_tiles": 10}
    assert result["tiles_per_slide"] == pytest.approx({"median": 2.5, "p95": 3.85, "p99": 3.97, "max": 4})
    assert result["histogram"] == {"counts": (0, 1, 1, 1, 1), "edges": (0, 1, 2, 3, 4, 5)}
    assert [devices["k"] for devices in result["devices"]] == [840, 1848, 528, 728]
    assert json.loads(json.dumps(result))["status"]["ok"] == {"slides": 4, "tiles": 10}
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "6 slides (4 ok, 1 empty, 1 failed), 10 tiles"
    assert "4 to 4 ################################################## 1" in lines
    assert "   1,848        1       1       1       1  ResNet50 AMP" in lines


def test_stats_with_numbers_of_ones_own(root: Path) -> None:
    result, _ = Stats(manifests=str(root), k=(1, 3)).run()
    assert [(devices["k"], devices["median"], devices["max"]) for devices in result["devices"]] == [
        (1, 3, 4),
        (3, 1, 2),
    ]


def test_stats_of_nothing_are_zero(tmp_path: Path) -> None:
    (tmp_path / "tiles").mkdir()
    result, code = Stats(manifests=str(tmp_path)).run()
    assert (code, result["num_slides"], result["num_tiles"], result["tiles_per_slide"]["max"]) == (0, 0, 0, 0)


def test_validate_lists_the_first_problems_and_counts_all(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"num_slides": 6, "num_problems": 0, "num_by_kind": {}, "problems": []}
    assert Validate(manifests=str(root)).run() == (good, 0)
    for number in range(30):
        _write(root, f"new_{number}", 1)
    capsys.readouterr()
    result, code = Validate(manifests=str(root)).run()
    assert (code, result["num_problems"], result["num_by_kind"]) == (1, 30, {"catalogue": 30})
    assert set(result["problems"][0]) == {"kind", "slide_id", "text"}
    lines = capsys.readouterr().err.splitlines()
    assert lines[20:] == ["… and 10 more", "catalog.parquet is a cache: delete it, it is made anew at the next use"]


def test_validate_with_slides_finds_those_that_changed_or_are_gone(
    small_cohort: Path, small_manifests: Path, tmp_path: Path
) -> None:
    assert Validate(manifests=str(small_manifests), slides=True).run()[1] == 0
    archive = tmp_path / "archive"
    shutil.copytree(small_cohort / "slides", archive)
    first, second = sorted(read_paths(small_manifests, archive).items())[:2]
    first[1].write_bytes(first[1].read_bytes()[:-1])
    second[1].unlink()
    result, code = Validate(manifests=str(small_manifests), slides=True, archive=archive).run()
    assert (code, result["num_by_kind"]) == (1, {"slide": 2})
    assert {problem["slide_id"] for problem in result["problems"]} == {first[0], second[0]}
    assert str(archive) not in json.dumps(result)


def test_validate_says_what_it_needs(root: Path) -> None:
    with pytest.raises(ManifestError, match="no paths/ in"):
        Validate(manifests=str(root), slides=True).run()
    with pytest.raises(ManifestError, match="give --slides too"):
        Validate(manifests=str(root), archive=root).run()


def test_compact_makes_a_set_that_the_other_commands_read(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    result, code = Compact(manifests=str(root), out=out).run()
    size = sum(file.stat().st_size for file in out.rglob("*.parquet"))
    assert (code, result) == (
        0,
        {"num_slides": 6, "num_tiles": 10, "num_shards": 1, "num_bytes": size, "set": str(out)},
    )
    assert open_manifests(out).catalog().equals(open_manifests(root).catalog())
    assert Stats(manifests=str(out)).run() == Stats(manifests=str(root)).run()
    assert Inspect(manifests=str(out), slide_id="s_3").run() == Inspect(manifests=str(root), slide_id="s_3").run()
    assert Validate(manifests=str(out)).run()[1] == 0


@pytest.mark.slow  # six processes
def test_the_real_command_line(root: Path, tmp_path: Path, slidegrad: Callable[..., Any]) -> None:
    good = slidegrad("manifest", "stats", root, "--k", "3", "--k", "2")
    assert (good.code, good.result["num_tiles"]) == (0, 10)
    assert [devices["max"] for devices in good.result["devices"]] == [2, 2]
    compacted = slidegrad("manifest", "compact", root, "--out", tmp_path / "set")
    assert (compacted.code, compacted.result["num_slides"]) == (0, 6)
    (shard,) = (tmp_path / "set" / "shards").iterdir()
    shard.unlink()
    lost = slidegrad("manifest", "inspect", tmp_path / "set", "s_2")
    assert lost.code == 2
    assert lost.stderr.strip().endswith(f"shards/{shard.name} is missing; copy the whole set again, or compact anew")
    torn = tiles_path(root, "s_2")
    torn.write_bytes(b"PAR1")
    bad = slidegrad("manifest", "validate", root)
    assert (bad.code, len(bad.result["problems"])) == (1, 1)
    assert str(torn) in bad.stderr
    unusable = slidegrad("manifest", "inspect", root, "nobody")
    assert (unusable.code, unusable.result) == (2, None)
    assert unusable.stderr.strip().splitlines()[-1].endswith("nobody.parquet: no such manifest")
    empty = slidegrad("manifest", "validate", tmp_path)
    assert (empty.code, empty.result) == (2, None)
    assert "no manifests here" in empty.stderr


def _run_without_rights(*words: str | Path) -> tuple[int, str]:
    """Exit code and the last line for people, for one who may do only what the mode bits allow."""
    command = [sys.executable, "-m", "slidegrad", "manifest", *map(str, words)]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everywhere, and setpriv, which takes that right away, is not installed")
        rights = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


@pytest.mark.slow  # nine processes
def test_what_may_not_be_read_or_written_is_told_in_a_sentence(root: Path, tmp_path: Path) -> None:
    closed, secret = tmp_path / "closed", tiles_path(root, "s_2")
    closed.mkdir()
    closed.chmod(0o555)
    for words in (("export", "csv", root), ("export", "clam", root), ("export", "geojson", root), ("compact", root)):
        code, told = _run_without_rights(*words, "--out", closed)
        assert (code, told) == (2, f"slidegrad: {closed}: cannot write here (Permission denied); give another folder")
    secret.chmod(0)
    code, told = _run_without_rights("inspect", root, "s_2")
    assert (code, "s_2.parquet: not a readable manifest" in told) == (2, True)
    code, told = _run_without_rights("compact", root, "--out", tmp_path / "set")
    assert (code, "s_2.parquet: a manifest that cannot be used, one of 1" in told) == (2, True)
    code, told = _run_without_rights("export", "csv", root, "--out", tmp_path / "csv")
    assert (code, "failed: " in told, "s_2.parquet: not a readable manifest" in told) == (1, True, True)
    root.chmod(0)
    try:
        assert _run_without_rights("inspect", root, "s_1")[0] == 2
    finally:
        root.chmod(0o755)


@pytest.mark.slow  # three processes
def test_a_tree_that_may_not_be_written_to_is_read_as_it_is_now(root: Path, tmp_path: Path) -> None:
    _write(root, "late", 5)
    tiles_path(root, "s_1").unlink()
    before = (root / "catalog.parquet").read_bytes()
    root.chmod(0o555)
    try:
        assert _run_without_rights("inspect", root, "late")[0] == 0
        assert _run_without_rights("compact", root, "--out", tmp_path / "set")[0] == 0
    finally:
        root.chmod(0o755)
    assert list(open_manifests(tmp_path / "set")) == ["broken", "late", "nothing", "s_2", "s_3", "s_4"]
    assert (root / "catalog.parquet").read_bytes() == before


@pytest.mark.slow  # one process
def test_an_import_into_a_folder_that_may_not_be_written_to_is_told(small_cohort: Path, tmp_path: Path) -> None:
    tiles = tmp_path / "synth_0000.csv"
    tiles.write_text(
        "slide_id,x_l0,y_l0,tissue,level,read_w,read_h,tile_px,tile_mpp\nsynth_0000,0,0,1,0,64,64,64,0.5\n"
    )
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    code, told = _run_without_rights("import", "csv", tiles, "--slides", small_cohort / "slides", "--out", closed)
    assert (code, told) == (2, f"slidegrad: {closed}: cannot write here (Permission denied); give another folder")
