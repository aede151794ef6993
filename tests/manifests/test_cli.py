"""`slidegrad manifest inspect | validate | stats`: the answer, and the exit code that goes with it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manifests import Manifest, ManifestError, SlideRecord, read_manifest, write_manifest
from manifests.catalog import rebuild_catalog
from manifests.cli import Inspect, Stats, Validate
from manifests.files import tiles_path

SIZE = {"width_l0": 448 * 4, "height_l0": 448, "mpp_x": 0.25, "mpp_y": 0.25, "tile_px": 224, "tile_mpp": 0.5}


def _write(root: Path, slide_id: str, x_l0: list[int]) -> None:
    record = SlideRecord(slide_id=slide_id, status="ok", num_tiles=len(x_l0), **SIZE)  # type: ignore[arg-type]
    x = np.array(x_l0, np.int32)
    write_manifest(tiles_path(root, slide_id), Manifest(record, x, x * 0, np.ones(len(x), np.float32)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Slides of 1, 2, 3 and 4 tiles edge to edge, an empty and a failed one."""
    for num_tiles in (1, 2, 3, 4):
        _write(tmp_path, f"s_{num_tiles}", [448 * i for i in range(num_tiles)])
    none = np.zeros(0, np.int32)
    for record in (
        SlideRecord(slide_id="nothing", status="empty", **SIZE),  # type: ignore[arg-type]
        SlideRecord(slide_id="broken", status="failed", error="slide broken: cut file"),
    ):
        write_manifest(tiles_path(tmp_path, record.slide_id), Manifest(record, none, none, none.astype(np.float32)))
    rebuild_catalog(tmp_path)
    return tmp_path


def test_inspect_gives_the_record_and_shows_tiles(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, code = Inspect(manifests=root, slide_id="s_4").run()
    assert code == 0
    assert result == dataclasses.asdict(read_manifest(tiles_path(root, "s_4")).slide)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[1] == "{'x_l0': 448, 'y_l0': 0, 'tissue': 1.0}"
    with pytest.raises(ManifestError, match="no such manifest"):
        Inspect(manifests=root, slide_id="nobody").run()


def test_stats_count_slides_by_status_and_tiles_over_the_ok_ones(root: Path) -> None:
    result, code = Stats(manifests=root).run()
    assert code == 0
    counts = {name: result[name] for name in ("num_slides", "ok", "empty", "failed", "num_tiles")}
    assert counts == {"num_slides": 6, "ok": 4, "empty": 1, "failed": 1, "num_tiles": 10}
    assert result["tiles_per_slide"] == pytest.approx({"median": 2.5, "p95": 3.85, "p99": 3.97, "max": 4})


def test_stats_of_nothing_are_zero(tmp_path: Path) -> None:
    (tmp_path / "tiles").mkdir()
    result, code = Stats(manifests=tmp_path).run()
    assert (code, result["num_slides"], result["num_tiles"], result["tiles_per_slide"]["max"]) == (0, 0, 0, 0)


def test_what_the_tiler_wrote_is_valid(root: Path, small_manifests: Path) -> None:
    assert Validate(manifests=root).run() == ({"num_slides": 6, "problems": []}, 0)
    assert Validate(manifests=small_manifests).run() == ({"num_slides": 12, "problems": []}, 0)


def _problem(root: Path) -> str:
    result, code = Validate(manifests=root).run()
    assert code == 1
    (problem,) = result["problems"]
    return str(problem)


def test_validate_finds_a_torn_file_and_reads_on(root: Path) -> None:
    torn = tiles_path(root, "s_2")
    torn.write_bytes(torn.read_bytes()[:-10])
    assert _problem(root).startswith(f"{torn}: not a readable manifest")
    assert Validate(manifests=root).run()[0]["num_slides"] == 5


@pytest.mark.parametrize("x_l0", [-1, 448 * 3 + 3])
def test_validate_finds_tiles_outside_their_slide(root: Path, x_l0: int) -> None:
    _write(root, "s_3", [0, x_l0, 448])
    rebuild_catalog(root)
    assert _problem(root) == "slide s_3: 1 tiles lie outside the slide"


def test_validate_finds_a_catalogue_that_disagrees(root: Path) -> None:
    _write(root, "s_5", [0])
    assert _problem(root).startswith("catalog.parquet disagrees")
    (root / "catalog.parquet").unlink()
    assert Validate(manifests=root).run()[1] == 0


@pytest.mark.slow  # three processes
def test_the_real_command_line(root: Path, slidegrad: Callable[..., Any]) -> None:
    good = slidegrad("manifest", "stats", root)
    assert (good.code, good.result["num_tiles"]) == (0, 10)
    torn = tiles_path(root, "s_2")
    torn.write_bytes(b"PAR1")
    bad = slidegrad("manifest", "validate", root)
    assert (bad.code, len(bad.result["problems"])) == (1, 1)
    assert str(torn) in bad.stderr
    unusable = slidegrad("manifest", "inspect", root, "nobody")
    assert (unusable.code, unusable.result) == (2, None)
    assert unusable.stderr.strip().splitlines()[-1].endswith("nobody.parquet: no such manifest")
