"""Pixel frames: coordinates come back as they went, the level is the right one, tiles lie inside, the curve is one.

And the way back from coordinates to cells: tiles of one grid keep their places in it, whatever the rounding.
"""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from manifests import open_manifests
from manifests.errors import ManifestError
from manifests.geometry import choose_read, grid_starts, hilbert_order, l0_to_level, level_to_l0
from manifests.schema import Manifest, SlideRecord

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


def manifest_of(x_l0: object, y_l0: object, *, tile_px: int = 224, overlap: int = 0, mpp: float = 0.5) -> Manifest:
    """Tiles at these corners, at 0.5 mpp."""
    x, y = np.asarray(x_l0, np.int32), np.asarray(y_l0, np.int32)
    record = SlideRecord(
        slide_id="a",
        status="ok",
        num_tiles=len(x),
        mpp_x=mpp,
        mpp_y=mpp,
        tile_px=tile_px,
        tile_mpp=0.5,
        overlap=overlap,
    )
    return Manifest(record, x, y, np.ones(len(x), np.float32))


steps_between_levels = st.one_of(st.integers(1, 16).map(float), st.floats(1.2, 17))


@st.composite
def grids(draw: st.DrawFn) -> tuple[Manifest, np.ndarray, np.ndarray]:
    """Some tiles of a grid that is made as the tiler makes it, in any order; and their true columns and rows."""
    mpp = draw(st.floats(0.1, 0.505))
    downsamples = (1.0, draw(steps_between_levels))
    tile_px = draw(st.integers(32, 512))
    read = choose_read(downsamples, (mpp, mpp), tile_px, 0.5)
    most = 1 - 8.01 / min(read.read_w, read.read_h)  # A stride of 8 px of the read level.
    overlap = math.floor(tile_px * draw(st.floats(0, most)))
    downsample = downsamples[read.level]
    num_lines = draw(st.integers(1, 900))
    corners = []
    for side in (read.read_w, read.read_h):
        stride = side * (1 - overlap / tile_px)
        extent = round(side + stride * num_lines)
        corners.append(level_to_l0(grid_starts(extent, side, stride, draw(st.floats(0, 1)) * side), downsample))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_tiles = draw(st.integers(1, 3_000))
    # Tiles lie in a few heaps, so that there are neighbours, and gaps of any width.
    centres = generator.integers(0, num_lines, (draw(st.integers(1, 5)), 2))
    spread = draw(st.floats(0.5, 100))
    places = np.round(
        centres[generator.integers(0, len(centres), num_tiles)] + generator.normal(0, spread, (num_tiles, 2))
    )
    limits = np.array([len(axis) for axis in corners])
    places = np.unique(places[((places >= 0) & (places < limits)).all(1)].astype(int), axis=0)
    assume(len(places))
    col, row = generator.permutation(places).T
    return manifest_of(corners[0][col], corners[1][row], tile_px=tile_px, overlap=overlap, mpp=mpp), col, row


@settings(max_examples=200)
@given(grids())
def test_tiles_of_a_grid_keep_their_places_in_it(grid: tuple[Manifest, np.ndarray, np.ndarray]) -> None:
    manifest, *lines_of_axes = grid
    cells = manifest.cells
    assert cells.dtype == np.int32
    assert cells.min(0).tolist() == [0, 0]
    assert len(np.unique(cells, axis=0)) == len(cells)
    for found, true in zip(cells.T, lines_of_axes, strict=True):
        lines, first = np.unique(true, return_index=True)
        assert np.array_equal(found[first][np.searchsorted(lines, true)], found), "one column has two numbers"
        found_steps, true_steps = np.diff(found[first]), np.diff(lines)
        near = true_steps <= 8
        assert np.array_equal(found_steps[near], true_steps[near])
        # Over wide gaps the scale of a level that is used as it is may be 1 % off.
        assert (np.abs(found_steps - true_steps) <= 1 + 0.02 * true_steps).all()


def test_cells_of_a_level_that_is_used_as_it_is_do_not_drift() -> None:
    """0.4951 mpp is read without resampling for 0.5: 1 % off, two columns over 224."""
    lines = np.arange(224)
    manifest = manifest_of(lines * 224, lines * 0, mpp=0.4951)
    assert np.array_equal(manifest.cells[:, 0], lines)


@pytest.mark.parametrize("step", [240, 256, 320])
def test_cells_of_a_grid_on_the_compressed_tiles_are_neighbours(step: int) -> None:
    """224-px tiles, each at the corner of a compressed tile, in two pieces."""
    lines = np.array([*range(30), *range(34, 60)])
    col, row = (axis.ravel() for axis in np.meshgrid(lines, lines))
    assert np.array_equal(manifest_of(col * step, row * step).cells, np.stack([col, row], 1))


def test_coordinates_off_any_grid_fall_into_the_nearest_cell() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 40_000, (2, 5_000))
    cells = manifest_of(x, y).cells
    assert np.abs(cells[:, 0] * 224 - (x - x.min())).max() <= 112
    assert np.abs(cells[:, 1] * 224 - (y - y.min())).max() <= 112
    assert len(np.unique(cells, axis=0)) < len(cells)


@pytest.mark.parametrize("corners", [[], [0], [70_000]])
def test_no_tile_and_a_single_one_have_cells(corners: list[int]) -> None:
    assert manifest_of(corners, corners).cells.tolist() == [[0, 0]] * len(corners)


def test_manifests_of_the_tiler_have_their_cells(small_manifests: Path) -> None:
    source = open_manifests(small_manifests)
    for slide_id in source.catalog().column("slide_id").to_pylist():
        manifest = source[slide_id]
        cells = manifest.cells
        assert len(np.unique(cells, axis=0)) == len(manifest) > 1
        corners = np.stack([manifest.x_l0, manifest.y_l0], 1)
        off_px = (corners - corners.min(0)) - cells * np.array(manifest.footprint_l0)
        assert np.abs(off_px).max() <= 0.02 * manifest.slide.width_l0
