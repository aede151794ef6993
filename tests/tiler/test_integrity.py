"""Looking for damage: what each check finds and what it cannot, that only tiles which touch it are marked, and no alarm
without damage."""

import dataclasses
import os
import re
import shutil
import struct
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from manifests import Manifest
from manifests.geometry import l0_to_level
from tiler import TilerConfig, TilerError, build_manifest, open_slide
from tiler.config import Backend, Check
from tiler.integrity import check_whole, compare, find_damage, markers
from tiler.integrity.cover import cover
from tiler.integrity.decode import bad_decodes
from tiler.integrity.markers import bad_marks
from tiler.masks import overview_level
from tiler.slide import Slide
from tiler.tiff_tables import TileTable, find_table, read_tables

CHECKS: tuple[Check, ...] = ("markers", "decode", "sample")
CONFIG = TilerConfig(tile_px=48, mpp=0.5, min_tissue=0, check="none")
Opened = tuple[Slide, Manifest]


def _open(path: Path, config: TilerConfig = CONFIG, backend: Backend = "auto") -> Opened:
    return open_slide(path, backend), build_manifest(path, "case", config).manifest


def _bad(opened: Opened, check: Check) -> NDArray[np.bool_]:
    return find_damage(*opened, check).bad


@pytest.fixture
def path(small_cohort: Path, tmp_path: Path) -> Path:
    """A copy of a sound slide, to be damaged: 3 x 4 or so JPEG tiles at level 0."""
    shutil.copy(small_cohort / "slides" / "synth_0000.svs", tmp_path / "case.svs")
    return tmp_path / "case.svs"


def _place(path: Path, index: int, table: int = 0) -> tuple[int, int]:
    found = read_tables(path)[table]
    return int(found.offsets.flat[index]), int(found.num_bytes.flat[index])


