"""An archive as archives are: every slide has its outcome, a bad one ends nothing, a second run goes on."""

import dataclasses
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from manifests import SlideRecord, read_manifest
from manifests.catalog import read_catalog, read_paths
from manifests.files import mask_path, read_record, tiles_path
from tiler.archive import Job, tile_archive
from tiler.config import TilerConfig
from tiler.discover import find_slides, name_slides
from tiler.errors import TilerError
from tiler.integrity import check_whole

CONFIG = TilerConfig(tile_px=32, mpp=2.0)
LONG = "L" * 240


@pytest.fixture(scope="session")
def good(small_cohort: Path) -> Path:
    """A slide that can be used."""
    return small_cohort / "slides" / "synth_0000.svs"


def _tile(archive: Path | str, out: Path, config: TilerConfig = CONFIG, **options: Any) -> dict[str, SlideRecord]:
    mpp, on_done = options.pop("mpp", None), options.pop("on_done", None)
    job = Job(num_workers=0, **options)
    tiled = tile_archive(str(archive), out, config, job, mpp=mpp, on_done=on_done)
    return {row["slide_id"]: SlideRecord(**row) for row in tiled.catalog.to_pylist()}


def _cut(source: Path, target: Path, share: float) -> None:
    content = source.read_bytes()
    target.write_bytes(content[: round(len(content) * share)])


def _fill(archive: Path, good: Path) -> None:
    """Good slides and all that can be wrong with one."""
    for folder in ("Jane Doe", "twins/a", "twins/b", "folder.svs"):
        (archive / folder).mkdir(parents=True)
    shutil.copy(good, archive / "Jane Doe" / "good.svs")
    shutil.copy(good, archive / "twins" / "a" / "same.svs")
    shutil.copy(good, archive / "twins" / "b" / "same.svs")
    shutil.copy(good, archive / "folder.svs" / "inner.svs")
    shutil.copy(good, archive / unicodedata.normalize("NFD", "Schnitt ä.svs"))
    shutil.copy(good, archive / f"{LONG}.svs")
    shutil.copy(good, archive / "two.dots.SVS")
    shutil.copy(good, archive / ".hidden.svs")
    (archive / "Jane Doe" / "text.svs").write_text("This is no slide.")
    (archive / "Jane Doe" / "empty.svs").touch()
    _cut(good, archive / "Jane Doe" / "cut50.svs", 0.5)
    _cut(good, archive / "Jane Doe" / "cut95.svs", 0.95)
    (archive / "notes.txt").write_text("Not looked at.")
    (archive / "Jane Doe" / "nowhere.svs").symlink_to(archive / "gone.svs")
    (archive / "Jane Doe" / "loop").symlink_to(archive, target_is_directory=True)


OK = {"good", "twins__a__same", "twins__b__same", "inner", "Schnitt ä", LONG, "two.dots"}
FAILED = {
    "text": "not a slide that can be opened",
    "empty": r"empty file \(0 bytes\)",
    "cut50": "",
    "cut95": "Short read|cut file",
    "nowhere": "no such file",
}


class Tiled(NamedTuple):
    archive: Path
    out: Path
    records: dict[str, SlideRecord]
    seen: list[str]


