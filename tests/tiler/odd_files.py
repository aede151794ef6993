"""Damaged and odd slide files, each with the outcome it must have. The table `ODD` is what the test walks.

Every maker gets the path to write and a good slide (Aperio, JPEG, 0.5 mpp, about 960 x 770 px, one level of JPEG tiles
of 256 px and one of a quarter of that) to start from.
"""

import gzip
import os
import shutil
import struct
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import tifffile

LONG = "L" * 240


class Odd(NamedTuple):
    """`status` of the slide "": it is passed over; `message`: a regular expression that its error matches."""

    name: str
    """Path under the archive."""
    slide_id: str
    make: Callable[[Path, Path], None]
    status: str
    message: str = ""
    note: str = ""


def _copy(path: Path, good: Path) -> None:
    shutil.copy(good, path)


def _cut(share: float) -> Callable[[Path, Path], None]:
    def make(path: Path, good: Path) -> None:
        content = good.read_bytes()
        path.write_bytes(content[: round(len(content) * share)])

    return make


def _text(path: Path, good: Path) -> None:
    path.write_text("This is no slide.")


def _picture(path: Path, good: Path) -> None:
    with tifffile.TiffFile(good) as tiff:
        ok, content = cv2.imencode(".png", tiff.pages[0].asarray()[..., ::-1])
    assert ok
    path.write_bytes(bytes(content))


def _zipped(path: Path, good: Path) -> None:
    path.write_bytes(gzip.compress(good.read_bytes()))


def _tissue(side: int = 768) -> np.ndarray:
    """A pink disc with texture on white."""
    rng = np.random.default_rng(0)
    picture = np.full((side, side, 3), 244, np.uint8)
    y, x = np.mgrid[:side, :side] - side // 2
    disc = x**2 + y**2 < (0.4 * side) ** 2
    picture[disc] = np.clip(np.array([205, 110, 165]) + rng.normal(0, 25, (int(disc.sum()), 3)), 0, 255)
    return picture


def _tiff(
    picture: np.ndarray, *, mpp: tuple[float, float] | None = (0.5, 0.5), tile: bool = True, **options: object
) -> Callable[[Path, Path], None]:
    """A plain TIFF; `mpp` (x, y) goes into its resolution tags."""

    def make(path: Path, good: Path) -> None:
        settings: dict[str, object] = {"photometric": "rgb" if picture.ndim == 3 else "minisblack"} | options
        if tile:
            settings["tile"] = (128, 128)
        if mpp is not None:
            settings |= {"resolution": (1e4 / mpp[0], 1e4 / mpp[1]), "resolutionunit": "CENTIMETER"}
        byteorder = settings.pop("byteorder", "<")
        with tifffile.TiffWriter(path, byteorder=byteorder, bigtiff=bool(settings.pop("bigtiff", False))) as tiff:
            tiff.write(picture, metadata=None, **settings)

    return make


def _aperio(mpp: str) -> Callable[[Path, Path], None]:
    """A good slide whose description says another scale."""

    def make(path: Path, good: Path) -> None:
        shutil.copy(good, path)
        with tifffile.TiffFile(path, mode="r+b") as tiff:
            tag = tiff.pages[0].tags["ImageDescription"]
            tag.overwrite(tag.value.replace("MPP = 0.5000", f"MPP = {mpp}" if mpp else "X = 1"))

    return make


