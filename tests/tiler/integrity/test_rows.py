"""The second look while training: which of a few rows are damaged, by their own bytes, from any number of threads."""

import errno
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from manifests import Manifest
from tests.tiler.damage import APERIO_CODECS, Opened, harm, open_built, touching, write_aperio
from tiler.integrity import bad_mark_rows, bad_rows
from tiler.slide import Slide
from tiler.tiff_tables import _read_tables, read_tables

Look = Callable[[Slide, Manifest, NDArray[np.int64]], NDArray[np.bool_]]


@pytest.mark.parametrize("kind", ["end lost", "second half zeros", "past the end"])
@pytest.mark.parametrize("codec", APERIO_CODECS)
def test_rows_that_touch_damage_are_bad_and_only_those(codec: str, kind: str, tmp_path: Path) -> None:
    """Of all codecs that cuCIM reads. Without compression there is a place to go by, and nothing else."""
    path = write_aperio(tmp_path / "case.svs", codec)
    opened = open_built(path, backend="cucim")
    assert opened[0].backend == "cucim"
    rows = np.random.default_rng(0).permutation(len(opened[1]))[: len(opened[1]) // 2]
    for look in (bad_mark_rows, bad_rows):
        assert not look(*opened, rows).any()
    harm(path, kind, 3)
    expected = np.array(touching(opened, 3))[rows]
    assert 0 < expected.sum() < len(rows)
    has_trace = codec != "none" or kind == "past the end"
    assert bad_rows(*opened, rows).tolist() == (expected & has_trace).tolist()
    has_mark_lost = has_trace and kind != "second half zeros"
    assert bad_mark_rows(*opened, rows).tolist() == (expected & has_mark_lost).tolist()


def test_no_rows_are_looked_at_where_none_are_asked_for(path: Path) -> None:
    opened = open_built(path)
    for look in (bad_mark_rows, bad_rows):
        assert look(*opened, np.zeros(0, np.int64)).shape == (0,)


def test_only_the_compressed_tiles_under_the_rows_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, table, read, places = open_built(path), read_tables(path)[0], os.pread, set()

    def note(descriptor: int, length: int, at: int) -> bytes:
        places.add((at, length))
        return read(descriptor, length, at)

    monkeypatch.setattr(os, "pread", note)
    rows = [len(opened[1]) - 1, 0]
    under = [index for index in range(table.offsets.size) if np.array(touching(opened, index))[rows].any()]
    assert not bad_rows(*opened, np.array(rows)).any()
    assert 1 < len(under) < table.offsets.size / 2
    assert places == {(int(table.offsets.flat[i]), int(table.num_bytes.flat[i])) for i in under}


def test_any_number_of_threads_may_ask_at_once(small_cohort: Path, tmp_path: Path) -> None:
    cases: list[tuple[Opened, NDArray[np.bool_]]] = []
    for index in (1, 5, 6):
        path = tmp_path / f"case_{index}.svs"
        shutil.copy(small_cohort / "slides" / "synth_0000.svs", path)
        opened = open_built(path)
        harm(path, "second half zeros", index)
        cases.append((opened, np.array(touching(opened, index))))
    _read_tables.cache_clear()

    def ask(seed: int) -> bool:
        opened, expected = cases[seed % len(cases)]
        rows = np.random.default_rng(seed).permutation(len(expected))[:30]
        return np.array_equal(bad_rows(*opened, rows), expected[rows]) and not bad_mark_rows(*opened, rows).any()

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(60)))


@pytest.mark.parametrize(("look", "call"), [(bad_mark_rows, "preadv"), (bad_rows, "preadv"), (bad_rows, "pread")])
def test_a_disk_that_does_not_answer_is_no_damage(
    look: Look, call: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, rows = open_built(path), np.arange(3)

    def fail(*arguments: Any) -> Any:  # noqa: ARG001
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="Input/output"):
            look(*opened, rows)
    assert not look(*opened, rows).any()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        look(*opened, rows)