@pytest.fixture(scope="module")
def tiled(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiled:
    archive, out = tmp_path_factory.mktemp("archive"), tmp_path_factory.mktemp("manifests")
    _fill(archive, good)
    seen: list[str] = []
    records = _tile(archive, out, on_done=lambda done: seen.append(done.record.slide_id))
    return Tiled(archive, out, records, seen)


def test_every_slide_has_an_outcome_whatever_the_others_are(tiled: Tiled) -> None:
    by_status = {
        status: {r.slide_id for r in tiled.records.values() if r.status == status} for status in ("ok", "failed")
    }
    assert by_status == {"ok": OK, "failed": set(FAILED)}
    assert list(tiled.records) == sorted(tiled.records)
    assert sorted(tiled.seen) == list(tiled.records)
    for slide_id, record in tiled.records.items():
        manifest = read_manifest(tiles_path(tiled.out, slide_id))
        assert manifest.slide == record
        assert (len(manifest) > 0) == (slide_id in OK)
        assert mask_path(tiled.out, slide_id).exists() == (slide_id in OK)
        assert record.fingerprint or slide_id == "nowhere"
    assert read_catalog(tiled.out).to_pylist() == [dataclasses.asdict(record) for record in tiled.records.values()]


@pytest.mark.parametrize("slide_id", FAILED)
def test_an_error_tells_the_slide_and_why_but_not_where(slide_id: str, tiled: Tiled) -> None:
    error = tiled.records[slide_id].error
    assert re.match(rf"slide {slide_id}: .*{FAILED[slide_id]}", error)
    assert "Jane Doe" not in error
    assert str(tiled.archive) not in error
    assert "\n" not in error


def test_file_names_are_kept_in_the_path_lists_alone(tiled: Tiled) -> None:
    assert {path.name for path in tiled.out.iterdir()} == {"tiles", "masks", "paths", "catalog.parquet"}
    for file in (path for path in tiled.out.rglob("*") if path.is_file()):
        is_list = file.parent.name == "paths"
        assert (b"Jane Doe" in file.read_bytes()) == is_list, file
        if is_list:
            assert file.stat().st_mode & 0o777 == 0o600
    paths = read_paths(tiled.out)
    assert set(paths) == OK | set(FAILED)
    assert all(paths[slide_id].exists() for slide_id in OK)


@pytest.mark.slow  # starts three processes
def test_the_command_line_lists_what_failed_and_exits_with_1(
    tiled: Tiled, tmp_path: Path, slidegrad: Callable[..., Any]
) -> None:
    flags = ("--tile-px", 32, "--mpp", 2, "--workers", 2)
    ended = slidegrad("tile", tiled.archive, "--out", tmp_path / "out", *flags)
    assert ended.code == 1
    counts = {name: ended.result[name] for name in ("num_slides", "ok", "empty", "failed")}
    assert counts == {"num_slides": 12, "ok": 7, "empty": 0, "failed": 5}
    assert ended.result["num_tiles"] == sum(record.num_tiles for record in tiled.records.values())
    assert all(f"failed: {tiled.records[slide_id].error}" in ended.stderr for slide_id in FAILED)
    # Processes or not, the manifests are the same.
    for slide_id, record in tiled.records.items():
        assert read_manifest(tiles_path(tmp_path / "out", slide_id)).slide == record


def _times(out: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.parent.parent.name in ("tiles", "masks")}


@pytest.fixture
def archive(tmp_path: Path, good: Path) -> Path:
    """Three slides: two good, one text file."""
    folder = tmp_path / "archive"
    folder.mkdir()
    shutil.copy(good, folder / "a.svs")
    shutil.copy(good.with_name("synth_0002.svs"), folder / "b.svs")
    (folder / "c.svs").write_text("no slide")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_second_run_does_nothing_again_but_what_failed(archive: Path, out: Path, good: Path) -> None:
    first = _tile(archive, out)
    before = _times(out)
    assert _tile(archive, out) == first
    after = _times(out)
    assert {file for file in before if before[file] != after[file]} == {tiles_path(out, "c")}
    shutil.copy(good, archive / "c.svs")
    mended = _tile(archive, out)
    assert [record.status for record in mended.values()] == ["ok", "ok", "ok"]
    assert read_catalog(out).column("status").to_pylist() == ["ok", "ok", "ok"]


def test_overwrite_does_all_again(archive: Path, out: Path) -> None:
    first = _tile(archive, out)
    before = _times(out)
    assert _tile(archive, out, overwrite=True) == first
    after = _times(out)
    assert all(before[file] != after[file] for file in before)


def test_what_changed_is_done_again(archive: Path, out: Path, good: Path) -> None:
    first = _tile(archive, out)
    shutil.copy(good.with_name("synth_0004.svs"), archive / "b.svs")
    second = _tile(archive, out)
    assert second["b"].fingerprint != first["b"].fingerprint
    assert second["a"] == first["a"]
    third = _tile(archive, out, dataclasses.replace(CONFIG, min_tissue=0.5))
    assert third["a"].num_tiles < first["a"].num_tiles
    tiles_path(out, "a").write_bytes(b"torn")
    assert _tile(archive, out, dataclasses.replace(CONFIG, min_tissue=0.5)) == third


def test_another_scale_in_the_users_table_is_not_missed(real_slides: Path, out: Path) -> None:
    slide = real_slides / "TCGA-CR-7395-01A-01-TS1.svs"
    config = TilerConfig(tile_px=64, mpp=2.0, min_tissue=0)
    for mpp in (0.25, 0.5):
        (record,) = _tile(slide, out, config, mpp={slide.stem: (mpp, mpp)}).values()
        assert (record.mpp_x, record.mpp_source) == (mpp, "csv")
    before = _times(out)
    _tile(slide, out, config, mpp={slide.stem: (0.5, 0.5)})
    assert _times(out) == before
    defaulted = dataclasses.replace(config, default_mpp=0.3)
    (record,) = _tile(slide, out, defaulted).values()
    assert (record.mpp_x, record.mpp_source) == (0.3, "default")
    (record,) = _tile(slide, out, defaulted, mpp={slide.stem: (0.25, 0.25)}).values()
    assert (record.mpp_x, record.mpp_source) == (0.25, "csv")


def test_an_unforeseen_error_is_an_outcome_too(archive: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, _backend: str) -> None:
        raise ZeroDivisionError(f"reading {path}")

    monkeypatch.setattr("tiler.build.open_slide", fail)
    records = _tile(archive, out)
    assert [record.error for record in records.values()] == [
        f"slide {slide_id}: ZeroDivisionError: reading {slide_id}" for slide_id in "abc"
    ]


def test_a_white_slide_is_empty_not_failed(out: Path, tmp_path: Path, good: Path) -> None:
    shutil.copy(good, tmp_path / "a.svs")
    (record,) = _tile(tmp_path / "a.svs", out, dataclasses.replace(CONFIG, min_tissue=1.0, tile_px=128)).values()
    assert (record.status, record.num_tiles, record.error) == ("empty", 0, "")
    assert record.num_rejected > 0
    (record,) = _tile(tmp_path / "a.svs", out, dataclasses.replace(CONFIG, min_tissue=0.0, tile_px=128)).values()
    assert (record.status, record.num_rejected) == ("ok", 0)


def test_an_out_that_cannot_be_is_told(archive: Path, out: Path) -> None:
    out.touch()
    with pytest.raises(TilerError, match=r"--out .*cannot make this folder"):
        _tile(archive, out)


@pytest.mark.parametrize("what", ["", "nothing/*.svs", "gone"])
def test_no_slides_found_says_what_was_looked_for(tmp_path: Path, what: str) -> None:
    (tmp_path / "readme.txt.bak").touch()
    with pytest.raises(TilerError, match=r"no slides found \(looked for \.svs \.tif"):
        find_slides(str(tmp_path / what))


@pytest.mark.parametrize("share", [0.3, 0.95])
def test_a_cut_file_that_still_opens_is_noticed(tmp_path: Path, share: float) -> None:
    """Two pyramid levels, their tables first: the reader opens what is left and misses nothing before it reads."""
    path = tmp_path / "case.tif"
    noise = np.random.default_rng(0).integers(0, 256, (512, 1024, 3), np.uint8)
    with tifffile.TiffWriter(path) as tiff:
        for level in (noise[::4, ::4], noise):
            tiff.write(level, tile=(128, 128), photometric="rgb")
    config = dataclasses.replace(CONFIG, default_mpp=2.0)
    assert _tile(path, tmp_path / "out", config)["case"].status == "ok"
    with path.open("r+b") as stream:
        stream.truncate(round(path.stat().st_size * share))
    with pytest.raises(TilerError, match=r"cut file, [0-9]+ of 34 tiles lie beyond its [0-9]+ bytes"):
        check_whole(path)
    error = _tile(path, tmp_path / "out", config)["case"].error
    assert re.match(r"slide case: (cut file|not a slide)", error)
    assert share < 0.5 or "cut file" in error


def _touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def _found(archive: str) -> tuple[Path, dict[str, str]]:
    found = find_slides(archive)
    return found.base, found.slides


def test_an_archive_is_a_folder_a_slide_a_glob_or_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _touch(tmp_path, "x/a.svs", "x/b.tif", "y/c.svs", "y/odd.qptiff")
    (tmp_path / "list.csv").write_text("case,path\n1,x/a.svs\n2,y/odd.qptiff\n")
    (tmp_path / "list.txt").write_text(f"x/b.tif\n\n{tmp_path}/y/c.svs\n")
    folders = {"a": "x/a.svs", "b": "x/b.tif", "c": "y/c.svs"}
    assert _found(str(tmp_path)) == (tmp_path, folders)
    assert _found(str(tmp_path / "y" / "c.svs")) == (tmp_path / "y", {"c": "c.svs"})
    assert _found(str(tmp_path / "y" / "odd.qptiff")) == (tmp_path / "y", {"odd.qptiff": "odd.qptiff"})
    assert _found(str(tmp_path / "*" / "*.svs")) == (tmp_path, {"a": "x/a.svs", "c": "y/c.svs"})
    assert _found(str(tmp_path / "**" / "*.tif"))[1] == {"b": "b.tif"}
    assert _found(str(tmp_path / "list.csv")) == (tmp_path, {"a": "x/a.svs", "odd.qptiff": "y/odd.qptiff"})
    assert _found(str(tmp_path / "list.txt")) == (tmp_path, {"b": "x/b.tif", "c": "y/c.svs"})
    monkeypatch.chdir(tmp_path)
    assert _found(".") == (tmp_path, folders)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"path\na.svs\nb.svs\nc.svs\n", r"2 of 3 listed slides are not there, first b\.svs"),
        (b"case,path\n1,a.svs\n2\n", "1 of 3 lines have no path in column 2"),
        ("ä.svs\n".encode("latin-1"), "this list is not UTF-8"),
    ],
)
def test_a_list_that_cannot_be_used(tmp_path: Path, content: bytes, sentence: str) -> None:
    _touch(tmp_path, "a.svs")
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(TilerError, match=sentence):
        _found(str(tmp_path / "list.csv"))


