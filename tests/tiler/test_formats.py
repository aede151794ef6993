"""Every format that users have: who reads it, its pixels, its scale; and what is no brightfield slide is refused."""

import re
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import tifffile
import zarr

from tests.tiler import formats
from tiler import ReadError, TilerError, open_slide
from tiler.config import Backend

WIDTH, HEIGHT, MPP = formats.WIDTH, formats.HEIGHT, formats.MPP
JPEG_ERROR = 1.0
"""Grey levels: the mean error of a JPEG of quality 95 of the picture is 0.5."""


class Format(NamedTuple):
    """A maker, the name of the file, and what is expected of it."""

    file: str
    make: Callable[..., Path]
    backend: str
    vendor: str
    mpp_source: str
    options: Mapping[str, Any] = MappingProxyType({})
    most: float = 0.0
    """Largest mean error, grey levels."""
    is_averaged: bool = False
    """Level 1 is the mean of four px, else every second px."""


def _generic(backend: str, vendor: str = "generic-tiff", most: float = 0.0, **options: Any) -> Format:
    return Format("case.tif", formats.write_generic, backend, vendor, "tiff", options, most)


def _vendor(file: str, make: Callable[..., Path], backend: str, vendor: str, source: str = "vendor") -> Format:
    return Format(file, make, backend, vendor, source, {}, JPEG_ERROR, True)


FORMATS = {
    "Aperio SVS": _vendor("case.svs", formats.write_aperio, "cucim", "aperio"),
    "Philips TIFF": _vendor("case.tiff", formats.write_philips, "cucim", "philips"),
    "Philips TIFF, with white tiles": Format(
        "case.tiff", formats.write_philips, "openslide", "philips", "vendor", {"more": 1}, JPEG_ERROR, True
    ),
    "Hamamatsu NDPI": _vendor("case.ndpi", formats.write_ndpi, "openslide", "hamamatsu", "tiff"),
    "Hamamatsu VMS": _vendor("case.vms", formats.write_vms, "openslide", "hamamatsu"),
    "Hamamatsu VMU": _vendor("case.vmu", formats.write_vmu, "openslide", "hamamatsu"),
    "MRXS": _vendor("case.mrxs", formats.write_mirax, "openslide", "mirax"),
    "Leica SCN": _vendor("case.scn", formats.write_leica, "openslide", "leica", "tiff"),
    "Ventana BIF": _vendor("case.bif", formats.write_ventana, "openslide", "ventana"),
    "Trestle": _vendor("case.tif", formats.write_trestle, "openslide", "trestle"),
    "DICOM": _vendor("case", formats.write_dicom, "openslide", "dicom"),
    "TIFF, uncompressed": _generic("cucim"),
    "TIFF, JPEG": _generic("cucim", most=2.0, compression="jpeg"),
    "TIFF, LZW": _generic("cucim", compression="lzw"),
    "TIFF, LZW with predictor": _generic("cucim", compression="lzw", predictor=True),
    "TIFF, Deflate": _generic("cucim", compression="adobe_deflate"),
    "TIFF, Deflate with predictor": _generic("openslide", compression="adobe_deflate", predictor=True),
    "TIFF, Zstandard": _generic("openslide", compression="zstd"),
    "TIFF, JPEG 2000": _generic("tifffile", compression="jpeg2000"),
    "TIFF, WebP": _generic("tifffile", compression="webp"),
    "TIFF, planar": _generic("openslide", planarconfig="separate"),
    "TIFF, strips": _generic("tifffile", "", tile=None),
    "TIFF, JPEG strips": _generic("tifffile", "", most=2.0, tile=None, compression="jpeg", rowsperstrip=64),
    "TIFF, LZW strips": _generic("tifffile", "", tile=None, compression="lzw", rowsperstrip=10),
    "BigTIFF": _generic("cucim", bigtiff=True),
    "OME-TIFF": Format("case.ome.tif", formats.write_ome_tiff, "tifffile", "ome-tiff", "vendor"),
    "OME-TIFF, channels apart": Format(
        "case.ome.tiff", formats.write_ome_tiff, "tifffile", "ome-tiff", "vendor", {"metadata": {"axes": "CYX"}}
    ),
    "OME-Zarr 0.4": Format("case.ome.zarr", formats.write_ome_zarr, "zarr", "ome-zarr", "vendor"),
    "OME-Zarr 0.5": Format("case.zarr", formats.write_ome_zarr, "zarr", "ome-zarr", "vendor", {"version": "0.5"}),
    "OME-Zarr, channel last": Format(
        "case.zarr", formats.write_ome_zarr, "zarr", "ome-zarr", "vendor", {"axes": "yxc"}
    ),
    "OME-Zarr, channel first": Format(
        "case.zarr", formats.write_ome_zarr, "zarr", "ome-zarr", "vendor", {"axes": "cyx", "version": "0.5"}
    ),
}


