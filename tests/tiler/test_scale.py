"""The true scale of a slide, where it came from, and what is not taken for one."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tests.tiler import formats
from tiler import open_slide
from tiler.errors import TilerError
from tiler.ome import parse_ngff, parse_ome_xml
from tiler.scale import MppReading, Stated, read_mpp, read_mpp_csv, resolve_mpp, vendor_field
from tiler.tiff import read_tiff

Resolution = tuple[float, float, str | int] | None
HALF = Stated("XResolution", (0.5, 0.5), "tiff")
NOTHING = Stated("XResolution", None, "tiff")


def _tiff(tmp_path: Path, resolution: Resolution) -> Path:
    path = tmp_path / "slide.tif"
    options = {} if resolution is None else {"resolution": resolution[:2], "resolutionunit": resolution[2]}
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), photometric="rgb", **options)
    return path


def _aperio(mpp: str) -> Stated:
    return vendor_field("aperio", {"openslide.mpp-x": mpp, "openslide.mpp-y": mpp}, is_tiff=True)


@pytest.mark.parametrize(
    ("resolution", "mpp"),
    [
        ((20_000, 20_000, "CENTIMETER"), (0.5, 0.5)),
        ((20_000, 40_000, "CENTIMETER"), (0.5, 0.25)),
        ((50_800, 50_800, "INCH"), (0.5, 0.5)),
        ((20_000, 20_000, 1), None),  # no unit
        ((72, 72, "INCH"), None),  # a screen's
        ((96, 96, "INCH"), None),
        ((1, 1, "CENTIMETER"), None),  # a placeholder
        ((50, 50, "CENTIMETER"), None),  # 200 um a px
        (None, None),
    ],
)
def test_the_tiff_resolution(tmp_path: Path, resolution: Resolution, mpp: tuple[float, float] | None) -> None:
    slide = open_slide(_tiff(tmp_path, resolution))
    assert slide.mpp == (None if mpp is None else pytest.approx(mpp))
    assert slide.mpp_source == ("tiff" if mpp else "")
    is_absurd = resolution is not None and resolution[0] == 50
    assert slide.scale.conflict == is_absurd
    assert slide.scale.tried == ("XResolution = 200.0 is absurd" if is_absurd else "XResolution")


def test_the_vendor_field_goes_first_and_the_other_is_told() -> None:
    reading = read_mpp(_aperio("0.2631"), HALF)
    assert reading == MppReading((0.2631, 0.2631), "vendor", "MPP, XResolution", True, 0.5)


@pytest.mark.parametrize(("mpp", "conflict"), [("0.509", False), ("0.491", False), ("0.511", True), ("0.489", True)])
def test_sources_that_differ_by_over_2_percent_conflict(mpp: str, conflict: bool) -> None:
    reading = read_mpp(_aperio(mpp), HALF)
    assert (reading.conflict, reading.other) == (conflict, 0.5 if conflict else 0.0)


def test_a_conflict_in_y_alone_is_one_too() -> None:
    assert read_mpp(Stated("MPP", (0.5, 0.6)), HALF) == MppReading((0.5, 0.6), "vendor", "MPP, XResolution", True, 0.5)


@pytest.mark.parametrize("absurd", ["0", "-0.5", "nan", "inf", "1e9", "100.1", "unknown"])
def test_an_absurd_vendor_field_counts_as_none_and_is_named(absurd: str) -> None:
    named = f"MPP = {absurd} is absurd, XResolution"
    assert read_mpp(_aperio(absurd), HALF) == MppReading((0.5, 0.5), "tiff", named, conflict=True)
    assert read_mpp(_aperio(absurd), NOTHING) == MppReading(None, "", named, conflict=True)


def test_an_absurd_value_of_one_axis_spoils_both() -> None:
    assert read_mpp(Stated("MPP", ("0.5", "0"))) == MppReading(None, "", "MPP = 0 is absurd", conflict=True)


@pytest.mark.parametrize("text", ["0", "unknown", "-1", "nan"])
def test_an_absurd_field_in_a_real_file_is_named(tmp_path: Path, text: str) -> None:
    """OpenSlide drops what it takes for no number; we look at the field itself."""
    head = "Aperio Image Library v12.0.0 \r\n512x384 [0,0 512x384] (128x128) JPEG/RGB Q=95"
    with tifffile.TiffWriter(tmp_path / "case.svs") as tiff:
        formats.write_page(tiff, formats.draw_picture(), description=f"{head}|AppMag = 40|MPP = {text}")
    slide = open_slide(tmp_path / "case.svs")
    assert (slide.mpp, slide.scale.tried) == (None, f"MPP = {text} is absurd, XResolution")
    with pytest.raises(TilerError, match=rf"slide case: no microns-per-pixel \(aperio; MPP = {text} is absurd, XRes"):
        resolve_mpp("case", slide.vendor, slide.scale, None, None)


def test_x_and_y_may_differ(tmp_path: Path) -> None:
    path = formats.write_ndpi(tmp_path / "case.ndpi", formats.draw_picture())
    tags = read_tiff(path)
    assert tags is not None
    assert tags.pages[0].mpp == pytest.approx((0.25, 0.25))
    fields = {"openslide.mpp-x": "0.2265", "openslide.mpp-y": "0.2271"}
    for vendor, is_tiff, source in (
        ("hamamatsu", True, "tiff"),
        ("hamamatsu", False, "vendor"),
        ("mirax", False, "vendor"),
    ):
        reading = read_mpp(vendor_field(vendor, fields, is_tiff=is_tiff))
        assert (reading.mpp, reading.source) == ((0.2265, 0.2271), source)


def test_tags_that_openslide_read_too_are_no_second_source() -> None:
    fields = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}
    assert not read_mpp(vendor_field("leica", fields, is_tiff=True), HALF).conflict


def test_a_label_pages_resolution_is_not_the_slides(tmp_path: Path) -> None:
    path = tmp_path / "case.bif"
    formats.write_ventana(path, formats.draw_picture())
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["XResolution"].overwrite((393, 1))
        tiff.pages[0].tags["YResolution"].overwrite((393, 1))
        tiff.pages[0].tags["ResolutionUnit"].overwrite(3)
    slide = open_slide(path)
    assert (slide.mpp, slide.mpp_source, slide.scale.conflict) == ((0.25, 0.25), "vendor", False)


@pytest.mark.parametrize(
    ("value", "unit", "mpp"),
    [
        ("0.25", None, 0.25),
        ("0.25", "µm", 0.25),
        ("250", "nm", 0.25),
        ("0.00025", "mm", 0.25),
        ("2500", "Å", 0.25),
        ("0.25", "pixel", None),
        ("0.25", "reference frame", None),
        (None, "µm", None),
    ],
)
def test_the_scale_of_an_ome_xml(value: str | None, unit: str | None, mpp: float | None) -> None:
    size = "" if value is None else f'PhysicalSizeX="{value}" PhysicalSizeY="{value}"'
    units = "" if unit is None else f'PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"'
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image><Pixels SizeX="9" SizeY="8"/></Image>'
        f'<Image><Pixels SizeX="640" SizeY="480" {size} {units}/></Image></OME>'
    )
    image = parse_ome_xml(xml).find((640, 480))
    assert image is not None
    assert image.mpp == (None if mpp is None else pytest.approx((mpp, mpp)))


@pytest.mark.parametrize("xml", [None, "", "<OME", '<OME xmlns="x"><Pixels SizeX="a" SizeY="1"/></OME>'])
def test_an_ome_xml_that_cannot_be_read_says_nothing(xml: str | None) -> None:
    assert parse_ome_xml(xml).images == ()


@pytest.mark.parametrize(
    ("size", "mpp", "source", "tried"),
    [
        (0.25, (0.25, 0.25), "vendor", "PhysicalSizeX, XResolution"),
        (0, (0.5, 0.5), "tiff", "PhysicalSizeX = 0.0 is absurd, XResolution"),
    ],
)
def test_ome_before_the_tags(tmp_path: Path, size: float, mpp: tuple[float, float], source: str, tried: str) -> None:
    fields = {"PhysicalSizeX": size, "PhysicalSizeY": size}
    options = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    slide = open_slide(
        formats.write_ome_tiff(tmp_path / "case.ome.tif", formats.draw_picture(), metadata=fields, **options)
    )
    assert (slide.mpp, slide.mpp_source, slide.scale.tried) == (pytest.approx(mpp), source, tried)
    assert (slide.scale.conflict, slide.scale.other) == (True, pytest.approx(0.5) if size else 0)


@pytest.mark.parametrize(
    ("unit", "scale", "mpp"),
    [
        ("micrometer", 0.25, (0.25, 0.25)),
        ("nanometer", 250.0, (0.25, 0.25)),
        ("millimeter", 0.00025, (0.25, 0.25)),
        ("micrometer", 0.0, None),
        ("parsec", 0.25, None),
    ],
)
def test_the_scale_of_a_zarr(tmp_path: Path, unit: str, scale: float, mpp: tuple[float, float] | None) -> None:
    slide = open_slide(formats.write_ome_zarr(tmp_path / "a.zarr", formats.draw_picture(), unit=unit, mpp=scale))
    assert slide.mpp == (None if mpp is None else pytest.approx(mpp))
    assert slide.scale.tried == f"coordinateTransformations{'' if scale else ' = 0.0 is absurd'}"


def test_scales_of_level_and_pyramid_multiply() -> None:
    level = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1, 2.0, 0.5]}]}
    axes = [{"name": "c"}, *({"name": name, "unit": "micrometer"} for name in "yx")]
    whole = [{"type": "translation", "translation": [9, 9, 9]}, {"type": "scale", "scale": [1, 0.1, 0.5]}]
    found = parse_ngff({"multiscales": [{"axes": axes, "datasets": [level], "coordinateTransformations": whole}]})
    assert found is not None
    assert found.mpp == pytest.approx((0.25, 0.2))


def test_slide_then_table_then_default() -> None:
    known, unknown = MppReading((0.25, 0.26), "vendor", "MPP"), MppReading(None, "", "MPP, XResolution")
    assert resolve_mpp("s", "aperio", known, (0.4, 0.4), 0.5) == ((0.25, 0.26), "vendor")
    assert resolve_mpp("s", "aperio", unknown, (0.4, 0.4), 0.5) == ((0.4, 0.4), "csv")
    assert resolve_mpp("s", "aperio", unknown, None, 0.5) == ((0.5, 0.5), "default")
    with pytest.raises(TilerError) as told:
        resolve_mpp("case_17", "aperio", unknown, None, None)
    assert str(told.value) == (
        "slide case_17: no microns-per-pixel (aperio; MPP, XResolution tried); give --default-mpp or --mpp-csv"
    )


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_table_of_scales(tmp_path: Path, bom: bytes) -> None:
    file = tmp_path / "mpp.csv"
    file.write_bytes(bom + "slide_id,who,mpp\ncase_1,x,0.25\nschnitt_ä,y,0.5\n".encode())
    assert read_mpp_csv(file) == {"case_1": (0.25, 0.25), "schnitt_ä": (0.5, 0.5)}


def test_ids_of_a_table_are_written_as_slide_ids_are(tmp_path: Path) -> None:
    file = tmp_path / "mpp.csv"
    file.write_text(f"mpp,slide_id\n0.25, case_1 \n0.5,{unicodedata.normalize('NFD', 'ä')}\n", encoding="utf-8")
    assert read_mpp_csv(file) == {"case_1": (0.25, 0.25), "ä": (0.5, 0.5)}


def test_a_table_may_hold_both_axes(tmp_path: Path) -> None:
    file = tmp_path / "mpp.csv"
    file.write_text("slide_id,mpp_x,mpp_y\na,0.25,0.26\na,0.25,0.26\n")
    assert read_mpp_csv(file) == {"a": (0.25, 0.26)}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"slide_id,mpp_x,mpp_y\na,0.25,101\n", "slide a has mpp '0.25, 101', expected"),
        (b"slide_id,mpp_x\na,0.25\n", "expected the columns slide_id, mpp"),
        (b"slide_id,mpp\na,0.25\na,0.5\n", "slide a stands there twice, with"),
        (b"mpp,slide_id\n0.5,a\n0.5\n", "row 2 has no slide_id"),
        (b"slide_id,mpp\n ,0.5\n", "row 1 has no slide_id"),
        (b"slide_id,mpp\na,0.5\n a,0.25\n", "slide a stands there twice"),
        (b"", r"expected the columns slide_id, mpp \(or slide_id, mpp_x, mpp_y\) and at least one row"),
        (b"slide_id,mpp\n", "at least one row"),
        (b"slide,mpp\na,0.5\n", "expected the columns"),
        (b"slide_id,mpp\na,0.5\nb,x\n", "slide b has mpp 'x'"),
        (b"slide_id,mpp\na,0\n", "slide a has mpp '0'"),
        (b"slide_id,mpp\na\n", "slide a has mpp ''"),
        ("slide_id,mpp\nä,0.5\n".encode("latin-1"), "not UTF-8"),
    ],
)
def test_a_table_that_cannot_be_used(tmp_path: Path, content: bytes, sentence: str) -> None:
    file = tmp_path / "mpp.csv"
    file.write_bytes(content)
    with pytest.raises(TilerError, match=rf"--mpp-csv .*mpp\.csv: .*{sentence}"):
        read_mpp_csv(file)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TilerError, match=r"--mpp-csv .*: No such file"):
        read_mpp_csv(tmp_path / "mpp.csv")
