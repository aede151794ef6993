"""Looking for damage at tiling time: what each check finds and what it cannot, and which tiles it marks."""

import dataclasses
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from manifests import Manifest
from tests.tiler.damage import CHECKS, CONFIG, bad_of, harm, open_built, overwrite, place, retag, touching, write_codec
from tiler import TilerConfig, TilerError, build_manifest, open_slide
from tiler.config import Backend, Check
from tiler.integrity import check_whole
from tiler.masks import overview_level
from tiler.tiff_tables import read_tables

FOUND_BY_MARKERS = ("all zeros", "no start", "end lost", "wrong place", "past the end", "too short", "no length")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", FOUND_BY_MARKERS)
def test_tiles_that_touch_damage_are_bad_and_only_those(kind: str, check: Check, path: Path) -> None:
    opened = open_built(path)
    harm(path, kind, 5)
    expected = touching(opened, 5)
    assert 0 < sum(expected) < len(expected) / 3
    assert bad_of((open_slide(path), opened[1]), check).tolist() == expected


@pytest.mark.parametrize("check", ["decode", "sample"])
@pytest.mark.parametrize("only", [False, True])
def test_a_half_damaged_jpeg_with_both_marks_takes_a_strict_decode(only: bool, check: Check, path: Path) -> None:
    """Also where the manifest touches no sound tile: not to be taken for a codec that is not known."""
    slide, manifest = open_built(path)
    if only:
        inside = np.flatnonzero((manifest.x_l0 // 256 == 1) & (manifest.y_l0 // 256 == 1))[:1]
        manifest = _pick(manifest, inside)
    harm(path, "second half zeros", slide.levels[0].width // 256 + (slide.levels[0].width % 256 > 0) + 1)
    expected = touching((slide, manifest), -(-slide.levels[0].width // 256) + 1)
    assert any(expected)
    assert not bad_of((slide, manifest), "markers").any()
    assert bad_of((slide, manifest), check).tolist() == expected


def _pick(manifest: Manifest, rows: NDArray[np.int64]) -> Manifest:
    record = dataclasses.replace(manifest.slide, num_tiles=len(rows))
    return Manifest(record, manifest.x_l0[rows], manifest.y_l0[rows], manifest.tissue[rows])


@pytest.mark.parametrize("check", CHECKS)
def test_another_whole_tile_is_noticed_by_none(check: Check, path: Path) -> None:
    """A limit, told in the package's docstring: it is a sound picture."""
    opened = open_built(path)
    at, length = min(place(path, i)[::-1] for i in range(12))[::-1]
    smallest = [place(path, i) for i in range(12)].index((at, length))
    tile = path.read_bytes()[at : at + length]
    target = (smallest + 5) % 12
    retag(path, 325, target, length)
    overwrite(path, place(path, target)[0], tile)
    assert not bad_of((open_slide(path), opened[1]), check).any()


@pytest.mark.parametrize("check", get_args(Check))
def test_sound_slides_have_no_bad_tile(check: Check, small_cohort: Path) -> None:
    slides = sorted((small_cohort / "slides").glob("*.svs"))
    for name in slides:
        for config in (CONFIG, TilerConfig(tile_px=32, mpp=2.0, min_tissue=0, check="none")):
            check_whole(name)
            opened = open_built(name, config)
            assert len(opened[1])
            assert not bad_of(opened, check).any(), name.name
    assert not bad_of(open_built(slides[0], backend="openslide"), check).any()


@pytest.mark.slow  # reads both slides by two readers
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("backend", ["cucim", "openslide"])
def test_nor_have_the_real_ones(backend: Backend, check: Check, real_slides: Path) -> None:
    for name in sorted(real_slides.glob("*.svs")):
        check_whole(name)
        for mpp in (0.5, 0.7, 1.0):
            opened = open_built(name, TilerConfig(default_mpp=0.5, mpp=mpp, min_tissue=0, check="none"), backend)
            assert len(opened[1]) > 20
            assert not bad_of(opened, check).any(), (name.name, mpp)


def test_none_looks_at_nothing(path: Path) -> None:
    opened = open_built(path)
    for table in range(3):
        harm(path, "all zeros", 0, table)
    assert not bad_of(opened, "none").any()


def test_a_build_leaves_out_what_is_bad_and_counts_it(path: Path) -> None:
    config = TilerConfig(tile_px=48, mpp=0.5, min_tissue=0, max_bad=0.4)
    whole = build_manifest(path, "case", config).manifest
    expected = np.array(touching((open_slide(path), whole), 5))
    harm(path, "end lost", 5)
    kept = build_manifest(path, "case", config).manifest
    assert kept.slide.num_bad_tiles == expected.sum() > 0
    assert np.array_equal(kept.x_l0, whole.x_l0[~expected])


# Where the tissue was looked for.


@pytest.mark.parametrize("check", CHECKS)
def test_a_damaged_level_where_tissue_was_looked_for_is_the_end(check: Check, path: Path) -> None:
    opened = open_built(path)
    tables = read_tables(path)
    level = opened[0].levels[1]
    index = next(i for i, t in enumerate(tables) if (t.width, t.height) == (level.width, level.height))
    harm(path, "end lost", 0, index)
    with pytest.raises(TilerError, match=r"slide case: 1 of \d+ compressed tiles of level 1, .* are damaged; restore"):
        bad_of(opened, check)


def test_but_where_tiles_are_read_from_it_they_are_left_out(path: Path) -> None:
    opened = open_built(path, TilerConfig(tile_px=16, mpp=2.0, min_tissue=0, check="none"))
    assert opened[1].slide.level == overview_level(opened[0], 0.5) == 1
    index = [table.width for table in read_tables(path)].index(opened[0].levels[1].width)
    harm(path, "all zeros", 0, index)
    assert bad_of(opened, "markers").tolist() == touching(opened, 0)


def test_where_no_codec_is_known_the_strict_reader_tells(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_built(path)
    harm(path, "second half zeros", 5)
    harm(path, "end lost", 7)
    monkeypatch.setattr("tiler.integrity.bad_decodes", lambda *arguments: None)  # noqa: ARG005
    # The level of the thumbnail has no damage that could be told.
    assert bad_of(opened, "decode").tolist() == touching(opened, 5, 7)


@pytest.mark.parametrize("check", CHECKS)
def test_a_damaged_deflate_tile_does_not_end_the_process(check: Check, tmp_path: Path) -> None:
    path = tmp_path / "case.tif"
    write_codec(path, "deflate", levels=2)
    opened = open_built(path, TilerConfig(tile_px=32, default_mpp=0.5, min_tissue=0, check="none"), "cucim")
    assert opened[0].backend == "cucim"
    assert not bad_of(opened, check).any()
    harm(path, "second half zeros" if check != "markers" else "all zeros", 2)
    assert bad_of(opened, check).tolist() == touching(opened, 2)


# Empty tiles.


def _sparse(path: Path) -> None:
    jpeg = cv2.imencode(".jpg", np.full((128, 128, 3), 90, np.uint8))[1].tobytes()
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            iter([jpeg, b"", jpeg, jpeg]),
            shape=(256, 256, 3),
            dtype=np.uint8,
            photometric="ycbcr",
            subsampling=(2, 2),
            compression="jpeg",
            tile=(128, 128),
        )


@pytest.mark.parametrize(("backend", "painted"), [("openslide", 255), ("cucim", 0)])
def test_a_tile_left_out_is_bad_where_its_reader_paints_it_black(
    backend: Backend, painted: int, tmp_path: Path
) -> None:
    path = tmp_path / "case.tif"
    _sparse(path)
    config = TilerConfig(tile_px=64, default_mpp=0.5, min_tissue=0, check="none", backend=backend)
    opened = open_built(path, config, backend)
    assert (opened[0].read(128, 0, 0, 128, 128) == painted).all()
    assert opened[0].read(0, 0, 0, 128, 128).mean() == pytest.approx(90, abs=1)
    expected = touching(opened, 1) if painted == 0 else [False] * len(opened[1])
    for check in ("markers", "decode"):
        assert bad_of(opened, check).tolist() == expected  # type: ignore[arg-type]