def _make(name: str, folder: Path) -> Path:
    fmt, picture = FORMATS[name], formats.draw_picture()
    options = dict(fmt.options)
    if options.get("metadata", {}).get("axes") == "CYX" or options.get("planarconfig") == "separate":
        picture = np.ascontiguousarray(np.moveaxis(picture, 2, 0))
    if options.get("metadata", {}).get("axes") == "CYX":
        options["photometric"] = "minisblack"
    return Path(fmt.make(folder / fmt.file, picture, **options))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    known: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in known:
            known[name] = _make(name, tmp_path_factory.mktemp("formats"))
        return known[name]

    return find


def _error(seen: formats.Picture, expected: formats.Picture) -> float:
    assert seen.shape == expected.shape
    return float(np.abs(seen.astype(int) - expected).mean())


@pytest.mark.parametrize("name", FORMATS)
def test_the_right_reader_shows_the_right_pixels(name: str, made: Callable[[str], Path]) -> None:
    fmt, picture = FORMATS[name], formats.draw_picture()
    slide = open_slide(made(name))
    assert (slide.backend, slide.vendor) == (fmt.backend, fmt.vendor)
    assert [(level.width, level.height, level.downsample) for level in slide.levels[1:2]] == [
        (slide.size_l0[0] // 2, HEIGHT // 2, 2.0)
    ]
    assert _error(slide.read(0, 0, 0, WIDTH, HEIGHT), picture) <= fmt.most
    assert _error(slide.read(139, 250, 0, 201, 77), picture[250:327, 139:340]) <= fmt.most
    small = formats.halve(picture) if fmt.is_averaged else picture[::2, ::2]
    assert _error(slide.read(0, 0, 1, WIDTH // 2, HEIGHT // 2), small) <= fmt.most
    assert _error(slide.read(140, 60, 1, 101, 77), small[30:107, 70:171]) <= fmt.most


@pytest.mark.parametrize("name", FORMATS)
def test_the_scale_is_the_files_own(name: str, made: Callable[[str], Path]) -> None:
    slide = open_slide(made(name))
    assert slide.mpp == pytest.approx((MPP, MPP))
    assert slide.mpp_source == FORMATS[name].mpp_source
    assert not slide.scale.conflict


@pytest.mark.parametrize("name", FORMATS)
def test_past_the_edge_it_is_white(name: str, made: Callable[[str], Path]) -> None:
    slide, picture = open_slide(made(name)), formats.draw_picture()
    corner = slide.read(WIDTH - 50, HEIGHT - 40, 0, 200, 200)
    assert _error(corner[:40, :50], picture[-40:, -50:]) <= FORMATS[name].most + 0.5
    assert (corner[40:] == 255).all()
    assert (corner[:, 50:] == 255).all()
    outside = slide.read(-60, -70, 0, 100, 100)
    assert (outside[:70] == 255).all()
    assert (outside[:, :60] == 255).all()
    assert _error(outside[70:, 60:], picture[:30, :40]) <= FORMATS[name].most + 0.5
    assert (slide.read(5 * WIDTH, 0, 1, 30, 20) == 255).all()


@pytest.mark.parametrize("name", FORMATS)
def test_many_threads_read_what_one_reads(name: str, made: Callable[[str], Path]) -> None:
    slide = open_slide(made(name))
    places = [(x, y) for y in range(0, HEIGHT, 50) for x in range(0, WIDTH, 50)]
    alone = [slide.read(x, y, 0, 90, 80) for x, y in places]
    fresh = open_slide(made(name))  # Whatever is made at the first read is made by several threads at once.
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda place: fresh.read(*place, 0, 90, 80), places))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("name", FORMATS)
def test_a_tile_does_not_depend_on_where_its_read_began(name: str, made: Callable[[str], Path]) -> None:
    slide = open_slide(made(name))
    for level in (0, 1):
        assert slide.is_exact(level)
        step = int(slide.levels[level].downsample)
        whole = slide.read(0, 0, level, WIDTH // step, HEIGHT // step)
        for x, y in ((3, 5), (121, 130), (200, 90)):
            assert np.array_equal(slide.read(x * step, y * step, level, 50, 60), whole[y : y + 60, x : x + 50])


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.backend != "zarr"])
def test_any_reader_that_may_be_forced_shows_the_same(name: str, made: Callable[[str], Path]) -> None:
    auto, names = open_slide(made(name)), []
    for backend in ("cucim", "openslide", "tifffile"):
        try:
            forced = open_slide(made(name), backend)  # type: ignore[arg-type]
        except TilerError:
            continue
        names.append(forced.backend)
        assert (forced.mpp, forced.mpp_source, forced.vendor) == (auto.mpp, auto.mpp_source, auto.vendor)
        assert forced.fingerprint == auto.fingerprint
        if forced.size_l0 == auto.size_l0:
            assert _error(forced.read(100, 90, 0, 150, 120), auto.read(100, 90, 0, 150, 120)) < 0.5
    assert auto.backend in names


