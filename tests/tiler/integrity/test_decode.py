"""The strict decode: what each codec notices, and no alarm without damage."""

from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pytest
import simplejpeg
import tifffile
from numpy.typing import NDArray

from tests.tiler.damage import CODECS, cut, draw_texture, harm, write_codec
from tiler.integrity import check_whole
from tiler.integrity.decode import bad_decodes
from tiler.integrity.markers import bad_marks
from tiler.tiff_tables import TileTable, read_tables


@pytest.mark.parametrize("layout", [{"tile": (128, 128)}, {"rowsperstrip": 16}, {"rowsperstrip": 15}])
@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_in_tiles_and_strips(codec: str, layout: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "case.tif"
    table = write_codec(path, codec, **layout)
    check_whole(path)
    everywhere = np.ones(table.shape, bool)
    assert not bad_marks(path, table, everywhere, may_be_empty=False).any()
    assert not bad_decodes(path, table, everywhere).any()  # type: ignore[union-attr]
    harm(path, "end lost", 3)
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
    table = write_codec(path, codec)
    everywhere = np.ones(table.shape, bool)
    harm(path, "second half zeros", 3)
    decoded = bad_decodes(path, table, everywhere)
    assert not bad_marks(path, table, everywhere, may_be_empty=False).any()
    assert decoded is not None
    assert np.flatnonzero(decoded).tolist() == ([] if codec == "none" else [3])


def test_a_codec_is_known_by_what_it_takes(tmp_path: Path) -> None:
    path = tmp_path / "case.tif"
    table = write_codec(path, "jpeg")
    everywhere = np.ones(table.shape, bool)
    only = np.arange(everywhere.size).reshape(table.shape) == 3
    harm(path, "second half zeros", 3)
    assert np.array_equal(bad_decodes(path, table, only), only)  # type: ignore[arg-type]
    for index in range(everywhere.size):
        harm(path, "second half zeros", index)
    assert bad_decodes(path, table, only) is None
    assert not bad_decodes(path, table, ~everywhere).any()  # type: ignore[union-attr]


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


# Kinds of JPEG.

SAMPLING = cv2.IMWRITE_JPEG_SAMPLING_FACTOR
FLAGS = {
    "4:4:4": [SAMPLING, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444],
    "4:2:2": [SAMPLING, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422],
    "4:2:0": [SAMPLING, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420],
    "progressive": [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
    "restart intervals": [cv2.IMWRITE_JPEG_RST_INTERVAL, 4],
}


def _encode(tile: NDArray[np.uint8], kind: str) -> bytes:
    if kind == "RGB without Adobe's marker":
        jpeg = imagecodecs.jpeg8_encode(tile, level=90, colorspace="RGB", outcolorspace="RGB")
        marker = jpeg.find(b"\xff\xee")
        return bytes(jpeg[:marker] + jpeg[marker + 16 :])
    return bytes(cv2.imencode(".jpg", tile[..., 1] if kind == "grey" else tile, FLAGS.get(kind, []))[1])


def _abbreviate(jpeg: bytes) -> tuple[bytes, bytes]:
    """A JPEG's tables as a stream of their own, and what is left: ITU-T T.81 B.5."""
    tables, rest, at = b"", b"", 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if jpeg[at + 1] in (0xDB, 0xC4):
            tables += jpeg[at:end]
        else:
            rest += jpeg[at:end]
        at = end
    return b"\xff\xd8" + tables + b"\xff\xd9", b"\xff\xd8" + rest + jpeg[at:]


def _write_jpegs(path: Path, jpegs: list[bytes], *, is_grey: bool = False, tables: bytes | None = None) -> TileTable:
    shape, photometric = ((256, 512), "minisblack") if is_grey else ((256, 512, 3), "rgb")
    tifffile.imwrite(
        path,
        iter(jpegs),  # type: ignore[arg-type]
        shape=shape,
        dtype=np.uint8,
        tile=(128, 128),
        photometric=photometric,
        compression="jpeg",
        jpegtables=tables,
    )
    return read_tables(path)[0]


@pytest.mark.parametrize("kind", [*FLAGS, "grey", "RGB without Adobe's marker", "abbreviated"])
def test_every_kind_of_jpeg_is_taken_whole_and_refused_damaged(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And libjpeg says nothing meanwhile."""
    path, tables = tmp_path / "case.tif", None
    jpegs = [_encode(tile, kind) for tile in cut(draw_texture())]
    if kind == "abbreviated":
        heads, jpegs = zip(*map(_abbreviate, jpegs), strict=True)  # type: ignore[assignment]
        (tables,) = set(heads)
    table = _write_jpegs(path, jpegs, is_grey=kind == "grey", tables=tables)
    everywhere = np.ones(table.shape, bool)
    assert not bad_decodes(path, table, everywhere).any()  # type: ignore[union-attr]
    for count, harmed in enumerate(("second half zeros", "end lost"), start=1):
        harm(path, harmed, 2 + count)
        found = bad_decodes(path, table, everywhere)
        assert np.flatnonzero(found).tolist() == list(range(3, 3 + count))  # type: ignore[arg-type]
    assert capfd.readouterr() == ("", "")


def test_a_size_that_asks_for_gigabytes_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jpegs = [bytearray(_encode(tile, "progressive")) for tile in cut(draw_texture())]
    frame = jpegs[3].find(b"\xff\xc2")
    jpegs[3][frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"
    table, decode, num_decoded = _write_jpegs(tmp_path / "case.tif", list(map(bytes, jpegs))), simplejpeg.decode_jpeg, 0

    def count(*arguments: Any, **more: Any) -> Any:
        nonlocal num_decoded
        num_decoded += 1
        return decode(*arguments, **more)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", count)
    found = bad_decodes(tmp_path / "case.tif", table, np.ones(table.shape, bool))
    assert np.flatnonzero(found).tolist() == [3]  # type: ignore[arg-type]
    assert num_decoded == 7