def _overwrite(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(content)


def _harm(path: Path, kind: str, index: int, table: int = 0) -> None:
    """Damages one compressed tile."""
    at, length = _place(path, index, table)
    half = length // 2
    if kind == "all zeros":
        _overwrite(path, at, bytes(length))
    elif kind == "no start":
        _overwrite(path, at, b"\0")
    elif kind == "end lost":
        _overwrite(path, at + half, bytes(length - half))
    elif kind == "second half zeros":
        _overwrite(path, at + half, bytes(length - half - 2))
    elif kind == "wrong place":
        _retag(path, 324, index, at + 7)
    elif kind == "past the end":
        _retag(path, 324, index, path.stat().st_size - 10)
    elif kind == "too short":
        _retag(path, 325, index, length - 100)
    elif kind == "no length":
        _retag(path, 325, index, 0)
    else:
        assert kind == "another tile"
        other = path.read_bytes()[slice(*np.cumsum(_place(path, index + 1, table)))]
        _retag(path, 325, index, len(other))
        _overwrite(path, at, other)


def _retag(path: Path, code: int, index: int, value: int) -> None:
    """Changes an entry of the tables of level 0."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tag = tiff.pages[0].tags[code]
        tag.overwrite([*tag.value[:index], value, *tag.value[index + 1 :]])


def _touching(opened: Opened, *indices: int) -> list[bool]:
    """Which tiles touch these tiles of the file, one by one and by every corner of a px."""
    slide, manifest = opened
    level, record = slide.levels[manifest.slide.level], manifest.slide
    across = -(-level.width // level.tile_w)
    touching = []
    for x_l0, y_l0 in zip(manifest.x_l0.tolist(), manifest.y_l0.tolist(), strict=True):
        x, y = int(x_l0 // level.downsample), int(y_l0 // level.downsample)
        columns = {px // level.tile_w for px in range(x, x + record.read_w)}
        rows = {px // level.tile_h for px in range(y, y + record.read_h)}
        touching.append(any(i // across in rows and i % across in columns for i in indices))
    return touching


FOUND_BY_MARKERS = ("all zeros", "no start", "end lost", "wrong place", "past the end", "too short", "no length")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", FOUND_BY_MARKERS)
def test_tiles_that_touch_damage_are_bad_and_only_those(kind: str, check: Check, path: Path) -> None:
    opened = _open(path)
    _harm(path, kind, 5)
    expected = _touching(opened, 5)
    assert 0 < sum(expected) < len(expected) / 3
    assert _bad((open_slide(path), opened[1]), check).tolist() == expected


@pytest.mark.parametrize("check", ["decode", "sample"])
@pytest.mark.parametrize("only", [False, True])
def test_a_half_damaged_jpeg_with_both_marks_takes_a_strict_decode(only: bool, check: Check, path: Path) -> None:
    """Also where the manifest touches no sound tile: not to be taken for a codec that is not known."""
    slide, manifest = _open(path)
    if only:
        inside = np.flatnonzero((manifest.x_l0 // 256 == 1) & (manifest.y_l0 // 256 == 1))[:1]
        manifest = _pick(manifest, inside)
    _harm(path, "second half zeros", slide.levels[0].width // 256 + (slide.levels[0].width % 256 > 0) + 1)
    expected = _touching((slide, manifest), -(-slide.levels[0].width // 256) + 1)
    assert any(expected)
    assert not _bad((slide, manifest), "markers").any()
    assert _bad((slide, manifest), check).tolist() == expected


def _pick(manifest: Manifest, rows: NDArray[np.int64]) -> Manifest:
    record = dataclasses.replace(manifest.slide, num_tiles=len(rows))
    return Manifest(record, manifest.x_l0[rows], manifest.y_l0[rows], manifest.tissue[rows])


@pytest.mark.parametrize("check", CHECKS)
def test_another_whole_tile_is_noticed_by_none(check: Check, path: Path) -> None:
    """A limit, told in the package's docstring: it is a sound picture."""
    opened = _open(path)
    at, length = min(_place(path, i)[::-1] for i in range(12))[::-1]
    smallest = [_place(path, i) for i in range(12)].index((at, length))
    tile = path.read_bytes()[at : at + length]
    target = (smallest + 5) % 12
    _retag(path, 325, target, length)
    _overwrite(path, _place(path, target)[0], tile)
    assert not _bad((open_slide(path), opened[1]), check).any()


@pytest.mark.parametrize("check", get_args(Check))
def test_sound_slides_have_no_bad_tile(check: Check, small_cohort: Path) -> None:
    slides = sorted((small_cohort / "slides").glob("*.svs"))
    for name in slides:
        for config in (CONFIG, TilerConfig(tile_px=32, mpp=2.0, min_tissue=0, check="none")):
            check_whole(name)
            opened = _open(name, config)
            assert len(opened[1])
            assert not _bad(opened, check).any(), name.name
    assert not _bad(_open(slides[0], backend="openslide"), check).any()


@pytest.mark.slow  # reads both slides by two readers
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("backend", ["cucim", "openslide"])
def test_nor_have_the_real_ones(backend: Backend, check: Check, real_slides: Path) -> None:
    for name in sorted(real_slides.glob("*.svs")):
        check_whole(name)
        for mpp in (0.5, 0.7, 1.0):
            opened = _open(name, TilerConfig(default_mpp=0.5, mpp=mpp, min_tissue=0, check="none"), backend)
            assert len(opened[1]) > 20
            assert not _bad(opened, check).any(), (name.name, mpp)


def test_none_looks_at_nothing(path: Path) -> None:
    opened = _open(path)
    for table in range(3):
        _harm(path, "all zeros", 0, table)
    assert not _bad(opened, "none").any()


def test_a_build_leaves_out_what_is_bad_and_counts_it(path: Path) -> None:
    config = TilerConfig(tile_px=48, mpp=0.5, min_tissue=0, max_bad=0.4)
    whole = build_manifest(path, "case", config).manifest
    expected = np.array(_touching((open_slide(path), whole), 5))
    _harm(path, "end lost", 5)
    kept = build_manifest(path, "case", config).manifest
    assert kept.slide.num_bad_tiles == expected.sum() > 0
    assert np.array_equal(kept.x_l0, whole.x_l0[~expected])


# Where the tissue was looked for.


@pytest.mark.parametrize("check", CHECKS)
def test_a_damaged_level_where_tissue_was_looked_for_is_the_end(check: Check, path: Path) -> None:
    opened = _open(path)
    tables = read_tables(path)
    level = opened[0].levels[1]
    index = next(i for i, t in enumerate(tables) if (t.width, t.height) == (level.width, level.height))
    _harm(path, "end lost", 0, index)
    with pytest.raises(TilerError, match=r"slide case: 1 of \d+ compressed tiles of level 1, .* are damaged; restore"):
        _bad(opened, check)


def test_but_where_tiles_are_read_from_it_they_are_left_out(path: Path) -> None:
    opened = _open(path, TilerConfig(tile_px=16, mpp=2.0, min_tissue=0, check="none"))
    assert opened[1].slide.level == overview_level(opened[0], 0.5) == 1
    index = [table.width for table in read_tables(path)].index(opened[0].levels[1].width)
    _harm(path, "all zeros", 0, index)
    assert _bad(opened, "markers").tolist() == _touching(opened, 0)


# Codecs.

CODECS = {"jpeg": "jpeg", "jpeg2000": "jpeg2000", "lzw": "lzw", "deflate": "zlib", "none": None}


def _write(path: Path, codec: str, *, levels: int = 1, **layout: Any) -> TileTable:
    """A TIFF of 8 tiles or 16 strips, with texture: its first table."""
    rng = np.random.default_rng(0)
    pixels = cv2.resize(rng.integers(0, 256, (64, 128, 3), np.uint8), (512, 256))
    layout = layout or {"tile": (128, 128)}
    with tifffile.TiffWriter(path) as tiff:
        for i in range(levels):
            shrunk = pixels[:: 2**i, :: 2**i]
            tiff.write(shrunk, photometric="rgb", compression=CODECS[codec], subfiletype=min(i, 1), **layout)
    return read_tables(path)[0]


@pytest.mark.parametrize("layout", [{"tile": (128, 128)}, {"rowsperstrip": 16}, {"rowsperstrip": 15}])
@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_in_tiles_and_strips(codec: str, layout: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "case.tif"
    table = _write(path, codec, **layout)
    check_whole(path)
    everywhere = np.ones(table.shape, bool)
    assert not bad_marks(path, table, everywhere, may_be_empty=False).any()
    assert not bad_decodes(path, table, everywhere).any()  # type: ignore[union-attr]
    _harm(path, "end lost", 3)
    only = np.arange(everywhere.size).reshape(table.shape) == 3
    marks, decoded = bad_marks(path, table, everywhere, may_be_empty=False), bad_decodes(path, table, everywhere)
    if codec == "none":  # Nothing to go by: told in the docstring.
        only[:] = False
    assert np.array_equal(marks, only)
    assert decoded is not None
    assert np.array_equal(marks | decoded, only)


@pytest.mark.parametrize("codec", CODECS)
def test_half_a_tile_of_zeros_with_its_end_kept(codec: str, tmp_path: Path) -> None:
    path = tmp_path / "case.tif"
    table = _write(path, codec)
    everywhere = np.ones(table.shape, bool)
    _harm(path, "second half zeros", 3)
    decoded = bad_decodes(path, table, everywhere)
    assert not bad_marks(path, table, everywhere, may_be_empty=False).any()
    assert decoded is not None
    assert np.flatnonzero(decoded).tolist() == ([] if codec == "none" else [3])


def test_a_tile_past_the_end_of_the_file_is_bad_whatever_its_codec(tmp_path: Path) -> None:
    path = tmp_path / "case.tif"
    _write(path, "none")
    _retag(path, 324, 3, path.stat().st_size - 1000)
    table = read_tables(path)[0]
    assert np.flatnonzero(bad_marks(path, table, np.ones(table.shape, bool), may_be_empty=False)).tolist() == [3]


def test_a_codec_is_known_by_what_it_takes(tmp_path: Path) -> None:
    path = tmp_path / "case.tif"
    table = _write(path, "jpeg")
    everywhere = np.ones(table.shape, bool)
    only = np.arange(everywhere.size).reshape(table.shape) == 3
    _harm(path, "second half zeros", 3)
    assert np.array_equal(bad_decodes(path, table, only), only)  # type: ignore[arg-type]
    for index in range(everywhere.size):
        _harm(path, "second half zeros", index)
    assert bad_decodes(path, table, only) is None
    assert not bad_decodes(path, table, ~everywhere).any()  # type: ignore[union-attr]


def test_where_no_codec_is_known_the_strict_reader_tells(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = _open(path)
    _harm(path, "second half zeros", 5)
    _harm(path, "end lost", 7)
    monkeypatch.setattr("tiler.integrity.bad_decodes", lambda *arguments: None)  # noqa: ARG005
    # The level of the thumbnail has no damage that could be told.
    assert _bad(opened, "decode").tolist() == _touching(opened, 5, 7)


def test_a_jpeg_has_the_size_of_its_tile_or_ends_with_the_slide(tmp_path: Path) -> None:
    pixels = cv2.resize(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), (300, 200))

    def write(*sizes: tuple[int, int]) -> TileTable:
        jpegs = [cv2.imencode(".jpg", pixels[:height, :width])[1].tobytes() for width, height in sizes]
        tifffile.imwrite(
            tmp_path / "case.tif",
            iter(jpegs),  # type: ignore[arg-type]
            shape=(200, 300, 3),
            dtype=np.uint8,
            tile=(128, 128),
            photometric="ycbcr",
            subsampling=(2, 2),
            compression="jpeg",
        )
        return read_tables(tmp_path / "case.tif")[0]

    whole = (128, 128)
    for sizes, bad in (
        ([whole] * 6, []),
        ([whole, whole, (44, 128), (128, 72), (128, 72), (44, 72)], []),
        ([whole, (44, 128), whole, (44, 128), (64, 64), (128, 60)], [1, 3, 4, 5]),
    ):
        table = write(*sizes)
        found = bad_decodes(tmp_path / "case.tif", table, np.ones(table.shape, bool))
        assert np.flatnonzero(found).tolist() == bad  # type: ignore[arg-type]


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("codec", ["lzw", "deflate", "none"])
def test_a_tile_in_three_planes_is_bad_if_one_is(codec: str, planar: str, tmp_path: Path) -> None:
    path = tmp_path / "case.tif"
    pixels = np.random.default_rng(0).integers(0, 256, (3, 256, 256), np.uint8)
    pixels = pixels if planar == "separate" else np.ascontiguousarray(np.moveaxis(pixels, 0, -1))
    tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb", planarconfig=planar, compression=CODECS[codec])
    table = read_tables(path)[0]
    assert table.offsets.shape == (3 if planar == "separate" else 1, 2, 2)
    _retag(path, 325, 2, 3)
    table = read_tables(path)[0]
    bad = bad_marks(path, table, np.ones(table.shape, bool), may_be_empty=False)
    assert bad.tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("check", CHECKS)
def test_a_damaged_deflate_tile_does_not_end_the_process(check: Check, tmp_path: Path) -> None:
    path = tmp_path / "case.tif"
    _write(path, "deflate", levels=2)
    opened = _open(path, TilerConfig(tile_px=32, default_mpp=0.5, min_tissue=0, check="none"), "cucim")
    assert opened[0].backend == "cucim"
    assert not _bad(opened, check).any()
    _harm(path, "second half zeros" if check != "markers" else "all zeros", 2)
    assert _bad(opened, check).tolist() == _touching(opened, 2)


def test_padding_after_the_end_is_no_damage(tmp_path: Path) -> None:
    table = _write(tmp_path / "case.tif", "jpeg")
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


# Empty tiles.


def _sparse(path: Path) -> None:
    jpeg = cv2.imencode(".jpg", np.full((128, 128, 3), 90, np.uint8))[1].tobytes()
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            iter([jpeg, b"", jpeg, jpeg]),
            shape=(256, 256, 3),
            dtype=np.uint8,
            photometric="ycbcr",
            subsampling=(2, 2),
            compression="jpeg",
            tile=(128, 128),
        )


@pytest.mark.parametrize(("backend", "painted"), [("openslide", 255), ("cucim", 0)])
def test_a_tile_left_out_is_bad_where_its_reader_paints_it_black(
    backend: Backend, painted: int, tmp_path: Path
) -> None:
    path = tmp_path / "case.tif"
    _sparse(path)
    config = TilerConfig(tile_px=64, default_mpp=0.5, min_tissue=0, check="none", backend=backend)
    opened = _open(path, config, backend)
    assert (opened[0].read(128, 0, 0, 128, 128) == painted).all()
    assert opened[0].read(0, 0, 0, 128, 128).mean() == pytest.approx(90, abs=1)
    expected = _touching(opened, 1) if painted == 0 else [False] * len(opened[1])
    for check in ("markers", "decode"):
        assert _bad(opened, check).tolist() == expected  # type: ignore[arg-type]


# Other formats.


def write_ndpi(path: Path, pictures: list[NDArray[np.uint8]]) -> None:
    """A slide as Hamamatsu writes it: one big JPEG a level, its restart intervals listed, 64-bit links.

    Source: https://openslide.org/formats/hamamatsu/ and https://www.awaresystems.be/imaging/tiff/faq.html.
    """
    out, link = bytearray(b"II*\0" + bytes(8)), 4
    flags = [cv2.IMWRITE_JPEG_RST_INTERVAL, 16, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422]

    def put(content: bytes) -> int:
        out.extend(content)
        return len(out) - len(content)

    for picture in pictures:
        (height, width), jpeg = picture.shape[:2], cv2.imencode(".jpg", picture, flags)[1].tobytes()
        scan = jpeg.find(b"\xff\xda")
        first = scan + 2 + int.from_bytes(jpeg[scan + 2 : scan + 4], "big")
        starts = [first, *(found.end() for found in re.finditer(rb"\xff[\xd0-\xd7]", jpeg[first:]))]
        starts[1:] = [first + start for start in starts[1:]]
        magnification = struct.unpack("<I", struct.pack("<f", 20 * width / pictures[0].shape[1]))[0]
        resolution = put(struct.pack("<II", round(20_000 * width / pictures[0].shape[1]), 1))
        tags = [
            (254, 4, 1, 0), (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, put(struct.pack("<3H", 8, 8, 8))),
            (259, 3, 1, 7), (262, 3, 1, 6), (271, 2, 10, put(b"Hamamatsu\0")), (272, 2, 11, put(b"NanoZoomer\0")),
            (273, 4, 1, put(jpeg)), (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 1, len(jpeg)),
            (282, 5, 1, resolution), (283, 5, 1, resolution), (284, 3, 1, 1), (296, 3, 1, 3),
            (305, 2, 9, put(b"NDP.scan\0")), (530, 3, 2, 2 | 1 << 16), (65420, 4, 1, 1), (65421, 11, 1, magnification),
            (65422, 9, 1, 0), (65423, 9, 1, 0), (65424, 9, 1, 0),
            (65426, 4, len(starts), put(struct.pack(f"<{len(starts)}I", *starts))),
        ]  # fmt: skip
        out[link : link + 8] = struct.pack("<Q", len(out))
        put(struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags))
        link = put(bytes(8))
        put(bytes(4 * len(tags)))
    path.write_bytes(out)