def test_ids_do_not_depend_on_how_the_archive_is_reached(tmp_path: Path) -> None:
    real = tmp_path / "disk" / "archive"
    _touch(real, "x/a.svs", "y/a.svs", "b.svs")
    (tmp_path / "link").symlink_to(real, target_is_directory=True)
    expected = {"b": "b.svs", "x__a": "x/a.svs", "y__a": "y/a.svs"}
    assert _found(str(real)) == _found(str(tmp_path / "link")) == (real, expected)
    assert _found(str(tmp_path / "link" / "*" / "*.svs")) == (real, {k: expected[k] for k in ("x__a", "y__a")})


def test_listed_slides_outside_the_lists_folder_are_found_through_links(tmp_path: Path) -> None:
    _touch(tmp_path, "elsewhere/a.svs", "disk/deep/lists/here.svs")
    (tmp_path / "lists").symlink_to(tmp_path / "disk" / "deep" / "lists", target_is_directory=True)
    (tmp_path / "lists" / "list.txt").write_text(f"{tmp_path}/elsewhere/a.svs\nhere.svs\n")
    base, slides = _found(str(tmp_path / "lists" / "list.txt"))
    assert {slide_id: (base / path).resolve() for slide_id, path in slides.items()} == {
        "a": tmp_path / "elsewhere" / "a.svs",
        "here": tmp_path / "disk" / "deep" / "lists" / "here.svs",
    }


