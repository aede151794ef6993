"""The read plan serves every tile once, from inside its block, and never costs more than reading each tile alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from manifests.geometry import l0_to_level, level_to_l0
from tiler.plan import _CALL_COST, BlockRead, plan_reads

Px = NDArray[np.int64]


def _plan(
    x: Px, y: Px, read: tuple[int, int], file_tile: tuple[int, int], down: float = 1.0, **options: bool
) -> list[BlockRead]:
    return plan_reads(level_to_l0(x, down), level_to_l0(y, down), x, y, read, file_tile, **options)


def _cost(x: int, y: int, size: tuple[int, int], file_tile: tuple[int, int]) -> float:
    """File tiles that a region touches, counted one by one, and one call."""
    across = {px // file_tile[0] for px in range(x, x + size[0])}
    down = {px // file_tile[1] for px in range(y, y + size[1])}
    return len(across) * len(down) + _CALL_COST


@st.composite
def tile_places(draw: st.DrawFn) -> tuple[Px, Px, tuple[int, int]]:
    """Distinct tiles (x, y) and their size: of a grid, edge to edge or overlapping, in any order."""
    read = draw(st.tuples(st.integers(8, 60), st.integers(8, 60)))
    stride = draw(st.sampled_from([1.0, 0.75, 0.4]))
    cells = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), unique=True, min_size=1, max_size=60))
    col, row = np.array(cells).T
    return np.round(col * read[0] * stride).astype(np.int64), np.round(row * read[1] * stride).astype(np.int64), read


file_tiles = st.tuples(st.integers(8, 80), st.integers(8, 80))


@given(tile_places(), file_tiles, st.sampled_from([1.0, 4.0, 2.0005054]), st.booleans())
def test_each_tile_is_served_once_from_inside_its_block(
    places: tuple[Px, Px, tuple[int, int]], file_tile: tuple[int, int], down: float, may_share: bool
) -> None:
    x, y, (width, height) = places
    reads = _plan(x, y, (width, height), file_tile, down, may_share=may_share)
    members = np.concatenate([read.members for read in reads])
    assert np.array_equal(np.sort(members), np.arange(len(x)))
    for read in reads:
        x0, y0 = (int(l0_to_level(np.array(at), down)) for at in (read.x_l0, read.y_l0))
        assert np.array_equal(x0 + read.left, x[read.members])
        assert np.array_equal(y0 + read.top, y[read.members])
        assert (read.left >= 0).all()
        assert (read.top >= 0).all()
        # No larger than its tiles need.
        assert (read.left + width).max() == read.width
        assert (read.top + height).max() == read.height
    if not may_share:
        assert len(reads) == len(x)


@given(tile_places(), file_tiles)
def test_a_plan_costs_no_more_than_reading_each_tile_alone(
    places: tuple[Px, Px, tuple[int, int]], file_tile: tuple[int, int]
) -> None:
    x, y, size = places
    planned = sum(_cost(r.x_l0, r.y_l0, (r.width, r.height), file_tile) for r in _plan(x, y, size, file_tile))
    alone = sum(_cost(int(a), int(b), size, file_tile) for a, b in zip(x, y, strict=True))
    assert planned <= alone + 1e-9


def test_overlapping_tiles_of_one_place_may_be_read_apart() -> None:
    # Apart they touch 3 and 4 file tiles, together a rectangle of 8: more than the call it saves.
    x, y, size, file_tile = np.array([96, 102]), np.array([39, 49]), (8, 13), (8, 8)
    assert len(_plan(x, y, size, file_tile)) == 2
    assert len(_plan(x * 0, np.array([39, 40]), size, file_tile)) == 1


def test_a_dense_block_is_one_read() -> None:
    row, col = np.divmod(np.arange(64), 8)
    (read,) = _plan(col * 224, row * 224, (224, 224), (256, 256))
    assert (read.width, read.height) == (8 * 224, 8 * 224)


def test_far_tiles_are_read_apart() -> None:
    at = np.array([0, 7]) * 224
    assert len(_plan(at, at, (224, 224), (256, 256))) == 2


def test_tiles_on_the_files_own_grid_share_calls_but_no_tile() -> None:
    row, col = np.divmod(np.arange(64), 8)
    (read,) = _plan(col * 256, row * 256, (256, 256), (256, 256))
    assert (read.width, read.height) == (2048, 2048)


@pytest.mark.parametrize("may_share", [True, False])
def test_no_tiles_are_no_reads(may_share: bool) -> None:
    none = np.zeros(0, np.int64)
    assert _plan(none, none, (224, 224), (256, 256), may_share=may_share) == []