@pytest.fixture
def ndpi(tmp_path: Path) -> Path:
    pixels = cv2.resize(np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8), (1024, 512))
    write_ndpi(tmp_path / "case.ndpi", [pixels, pixels[::4, ::4]])  # type: ignore[list-item]
    return tmp_path / "case.ndpi"


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("mpp", [0.5, 1.0, 2.0])
def test_ndpi(mpp: float, check: Check, ndpi: Path) -> None:
    """At 1.0 there is no picture: OpenSlide makes the level from the one above.

    An interval without its end marker spoils the next one: OpenSlide looks for it there.
    """
    opened = _open(ndpi, TilerConfig(tile_px=32, mpp=mpp, min_tissue=0, check="none"))
    slide, manifest = opened
    assert (slide.backend, slide.vendor) == ("openslide", "hamamatsu")
    level = slide.levels[manifest.slide.level]
    table = find_table(read_tables(ndpi), level.width, level.height)
    assert (table is None) == (mpp == 1.0)
    check_whole(ndpi)
    assert not _bad(opened, check).any()
    pages = read_tables(ndpi)
    index = 9 if mpp == 2.0 else 2 * pages[0].shape[1] + 1  # On the last page, a restart interval is a whole row.
    page = pages[1 if mpp == 2.0 else 0]
    at, length = int(page.offsets.flat[index]), int(page.num_bytes.flat[index])
    _overwrite(ndpi, at, bytes(length))
    scale = level.width / page.width
    x, y = (l0_to_level(corner, level.downsample) for corner in (manifest.x_l0, manifest.y_l0))
    expected = np.zeros(len(manifest), bool)
    for row, column in (divmod(i, page.shape[1]) for i in (index, index + 1)):
        left, top = column * page.tile_w * scale, row * page.tile_h * scale
        right, bottom = left + page.tile_w * scale, top + page.tile_h * scale
        expected |= (x < right) & (x + 32 > left) & (y < bottom) & (y + 32 > top)
    assert 0 < expected.sum() < len(expected)
    assert _bad((open_slide(ndpi), manifest), check).tolist() == expected.tolist()
    assert compare.unreadable(slide, manifest, np.arange(len(manifest))).tolist() == expected.tolist()


