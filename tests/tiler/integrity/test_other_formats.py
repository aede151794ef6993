"""Looking for damage where a slide's levels are not a grid of compressed tiles with marks."""

import re
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from manifests.geometry import l0_to_level
from tests.tiler.damage import CHECKS, bad_of, harm, open_built, overwrite, touching
from tiler import TilerConfig, open_slide
from tiler.config import Check
from tiler.integrity import bad_mark_rows, bad_rows, check_whole, compare
from tiler.tiff_tables import find_table, read_tables


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
    opened = open_built(ndpi, TilerConfig(tile_px=32, mpp=mpp, min_tissue=0, check="none"))
    slide, manifest = opened
    assert (slide.backend, slide.vendor) == ("openslide", "hamamatsu")
    level = slide.levels[manifest.slide.level]
    table = find_table(read_tables(ndpi), level.width, level.height)
    assert (table is None) == (mpp == 1.0)
    check_whole(ndpi)
    assert not bad_of(opened, check).any()
    pages = read_tables(ndpi)
    index = 9 if mpp == 2.0 else 2 * pages[0].shape[1] + 1  # On the last page, a restart interval is a whole row.
    page = pages[1 if mpp == 2.0 else 0]
    at, length = int(page.offsets.flat[index]), int(page.num_bytes.flat[index])
    overwrite(ndpi, at, bytes(length))
    scale = level.width / page.width
    x, y = (l0_to_level(corner, level.downsample) for corner in (manifest.x_l0, manifest.y_l0))
    expected = np.zeros(len(manifest), bool)
    for row, column in (divmod(i, page.shape[1]) for i in (index, index + 1)):
        left, top = column * page.tile_w * scale, row * page.tile_h * scale
        right, bottom = left + page.tile_w * scale, top + page.tile_h * scale
        expected |= (x < right) & (x + 32 > left) & (y < bottom) & (y + 32 > top)
    assert 0 < expected.sum() < len(expected)
    assert bad_of((open_slide(ndpi), manifest), check).tolist() == expected.tolist()
    assert compare.unreadable(slide, manifest, np.arange(len(manifest))).tolist() == expected.tolist()


def test_where_tiles_are_moved_about_a_bad_mark_leads_to_reading_all(path: Path) -> None:
    """Ventana, Leica, Trestle: which tile of the file lies where, OpenSlide alone knows."""
    slide, manifest = open_built(path, backend="openslide")
    slide.vendor = "ventana"
    for check in CHECKS:
        assert not bad_of((slide, manifest), check).any()
    harm(path, "end lost", 5)
    harm(path, "second half zeros", 7)
    expected = touching((slide, manifest), 5, 7)
    for check in CHECKS:
        assert bad_of((slide, manifest), check).tolist() == expected
    rows = np.flatnonzero(expected)[::-1]
    assert bad_rows(slide, manifest, rows).all()
    assert not bad_mark_rows(slide, manifest, rows).any()  # OpenSlide raises when they are read.


def test_where_there_are_no_tables_a_strict_decode_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MRXS, VMS, DICOM: OpenSlide raises."""
    opened = open_built(path, backend="openslide")
    harm(path, "second half zeros", 5)
    expected = touching(opened, 5)
    monkeypatch.setattr("tiler.integrity.read_tables", lambda path: ())  # noqa: ARG005
    assert not bad_of(opened, "markers").any()
    assert bad_of(opened, "decode").tolist() == expected
