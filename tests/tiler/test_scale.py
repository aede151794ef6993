"""The true scale of a slide, where it came from, and what is not taken for one."""

from pathlib import Path

import numpy as np
import pytest
import tifffile

from tiler.errors import TilerError
from tiler.scale import MppReading, read_mpp, read_mpp_csv, resolve_mpp

Resolution = tuple[float, float, str | int] | None


def _tiff(tmp_path: Path, resolution: Resolution) -> Path:
    path = tmp_path / "slide.tif"
    options = {} if resolution is None else {"resolution": resolution[:2], "resolutionunit": resolution[2]}
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), photometric="rgb", **options)
    return path


def _aperio(mpp: str) -> dict[str, str]:
    return {"openslide.mpp-x": mpp, "openslide.mpp-y": mpp}


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
    reading = read_mpp(_tiff(tmp_path, resolution), "", {})
    assert reading.mpp == (None if mpp is None else pytest.approx(mpp))
    assert reading.source == ("tiff" if mpp else "")
    assert not reading.conflict


def test_the_vendor_field_goes_first(tmp_path: Path) -> None:
    reading = read_mpp(_tiff(tmp_path, (20_000, 20_000, "CENTIMETER")), "aperio", _aperio("0.2631"))
    assert (reading.mpp, reading.source, reading.conflict) == ((0.2631, 0.2631), "vendor", True)


@pytest.mark.parametrize(("mpp", "conflict"), [("0.509", False), ("0.491", False), ("0.511", True), ("0.489", True)])
def test_sources_that_differ_by_over_2_percent_conflict(tmp_path: Path, mpp: str, conflict: bool) -> None:
    assert read_mpp(_tiff(tmp_path, (20_000, 20_000, "CENTIMETER")), "aperio", _aperio(mpp)).conflict is conflict


@pytest.mark.parametrize("absurd", ["0", "-0.5", "nan", "inf", "1e9", "unknown"])
def test_an_absurd_vendor_field_counts_as_none_and_is_named(tmp_path: Path, absurd: str) -> None:
    with_tiff = read_mpp(_tiff(tmp_path, (20_000, 20_000, "CENTIMETER")), "aperio", _aperio(absurd))
    assert (with_tiff.mpp, with_tiff.source) == (pytest.approx((0.5, 0.5)), "tiff")
    without = read_mpp(_tiff(tmp_path, None), "aperio", _aperio(absurd))
    assert without == MppReading(None, "", f"MPP = {absurd} is absurd, XResolution")


def test_a_generic_tiffs_scale_is_the_tiffs(tmp_path: Path) -> None:
    path = _tiff(tmp_path, (20_000, 20_000, "CENTIMETER"))
    assert read_mpp(path, "generic-tiff", _aperio("0.5")) == MppReading(
        (0.5, 0.5), "tiff", "openslide.mpp-x, XResolution"
    )


def test_a_file_that_is_no_tiff_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "slide.ndpi").write_text("no TIFF")
    assert read_mpp(tmp_path / "slide.ndpi", "", {}).mpp is None


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


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "expected the columns slide_id, mpp and at least one row"),
        (b"slide_id,mpp\n", "at least one row"),
        (b"slide,mpp\na,0.5\n", "expected the columns"),
        (b"slide_id,mpp\na,0.5\nb,x\n", "slide b has mpp 'x'"),
        (b"slide_id,mpp\na,0\n", "slide a has mpp '0'"),
        (b"slide_id,mpp\na\n", "slide a has mpp None"),
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
