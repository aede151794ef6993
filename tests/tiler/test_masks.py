"""Thumbnail and mask come back as they were written; outlines are the mask; blocks make the picture read whole."""

import itertools
import json
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

import tiler.masks
from tiler import TilerError, open_slide
from tiler.config import TissueConfig
from tiler.masks import MaskRecord, Overview, label_areas, read_mask, read_overview, trace_outline, write_mask
from tiler.synth.layout import smooth_noise
from tiler.tissue import drop_small, find_tissue


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


@pytest.mark.parametrize("shape", [(1, 1), (5, 3000), (1250, 1250), (2049, 1024)])
def test_a_mask_of_any_size_comes_back(tmp_path: Path, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    areas = rng.integers(0, 7, shape, np.uint8)
    record = MaskRecord(Overview(rng.integers(0, 256, (*shape, 3), np.uint8), 8.0, 16.0), areas, [])
    write_mask(tmp_path / "case.zarr.zip", record)
    found = read_mask(tmp_path / "case.zarr.zip")
    assert np.array_equal(found.overview.thumbnail, record.overview.thumbnail)
    assert np.array_equal(found.areas, areas)


def test_the_outline_can_be_read_without_zarr(tmp_path: Path) -> None:
    write_mask(tmp_path / "case.zarr.zip", _record())
    with zipfile.ZipFile(tmp_path / "case.zarr.zip") as archive:
        assert len(archive.namelist()) == len(set(archive.namelist()))
        attributes = json.loads(archive.read("zarr.json"))["attributes"]
    assert attributes == {"mpp": 7.984, "px_l0": 16.0, "outline": _record().outline}


def test_the_first_reason_wins_and_only_tissue_is_left_out() -> None:
    tissue = np.array([[True, True, True, False]])
    artefacts = {"pen": np.array([[True, False, False, True]]), "blur": np.array([[True, True, False, False]])}
    assert label_areas(tissue, artefacts).tolist() == [[2, 5, 1, 0]]


def _drawn(outline: list[list[list[list[int]]]], shape: tuple[int, int], px_l0: float) -> np.ndarray:
    """The outline drawn px by px: a px is inside by the even-odd rule at its middle."""
    y, x = (np.mgrid[: shape[0], : shape[1]] + 0.5) * px_l0
    mask = np.zeros(shape, bool)
    for rings in outline:
        inside = np.zeros(shape, bool)
        for ring in rings:
            for (x0, y0), (x1, y1) in itertools.pairwise(ring):
                if y0 != y1:
                    inside ^= ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
        mask |= inside
    return mask


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_an_outline_is_the_mask_of_a_slide(small_cohort: Path) -> None:
    for path in sorted(small_cohort.glob("slides/*.svs"))[::3]:
        overview = read_overview(open_slide(path), 0.5)
        mask = find_tissue(overview.thumbnail, overview.mpp, TissueConfig())
        outline = trace_outline(mask, overview.px_l0)
        assert _overlap(_drawn(outline, mask.shape, overview.px_l0), mask) > 0.99
        # Simplified: far fewer points than px along the outline.
        edge = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
        assert sum(len(ring) for rings in outline for ring in rings) < 0.3 * cv2.countNonZero(edge)


@pytest.mark.parametrize("px_l0", [16.0, 31.6, 1.0])
@pytest.mark.parametrize("scale", [8, 16])
def test_ragged_pieces_with_holes_keep_their_shape(scale: int, px_l0: float) -> None:
    mask = drop_small(smooth_noise(np.random.default_rng(scale), (150, 200), scale) > 0.2, 62)
    outline = trace_outline(mask, px_l0)
    assert any(len(rings) > 1 for rings in outline)
    # At 1 level-0 px per px the corners are rounded to whole px and the outline still lies on edges.
    assert _overlap(_drawn(outline, mask.shape, px_l0), mask) > 0.98
    assert all(ring[0] == ring[-1] and len(ring) >= 4 for rings in outline for ring in rings)
    assert isinstance(outline[0][0][0][0], int)


def test_an_outline_stays_within_a_px_of_a_large_piece() -> None:
    mask = np.zeros((420, 420), np.uint8)
    cv2.circle(mask, (210, 210), 200, 1, cv2.FILLED)
    off = _drawn(trace_outline(mask > 0, 16.0), mask.shape, 16.0) ^ (mask > 0)
    assert off.sum() < 0.2 * 2 * np.pi * 200


def test_an_outline_runs_along_the_edges_of_px() -> None:
    mask = np.zeros((20, 30), bool)
    mask[2:18, 5:25] = True
    mask[6:12, 10:20] = False
    (rings,) = trace_outline(mask, 10.0)
    assert [_corners(ring) for ring in rings] == [
        {(50, 20), (250, 20), (250, 180), (50, 180)},
        {(100, 60), (200, 60), (200, 120), (100, 120)},
    ]
    assert trace_outline(~np.ones((4, 4), bool), 10.0) == []
    assert _corners(trace_outline(np.ones((4, 6), bool), 10.0)[0][0]) == {(0, 0), (60, 0), (60, 40), (0, 40)}


def _corners(ring: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(point) for point in ring}


def test_a_torn_or_missing_mask_is_told(tmp_path: Path) -> None:
    file = tmp_path / "case.zarr.zip"
    with pytest.raises(TilerError, match=r"case\.zarr\.zip: no readable tissue mask"):
        read_mask(file)
    write_mask(file, _record())
    content = file.read_bytes()
    for length in range(0, len(content), len(content) // 25):
        file.write_bytes(content[:length])
        with pytest.raises(TilerError, match="tile again with --overwrite"):
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


def _in_blocks(slide: object, mpp: float, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_overview(slide, mpp)  # type: ignore[arg-type]
    monkeypatch.setattr(tiler.masks, "_BLOCK_BYTES", block_bytes)
    blocks = read_overview(slide, mpp)  # type: ignore[arg-type]
    assert (blocks.mpp, blocks.px_l0) == (whole.mpp, whole.px_l0)
    assert np.array_equal(blocks.thumbnail, whole.thumbnail)


@pytest.mark.parametrize("block_bytes", [1, 200_000])
def test_blocks_make_the_same_picture(small_cohort: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _in_blocks(open_slide(small_cohort / "slides" / "synth_0000.svs"), 0.5, block_bytes, monkeypatch)


def test_blocks_make_the_same_picture_where_the_slide_ends_within_a_px(
    real_slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = open_slide(real_slides / "CMU-1-Small-Region.svs")
    _in_blocks(slide, 0.499, 1_000_000, monkeypatch)
    # Its last px covers 12 x 7 px of the slide and is their colour.
    last = slide.read(138 * 16, 185 * 16, 0, 12, 7).mean((0, 1))
    assert np.abs(read_overview(slide, 0.499).thumbnail[-1, -1] - last).max() < 3


def test_blocks_make_the_same_picture_at_a_fractional_downsample(
    real_slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _in_blocks(open_slide(real_slides / "TCGA-CR-7395-01A-01-TS1.svs"), 0.25, 2_000_000, monkeypatch)


def test_no_read_of_a_slide_with_one_level_is_large(real_slides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = open_slide(real_slides / "CMU-1-Small-Region.svs")
    monkeypatch.setattr(tiler.masks, "_BLOCK_BYTES", 1_000_000)
    read, sizes = slide.read, []

    def watched(x_l0: int, y_l0: int, level: int, width: int, height: int) -> np.ndarray:
        sizes.append(3 * width * height)
        return read(x_l0, y_l0, level, width, height)

    slide.read = watched  # type: ignore[method-assign]
    read_overview(slide, 0.499)
    assert max(sizes) <= 1_000_000
    assert sum(sizes) == 3 * 2220 * 2967
