"""What of an archive is a slide, what one slide is, and what could not be looked at."""

import os
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
import zarr

from tests.tiler import formats
from tiler import TilerError, dicom, open_slide
from tiler.discover import SLIDE_SUFFIXES, Found, find_slides, name_slides


def _touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def _zarr(folder: Path, **attributes: Any) -> None:
    zarr.create_group(folder, zarr_format=2).attrs.update(attributes)


def test_a_longer_suffix_stands_before_those_that_end_it() -> None:
    for i, suffix in enumerate(SLIDE_SUFFIXES):
        assert not any(suffix.endswith(shorter) for shorter in SLIDE_SUFFIXES[:i])
    names = ["a.ome.tif", "b.OME.TIFF", "c.ome.zarr", "d.zarr", "e.tif", "f.x.svs"]
    assert list(name_slides(names)) == ["a", "b", "c", "d", "e", "f.x"]


def test_an_archive_is_a_folder_a_slide_a_glob_or_a_list(tmp_path: Path) -> None:
    _touch(tmp_path, "x/a.svs", "x/b.ome.tif", "y/c.vms", "y/c.jpg", "y/odd.qptiff", "y/notes.txt")
    _zarr(tmp_path / "y" / "d.ome.zarr", multiscales=[])
    (tmp_path / "list.csv").write_text("case,path\n1,x/a.svs\n2,y/odd.qptiff\n3,y/d.ome.zarr\n")
    everything = {"a": "x/a.svs", "b": "x/b.ome.tif", "c": "y/c.vms", "d": "y/d.ome.zarr"}
    assert find_slides(str(tmp_path)) == Found(tmp_path, everything)
    assert find_slides(str(tmp_path / "y" / "d.ome.zarr")) == Found(tmp_path / "y", {"d": "d.ome.zarr"})
    assert find_slides(str(tmp_path / "y" / "odd.qptiff")) == Found(tmp_path / "y", {"odd.qptiff": "odd.qptiff"})
    assert find_slides(str(tmp_path / "*" / "*")) == Found(tmp_path, everything)
    assert find_slides(str(tmp_path / "**" / "*.zarr")) == Found(tmp_path / "y", {"d": "d.ome.zarr"})
    listed = {"a": "x/a.svs", "d": "y/d.ome.zarr", "odd.qptiff": "y/odd.qptiff"}
    assert find_slides(str(tmp_path / "list.csv")) == Found(tmp_path, listed)


def test_folders_are_walked_whatever_they_are_called(tmp_path: Path) -> None:
    _touch(tmp_path, "x.svs/a.svs", "y.tif/z.mrxs/b.svs", "plain.zarr/c/d.tif")
    assert find_slides(str(tmp_path)).slides == {"a": "x.svs/a.svs", "b": "y.tif/z.mrxs/b.svs"}
    assert find_slides(str(tmp_path / "x.svs")).slides == {"a": "a.svs"}
    assert find_slides(str(tmp_path / "**" / "*.svs")).slides == {"a": "x.svs/a.svs", "b": "y.tif/z.mrxs/b.svs"}


