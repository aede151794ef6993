"""The grid: shares are exact areas, tiles lie inside their slide, and what is left out is counted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from manifests.geometry import ReadSize, l0_to_level
from tiler.grid import Grid, box_means, lay_lattice, make_grid

_FINE = 4
"""Sub-pixels per mask pixel and axis, in the brute-force answer."""


@st.composite
def masks(draw: st.DrawFn) -> NDArray[np.bool_]:
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    bits = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    return np.array(bits).reshape(height, width)


@st.composite
def edges(draw: st.DrawFn, fine_px: int) -> NDArray[np.int64]:
    """Begins and ends (n, 2) in sub-pixels."""
    pairs = draw(st.lists(st.tuples(st.integers(0, fine_px - 1), st.integers(1, fine_px)), min_size=1, max_size=5))
    return np.array([(begin, min(fine_px, begin + extent)) for begin, extent in pairs])


@given(st.data())
def test_box_means_are_exact_areas(data: st.DataObject) -> None:
    mask = data.draw(masks())
    fine = np.kron(mask, np.ones((_FINE, _FINE)))
    x, y = data.draw(edges(fine.shape[1])), data.draw(edges(fine.shape[0]))
    expected = [[fine[y0:y1, x0:x1].mean() for x0, x1 in x] for y0, y1 in y]
    (x0, x1), (y0, y1) = (x / fine.shape[1]).T, (y / fine.shape[0]).T
    np.testing.assert_allclose(box_means(mask, x0, x1, y0, y1), expected, atol=1e-9)


def _grid(mask: NDArray[np.bool_], size: tuple[int, int], read: tuple[int, int], **settings: float) -> Grid:
    read_size = ReadSize(level=0, read_w=read[0], read_h=read[1], is_native=True)
    lattice = lay_lattice(size, read_size, overlap_share=settings.get("overlap_share", 0))
    down, least = settings.get("downsample", 1.0), settings.get("min_tissue", 0.25)
    return make_grid(lattice, read_size, down, mask, {}, size, min_tissue=least)


sides = st.integers(1, 700)


@given(
    masks(),
    st.tuples(sides, sides),
    st.tuples(st.integers(20, 200), st.integers(20, 200)),
    st.sampled_from([1.0, 4.0, 2.0005054, 3.9987]),
    st.sampled_from([0, 0.25, 0.6]),
    st.floats(0, 1),
)
def test_kept_tiles_lie_inside_and_hold_enough_tissue(
    mask: NDArray[np.bool_],
    size: tuple[int, int],
    read: tuple[int, int],
    downsample: float,
    overlap_share: float,
    min_tissue: float,
) -> None:
    every = _grid(mask, size, read, downsample=downsample, overlap_share=overlap_share, min_tissue=0)
    kept = _grid(mask, size, read, downsample=downsample, overlap_share=overlap_share, min_tissue=min_tissue)
    x, y = l0_to_level(every.x_l0, downsample), l0_to_level(every.y_l0, downsample)
    assert every.rejected["tissue"] == 0
    assert (x >= 0).all()
    assert (x + read[0] <= size[0]).all()
    assert (y + read[1] <= size[1]).all()
    assert len(set(zip(x.tolist(), y.tolist(), strict=True))) == len(x)
    enough = {(x, y): t for x, y, t in zip(every.x_l0, every.y_l0, every.tissue, strict=True) if t >= min_tissue}
    share = dict(zip(zip(kept.x_l0, kept.y_l0, strict=True), kept.tissue, strict=True))
    # float32 shares beside a float64 threshold: only a share that equals it to seven digits may fall either way.
    assert all(abs(every_t - min_tissue) < 1e-6 for at, every_t in enough.items() if at not in share)
    assert all(t >= min_tissue - 1e-6 for t in share.values())
    assert len(kept.x_l0) + kept.rejected["tissue"] == len(every.x_l0)
    assert (kept.x_l0.dtype, kept.y_l0.dtype, kept.tissue.dtype) == (np.int32, np.int32, np.float32)


def test_no_least_tissue_keeps_every_tile_of_a_white_slide() -> None:
    white = np.zeros((5, 7), bool)
    grid = _grid(white, (700, 500), (100, 100), min_tissue=0)
    assert (len(grid.x_l0), grid.rejected["tissue"], grid.tissue.max()) == (35, 0, 0)
    assert len(_grid(white, (700, 500), (100, 100)).x_l0) == 0


def test_the_share_is_that_of_the_tiles_own_place() -> None:
    mask = np.zeros((4, 8), bool)
    mask[1, 6] = True  # one quarter of the tile at column 3, row 0
    grid = _grid(mask, (800, 400), (200, 200))
    assert (grid.x_l0.tolist(), grid.y_l0.tolist(), grid.tissue.tolist()) == ([600], [0], [0.25])
    assert grid.rejected["tissue"] == 7


@pytest.mark.parametrize("size", [(99, 500), (500, 99)])
def test_a_slide_smaller_than_a_tile_has_none(size: tuple[int, int]) -> None:
    assert len(_grid(np.ones((5, 5), bool), size, (100, 100)).x_l0) == 0


def test_neighbours_in_the_array_are_neighbours_on_the_slide() -> None:
    grid = _grid(np.ones((4, 4), bool), (800, 800), (100, 100))
    steps = np.abs(np.diff(grid.x_l0)) + np.abs(np.diff(grid.y_l0))
    assert len(grid.x_l0) == 64
    assert (steps == 100).all()


@given(
    st.tuples(sides, sides),
    st.tuples(st.integers(20, 200), st.integers(20, 200)),
    st.tuples(st.floats(0, 3), st.floats(0, 3)),
    st.sampled_from([0, 0.25, 0.6]),
)
def test_a_shifted_lattice_starts_where_asked_and_stays_inside(
    size: tuple[int, int], read: tuple[int, int], offset: tuple[float, float], overlap_share: float
) -> None:
    read_size = ReadSize(level=0, read_w=read[0], read_h=read[1], is_native=True)
    lattice = lay_lattice(size, read_size, overlap_share=overlap_share, offset_share=offset)
    for axis, starts in enumerate((lattice.xs, lattice.ys)):
        first = round(offset[axis] * read[axis])
        if first + read[axis] > size[axis]:
            assert len(starts) == 0
            continue
        assert starts[0] == first
        assert starts[-1] + read[axis] <= size[axis]
        # The next one would not lie inside.
        assert round(first + len(starts) * read[axis] * (1 - overlap_share)) + read[axis] > size[axis] - 1


@given(st.tuples(sides, sides), st.tuples(st.integers(20, 200), st.integers(20, 200)), st.integers(16, 128))
def test_an_aligned_lattice_starts_at_corners_of_the_files_tiles(
    size: tuple[int, int], read: tuple[int, int], file_tile: int
) -> None:
    read_size = ReadSize(level=0, read_w=read[0], read_h=read[1], is_native=True)
    lattice = lay_lattice(size, read_size, align_to=(file_tile, file_tile))
    for axis, starts in enumerate((lattice.xs, lattice.ys)):
        assert (starts % file_tile == 0).all()
        assert (np.diff(starts) >= read[axis]).all()
        assert (np.diff(starts) - read[axis] < file_tile).all()


def test_each_place_is_rejected_for_the_first_reason_that_holds() -> None:
    read_size = ReadSize(level=0, read_w=10, read_h=10, is_native=True)
    tissue = np.ones((10, 40), bool)
    tissue[:, :10] = False  # The first place holds none.
    pen, blur = np.zeros_like(tissue), np.zeros_like(tissue)
    pen[:, 10:20] = True
    blur[:, 10:25] = True  # All of the second, half of the third.
    lattice = lay_lattice((40, 10), read_size)
    for least, rejected, shares in ((0.25, (1, 1, 0), [0.5, 1]), (0.75, (1, 1, 1), [1])):
        grid = make_grid(lattice, read_size, 1.0, tissue, {"pen": pen, "blur": blur}, (40, 10), min_tissue=least)
        assert grid.rejected == dict(zip(("tissue", "pen", "blur"), rejected, strict=True))
        assert grid.tissue.tolist() == shares
