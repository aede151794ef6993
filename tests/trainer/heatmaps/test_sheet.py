"""Which tiles are on the sheet, and that they lie on it px by px."""

import warnings

import cv2
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from tests.trainer.heatmaps.made_values import made_manifest, made_values
from trainer.heatmaps.sheet import choose_tiles, draw_sheet, plan_sheet, shown_side
from trainer.heatmaps.words import in_lines


def test_the_highest_from_the_top_down_and_the_lowest_from_the_bottom_up() -> None:
    choice = choose_tiles(np.array([0.1, 0.9, -0.5, np.nan, 0.3, -0.7, 0.9]), 2)
    assert choice.top.tolist() == [1, 6]
    assert choice.bottom.tolist() == [5, 2]
    assert choice.rows.tolist() == [1, 6, 5, 2]


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0, np.nan]), max_size=30), st.integers(1, 12))
def test_no_tile_is_chosen_twice_and_none_that_was_not_seen(values: list[float], num: int) -> None:
    leading = np.array(values, np.float64)
    choice, num_seen = choose_tiles(leading, num), int(np.isfinite(leading).sum())
    assert len(set(choice.rows.tolist())) == len(choice.rows) == min(2 * num, num_seen)
    assert 0 <= len(choice.top) - len(choice.bottom) <= 1
    assert np.isfinite(leading[choice.rows]).all()
    rest = np.setdiff1d(np.flatnonzero(np.isfinite(leading)), choice.rows)
    if len(rest):
        assert leading[choice.top].min() >= leading[rest].max()
        assert leading[choice.bottom].max() <= leading[rest].min()


@pytest.mark.parametrize(("tile_px", "side"), [(32, 160), (100, 200), (224, 224), (256, 256), (512, 256), (1024, 256)])
def test_tiles_are_shown_by_a_whole_factor(tile_px: int, side: int) -> None:
    assert shown_side(tile_px) == side


@pytest.mark.parametrize(("num_top", "num_bottom"), [(12, 12), (1, 0), (7, 6), (120, 120)])
def test_nothing_overlaps_and_all_is_on_the_sheet(num_top: int, num_bottom: int) -> None:
    layout = plan_sheet(num_top, num_bottom, 160, 3)
    taken = np.zeros((layout.height, layout.width), bool)
    for left, top in layout.corners:
        assert left >= 5
        box = taken[top - 5 : top + layout.side + 5, left - 5 : left + layout.side + 5]
        assert box.shape == (layout.side + 10,) * 2
        assert not box.any()
        box[:] = True
    assert len(layout.corners) == num_top + num_bottom
    assert len(layout.headings) == 1 + bool(num_bottom)


@pytest.mark.parametrize("tile_px", [32, 224, 512])
@pytest.mark.parametrize("has_contributions", [True, False])
def test_pixels_on_the_sheet_are_those_that_were_read(tile_px: int, has_contributions: bool) -> None:
    manifest, parts = made_manifest(7, tile_px=tile_px), np.array([0.5, -0.25, np.nan, 0.3, 0.2, -0.6, 0.0])
    values = made_values(parts) if has_contributions else made_values(parts * np.nan, what="", attention=parts)
    choice = choose_tiles(values.leading, 2)
    tiles = np.random.default_rng(0).integers(0, 256, (4, tile_px, tile_px, 3)).astype(np.uint8)
    lines = ("slide a", "label x", "gma")
    sheet = decoded(draw_sheet(manifest, values, choice, tiles, lines))
    side = shown_side(tile_px)
    layout = plan_sheet(2, 2, side, len(lines) + 1)
    assert sheet.shape == (layout.height, layout.width, 3)
    for tile, (left, top) in zip(tiles, layout.corners, strict=True):
        shown = sheet[top : top + side, left : left + side]
        if side >= tile_px:
            assert (shown == tile.repeat(side // tile_px, 0).repeat(side // tile_px, 1)).all()
        else:
            blocks = tile.reshape(side, tile_px // side, side, tile_px // side, 3).mean((1, 3))
            assert np.abs(shown - blocks).max() <= 0.51
    if has_contributions:
        frames = [sheet[top - 3, left + 5].astype(int) for left, top in layout.corners]
        assert frames[0][0] > frames[0][2] + 80, "orange: above 0"
        assert frames[2][2] > frames[2][0] + 80, "blue: below 0"


def test_odd_ids_are_shown_without_a_warning() -> None:
    manifest, values = made_manifest(3), made_values([0.1, 0.2, -0.3])
    tiles = np.zeros((3, 32, 32, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("病理 $x_y", "a\nb\x00\u200b", "x" * 2000, "", "%s \\ {}"):
            draw_sheet(manifest, values, choose_tiles(values.leading, 12), tiles, [f"slide {name}", name])
    assert in_lines("病理 Größe $x", 40) == ["□□ Größe $x"]
    assert max(map(len, in_lines("x" * 200, 40))) == 40


def decoded(png: bytes) -> np.ndarray:
    picture = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    return picture[..., ::-1]
