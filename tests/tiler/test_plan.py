"""The read plan makes up every tile exactly once, and has every compressed tile decoded exactly once."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from manifests.geometry import l0_to_level, level_to_l0
from tiler.plan import BLOCK_PX, BlockRead, plan_reads

Px = NDArray[np.int64]


def _plan(
    x: Px, y: Px, read: tuple[int, int], file_tile: tuple[int, int], down: float = 1.0, **options: int
) -> tuple[list[BlockRead], int]:
    return plan_reads(level_to_l0(x, down), level_to_l0(y, down), down, read, file_tile, **options)


def _under(x: int, y: int, size: tuple[int, int], file_tile: tuple[int, int]) -> set[tuple[int, int]]:
    """File tiles that a region touches, found px by px."""
    across = {px // file_tile[0] for px in range(x, x + size[0])}
    down = {px // file_tile[1] for px in range(y, y + size[1])}
    return {(column, row) for column in across for row in down}


@st.composite
def tile_places(draw: st.DrawFn) -> tuple[Px, Px, tuple[int, int]]:
    """Distinct tiles (x, y) and their size: of a grid, edge to edge or overlapping, in any order."""
    read = draw(st.tuples(st.integers(8, 60), st.integers(8, 60)))
    stride = draw(st.sampled_from([1.0, 0.75, 0.4]))
    cells = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), unique=True, min_size=1, max_size=60))
    col, row = np.array(cells).T
    return np.round(col * read[0] * stride).astype(np.int64), np.round(row * read[1] * stride).astype(np.int64), read


file_tiles = st.tuples(st.integers(8, 80), st.integers(8, 80)) | st.sampled_from([(300, 700), (2000, 3)])


@given(tile_places(), file_tiles, st.sampled_from([1.0, 4.0, 2.0005054]), st.booleans())
def test_the_parts_make_up_each_tile_once(
    places: tuple[Px, Px, tuple[int, int]], file_tile: tuple[int, int], down: float, may_share: bool
) -> None:
    x, y, (width, height) = places
    reads, _ = _plan(x, y, (width, height), file_tile, down, may_share=may_share)
    painted = np.zeros((len(x), height, width), np.int64)
    for read in reads:
        x0, y0 = (int(l0_to_level(np.array(at), down)) for at in (read.x_l0, read.y_l0))
        for tile, left, top, tile_x, tile_y, w, h in read.parts.tolist():
            painted[tile, tile_y : tile_y + h, tile_x : tile_x + w] += 1
            assert (x0 + left, y0 + top) == (x[tile] + tile_x, y[tile] + tile_y)
            assert min(left, top, tile_x, tile_y) >= 0
        # No larger than its parts need.
        assert read.parts[:, 1].min() == read.parts[:, 2].min() == 0
        assert (read.parts[:, 1] + read.parts[:, 5]).max() == read.width
        assert (read.parts[:, 2] + read.parts[:, 6]).max() == read.height
        assert (x0, y0) == (read.x, read.y)
    assert (painted == 1).all()
    if not may_share:
        assert len(reads) == len(x)


@given(tile_places(), file_tiles, st.sampled_from([0, BLOCK_PX]))
def test_each_compressed_tile_is_decoded_once(
    places: tuple[Px, Px, tuple[int, int]], file_tile: tuple[int, int], most_px: int
) -> None:
    x, y, size = places
    reads, num_decoded = _plan(x, y, size, file_tile, most_px=most_px)
    decoded = Counter(cell for r in reads for cell in _under(r.x_l0, r.y_l0, (r.width, r.height), file_tile))
    needed = {cell for a, b in zip(x.tolist(), y.tolist(), strict=True) for cell in _under(a, b, size, file_tile)}
    assert set(decoded) == needed
    assert set(decoded.values()) == {1}
    assert num_decoded == len(needed)
    assert most_px or len(reads) == len(needed)


@given(tile_places(), file_tiles)
def test_alone_each_tile_pays_for_all_under_it(
    places: tuple[Px, Px, tuple[int, int]], file_tile: tuple[int, int]
) -> None:
    x, y, size = places
    _, num_decoded = _plan(x, y, size, file_tile, may_share=False)
    tiles = zip(x.tolist(), y.tolist(), strict=True)
    assert num_decoded == sum(len(_under(a, b, size, file_tile)) for a, b in tiles)


def test_dense_tiles_are_read_in_regions_of_eight_compressed_tiles() -> None:
    row, col = np.divmod(np.arange(32 * 32), 32)
    reads, num_decoded = _plan(col * 256, row * 256, (256, 256), (256, 256))
    assert {(read.width, read.height) for read in reads} == {(1024, 512)}
    assert num_decoded == 32 * 32 == 8 * len(reads)


@pytest.mark.parametrize(("side", "most"), [(240, 8), (256, 8), (512, 2), (1024, 1), (4096, 1)])
def test_regions_stay_small_whatever_the_file_tiles_are(side: int, most: int) -> None:
    row, col = np.divmod(np.arange(40 * 40), 40)
    reads, _ = _plan(col * 224, row * 224, (224, 224), (side, side))
    assert max(r.width * r.height for r in reads) <= most * side * side


def test_far_tiles_are_regions_of_their_own() -> None:
    at = np.array([100, 1668])
    reads, num_decoded = _plan(at, at, (224, 224), (256, 256))
    assert [(r.x_l0, r.y_l0, r.width, r.height) for r in reads] == [(100, 100, 224, 224), (1668, 1668, 224, 224)]
    assert num_decoded == 8


@pytest.mark.parametrize("may_share", [True, False])
def test_no_tiles_are_no_reads(may_share: bool) -> None:
    none = np.zeros(0, np.int64)
    assert _plan(none, none, (224, 224), (256, 256), may_share=may_share) == ([], 0)
