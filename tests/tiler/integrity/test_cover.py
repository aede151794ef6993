"""Which compressed tiles lie under the tiles of a manifest."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiler.damage import bad_of, harm, open_built, touching
from tiler import TilerConfig
from tiler.integrity.cover import cover


@given(st.data())
def test_cover_is_that_of_every_px(data: st.DataObject) -> None:
    tile_w, tile_h, read_w, read_h = (data.draw(st.integers(1, 9)) for _ in range(4))
    rows, columns = (data.draw(st.integers(1, 6)) for _ in range(2))
    corner = st.tuples(st.integers(0, tile_w * columns - 1), st.integers(0, tile_h * rows - 1))
    corners = data.draw(st.lists(corner, max_size=6))
    bad = np.array(data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns)))
    bad = bad.reshape(rows, columns)
    x, y = np.array(corners, np.int64).reshape(-1, 2).T
    covered = cover(x, y, (read_w, read_h), (tile_w, tile_h), (rows, columns))
    touched, touching = np.zeros((rows, columns), bool), []
    for left, top in corners:
        under = {
            (min(py // tile_h, rows - 1), min(px // tile_w, columns - 1))
            for px in range(left, left + read_w)
            for py in range(top, top + read_h)
        }
        for place in under:
            touched[place] = True
        touching.append(any(bad[place] for place in under))
    assert np.array_equal(covered.touched(), touched)
    assert covered.touching(bad).tolist() == touching


def test_a_reader_that_interpolates_touches_the_next_px(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_built(path, TilerConfig(tile_px=64, mpp=0.5, min_tissue=0, check="none"))
    harm(path, "end lost", 5)
    wider = dataclasses.replace(opened[1].slide, read_w=65, read_h=65)
    expected = touching((opened[0], dataclasses.replace(opened[1], slide=wider)), 5)
    exact = bad_of(opened, "markers").tolist()
    assert exact == touching(opened, 5) != expected
    monkeypatch.setattr(opened[0], "is_exact", lambda level: False)  # noqa: ARG005
    assert bad_of(opened, "markers").tolist() == expected
