"""Pixel frames: coordinates come back as they went, the level is the right one, tiles lie inside, the curve is one."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from manifests.errors import ManifestError
from manifests.geometry import choose_read, grid_starts, hilbert_order, l0_to_level, level_to_l0

MAX_L0 = 200_000
whole = st.integers(1, 64).map(float)
fractional = st.floats(1.2, 64).filter(lambda d: not d.is_integer())


@settings(max_examples=60)
@given(st.one_of(whole, fractional, st.builds(lambda a, b: a / b, st.integers(2_000, 9_000), st.integers(200, 1_500))))
def test_level_px_survive_the_way_over_level_0(downsample: float) -> None:
    px = np.arange(math.floor(MAX_L0 / downsample))
    x_l0 = level_to_l0(px, downsample)
    assert x_l0.dtype == np.int32
    assert np.array_equal(l0_to_level(x_l0, downsample), px)
    # A reader that divides in float32 finds the same px.
    assert np.array_equal(np.floor(x_l0.astype(np.float32) / np.float32(downsample)), px)


@given(whole, st.integers(0, 3_000))
def test_whole_downsamples_are_exact(downsample: float, px: int) -> None:
    assert level_to_l0(np.array([px]), downsample)[0] == px * downsample


@pytest.mark.parametrize(
    ("downsamples", "mpp", "tile_mpp", "level", "read_px", "is_native"),
    [
        ((1.0, 4.0), 0.5, 0.5, 0, 224, True),
        ((1.0, 4.0), 0.5049, 0.5, 0, 224, True),  # 1 % too coarse: just taken as it is
        ((1.0, 4.0), 0.4951, 0.5, 0, 224, True),
        ((1.0, 4.0), 0.494, 0.5, 0, 227, False),
        ((1.0, 4.0), 0.263, 0.5, 0, 426, False),
        ((1.0, 2.0, 4.0), 0.25, 0.5, 1, 224, True),
        ((1.0, 2.0, 4.0), 0.2526, 0.5, 0, 443, False),  # level 1 would be 0.5052 mpp: too coarse
        ((1.0, 4.0, 16.0), 0.25, 0.5, 0, 448, False),
        ((1.0, 4.0, 16.0), 0.25, 2.0, 1, 448, False),
        ((1.0, 2.0005054, 4.001), 0.25, 0.5, 1, 224, True),
        ((1.0,), 0.25, 8.0, 0, 7168, False),
    ],
)
def test_the_level_to_read(
    downsamples: tuple[float, ...], mpp: float, tile_mpp: float, level: int, read_px: int, is_native: bool
) -> None:
    read = choose_read(downsamples, (mpp, mpp), 224, tile_mpp)
    assert (read.level, read.read_w, read.read_h, read.is_native) == (level, read_px, read_px, is_native)


def test_px_that_are_not_square_are_read_by_axis() -> None:
    read = choose_read((1.0,), (0.5, 0.25), 224, 0.5)
    assert (read.read_w, read.read_h, read.is_native) == (224, 448, False)


@pytest.mark.parametrize("mpp", [(0.506, 0.506), (0.25, 0.506), (1.0, 0.5)])
def test_resolution_that_is_not_there_is_not_made_up(mpp: tuple[float, float]) -> None:
    with pytest.raises(ManifestError, match=r"coarser than the requested 0\.5; give --mpp"):
        choose_read((1.0, 4.0), mpp, 224, 0.5)


@given(
    st.lists(st.floats(1.1, 4.5), max_size=6),
    st.floats(0.1, 1.0),
    st.floats(0.1, 8.0),
    st.integers(1, 512),
)
def test_the_level_is_the_coarsest_that_is_fine_enough(
    steps: list[float], mpp: float, tile_mpp: float, tile_px: int
) -> None:
    assume(mpp <= tile_mpp)
    downsamples = tuple(np.cumprod([1.0, *steps]).tolist())
    read = choose_read(downsamples, (mpp, mpp), tile_px, tile_mpp)
    assert mpp * downsamples[read.level] <= tile_mpp * 1.0100001
    assert all(mpp * d > tile_mpp * 1.0099999 for d in downsamples[read.level + 1 :])
    covered_um = read.read_w * mpp * downsamples[read.level]
    assert abs(covered_um - tile_px * tile_mpp) <= max(0.0101 * tile_px * tile_mpp, mpp * downsamples[read.level])


@given(st.integers(0, 5_000), st.integers(1, 600), st.floats(0.02, 1))
def test_tiles_lie_inside_and_leave_no_room_for_another(extent: int, read_px: int, share: float) -> None:
    stride = max(1.0, read_px * share)
    starts = grid_starts(extent, read_px, stride)
    assert starts.dtype == np.int64
    if extent < read_px:
        assert len(starts) == 0
        return
    assert starts[0] == 0
    assert starts[-1] + read_px <= extent
    assert starts[-1] + read_px + stride > extent - 1
    assert (np.diff(starts) >= 1).all()
    assert np.abs(starts - np.arange(len(starts)) * stride).max() <= 0.5


@given(st.integers(0, 5), st.randoms(use_true_random=False))
def test_neighbours_on_the_curve_touch(num_bits: int, random: object) -> None:
    side = 2**num_bits
    cells = [(col, row) for row in range(side) for col in range(side)]
    random.shuffle(cells)  # type: ignore[attr-defined]
    col, row = np.array(cells, np.int64).T
    order = hilbert_order(col, row)
    assert np.array_equal(np.sort(order), np.arange(side * side))
    steps = np.abs(np.diff(col[order])) + np.abs(np.diff(row[order]))
    assert (steps == 1).all()


@given(st.sets(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=60))
def test_the_curve_over_any_cells_follows_the_full_one(cells: set[tuple[int, int]]) -> None:
    col, row = np.array(sorted(cells), np.int64).reshape(-1, 2).T
    order = hilbert_order(col, row)
    assert np.array_equal(np.sort(order), np.arange(len(cells)))
    # Once the curve has left an aligned square, it never comes back: regions are compact.
    for side in (2, 16, 128):
        square = (col[order] // side) * 1_000 + row[order] // side
        runs = 1 + np.count_nonzero(np.diff(square)) if len(square) else 0
        assert runs == len(np.unique(square))


def test_the_curve_goes_down_first() -> None:
    col, row = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])
    walked = [(int(col[i]), int(row[i])) for i in hilbert_order(col, row)]
    assert walked == [(0, 0), (0, 1), (1, 1), (1, 0)]