def test_a_leica_slide_is_white_where_nothing_was_scanned(made: Callable[[str], Path]) -> None:
    slide = open_slide(made("Leica SCN"))
    assert slide.size_l0 == (WIDTH + 64, HEIGHT)
    assert (slide.read(WIDTH, 0, 0, 64, HEIGHT) == 255).all()


@pytest.mark.parametrize("compression", [None, "jpeg", "deflate"])
@pytest.mark.parametrize("backend", ["auto", "openslide", "tifffile"])
def test_grey_becomes_three_equal_channels(tmp_path: Path, compression: str | None, backend: Backend) -> None:
    grey = formats.draw_picture()[..., 0].copy()
    path = formats.write_generic(tmp_path / "case.tif", grey, photometric="minisblack", compression=compression)
    slide = open_slide(path, backend)
    assert slide.backend != "cucim"
    seen = slide.read(139, 250, 0, 201, 77)
    assert np.array_equal(seen[..., 0], seen[..., 1])
    assert np.array_equal(seen[..., 0], seen[..., 2])
    assert np.abs(seen[..., 0].astype(int) - grey[250:327, 139:340]).mean() <= (1.0 if compression == "jpeg" else 0)


@pytest.mark.parametrize("backend", ["auto", "tifffile"])
def test_grey_may_count_from_white(tmp_path: Path, backend: Backend) -> None:
    grey = formats.draw_picture()[..., 0].copy()
    path = formats.write_generic(tmp_path / "case.tif", grey, photometric="miniswhite")
    assert np.array_equal(open_slide(path, backend).read(139, 250, 0, 201, 77)[..., 1], 255 - grey[250:327, 139:340])