def test_what_is_hidden_is_passed_over(tmp_path: Path) -> None:
    _touch(tmp_path, ".a.svs", ".trash/b.svs", "c.svs", "._c.svs")
    assert find_slides(str(tmp_path)).slides == {"c": "c.svs"}
    assert find_slides(str(tmp_path / ".a.svs")).slides == {".a": ".a.svs"}  # The user named it.


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    _touch(tmp_path, "x/a.svs")
    (tmp_path / "x" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "x" / "self").symlink_to(tmp_path / "x" / "self", target_is_directory=True)
    (tmp_path / "y").symlink_to(tmp_path / "x", target_is_directory=True)
    assert find_slides(str(tmp_path)).slides == {"a": "x/a.svs"}


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _touch(tmp_path, "a.svs", "x/b.svs", "x/closed/c.svs", "shut/d.svs")
    scandir = os.scandir

    def refuse(folder: str) -> Iterator[os.DirEntry[str]]:
        if os.path.basename(os.path.normpath(folder)) in ("closed", "shut"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find_slides(str(tmp_path))
    assert found.slides == {"a": "a.svs", "b": "x/b.svs"}
    assert found.unreadable == ["shut", "x/closed"]
    with pytest.raises(TilerError, match=r"no slides found \(looked for .*\), and 1 folders cannot be read"):
        find_slides(str(tmp_path / "x" / "closed"))


def test_ids_that_had_to_be_joined_are_told(tmp_path: Path) -> None:
    _touch(tmp_path, "x/a.svs", "y/a.tif", "b.svs")
    found = find_slides(str(tmp_path))
    assert found.slides == {"b": "b.svs", "x__a": "x/a.svs", "y__a": "y/a.tif"}
    assert found.joined == ["x__a", "y__a"]


def test_where_only_the_suffix_differs_every_one_gets_it(tmp_path: Path) -> None:
    """Else one that comes later, and sorts before it, would take an id from another slide."""
    _touch(tmp_path, "a.svs", "a.ndpi", "b.svs", "x/c.ome.tif", "x/c.tif", "x/d.tif", "x/d.svs", "y/d.svs")
    found = find_slides(str(tmp_path))
    assert found.slides == {
        "a__ndpi": "a.ndpi",
        "a__svs": "a.svs",
        "b": "b.svs",
        "c__ome.tif": "x/c.ome.tif",
        "c__tif": "x/c.tif",
        "x__d__svs": "x/d.svs",
        "x__d__tif": "x/d.tif",
        "y__d": "y/d.svs",
    }
    assert sorted(found.joined) == sorted(set(found.slides) - {"b"})


def test_names_that_the_suffix_does_not_tell_apart_depend_on_no_order() -> None:
    paths = ["a.svs", "a.SVS", "../x/b.svs", "x/b.svs"]
    slides = name_slides(paths)
    assert slides == name_slides(paths[::-1])
    assert sorted(slides.values()) == sorted(paths)
    assert sorted(slide_id.rpartition("__")[0] for slide_id in slides) == ["a__svs"] * 2 + ["x__b__svs"] * 2


def test_names_that_are_not_utf_8_are_passed_over_and_counted(tmp_path: Path) -> None:
    odd = os.fsdecode(b"M\xfcller")
    try:
        _touch(tmp_path, "a.svs", f"{odd}.svs", f"{odd}/b.svs", "x/c.svs")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    found = find_slides(str(tmp_path))
    assert (found.slides, found.num_unnamed) == ({"a": "a.svs", "c": "x/c.svs"}, 2)
    assert find_slides(str(tmp_path / "x")).num_unnamed == 0
    assert find_slides(str(tmp_path / odd)).slides == {"b": "b.svs"}  # Names count from the archive on.
    with pytest.raises(TilerError, match=r"no slides found .*, and 1 files have names that are not UTF-8; rename them"):
        find_slides(str(tmp_path / f"{odd}.svs"))


def test_a_series_in_a_folder_whose_name_is_not_utf_8_is_named_by_its_file(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"M\xfcller")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    formats.write_dicom(folder, formats.draw_picture())
    assert find_slides(str(folder)).slides == {"1": "1.dcm"}


def test_a_text_list_is_one_path_a_line_and_a_csv_is_a_csv(tmp_path: Path) -> None:
    name = unicodedata.normalize("NFC", 'Smith, "J" ä.svs')
    _touch(tmp_path, name, "b.svs", "path")
    (tmp_path / "list.txt").write_text(f"{name}\n\n  b.svs \r\n", encoding="utf-8-sig")
    assert sorted(find_slides(str(tmp_path / "list.txt")).slides.values()) == sorted([name, "b.svs"])
    quoted = name.replace('"', '""')
    (tmp_path / "list.csv").write_text(f'path,n\n"{quoted}",1\nb.svs,2\n')
    assert sorted(find_slides(str(tmp_path / "list.csv")).slides.values()) == sorted([name, "b.svs"])


@pytest.mark.parametrize(
    ("archive", "sentence"),
    [
        ("~no_such_user_here/x", "~no_such_user_here/x: no such user"),
        ("x" * 300, "x{300}: File name too long"),
        ("~no_such_user_here/*.svs", r"~no_such_user_here/\*\.svs: no such user"),
        (f"{'x' * 300}/*.svs", r"x{300}/\*\.svs: File name too long"),
    ],
)
def test_an_archive_that_cannot_be_is_told(archive: str, sentence: str) -> None:
    with pytest.raises(TilerError, match=f"^{sentence}"):
        find_slides(archive)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("list.csv", "path\n" + "x" * 200_000, r"not readable as CSV \(field larger than field limit"),
        ("list.csv", "path\n" + "x" * 300, "'x{300}' cannot be looked at: File name too long"),
        ("list.txt", "x" * 300, "'x{300}' cannot be looked at: File name too long"),
        ("list.txt", "gone.svs\n", r"1 of 1 listed slides are not there, first gone\.svs"),
    ],
)
def test_a_list_that_cannot_be_used_is_one_sentence(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TilerError, match=rf"list\.\w+: {sentence}"):
        find_slides(str(tmp_path / name))