def test_where_tiles_are_moved_about_a_bad_mark_leads_to_reading_all(path: Path) -> None:
    """Ventana, Leica, Trestle: which tile of the file lies where, OpenSlide alone knows."""
    slide, manifest = _open(path, backend="openslide")
    slide.vendor = "ventana"
    for check in CHECKS:
        assert not _bad((slide, manifest), check).any()
    _harm(path, "end lost", 5)
    _harm(path, "second half zeros", 7)
    for check in CHECKS:
        assert _bad((slide, manifest), check).tolist() == _touching((slide, manifest), 5, 7)


def test_where_there_are_no_tables_a_strict_decode_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MRXS, VMS, DICOM: OpenSlide raises."""
    opened = _open(path, backend="openslide")
    _harm(path, "second half zeros", 5)
    expected = _touching(opened, 5)
    monkeypatch.setattr("tiler.integrity.read_tables", lambda path: ())  # noqa: ARG005
    assert not _bad(opened, "markers").any()
    assert _bad(opened, "decode").tolist() == expected


# How the bytes are read.


def test_markers_read_few_bytes_wherever_tiles_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, with gaps and repeats, read in any number of parts."""
    path, rng = tmp_path / "case.tif", np.random.default_rng(0)
    _write(path, "jpeg", tile=(16, 16))
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


