"""The fingerprint changes with whatever makes up a slide, and with nothing else."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tests.tiler import formats
from tiler import open_slide
from tiler.fingerprint import fingerprint

MAKERS: dict[str, tuple[str, Callable[..., Path]]] = {
    "generic TIFF": ("case.tif", formats.write_generic),
    "OME-TIFF": ("case.ome.tif", formats.write_ome_tiff),
    "NDPI": ("case.ndpi", formats.write_ndpi),
    "VMS": ("case.vms", formats.write_vms),
    "MRXS": ("case.mrxs", formats.write_mirax),
    "DICOM": ("case", formats.write_dicom),
    "OME-Zarr 0.4": ("case.ome.zarr", formats.write_ome_zarr),
    "OME-Zarr 0.5": ("case.zarr", lambda path, picture: formats.write_ome_zarr(path, picture, version="0.5")),
}


def _make(name: str, folder: Path) -> Path:
    file, make = MAKERS[name]
    return make(folder / file, formats.draw_picture())


@pytest.mark.parametrize("name", MAKERS)
def test_it_depends_on_no_clock_and_no_place(name: str, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    path = _make(name, tmp_path / "made")
    first = fingerprint(path)
    shutil.copytree(tmp_path / "made", tmp_path / "elsewhere" / "deep")
    copy = tmp_path / "elsewhere" / "deep" / path.relative_to(tmp_path / "made")
    for file in copy.parent.rglob("*"):
        os.utime(file, (1, 1))
    assert fingerprint(copy) == first
    assert open_slide(copy).fingerprint == first
    assert len(first) == 32


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "VMS"])
def test_any_name_will_do(name: str, tmp_path: Path) -> None:
    path = _make(name, tmp_path)
    first = fingerprint(path)
    if path.with_suffix("").is_dir():
        path.with_suffix("").rename(tmp_path / "other")
    assert fingerprint(path.rename(path.with_name(f"other{path.suffix}"))) == first


@pytest.mark.parametrize("name", MAKERS)
def test_every_file_of_a_slide_counts(name: str, tmp_path: Path) -> None:
    path = _make(name, tmp_path)
    first = fingerprint(path)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == {"MRXS": 4, "VMS": 4, "DICOM": 2}.get(name, len(files))
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content + b"\0")
        assert fingerprint(path) != first, file
        file.write_bytes(content)
    assert fingerprint(path) == first


@pytest.mark.parametrize("bigtiff", [False, True])
def test_any_byte_of_a_tiffs_tables_counts(tmp_path: Path, bigtiff: bool) -> None:
    """Most of the file lies between its head and tail of 64 KiB; so do the tables."""
    path = tmp_path / "case.tif"
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as tiff:
        for _ in range(2):
            tiff.write(np.zeros((100, 1000), np.uint8), metadata=None)
        formats.write_page(tiff, formats.draw_picture())
        formats.write_page(tiff, formats.halve(formats.draw_picture()), subfiletype=1)
        for _ in range(2):
            tiff.write(np.zeros((100, 1000), np.uint8), metadata=None)
    first = fingerprint(path)
    with tifffile.TiffFile(path) as tiff:
        tags = [page.tags[code] for page in tiff.pages for code in (273, 279, 324, 325) if code in page.tags]
        places = [place for tag in tags for place in range(tag.valueoffset, tag.valueoffset + tag.valuebytecount)]
    size = path.stat().st_size
    middle = [place for place in places if 65_536 <= place < size - 65_536]
    assert len(middle) > 50
    content = path.read_bytes()
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert fingerprint(path) != first, place


def test_tables_in_sub_directories_count(tmp_path: Path) -> None:
    path = tmp_path / "case.ome.tif"
    formats.write_ome_tiff(path, formats.draw_picture(), compression=None)
    first, content = fingerprint(path), path.read_bytes()
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages[0].pages[0].tags[324]
        place = tag.valueoffset + tag.valuebytecount - 1
    assert 65_536 <= place < len(content) - 65_536
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert fingerprint(path) != first


@pytest.mark.parametrize(("name", "other"), [("NDPI", ".tif"), ("generic TIFF", ".ndpi")])
def test_another_suffix_will_do(name: str, other: str, tmp_path: Path) -> None:
    """tifffile takes a file for an NDPI by its name."""
    path = _make(name, tmp_path)
    slide = open_slide(path)
    renamed = open_slide(path.rename(path.with_suffix(other)))
    assert renamed.fingerprint == slide.fingerprint
    assert (renamed.vendor, renamed.scale) == (slide.vendor, slide.scale)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "case.svs")
    with pytest.raises(OSError, match=r"case\.svs: not a file"):
        fingerprint(tmp_path / "case.svs")


def test_other_series_in_the_folder_do_not_count(tmp_path: Path) -> None:
    path = formats.write_dicom(tmp_path, formats.draw_picture())
    first = fingerprint(path)
    assert fingerprint(tmp_path / "2.dcm") == first
    formats.write_dicom(tmp_path, formats.draw_picture(), ("3.dcm", "4.dcm"))
    (tmp_path / "notes.txt").write_text("no slide")
    assert fingerprint(path) == first
    assert fingerprint(tmp_path / "3.dcm") != first
    (tmp_path / "2.dcm").unlink()
    assert fingerprint(path) != first


def test_a_photograph_of_the_label_does_not_count(tmp_path: Path) -> None:
    path = formats.write_vms(tmp_path / "case.vms", formats.draw_picture())
    with path.open("a") as stream:
        stream.write("MacroImage=macro.jpg\n")
    (tmp_path / "macro.jpg").write_bytes(b"one")
    first = fingerprint(path)
    (tmp_path / "macro.jpg").write_bytes(b"another")
    assert fingerprint(path) == first


def test_a_chunk_that_is_lost_or_cut_counts(tmp_path: Path) -> None:
    path = formats.write_ome_zarr(tmp_path / "case.zarr", formats.draw_picture())
    first = fingerprint(path)
    chunk = next(file for file in (path / "1").rglob("*") if file.is_file() and file.name[0] != ".")
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1])
    cut = fingerprint(path)
    chunk.unlink()
    assert len({first, cut, fingerprint(path)}) == 3


def _write_other(path: Path, content: bytes, start: int, end: int) -> None:
    """Everything between two places is another picture's."""
    path.write_bytes(content[:start] + bytes(255 - byte for byte in content[start:end]) + content[end:])