@pytest.mark.parametrize("name", ["list.txt", "list.csv"])
def test_what_may_not_be_read_is_told(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rights are taken away: the administrator, as whom tests may run, has them all."""
    _touch(tmp_path, "locked/a.svs")
    (tmp_path / name).write_text("locked/a.svs\n")
    stat, opened = os.stat, Path.open

    def refuse(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if not isinstance(path, int) and "locked/" in os.fspath(path):
            raise PermissionError(13, "Permission denied", path)
        return stat(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        with pytest.raises(TilerError, match=r"list\.\w+: 'locked/a\.svs' cannot be looked at: Permission denied$"):
            find_slides(str(tmp_path / name))
        with pytest.raises(TilerError, match=r"a\.svs: Permission denied$"):
            find_slides(str(tmp_path / "locked" / "a.svs"))

    def closed(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(TilerError, match=r"list\.\w+: Permission denied$"):
        find_slides(str(tmp_path / name))


def test_a_pipe_among_dicom_files_is_not_waited_for(tmp_path: Path) -> None:
    formats.write_dicom(tmp_path / "case", formats.draw_picture())
    os.mkfifo(tmp_path / "case" / "0.dcm")
    script = "import sys; from tiler.discover import find_slides; print(find_slides(sys.argv[1]).slides)"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "{'case': 'case/1.dcm'}\n"


def test_a_dicom_folder_is_read_once_for_all_its_slides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{series}{level}.dcm" for series in "abc" for level in "01"]
    for series in "abc":
        formats.write_dicom(tmp_path, formats.draw_picture(), (f"{series}0.dcm", f"{series}1.dcm"))
    reads: list[str] = []
    monkeypatch.setattr(
        dicom, "read_instance", lambda file, _f=dicom.read_instance: (reads.append(file.name), _f(file))[1]
    )
    for path in find_slides(str(tmp_path)).slides.values():
        assert [file.name[0] for file in dicom.list_series(tmp_path / path)] == [path[0]] * 2
    assert sorted(reads) == names
    formats.write_dicom(tmp_path, formats.draw_picture(), ("d0.dcm", "d1.dcm"))
    (tmp_path / "a1.dcm").unlink()
    assert dicom.list_series(tmp_path / "a0.dcm") == [tmp_path / "a0.dcm"]
    assert dicom.list_series(tmp_path / "d1.dcm") == [tmp_path / "d0.dcm", tmp_path / "d1.dcm"]


def test_an_mrxs_with_its_folder_is_one_slide(tmp_path: Path) -> None:
    formats.write_mirax(tmp_path / "case.mrxs", formats.draw_picture())
    _touch(tmp_path, "case/odd.tif", "other/d.svs")
    assert find_slides(str(tmp_path)).slides == {"case": "case.mrxs", "d": "other/d.svs"}


@pytest.mark.parametrize("key", ["multiscales", "bioformats2raw.layout"])
def test_a_zarr_folder_with_a_picture_is_one_slide(tmp_path: Path, key: str) -> None:
    _zarr(tmp_path / "case.zarr", **{key: 3})
    zarr.create_group(tmp_path / "new.ome.zarr", zarr_format=3).attrs["ome"] = {"version": "0.5", "multiscales": []}
    _zarr(tmp_path / "features.zarr", what="embeddings")
    _touch(
        tmp_path, "case.zarr/0/inner.tif", "archive.zarr.zip", "file.zarr", "bad.ome.zarr/zarr.json", "no.zarr/x.tif"
    )
    slides = {"bad": "bad.ome.zarr", "case": "case.zarr", "new": "new.ome.zarr"}
    assert find_slides(str(tmp_path)).slides == slides


def test_a_dicom_series_is_one_slide_named_by_its_folder(tmp_path: Path) -> None:
    picture = formats.draw_picture()
    formats.write_dicom(tmp_path / "case_1", picture, ("b.dcm", "a.dcm"))
    formats.write_dicom(tmp_path / "both", picture, ("p0.dcm", "p1.dcm"))
    formats.write_dicom(tmp_path / "both", picture, ("q1.dcm", "q0.dcm"))
    found = find_slides(str(tmp_path))
    assert found == Found(tmp_path, {"p0": "both/p0.dcm", "q1": "both/q1.dcm", "case_1": "case_1/b.dcm"})
    assert open_slide(tmp_path / "case_1" / "a.dcm").size_l0 == (formats.WIDTH, formats.HEIGHT)
    # However the series is reached, it is the same slide.
    case = Found(tmp_path / "case_1", {"case_1": "b.dcm"})
    assert find_slides(str(tmp_path / "case_1")) == case
    assert find_slides(str(tmp_path / "case_1" / "a.dcm")) == case
    assert find_slides(str(tmp_path / "case_1" / "*.dcm")) == case
    (tmp_path / "list.txt").write_text("case_1/a.dcm\ncase_1/b.dcm\n")
    assert find_slides(str(tmp_path / "list.txt")).slides == {"case_1": "case_1/b.dcm"}


def test_folders_of_one_name_are_joined_with_theirs(tmp_path: Path) -> None:
    for patient in "xy":
        formats.write_dicom(tmp_path / patient / "series", formats.draw_picture())
    found = find_slides(str(tmp_path))
    assert found.slides == {"x__series": "x/series/1.dcm", "y__series": "y/series/1.dcm"}
    assert found.joined == ["x__series", "y__series"]


def test_a_level_stands_for_its_series_not_a_label_however_large(tmp_path: Path) -> None:
    formats.write_dicom(tmp_path, formats.draw_picture())
    label = pydicom.dcmread(tmp_path / "1.dcm")
    label.ImageType = ["ORIGINAL", "PRIMARY", "LABEL", "NONE"]
    label.TotalPixelMatrixColumns = 9 * formats.WIDTH
    label.save_as(tmp_path / "0.dcm")
    assert list(find_slides(str(tmp_path)).slides.values()) == ["1.dcm"]


def test_other_dicom_files_are_passed_over(tmp_path: Path) -> None:
    formats.write_dicom(tmp_path / "case", formats.draw_picture())
    report = pydicom.dcmread(tmp_path / "case" / "2.dcm")
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    report.SeriesInstanceUID = "1.2.3"
    report.save_as(tmp_path / "case" / "report.dcm")
    _touch(tmp_path, "case/empty.dcm")
    (tmp_path / "case" / "text.dcm").write_text("no DICOM")
    assert find_slides(str(tmp_path)).slides == {"case": "case/1.dcm"}
    with pytest.raises(TilerError, match="no slides found"):
        find_slides(str(tmp_path / "case" / "[er]*.dcm"))
    assert find_slides(str(tmp_path / "case" / "report.dcm")).slides == {"report": "report.dcm"}  # The user named it.


def test_a_folder_with_many_files_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call a file: half a million files are listed in seconds."""
    _touch(tmp_path, *(f"x/{i}.svs" for i in range(300)))
    calls: list[str] = []
    for module, name in ((os, "stat"), (os.path, "realpath"), (os, "scandir"), (os, "listdir")):
        known = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=known, _n=name, **k: (calls.append(_n), _f(*a, **k))[1])
    assert len(find_slides(str(tmp_path)).slides) == 300
    assert 2 <= len(calls) < 30
