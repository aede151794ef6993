"""The look at both ends of compressed tiles: what it finds, and that it reads few bytes."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import example, given
from hypothesis import strategies as st

from tests.tiler.damage import CODECS, retag, write_codec
from tiler.integrity import markers
from tiler.integrity.markers import bad_marks
from tiler.tiff_tables import read_tables


def test_a_tile_past_the_end_of_the_file_is_bad_whatever_its_codec(tmp_path: Path) -> None:
    path = tmp_path / "case.tif"
    write_codec(path, "none")
    retag(path, 324, 3, path.stat().st_size - 1000)
    table = read_tables(path)[0]
    assert np.flatnonzero(bad_marks(path, table, np.ones(table.shape, bool), may_be_empty=False)).tolist() == [3]


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("codec", ["lzw", "deflate", "none"])
def test_a_tile_in_three_planes_is_bad_if_one_is(codec: str, planar: str, tmp_path: Path) -> None:
    path = tmp_path / "case.tif"
    pixels = np.random.default_rng(0).integers(0, 256, (3, 256, 256), np.uint8)
    pixels = pixels if planar == "separate" else np.ascontiguousarray(np.moveaxis(pixels, 0, -1))
    tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb", planarconfig=planar, compression=CODECS[codec])
    table = read_tables(path)[0]
    assert table.offsets.shape == (3 if planar == "separate" else 1, 2, 2)
    retag(path, 325, 2, 3)
    table = read_tables(path)[0]
    bad = bad_marks(path, table, np.ones(table.shape, bool), may_be_empty=False)
    assert bad.tolist() == [[False, False], [True, False]]


def test_padding_after_the_end_is_no_damage(tmp_path: Path) -> None:
    table = write_codec(tmp_path / "case.tif", "jpeg")
    tails = np.zeros((4, 32), np.uint8)
    for tail, end in zip(
        tails, (b"\xff\xd9", b"\xff\xd9\0", b"\xff\xd9" + bytes(20), b"\xff\xd9\xff\xff"), strict=True
    ):
        tail[-len(end) :] = np.frombuffer(end, np.uint8)
    heads = np.tile(np.array([0xFF, 0xD8, 0xFF, 0xDB], np.uint8), (4, 1))
    assert markers.has_marks(table, heads, tails).all()
    for wrong in (bytes(32), b"\xff" * 32, b"\xd9" + bytes(31), b"\0\xd9".rjust(32, b"\0"), b"\x5a" * 32):
        tail = np.frombuffer(wrong, np.uint8)[None]
        assert not markers.has_marks(table, heads[:1], tail).any()
    for other in (b"\xff\0\xff\xdb", b"\0\xd8\xff\xdb", bytes(4)):
        assert not markers.has_marks(table, np.frombuffer(other, np.uint8)[None], tails[:1]).any()


def test_markers_read_few_bytes_wherever_tiles_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, with gaps and repeats, read in any number of parts."""
    path, rng = tmp_path / "case.tif", np.random.default_rng(0)
    write_codec(path, "jpeg", tile=(16, 16))
    jpeg, sound, lengths = b"\xff\xd8\xff" + bytes(995) + b"\xff\xd9", read_tables(path)[0], []
    at = rng.permutation(np.cumsum(rng.choice([1000, 1003, 4000, 9000], sound.offsets.size)))
    at[50:60] = at[40]
    content = bytearray(int(at.max()) + 1000)
    for start in at.tolist():
        content[start : start + 1000] = jpeg
    for start in at[[3, 77, 300]].tolist():
        content[start + 999] = 0
    content[at[123]] = 0
    path.write_bytes(content)
    table = dataclasses.replace(
        sound, offsets=at.reshape(sound.offsets.shape), num_bytes=np.full(sound.offsets.shape, 1000)
    )
    read = os.preadv

    def count(descriptor: int, buffers: list[memoryview], start: int) -> int:
        lengths.append(len(buffers[0]))
        return read(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", count)
    for at_once in (1, 7, 2048):
        lengths.clear()
        monkeypatch.setattr(markers, "_TILES_AT_ONCE", at_once)
        bad = bad_marks(path, table, np.ones(table.shape, bool), may_be_empty=False)
        assert np.flatnonzero(bad).tolist() == [3, 77, 123, 300]
    assert len(lengths) < 0.6 * table.offsets.size
    assert max(lengths) < 200_000
    wanted = np.zeros(table.shape, bool)
    wanted.flat[[77, 78]] = True
    lengths.clear()
    assert np.flatnonzero(bad_marks(path, table, wanted, may_be_empty=False)).tolist() == [77]
    assert sum(lengths) <= 2 * 1000 + markers._GAP_BYTES


@given(
    tiles=st.lists(
        st.tuples(st.integers(0, 300) | st.integers(0, 11_000), st.integers(4, 60) | st.integers(4, 9000)),
        min_size=1,
        max_size=12,
    ).map(sorted)
)
@example(tiles=[(0, 100), (90, 9000)])  # One begins within the end of another.
def test_both_ends_of_any_tiles_are_read(
    tiles: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8)
    offsets, lengths = np.array(tiles, np.int64).T
    file = tmp_path_factory.getbasetemp() / "ends"
    content.tofile(file)
    with file.open("rb") as stream:
        heads, tails = markers._read_ends(stream.fileno(), offsets, lengths)
    for head, tail, (at, number) in zip(heads, tails, tiles, strict=True):
        tile = content[at : at + number]
        assert np.array_equal(head, tile[:4])
        assert np.array_equal(tail[-min(32, number) :], tile[-32:])
        assert (tail[: 32 - number] == tile[0]).all() or number >= 32
