"""The sample: which tiles it takes, and two readers that do not agree."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.tiler.damage import Opened, bad_of, harm, open_built, overwrite, place, touching
from tiler import open_slide
from tiler.integrity import compare


def test_a_sample_is_spread_and_the_same_for_the_same_slide() -> None:
    for num_tiles, count in ((0, 0), (1, 1), (64, 64), (65, 64), (5000, 64), (50_000, 500)):
        rows = compare.sample_rows(num_tiles, "abc")
        assert len(np.unique(rows)) == count
        assert np.array_equal(rows, compare.sample_rows(num_tiles, "abc"))
        assert (np.diff(rows) < 2.01 * max(1, num_tiles / max(1, count))).all()
    assert not np.array_equal(compare.sample_rows(5000, "abc"), compare.sample_rows(5000, "abd"))


def test_damage_in_the_sample_leads_to_a_decode_of_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_built(path)
    for index in (1, 10):
        harm(path, "second half zeros", index)
    first, second = (np.flatnonzero(touching(opened, index)) for index in (1, 10))
    sound = np.setdiff1d(np.arange(len(opened[1])), np.concatenate([first, second]))
    for sample, expected in ((sound[:3], []), (first[:1], sorted({*first.tolist(), *second.tolist()}))):
        monkeypatch.setattr("tiler.integrity.sample_rows", lambda n, mark, rows=sample: rows)  # noqa: ARG005
        assert np.flatnonzero(bad_of(opened, "sample")).tolist() == expected


def test_two_readers_that_disagree_mark_a_tile(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuCIM would, showing another tile for one that it cannot decode."""
    opened = open_built(path)
    shutil.copy(path, tmp_path / "other.svs")
    black = cv2.imencode(".jpg", np.zeros((256, 256, 3), np.uint8))[1].tobytes()
    overwrite(tmp_path / "other.svs", place(path, 5)[0], black)
    other = open_slide(tmp_path / "other.svs", "openslide")
    rows = np.arange(len(opened[1]))
    unequal = compare.unequal(opened[0], other, opened[1], rows)
    touched = np.array(touching(opened, 5))
    assert not (unequal & ~touched).any()
    assert unequal.sum() > 0.8 * touched.sum()  # Those that touch by a few px differ by little.
    monkeypatch.setattr("tiler.integrity.other_reader", lambda slide: other)  # noqa: ARG005
    assert np.array_equal(
        np.flatnonzero(bad_of(opened, "sample")), np.intersect1d(np.flatnonzero(unequal), _sampled(opened))
    )


def _sampled(opened: Opened) -> NDArray[np.int64]:
    return compare.sample_rows(len(opened[1]), opened[0].fingerprint)


def test_a_reader_that_raised_is_opened_anew(path: Path) -> None:
    opened = open_built(path, backend="openslide")
    harm(path, "second half zeros", 5)
    rows = np.arange(len(opened[1]))
    expected = touching(opened, 5)
    assert compare.unreadable(*opened, rows).tolist() == expected
    assert compare.unequal(open_slide(path, "openslide"), opened[0], opened[1], rows).tolist() == expected
