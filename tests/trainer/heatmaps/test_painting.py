"""Where a tile's value lands on the thumbnail, and how attention and contributions become colours."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from manifests import Manifest, SlideRecord
from trainer.heatmaps.painting import (
    RANKS,
    SIGNS,
    color_scale,
    paint_slide,
    paint_tiles,
    rank_share,
    sign_share,
    tile_boxes,
)

MPP_L0, MPP_THUMB = 0.25, 8.0
FOOTPRINT_L0 = 448  # 224 px at 0.5 mpp is 112 um: 14 px of the thumbnail.


def manifest_of(x_l0: list[int], y_l0: list[int], *, mpp: tuple[float, float] = (MPP_L0, MPP_L0)) -> Manifest:
    record = SlideRecord(
        slide_id="s",
        status="ok",
        num_tiles=len(x_l0),
        mpp_x=mpp[0],
        mpp_y=mpp[1],
        width_l0=10_000,
        height_l0=10_000,
        tile_px=224,
        tile_mpp=0.5,
    )
    return Manifest(record, np.array(x_l0, np.int32), np.array(y_l0, np.int32), np.ones(len(x_l0), np.float32))


def render(thumbnail: np.ndarray, mpp_thumb: float, manifest: Manifest, weights: np.ndarray) -> np.ndarray:
    """A heatmap of attention."""
    return paint_slide(thumbnail, mpp_thumb, manifest, rank_share(weights))


def white(height: int = 100, width: int = 120) -> np.ndarray:
    return np.full((height, width, 3), 255, np.uint8)


def test_weight_lands_on_its_tiles_pixels() -> None:
    # 32 level-0 px make one thumbnail px.
    manifest = manifest_of([320, 320 + FOOTPRINT_L0, 1600], [640, 640, 1600])
    heatmap = render(white(), MPP_THUMB, manifest, np.array([0.1, 0.7, 0.2]))
    changed = (heatmap != 255).any(-1)
    expected = np.zeros((100, 120), bool)
    expected[20:34, 10:38] = True  # Two neighbours, without a gap.
    expected[50:64, 50:64] = True
    assert (changed == expected).all()
    brightness = [int(heatmap[y, x].sum()) for y, x in ((25, 15), (55, 55), (25, 30))]
    assert brightness == sorted(brightness), "lowest, middle, highest weight"
    assert len(np.unique(heatmap[20:34, 10:24].reshape(-1, 3), axis=0)) == 1


def test_color_is_that_of_the_color_bar_over_grey() -> None:
    thumbnail = np.full((20, 20, 3), (200, 40, 120), np.uint8)
    heatmap = render(thumbnail, MPP_THUMB, manifest_of([0], [0]), np.array([3.0]))
    grey = 0.299 * 200 + 0.587 * 40 + 0.114 * 120
    expected = 0.55 * np.array(RANKS(0.5)[:3]) * 255 + 0.45 * grey
    assert heatmap[5, 5] == pytest.approx(expected, abs=0.51)
    assert (heatmap[15, 15] == thumbnail[15, 15]).all()


def test_thumbnail_has_one_scale_where_mpp_differs_by_axis() -> None:
    """The thumbnail is the level shrunk by one factor; its mpp is that of the coarser axis."""
    manifest = manifest_of([3200], [3200], mpp=(0.25, 0.5))
    left, top, right, bottom = tile_boxes(manifest, mpp_thumb=16.0)[0]
    assert (left, top) == (100, 100)
    assert (right - left, bottom - top) == (14, 7)


def test_unseen_tiles_and_the_input_stay_as_they_are() -> None:
    thumbnail = white()
    heatmap = render(thumbnail, MPP_THUMB, manifest_of([0, 1600], [0, 0]), np.array([np.nan, 1.0]))
    assert (heatmap[:14, :14] == 255).all()
    assert (heatmap[:14, 50:64] != 255).any(-1).all()
    assert (thumbnail == 255).all()
    nothing = render(thumbnail, MPP_THUMB, manifest_of([0, 1600], [0, 0]), np.full(2, np.nan))
    assert (nothing == thumbnail).all()


def test_tiles_over_the_edge_are_cut() -> None:
    heatmap = render(white(), MPP_THUMB, manifest_of([120 * 32 - 64], [100 * 32 - 96]), np.array([1.0]))
    assert (heatmap != 255).any(-1).sum() == 2 * 3


def test_one_weight_per_tile() -> None:
    with pytest.raises(ValueError, match=r"slide s: values of shape \(3,\), expected \(2,\)"):
        render(white(), MPP_THUMB, manifest_of([0, 1600], [0, 0]), np.ones(3))


def test_ranks() -> None:
    assert rank_share(np.array([1e-9, 5.0, 1e-6])).tolist() == [0, 1, 0.5]
    assert rank_share(np.array([1.0, 2.0, 2.0, 3.0])).tolist() == [0, 0.5, 0.5, 1]
    assert rank_share(np.array([4.0, 4.0])).tolist() == [0.5, 0.5]
    assert rank_share(np.array([np.nan, 7.0]))[1] == 0.5
    assert len(rank_share(np.zeros(0))) == 0


@given(st.lists(st.floats(1e-30, 1), min_size=2, max_size=40, unique=True))
def test_ranks_forget_the_scale(weights: list[float]) -> None:
    share = rank_share(np.array(weights))
    assert (np.argsort(share) == np.argsort(weights)).all()
    assert share[[np.argmin(weights), np.argmax(weights)]].tolist() == [0, 1]


@given(st.data())
def test_painting_is_the_mean_of_the_tiles_over_a_pixel(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    corner, side = st.integers(-4, 14), st.integers(1, 8)
    tiles = data.draw(st.lists(st.tuples(corner, corner, side, side, st.floats(0, 1)), max_size=8))
    boxes = np.array([(x, y, x + w, y + h) for x, y, w, h, _ in tiles], np.int64).reshape(-1, 4)
    values = np.array([tile[-1] for tile in tiles])
    painted = paint_tiles((height, width), boxes, values)
    for y in range(height):
        for x in range(width):
            over = (boxes[:, 0] <= x) & (x < boxes[:, 2]) & (boxes[:, 1] <= y) & (y < boxes[:, 3])
            expected = values[over].mean() if over.any() else np.nan
            assert painted[y, x] == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_contributions_are_coloured_by_their_sign_on_the_tiles_own_place() -> None:
    """Left and right, above and below are not mixed up: the four corners of a slide wider than high."""
    manifest = manifest_of([0, 3200, 0, 1600], [0, 0, 2560, 1280])
    share = sign_share(np.array([4.0, -4.0, 0.0, np.nan]), scale=2.0)
    assert share[:3].tolist() == [1, 0, 0.5]
    picture = paint_slide(white(), MPP_THUMB, manifest, share, SIGNS).astype(int)
    red, blue = picture[..., 0], picture[..., 2]
    assert (red[:14, :14] > blue[:14, :14] + 80).all(), "above 0, upper left: orange"
    assert (blue[:14, 100:114] > red[:14, 100:114] + 80).all(), "below 0, upper right: blue"
    assert (abs(red - blue)[80:94, :14] < 4).all(), "0, lower left: no colour"
    assert (picture[40:54, 50:64] == 255).all(), "not seen"


def test_colours_of_contributions_end_at_a_quantile_of_their_size() -> None:
    """One tile that outdoes all others does not make those look like 0."""
    values = np.concatenate([np.linspace(-1, 1, 999), [1000.0, np.nan]])
    assert color_scale(values) == pytest.approx(np.quantile(np.abs(values[:-1]), 0.99))
    assert 0.9 < color_scale(values) < 1.1
    assert color_scale(-values) == color_scale(values)
    mostly_nothing = np.array([0.0] * 500 + [3.0])
    assert color_scale(mostly_nothing) == 3
    assert color_scale(np.zeros(5)) == color_scale(np.full(5, np.nan)) == color_scale(np.zeros(0)) == 1


def test_the_middle_of_the_signs_is_neutral_and_the_lightest() -> None:
    low, middle, high = (np.array(SIGNS(x)[:3]) for x in (0.0, 0.5, 1.0))
    assert np.ptp(middle) < 0.02
    assert middle.min() > max(low.mean(), high.mean())
    assert low[2] > low[0]
    assert high[0] > high[2]