def test_an_mrxs_with_its_folder_is_one_slide(tmp_path: Path) -> None:
    _touch(tmp_path, "case.mrxs", "case/Data0001.tif", "other/d.svs")
    assert set(_found(str(tmp_path))[1]) == {"case", "d"}


def test_slides_are_named_by_stem_then_folder_then_suffix() -> None:
    paths = ["a.svs", "b.x.svs", "k/c.svs", "k/m/c.tif", "d.svs", "d.tif", unicodedata.normalize("NFD", "ä.svs")]
    assert name_slides([Path(path) for path in paths]) == {
        "a": "a.svs",
        "b.x": "b.x.svs",
        "k__c": "k/c.svs",
        "k__m__c": "k/m/c.tif",
        "d__svs": "d.svs",
        "d__tif": "d.tif",
        "ä": unicodedata.normalize("NFD", "ä.svs"),
    }


_parts = st.sampled_from(["x", "y", "x__y", "a", "y__a", "a__svs", "..", "a__svs__tif"])


@given(
    st.lists(
        st.builds(
            lambda folders, stem, suffix: "/".join([*folders, stem + suffix]),
            st.lists(_parts, max_size=2),
            _parts,
            st.sampled_from([".svs", ".tif", ".SVS", ".ome.tif", ".dcm"]),
        ),
        unique=True,
        max_size=12,
    )
)
def test_no_slide_is_lost_for_its_name_whatever_the_order(paths: list[str]) -> None:
    slides = name_slides(paths)
    assert sorted(slides.values()) == sorted(paths)
    assert name_slides(paths[::-1]) == slides


def test_a_slide_id_does_not_come_to_mean_another_slide(small_cohort: Path, tmp_path: Path) -> None:
    for folder, slide in (("one", "synth_0000"), ("two", "synth_0001")):
        (tmp_path / folder).mkdir()
        shutil.copy(small_cohort / "slides" / f"{slide}.svs", tmp_path / folder / "case.svs")
    out = tmp_path / "M"
    first = _tile(tmp_path / "one", out)
    with pytest.raises(TilerError, match="1 slide ids already mean other files, first 'case'; give another --out"):
        _tile(tmp_path / "two", out)
    assert read_record(tiles_path(out, "case")) == first["case"]
    second = _tile(tmp_path / "two", out, overwrite=True)
    assert second["case"].fingerprint != first["case"].fingerprint
    shutil.move(tmp_path / "two", tmp_path / "three")  # An archive that moved is still the same.
    assert _tile(tmp_path / "three", out) == second