def test_what_others_say_on_stderr_meanwhile_is_passed_on(
    path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    opened = _open(path)
    decode, num_said = cv2.imdecode, 0

    def chatty(*arguments: Any) -> Any:
        nonlocal num_said
        num_said += 1
        if num_said == 3:
            os.write(2, b"somebody else\n")
        return decode(*arguments)

    monkeypatch.setattr("tiler.integrity.decode.cv2.imdecode", chatty)
    _harm(path, "second half zeros", 5)
    capfd.readouterr()
    assert _bad(opened, "decode").tolist() == _touching(opened, 5)
    assert capfd.readouterr().err == "somebody else\n"


# The sample.


def test_a_sample_is_spread_and_the_same_for_the_same_slide() -> None:
    for num_tiles, count in ((0, 0), (1, 1), (64, 64), (65, 64), (5000, 64), (50_000, 500)):
        rows = compare.sample_rows(num_tiles, "abc")
        assert len(np.unique(rows)) == count
        assert np.array_equal(rows, compare.sample_rows(num_tiles, "abc"))
        assert (np.diff(rows) < 2.01 * max(1, num_tiles / max(1, count))).all()
    assert not np.array_equal(compare.sample_rows(5000, "abc"), compare.sample_rows(5000, "abd"))


def test_damage_in_the_sample_leads_to_a_decode_of_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = _open(path)
    for index in (1, 10):
        _harm(path, "second half zeros", index)
    first, second = (np.flatnonzero(_touching(opened, index)) for index in (1, 10))
    sound = np.setdiff1d(np.arange(len(opened[1])), np.concatenate([first, second]))
    for sample, expected in ((sound[:3], []), (first[:1], sorted({*first.tolist(), *second.tolist()}))):
        monkeypatch.setattr("tiler.integrity.sample_rows", lambda n, mark, rows=sample: rows)  # noqa: ARG005
        assert np.flatnonzero(_bad(opened, "sample")).tolist() == expected


def test_two_readers_that_disagree_mark_a_tile(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuCIM would, showing another tile for one that it cannot decode."""
    opened = _open(path)
    shutil.copy(path, tmp_path / "other.svs")
    black = cv2.imencode(".jpg", np.zeros((256, 256, 3), np.uint8))[1].tobytes()
    _overwrite(tmp_path / "other.svs", _place(path, 5)[0], black)
    other = open_slide(tmp_path / "other.svs", "openslide")
    rows = np.arange(len(opened[1]))
    unequal = compare.unequal(opened[0], other, opened[1], rows)
    touching = np.array(_touching(opened, 5))
    assert not (unequal & ~touching).any()
    assert unequal.sum() > 0.8 * touching.sum()  # Those that touch by a few px differ by little.
    monkeypatch.setattr("tiler.integrity.other_reader", lambda slide: other)  # noqa: ARG005
    assert np.array_equal(
        np.flatnonzero(_bad(opened, "sample")), np.intersect1d(np.flatnonzero(unequal), _sampled(opened))
    )


def _sampled(opened: Opened) -> NDArray[np.int64]:
    return compare.sample_rows(len(opened[1]), opened[0].fingerprint)


def test_a_reader_that_interpolates_touches_the_next_px(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = _open(path, TilerConfig(tile_px=64, mpp=0.5, min_tissue=0, check="none"))
    _harm(path, "end lost", 5)
    wider = dataclasses.replace(opened[1].slide, read_w=65, read_h=65)
    expected = _touching((opened[0], dataclasses.replace(opened[1], slide=wider)), 5)
    exact = _bad(opened, "markers").tolist()
    assert exact == _touching(opened, 5) != expected
    monkeypatch.setattr(opened[0], "is_exact", lambda level: False)  # noqa: ARG005
    assert _bad(opened, "markers").tolist() == expected


def test_a_reader_that_raised_is_opened_anew(path: Path) -> None:
    opened = _open(path, backend="openslide")
    _harm(path, "second half zeros", 5)
    rows = np.arange(len(opened[1]))
    expected = _touching(opened, 5)
    assert compare.unreadable(*opened, rows).tolist() == expected
    assert compare.unequal(open_slide(path, "openslide"), opened[0], opened[1], rows).tolist() == expected


# The arithmetic.


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
