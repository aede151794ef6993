"""The tables of a TIFF: which tiles lie where, for every layout, and one sentence where they make no sense."""

import errno
import logging
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tiler import TilerConfig, TilerError, build_manifest, open_slide
from tiler.integrity import check_whole, find_damage
from tiler.tiff_tables import _NUM_KEPT, _quiet, _read_tables, find_table, read_tables


@pytest.fixture
def path(small_cohort: Path, tmp_path: Path) -> Path:
    """A copy of a sound slide."""
    shutil.copy(small_cohort / "slides" / "synth_0000.svs", tmp_path / "case.svs")
    return tmp_path / "case.svs"


def test_tables_are_those_of_the_levels_and_the_thumbnail(path: Path) -> None:
    tables, levels = read_tables(path), open_slide(path).levels
    assert [table.is_tiled for table in tables] == [True, False, True]
    for level, table in zip(levels, (tables[0], tables[2]), strict=True):
        assert find_table(tables, level.width, level.height) is table
        assert table.shape == (-(-level.height // 256), -(-level.width // 256))
        content = path.read_bytes()
        for at, length in zip(table.offsets.ravel().tolist(), table.num_bytes.ravel().tolist(), strict=True):
            tile = content[at : at + length]
            assert (tile[:2], tile[-2:]) == (b"\xff\xd8", b"\xff\xd9")


def test_files_without_tables_pass_as_whole(tmp_path: Path) -> None:
    (tmp_path / "case.mrxs").write_bytes(b"\xff\xd8\xff\xe0 and so on")
    (tmp_path / "case.dcm").write_bytes(b"")
    (tmp_path / "case.zarr").mkdir()
    for name in ("case.mrxs", "case.dcm", "case.zarr"):
        assert read_tables(tmp_path / name) == ()
    check_whole(tmp_path / "case.mrxs")


def test_a_pyramid_under_its_first_picture_is_seen(tmp_path: Path) -> None:
    """As in OME-TIFF."""
    pixels = np.zeros((512, 512, 3), np.uint8)
    with tifffile.TiffWriter(tmp_path / "case.ome.tif") as tiff:
        tiff.write(pixels, tile=(128, 128), photometric="rgb", subifds=1)
        tiff.write(pixels[::2, ::2], tile=(128, 128), photometric="rgb", subfiletype=1)
    tables = read_tables(tmp_path / "case.ome.tif")
    assert [(t.width, t.shape) for t in tables] == [(512, (4, 4)), (256, (2, 2))]
    assert find_table(tables, 256, 256) is tables[1]
    assert find_table(tables, 200, 190) is tables[1]  # Philips: padded to whole tiles.
    assert find_table(tables, 100, 100) is None


@pytest.mark.parametrize("content", [b"II*\0", b"II*\0\xff\xff\xff\x7f", b"II*\0\x08\0\0\0\xff\xff" + b"\x01" * 90])
def test_tables_that_are_garbage_give_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "case.svs"
    path.write_bytes(content)
    with pytest.raises(TilerError, match=r"^case\.svs: damaged TIFF tables \(.*\)$") as raised:
        check_whole(path)
    assert str(tmp_path) not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_so_do_those_with_random_bytes(
    path: Path, times: Callable[[int, int], int], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Each ends well or in a sentence, and nothing is said meanwhile."""
    whole, ended = path.read_bytes(), set()
    with tifffile.TiffFile(path) as tiff:
        tags = [tag for page in tiff.pages for tag in page.tags]
    for seed in range(times(150, 3000)):
        rng, content = np.random.default_rng(seed), bytearray(whole)
        for _ in range(rng.integers(1, 5)):
            tag = tags[rng.integers(len(tags))]
            start = tag.offset if rng.random() < 0.6 else tag.valueoffset
            at = start + int(rng.integers(12))
            content[at : at + 2] = rng.bytes(2)
        path.write_bytes(content[: len(whole)])
        try:
            check_whole(path)
            ended.add("well")
        except TilerError as error:
            ended.add(re.sub(r"\(.*\)$|, .* bytes$", "", str(error)))
    assert ended == {"well", "case.svs: damaged TIFF tables ", "case.svs: cut file"}
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_the_tables_are_parsed_once_a_file(path: Path) -> None:
    slide = open_slide(path)
    manifest = build_manifest(path, "case", TilerConfig(tile_px=48, min_tissue=0, check="none")).manifest
    _append(path)
    before = _read_tables.cache_info().misses
    check_whole(path)
    for check in ("markers", "decode", "sample"):
        find_damage(slide, manifest, check)  # type: ignore[arg-type]
    assert _read_tables.cache_info().misses == before + 1
    _append(path)
    check_whole(path)
    assert _read_tables.cache_info().misses == before + 2


def test_the_tables_of_a_few_slides_are_kept(path: Path, tmp_path: Path) -> None:
    """While training, several are looked at in turn."""
    paths = [tmp_path / f"case_{i}.svs" for i in range(2 * _NUM_KEPT)]
    for copy in paths:
        shutil.copy(path, copy)
    before = _read_tables.cache_info().misses
    for _ in range(3):
        for copy in paths[:4]:
            read_tables(copy)
    assert _read_tables.cache_info().misses == before + 4
    for copy in paths:
        read_tables(copy)
    assert _read_tables.cache_info().currsize == _NUM_KEPT


def test_a_disk_that_does_not_answer_is_no_damage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it remembered."""

    def fail(path: Path) -> None:  # noqa: ARG001
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("tiler.tiff_tables.open_tiff", fail)
        with pytest.raises(OSError, match="Input/output"):
            read_tables(path)
    assert len(read_tables(path)) == 3
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_tables(path)


def test_what_tifffile_says_in_other_threads_meanwhile_passes(caplog: pytest.LogCaptureFixture) -> None:
    def say() -> None:
        logging.getLogger("tifffile").warning("odd")

    with _quiet(), ThreadPoolExecutor(1) as other:
        say()
        assert not caplog.records
        other.submit(say).result()
    assert [record.message for record in caplog.records] == ["odd"]
    say()
    assert len(caplog.records) == 2


def _append(path: Path) -> None:
    """Makes another file of it, as far as is known."""
    with path.open("ab") as stream:
        stream.write(b"\0")


def test_a_thumbnail_with_odd_tables_does_not_matter(path: Path) -> None:
    """No level of a slide is in strips like Aperio's thumbnail, label and macro."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[1].tags[278].overwrite(16)  # As if there were many strips.
    assert len(read_tables(path)) == 2
    check_whole(path)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags[322].overwrite(128)
    with pytest.raises(TilerError, match=r"picture of \d+x\d+ px with \d+ of \d+ tiles"):
        check_whole(path)
