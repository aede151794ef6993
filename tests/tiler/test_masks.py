"""Thumbnail and mask come back as they were written; a picture read in strips is the picture read whole."""

from pathlib import Path

import numpy as np
import pytest

import tiler.masks
from tiler import TilerError, open_slide
from tiler.masks import MaskRecord, Overview, read_mask, read_overview, write_mask


def _record() -> MaskRecord:
    rng = np.random.default_rng(0)
    overview = Overview(rng.integers(0, 256, (70, 130, 3), np.uint8), 7.984, 16.0)
    return MaskRecord(overview, rng.integers(0, 7, (70, 130), np.uint8), [[[[0, 0], [16, 0], [16, 16], [0, 0]]]])


def test_a_mask_comes_back_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "masks" / "ab" / "case.zarr.zip"
    write_mask(file, _record())
    found = read_mask(file)
    assert np.array_equal(found.overview.thumbnail, _record().overview.thumbnail)
    assert np.array_equal(found.areas, _record().areas)
    assert found.areas.dtype == np.uint8
    assert (found.overview.mpp, found.overview.px_l0, found.outline) == (7.984, 16.0, _record().outline)
    assert [entry.name for entry in file.parent.iterdir()] == ["case.zarr.zip"]


def test_a_torn_or_missing_mask_is_told(tmp_path: Path) -> None:
    file = tmp_path / "case.zarr.zip"
    with pytest.raises(TilerError, match=r"case\.zarr\.zip: no readable tissue mask"):
        read_mask(file)
    write_mask(file, _record())
    content = file.read_bytes()
    for length in range(0, len(content), len(content) // 25):
        file.write_bytes(content[:length])
        with pytest.raises(TilerError, match="tile the slide again"):
            read_mask(file)


def test_an_error_while_writing_leaves_no_mask(tmp_path: Path) -> None:
    bad = MaskRecord(_record().overview, np.array([[object()]]), [])
    with pytest.raises((TypeError, ValueError)):
        write_mask(tmp_path / "case.zarr.zip", bad)
    assert list(tmp_path.iterdir()) == []


def test_a_thumbnail_covers_the_slide_at_8_microns(small_cohort: Path) -> None:
    slide = open_slide(small_cohort / "slides" / "synth_0000.svs")
    overview = read_overview(slide, 0.5)
    thumbnail = overview.thumbnail
    width, height = slide.size_l0
    assert (overview.mpp, overview.px_l0) == (8.0, 16.0)
    assert thumbnail.shape == (height // 16, width // 16, 3)
    assert thumbnail.dtype == np.uint8
    # The same picture, from level 0 alone.
    whole = slide.read(0, 0, 0, width, height).reshape(height // 16, 16, width // 16, 16, 3).mean((1, 3))
    assert np.abs(thumbnail - whole).mean() < 3


def test_a_coarse_slide_gives_its_own_px(small_cohort: Path) -> None:
    slide = open_slide(small_cohort / "slides" / "synth_0000.svs")
    overview = read_overview(slide, 16.0)
    assert (overview.mpp, overview.px_l0) == (16.0, 1.0)
    assert overview.thumbnail.shape[1::-1] == slide.size_l0


def _in_strips(slide: object, mpp: float, strip_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_overview(slide, mpp)  # type: ignore[arg-type]
    monkeypatch.setattr(tiler.masks, "_STRIP_BYTES", strip_bytes)
    strips = read_overview(slide, mpp)  # type: ignore[arg-type]
    assert (strips.mpp, strips.px_l0) == (whole.mpp, whole.px_l0)
    assert np.array_equal(strips.thumbnail, whole.thumbnail)


def test_strips_make_the_same_picture(small_cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _in_strips(open_slide(small_cohort / "slides" / "synth_0000.svs"), 0.5, 1, monkeypatch)


def test_strips_make_the_same_picture_at_a_fractional_downsample(
    real_slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _in_strips(open_slide(real_slides / "TCGA-CR-7395-01A-01-TS1.svs"), 0.25, 2_000_000, monkeypatch)
