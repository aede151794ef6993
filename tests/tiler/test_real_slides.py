"""The two real slides: tiled by the command line, and their pixels beside OpenSlide's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest

from manifests import read_manifest
from manifests.files import tiles_path
from tiler import open_slide, read_tiles

JPEG, JPEG2000 = "CMU-1-Small-Region", "TCGA-CR-7395-01A-01-TS1"


@pytest.fixture(scope="module")
def tiled(real_slides: Path, tmp_path_factory: pytest.TempPathFactory, slidegrad: Callable[..., Any]) -> Path:
    """Both slides, the one that does not tell its scale at 0.5 mpp."""
    out = tmp_path_factory.mktemp("manifests")
    ended = slidegrad("tile", real_slides, "--out", out, "--default-mpp", 0.5, "--workers", 1)
    assert (ended.code, ended.result["ok"], ended.result["failed"]) == (0, 2, 0)
    return out


@pytest.mark.slow  # reads both slides
def test_both_are_tiled_when_the_scale_is_given(tiled: Path) -> None:
    jpeg, jpeg2000 = (read_manifest(tiles_path(tiled, slide_id)) for slide_id in (JPEG, JPEG2000))
    assert (jpeg.slide.mpp_x, jpeg.slide.mpp_source, jpeg.slide.level) == (0.499, "vendor", 0)
    assert (jpeg2000.slide.mpp_x, jpeg2000.slide.mpp_source, jpeg2000.slide.level) == (0.5, "default", 0)
    assert (jpeg.slide.width_l0, jpeg.slide.height_l0) == (2220, 2967)
    assert (jpeg2000.slide.width_l0, jpeg2000.slide.height_l0) == (4443, 3567)
    for manifest in (jpeg, jpeg2000):
        assert len(manifest) >= 40
        assert manifest.tissue.min() >= 0.25
        assert 0 < manifest.slide.tissue_mm2 < manifest.slide.width_l0 * manifest.slide.height_l0 * 0.25e-6


@pytest.mark.slow  # starts a process
def test_a_scale_nobody_knows_is_asked_for(real_slides: Path, tmp_path: Path, slidegrad: Callable[..., Any]) -> None:
    ended = slidegrad("tile", real_slides, "--out", tmp_path, "--workers", 1)
    assert ended.code == 1
    assert (ended.result["ok"], ended.result["failed"]) == (1, 1)
    assert read_manifest(tiles_path(tmp_path, JPEG)).slide.status == "ok"
    error = read_manifest(tiles_path(tmp_path, JPEG2000)).slide.error
    assert error.startswith(f"slide {JPEG2000}: no microns-per-pixel (aperio; MPP")
    assert "--default-mpp" in error
    assert f"failed: {error}" in ended.stderr


@pytest.mark.parametrize(("slide_id", "most"), [(JPEG, 1.0), (JPEG2000, 2.5)])
def test_tiles_are_those_of_openslide(slide_id: str, most: float, tiled: Path, real_slides: Path) -> None:
    manifest = read_manifest(tiles_path(tiled, slide_id))
    rows = np.linspace(0, len(manifest) - 1, 12).astype(np.int64)
    slide = open_slide(real_slides / f"{slide_id}.svs")
    tiles = read_tiles(slide, manifest, rows)
    assert slide.backend == "cucim"
    theirs = openslide.OpenSlide(real_slides / f"{slide_id}.svs")
    for tile, row in zip(tiles, rows, strict=True):
        at = int(manifest.x_l0[row]), int(manifest.y_l0[row])
        expected = np.asarray(theirs.read_region(at, 0, (224, 224)).convert("RGB")).astype(int)
        assert expected.std() > 5
        assert np.abs(tile - expected).mean() < most