@pytest.mark.parametrize("tile", [None, (128, 128)])
def test_raw_pixels_are_sampled_for_the_tables_of_all_raw_pictures_are_alike(
    tmp_path: Path, tile: tuple[int, int] | None
) -> None:
    path = formats.write_generic(tmp_path / "case.tif", formats.draw_picture(), tile=tile)
    first, content = fingerprint(path), path.read_bytes()
    _write_other(path, content, 70_000, 400_000)
    assert len(content) > 500_000
    assert fingerprint(path) not in (first, "")
    # It is a sample: 4 KiB of every 12 here.
    path.write_bytes(content)
    assert fingerprint(path) == first == open_slide(path).fingerprint


def test_pixels_of_a_compressed_picture_are_not_looked_at(tmp_path: Path) -> None:
    """Its tables tell it from others; an NDPI's uncompressed map does not make it raw."""
    path = tmp_path / "case.tif"
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    with tifffile.TiffWriter(path) as tiff:
        options = {"photometric": "rgb", "compression": "adobe_deflate", "tile": (128, 128), "metadata": None}
        tiff.write(noise, **options)
        tiff.write(noise[::4, ::4, 0], metadata=None, subfiletype=1)
    first, content = fingerprint(path), path.read_bytes()
    _write_other(path, content, 100_000, 500_000)
    assert fingerprint(path) == first


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_chunks_of_a_zarr_are_sampled(tmp_path: Path, version: str) -> None:
    path = formats.write_ome_zarr(tmp_path / "case.zarr", formats.draw_picture(), version=version)
    first = fingerprint(path)
    chunks = [file for file in (path / "0").rglob("*") if file.is_file() and "z" not in file.name]
    assert 1 < len(chunks) <= 64
    for chunk in chunks:
        content = chunk.read_bytes()
        _write_other(chunk, content, 0, len(content))
        assert fingerprint(path) != first
        chunk.write_bytes(content)
    assert fingerprint(path) == first


@pytest.mark.parametrize("content", [b"", b"no slide", b"II*\0", b"II*\0\xff\xff\xff\x7f" + bytes(40)])
def test_a_file_that_is_no_slide_has_one_too(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "case.svs").write_bytes(content)
    assert len(fingerprint(tmp_path / "case.svs")) == 32
    with pytest.raises(OSError, match="No such file"):
        fingerprint(tmp_path / "gone.svs")