@pytest.mark.parametrize("backend", ["auto", "tifffile"])
def test_what_is_transparent_is_white(tmp_path: Path, backend: Backend) -> None:
    picture = formats.draw_picture()
    opaque = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    opaque[:, 300:] = 0
    rgba = np.concatenate([picture, opaque], axis=2)
    slide = open_slide(formats.write_generic(tmp_path / "case.tif", rgba, extrasamples=["unassalpha"]), backend)
    assert slide.backend != "cucim"
    assert np.array_equal(slide.read(139, 250, 0, 161, 77), picture[250:327, 139:300])
    assert (slide.read(300, 0, 0, 212, HEIGHT) == 255).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"predictor": True, "compression": "adobe_deflate"}, "cuCIM dies of ADOBE DEFLATE with a predictor"),
        ({"planarconfig": "separate"}, "cuCIM reads nothing but tiled RGB right"),
        ({"compression": "zstd"}, "cuCIM does not read ZSTD"),
    ],
)
def test_cucim_is_kept_off_what_it_reads_wrong(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    picture = formats.draw_picture()
    if "planarconfig" in options:
        picture = np.ascontiguousarray(np.moveaxis(picture, 2, 0))
    path = formats.write_generic(tmp_path / "case.tif", picture, **options)
    assert open_slide(path).why == sentence
    with pytest.raises(TilerError, match=rf"^case\.tif: {sentence}; give --backend auto$"):
        open_slide(path, "cucim")


def _deep(path: Path) -> None:
    formats.write_generic(path, formats.draw_picture().astype(np.uint16) * 256)


def _five_channels(path: Path) -> None:
    data = np.zeros((HEIGHT, WIDTH, 5), np.uint8)
    formats.write_generic(path, data, photometric="minisblack", planarconfig="contig", extrasamples=[0] * 4)


def _stack(path: Path) -> None:
    with tifffile.TiffWriter(path) as tiff:
        for _ in range(3):
            formats.write_page(tiff, formats.draw_picture())


def _fluorescence(path: Path) -> None:
    fields = {"axes": "CYX", "Channel": {"Color": [0x0000FFFF, 0x00FF00FF, -16776961]}}
    data = np.zeros((3, HEIGHT, WIDTH), np.uint8)
    formats.write_ome_tiff(path, data, metadata=fields, photometric="minisblack")


def _focal_planes(path: Path) -> None:
    tifffile.imwrite(path, np.zeros((4, 64, 64, 3), np.uint8), ome=True, photometric="rgb", metadata={"axes": "ZYXS"})


def _inks(path: Path) -> None:
    formats.write_generic(path, np.zeros((HEIGHT, WIDTH, 4), np.uint8), photometric="separated")


@pytest.mark.parametrize(
    ("name", "make", "sentence"),
    [
        ("case.tif", _deep, "its pixels are uint16, expected 8-bit brightfield"),
        ("case.tif", _five_channels, "it has 5 channels, expected RGB, RGBA or grey"),
        ("case.tif", _stack, "it is a stack of 3 pictures of one size"),
        ("case.tif", _inks, "its colours are TIFF photometric 5"),
        ("case.ome.tif", _fluorescence, "its channels are coloured 0000FF 00FF00 FF0000"),
        ("case.ome.tif", _focal_planes, r"it is a stack of pictures \(Z 4\)"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "openslide", "tifffile"])
def test_what_is_no_brightfield_slide_is_refused(
    name: str, make: Callable[[Path], None], sentence: str, backend: Backend, tmp_path: Path
) -> None:
    make(tmp_path / name)
    # OpenSlide would show the first of them as grey.
    sentence = "(it is a stack of|not a slide)" if backend == "openslide" and "ome" in name else sentence
    with pytest.raises(TilerError, match=rf"^{name}: {sentence}"):
        open_slide(tmp_path / name, backend)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data": np.uint16}, "its pixels are uint16"),
        ({"data": np.float32}, "its pixels are float32"),
        ({"channels": 2}, "it has 2 channels, expected RGB or grey"),
        (
            {"omero": {"channels": [{"color": c} for c in ("0000FF", "00FF00", "FF0000")]}},
            "it has 3 channels coloured 0000FF 00FF00 FF0000, expected RGB or grey",
        ),
    ],
)
def test_a_zarr_that_is_no_brightfield_slide_is_refused(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    picture = formats.draw_picture()[..., : options.get("channels", 3)].astype(options.get("data", np.uint8))
    path = formats.write_ome_zarr(tmp_path / "case.zarr", picture, omero=options.get("omero"))
    with pytest.raises(TilerError, match=rf"^case\.zarr: {sentence}"):
        open_slide(path)


def test_a_zarr_stack_is_refused(tmp_path: Path) -> None:
    path = formats.write_ome_zarr(tmp_path / "case.zarr", formats.draw_picture())
    group = zarr.open_group(path)
    for level in "01":
        data = np.repeat(np.asarray(group[level]), 2, axis=2)
        del group[level]
        group.create_array(level, data=data)
    with pytest.raises(TilerError, match=r"case\.zarr: it is a stack of pictures \(z 2\)"):
        open_slide(path)


def test_a_zarr_may_say_that_its_channels_are_rgb(tmp_path: Path) -> None:
    colours = {"channels": [{"color": colour} for colour in ("FF0000", "00ff00", "0000FF")]}
    assert open_slide(formats.write_ome_zarr(tmp_path / "case.zarr", formats.draw_picture(), omero=colours))


def test_a_zarr_may_be_laid_out_by_bioformats2raw(tmp_path: Path) -> None:
    root = tmp_path / "case.zarr"
    zarr.create_group(root, zarr_format=2).attrs["bioformats2raw.layout"] = 3
    formats.write_ome_zarr(root / "0", formats.draw_picture())
    assert np.array_equal(open_slide(root).read(0, 0, 0, WIDTH, HEIGHT), formats.draw_picture())


@pytest.mark.parametrize("text", ["{}", "no JSON", '{"multiscales": [{"axes": "xy"}]}', '{"multiscales": 3}'])
def test_a_zarr_without_a_picture_is_refused(tmp_path: Path, text: str) -> None:
    zarr.create_group(tmp_path / "case.zarr", zarr_format=2)
    (tmp_path / "case.zarr" / ".zattrs").write_text(text)
    with pytest.raises(TilerError, match=r"^case\.zarr: (a zarr folder without NGFF multiscales|no readable OME-Zarr)"):
        open_slide(tmp_path / "case.zarr")


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = formats.write_aperio(tmp_path / "case.svs", formats.draw_picture())

    def refuse(self: Path, *_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(TilerError, match=r"^case\.svs: no permission to read it$"):
        open_slide(path)


def test_a_folder_is_no_slide(tmp_path: Path) -> None:
    (tmp_path / "case.svs").mkdir()
    with pytest.raises(TilerError, match=r"^case\.svs: not a file$"):
        open_slide(tmp_path / "case.svs")


def test_a_reader_that_cannot_be_forced_says_so(made: Callable[[str], Path]) -> None:
    for name, backend in (("Aperio SVS", "zarr"), ("MRXS", "tifffile"), ("MRXS", "cucim"), ("TIFF, WebP", "openslide")):
        with pytest.raises(TilerError, match=r"^case\.\w+: [^/]+$"):
            open_slide(made(name), backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["OME-TIFF", "TIFF, LZW strips", "TIFF, strips"])
def test_bytes_that_are_gone_are_an_error_not_a_picture(name: str, tmp_path: Path) -> None:
    slide = open_slide(_make(name, tmp_path))
    with slide.path.open("r+b") as stream:
        stream.truncate(slide.path.stat().st_size // 4)
    with pytest.raises(ReadError, match=r"region 512x384 at \(0, 0\), level 0: the file ends within"):
        slide.read(0, 0, 0, WIDTH, HEIGHT)


def test_a_damaged_chunk_is_an_error_not_a_picture(tmp_path: Path) -> None:
    slide = open_slide(_make("OME-Zarr 0.4", tmp_path))
    chunk = next(file for file in sorted((slide.path / "0").rglob("*")) if file.is_file() and file.name[0] != ".")
    chunk.write_bytes(b"damaged")
    with pytest.raises(ReadError, match=r"region 512x384 at \(0, 0\), level 0:"):
        slide.read(0, 0, 0, WIDTH, HEIGHT)


def test_only_the_tiles_under_a_region_are_decoded(tmp_path: Path) -> None:
    path = _make("OME-TIFF", tmp_path)
    with tifffile.TiffFile(path) as tiff:
        places = list(zip(tiff.pages[0].dataoffsets, tiff.pages[0].databytecounts, strict=True))
    with path.open("r+b") as stream:  # All tiles of level 0 but the first are damaged.
        for offset, num_bytes in places[1:]:
            stream.seek(offset)
            stream.write(bytes(num_bytes))
    slide = open_slide(path)
    assert np.array_equal(slide.read(10, 20, 0, 118, 108), formats.draw_picture()[20:128, 10:128])
    with pytest.raises(ReadError):
        slide.read(10, 20, 0, 119, 108)


def test_only_the_chunks_under_a_region_are_decoded(tmp_path: Path) -> None:
    path = _make("OME-Zarr, channel last", tmp_path)
    chunks = [file for file in (path / "0").rglob("*") if file.is_file() and file.name[0] != "."]
    assert len(chunks) == 12
    for chunk in chunks:
        if chunk.name != "0.0.0":
            chunk.write_bytes(b"damaged")
    slide = open_slide(path)
    assert np.array_equal(slide.read(10, 20, 0, 118, 108), formats.draw_picture()[20:128, 10:128])
    with pytest.raises(ReadError):
        slide.read(10, 20, 0, 119, 108)


def test_a_tile_that_was_never_written_is_white(tmp_path: Path) -> None:
    path = formats.write_generic(tmp_path / "case.tif", formats.draw_picture(), compression="webp")
    with tifffile.TiffFile(path, mode="r+") as tiff:
        counts = tiff.pages[0].tags[325]
        counts.overwrite([0, *counts.value[1:]])
    slide = open_slide(path)
    assert slide.backend == "tifffile"
    assert (slide.read(0, 0, 0, 128, 128) == 255).all()
    assert np.array_equal(slide.read(128, 0, 0, 128, 128), formats.draw_picture()[:128, 128:256])


@pytest.mark.parametrize("options", [{"tile": (128, 128)}, {"tile": None, "rowsperstrip": 128}])
def test_what_was_never_written_is_white_where_0_is_white_too(tmp_path: Path, options: dict[str, Any]) -> None:
    grey = formats.draw_picture()[..., 0].copy()
    path = formats.write_generic(tmp_path / "a.tif", grey, photometric="miniswhite", compression="lzw", **options)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        counts = tiff.pages[0].tags[325 if options["tile"] else 279]
        counts.overwrite([0, *counts.value[1:]])
    slide = open_slide(path, "tifffile")
    assert (slide.read(0, 0, 0, 128, 128) == 255).all()
    assert np.array_equal(slide.read(0, 128, 0, 128, 128)[..., 0], 255 - grey[128:256, :128])


@pytest.mark.parametrize("suffix", [".tif", ".ome.tif"])
@pytest.mark.parametrize(
    ("tag", "value"), [("TileWidth", 0), ("TileLength", 0), ("ImageWidth", 0), ("ImageLength", 0), ("ImageWidth", 1)]
)
@pytest.mark.parametrize("backend", ["auto", "openslide", "tifffile", "cucim"])
def test_a_size_that_makes_no_sense_is_passed_over_or_told(
    tmp_path: Path, suffix: str, tag: str, value: int, backend: Backend
) -> None:
    make = formats.write_ome_tiff if suffix == ".ome.tif" else formats.write_generic
    path = make(tmp_path / f"a{suffix}", formats.draw_picture())
    with tifffile.TiffFile(path, mode="r+") as tiff:
        pages = [part for page in tiff.pages for part in (page, *(page.pages or ()))]
        tags = [page.tags[tag] for page in pages[1:]] if value else [page.tags[tag] for page in pages[:1]]
        for found in tags:
            found.overwrite(value)
    trouble = ""
    try:
        slide = open_slide(path, backend)
        for level in range(len(slide.levels)):
            slide.read(0, 0, level, 200, 200)
    except TilerError as error:
        trouble = str(error)
    assert not trouble or re.match(rf"a{suffix}: [^/]+$|region 200x200 ", trouble)


def test_a_table_that_is_too_short_is_an_error_when_its_tiles_are_read(tmp_path: Path) -> None:
    path = formats.write_generic(tmp_path / "a.tif", formats.draw_picture(), compression="webp")
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["ImageLength"].overwrite(4 * HEIGHT)
    slide = open_slide(path)
    assert np.array_equal(slide.read(0, 0, 0, 128, 128), formats.draw_picture()[:128, :128])
    with pytest.raises(ReadError, match=r"region 128x128 at \(0, 768\), level 0: .*index out of range"):
        slide.read(0, 2 * HEIGHT, 0, 128, 128)


@pytest.mark.parametrize("error", [ZeroDivisionError, OverflowError, KeyError, IndexError, TypeError, struct.error])
def test_whatever_a_reader_raises_at_damage_is_a_tiler_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def damaged(*_: Any, **__: Any) -> None:
        raise error("odd")

    path = formats.write_generic(tmp_path / "a.tif", formats.draw_picture(), compression="webp")
    slide = open_slide(path)
    monkeypatch.setattr("tiler.backends.tifffile_reader._pread", damaged)
    with pytest.raises(ReadError, match=r"region 9x9 at .*odd"):
        slide.read(0, 0, 0, 9, 9)
    monkeypatch.setattr("tiler.slide.TifffilePixels", damaged)
    with pytest.raises(TilerError, match=rf"^a\.tif: not a slide that can be opened \({error.__name__}: .*odd"):
        open_slide(path)
    monkeypatch.setattr("tiler.slide._try_cucim", damaged)
    with pytest.raises(TilerError, match=rf"^b\.tif: damaged directories \({error.__name__}: .*odd"):
        open_slide(formats.write_generic(tmp_path / "b.tif", formats.draw_picture()))


def test_directories_that_do_not_end_are_told(tmp_path: Path) -> None:
    sentence = (
        r"a\.ome\.tif: damaged directories \(cut file, or they go round in a circle\); restore it from its source$"
    )
    for other in (1, 1 << 30):  # The main chain goes on where it was already, or past the end of the file.
        path = formats.write_ome_tiff(tmp_path / "a.ome.tif", formats.draw_picture())
        with tifffile.TiffFile(path) as tiff:
            first, count = tiff.pages[0].offset, len(tiff.pages[0].tags)
        with path.open("r+b") as stream:
            stream.seek(first + 2 + 12 * count)
            stream.write(struct.pack("<I", first if other == 1 else other))
        with pytest.raises(TilerError, match=sentence):
            open_slide(path)


def test_odd_sizes_have_whole_downsamples(tmp_path: Path) -> None:
    picture = formats.draw_picture()[:381, :511]
    for path in (
        formats.write_ome_tiff(tmp_path / "a.ome.tif", picture),
        formats.write_ome_zarr(tmp_path / "b.zarr", picture),
    ):
        slide = open_slide(path)
        assert [level.downsample for level in slide.levels] == [1.0, 2.0]
        assert np.array_equal(slide.read(0, 0, 1, 256, 191), picture[::2, ::2])


def test_one_compressed_piece_as_large_as_a_slide_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiler.backends.tifffile_reader._MAX_SEGMENT_PX", WIDTH * HEIGHT - 1)
    picture = formats.draw_picture()
    path = formats.write_generic(tmp_path / "a.tif", picture, tile=None, compression="lzw", rowsperstrip=HEIGHT)
    with pytest.raises(TilerError, match=r"a\.tif: it is compressed in pieces of 512 x 384 px; save it tiled"):
        open_slide(path)
    assert open_slide(formats.write_generic(tmp_path / "b.tif", picture, tile=None)).backend == "tifffile"