def _overwrite(level: int, share: float) -> Callable[[Path, Path], None]:
    """A good slide; in this share of a level's JPEGs, the middle ones, the second half is zero."""

    def make(path: Path, good: Path) -> None:
        shutil.copy(good, path)
        with tifffile.TiffFile(good) as tiff:
            page = [page for page in tiff.pages if page.is_tiled][level]
            jpegs = list(zip(page.dataoffsets, page.databytecounts, strict=True))
        first = round((1 - share) * len(jpegs)) // 2
        with path.open("r+b") as stream:
            for offset, size in jpegs[first : first + max(1, round(share * len(jpegs)))]:
                stream.seek(offset + size // 2)
                stream.write(bytes(size - size // 2))

    return make


def _tag(name: str, value: object) -> Callable[[Path, Path], None]:
    def make(path: Path, good: Path) -> None:
        shutil.copy(good, path)
        with tifffile.TiffFile(path, mode="r+b") as tiff:
            for tag in [page.tags[name] for page in tiff.pages if page.is_tiled]:
                tag.overwrite([value] * tag.count if tag.count > 1 else value)

    return make


def _endless(path: Path, good: Path) -> None:
    """The last page names the first as its next."""
    shutil.copy(good, path)
    with tifffile.TiffFile(path) as tiff:
        pages = list(tiff.pages)
        first, last = pages[0].offset, pages[-1].offset
    with path.open("r+b") as stream:
        stream.seek(last)
        (count,) = struct.unpack("<H", stream.read(2))
        stream.seek(last + 2 + 12 * count)
        stream.write(struct.pack("<I", first))


def _garbage(path: Path, good: Path) -> None:
    """A TIFF header, then noise."""
    noise = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes()
    path.write_bytes(b"II*\0\x08\0\0\0" + noise)


def _pipe(path: Path, good: Path) -> None:
    os.mkfifo(path)


def _nowhere(path: Path, good: Path) -> None:
    path.symlink_to(path.with_name("gone.svs"))


def _loop(path: Path, good: Path) -> None:
    path.symlink_to(path.parent, target_is_directory=True)


def _folder(path: Path, good: Path) -> None:
    path.mkdir()
    shutil.copy(good, path / "inner.svs")


def _mrxs(path: Path, good: Path) -> None:
    """Without its data folder."""
    path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(1_000))


def _zarr(path: Path, good: Path) -> None:
    """A folder whose metadata is cut."""
    path.mkdir()
    (path / "zarr.json").write_text('{"zarr_format": 3, "node_ty')


def _dicom(path: Path, good: Path) -> None:
    path.write_bytes(bytes(128) + b"DICM" + bytes(200))


WHITE = np.full((768, 768, 3), 245, np.uint8)
FULL = np.clip(np.array([205, 110, 165]) + np.random.default_rng(1).normal(0, 25, (768, 768, 3)), 0, 255).astype("u1")
RGB = _tissue()
RGBA = np.dstack([RGB, np.full((768, 768), 255, np.uint8)])
NFD = unicodedata.normalize("NFD", "Schnitt ä")

ODD = [
    Odd("cut_0.svs", "cut_0", _cut(0), "failed", r"empty file \(0 bytes\)"),
    Odd("cut_1.svs", "cut_1", _cut(0.01), "failed", "cut file"),
    Odd("cut_50.svs", "cut_50", _cut(0.5), "failed", "."),
    Odd("cut_95.svs", "cut_95", _cut(0.95), "failed", "."),
    Odd("text.svs", "text", _text, "failed", "not a slide that can be opened"),
    Odd("picture.svs", "picture", _picture, "failed", "not a slide that can be opened"),
    Odd("zipped.svs", "zipped", _zipped, "failed", "not a slide that can be opened"),
    Odd("garbage.tif", "garbage", _garbage, "failed", "not a slide that can be opened"),
    Odd("suffix_tif.tif", "suffix_tif", _copy, "ok"),
    Odd("suffix_ndpi.ndpi", "suffix_ndpi", _copy, "ok"),
    Odd("suffix_upper.SVS", "suffix_upper", _copy, "ok"),
    Odd("two.dots.svs", "two.dots", _copy, "ok"),
    Odd("tiled.tif", "tiled", _tiff(RGB), "ok"),
    Odd("jpeg.tif", "jpeg", _tiff(RGB, compression="jpeg"), "ok"),
    Odd("deflate.tif", "deflate", _tiff(RGB, compression="deflate"), "ok"),
    Odd("lzw.tif", "lzw", _tiff(RGB, compression="lzw"), "ok"),
    Odd("striped.tif", "striped", _tiff(RGB, tile=False, rowsperstrip=16), "ok"),
    Odd("one_strip.tif", "one_strip", _tiff(RGB, tile=False), "ok"),
    Odd("bigtiff.tif", "bigtiff", _tiff(RGB, bigtiff=True), "ok"),
    Odd("big_endian.tif", "big_endian", _tiff(RGB, byteorder=">"), "ok"),
    Odd("sixteen_bit.tif", "sixteen_bit", _tiff(RGB.astype(np.uint16) * 257), "failed", "16"),
    Odd("float.tif", "float", _tiff(RGB.astype(np.float32) / 255), "failed", "."),
    Odd("grey.tif", "grey", _tiff(RGB[..., 1]), "empty", note="no colour: otsu finds no tissue"),
    Odd("rgba.tif", "rgba", _tiff(RGBA, extrasamples=["UNASSALPHA"]), "ok"),
    Odd("no_mpp.tif", "no_mpp__tif", _tiff(RGB, mpp=None), "failed", r"no microns-per-pixel \(.*give --default-mpp"),
    Odd("no_mpp.svs", "no_mpp__svs", _aperio(""), "failed", "no microns-per-pixel"),
    Odd("mpp_0.svs", "mpp_0", _aperio("0.0"), "failed", r"MPP = 0\S* is absurd"),
    Odd("mpp_nan.svs", "mpp_nan", _aperio("nan"), "failed", "MPP = nan is absurd"),
    Odd("mpp_1e6.svs", "mpp_1e6", _aperio("1e6"), "failed", r"MPP = \S+ is absurd"),
    Odd("mpp_minus.svs", "mpp_minus", _aperio("-0.5"), "failed", r"MPP = -0\.5 is absurd"),
    Odd("mpp_xy.tif", "mpp_xy", _tiff(RGB, mpp=(0.5, 0.25)), "ok"),
    Odd("coarse.tif", "coarse", _tiff(RGB, mpp=(1.0, 1.0)), "failed", "scanned at 1 mpp, coarser than the requested"),
    Odd("white.tif", "white", _tiff(WHITE), "empty"),
    Odd("all_tissue.tif", "all_tissue", _tiff(FULL), "ok"),
    Odd("tiny.tif", "tiny", _tiff(RGB[384:400, 384:400]), "empty"),
    Odd(f"{NFD}.svs", "Schnitt ä", _copy, "ok"),
    Odd(f"{LONG}.svs", LONG, _copy, "ok"),
    Odd("quote'\" & <b>.svs", "quote'\" & <b>", _copy, "ok"),
    Odd("twins/a/same.svs", "twins__a__same", _copy, "ok"),
    Odd("twins/b/same.svs", "twins__b__same", _copy, "ok"),
    Odd("nowhere.svs", "nowhere", _nowhere, "failed", "no such file"),
    Odd("pipe.svs", "pipe", _pipe, "failed", "not a file"),
    Odd("loop", "", _loop, ""),
    Odd("folder.svs", "inner", _folder, "ok"),
    Odd(".hidden.svs", "", _copy, ""),
    Odd("notes.txt", "", _text, ""),
    Odd("alone.mrxs", "alone", _mrxs, "failed", "not a slide that can be opened"),
    Odd("broken.ome.zarr", "broken", _zarr, "failed", "."),
    Odd("no_dicom.dcm", "", _dicom, ""),
    Odd("few_damaged.svs", "few_damaged", _overwrite(0, 0.01), "ok", note="damaged tiles left out"),
    Odd("all_damaged.svs", "all_damaged", _overwrite(0, 1.0), "failed", "tiles are damaged, more than --max-bad"),
    Odd("overview.svs", "overview", _overwrite(1, 1.0), "failed", "where tissue is looked for, are damaged"),
    Odd("sparse.svs", "sparse", _tag("TileByteCounts", 0), "failed", "."),
    Odd("far.svs", "far", _tag("TileOffsets", 4_000_000_000), "failed", "cut file|not a slide"),
    Odd("huge.svs", "huge", _tag("ImageWidth", 2_000_000_000), "failed", "."),
    Odd("endless.svs", "endless", _endless, "failed", "cut file|circle", note="its directories go round"),
]
