"""`slidegrad manifest export | import` on real files: slides are found, opened, and a bad one ends nothing."""

import json
import shutil
import stat
import unicodedata
import zipfile
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import tyro

from manifests import Manifest, ManifestError, SlideRecord, open_manifests, read_manifest, write_manifest
from manifests.catalog import read_catalog, read_paths, rebuild_catalog
from manifests.compact import compact
from manifests.exchange import Format
from manifests.files import mask_path, tiles_path
from manifests.source import open_stored
from tiler import TilerConfig, open_slide, read_tiles
from tiler.archive import Job, tile_archive
from tiler.errors import TilerError
from tiler.exchange import Archive, Export, Import

FORMATS = get_args(Format)
SLIDE = "synth_0000"


def _export(kind: Format, manifests: Path, out: Path, **options: Any) -> dict[str, Any]:
    result, code = Export(kind=kind, manifests=str(manifests), out=out, **options).run()
    assert code == 0
    return result


def _clam(file: Path, coords: list[list[int]], name: str = SLIDE, patch_px: int = 64, level: int = 0) -> Path:
    with h5py.File(file, "w") as store:
        store["coords"] = np.array(coords, np.int64)
        store["coords"].attrs.update({"patch_size": patch_px, "patch_level": level, "name": name})
    return file


def _corners(manifest: Manifest) -> list[tuple[int, int]]:
    return list(zip(manifest.x_l0.tolist(), manifest.y_l0.tolist(), strict=True))


@pytest.mark.parametrize("kind", FORMATS)
def test_manifests_come_back_as_the_tiler_made_them(
    kind: Format, small_cohort: Path, small_manifests: Path, tmp_path: Path
) -> None:
    exported = _export(kind, small_manifests, tmp_path / "files")
    result, code = Import(
        kind=kind, files=(tmp_path / "files",), slides=str(small_cohort / "slides"), out=tmp_path / "back"
    ).run()
    assert (code, result["ok"], result["failed"]) == (0, 12, 0)
    assert result["num_tiles"] == exported["num_tiles"] > 12
    before, after = open_manifests(small_manifests), open_manifests(tmp_path / "back")
    assert list(after) == list(before)
    paths = read_paths(tmp_path / "back")
    for slide_id in before:
        old, new = before[slide_id], after[slide_id]
        # Block order is found again: the rows are the same, not only the set.
        assert _corners(new) == _corners(old)
        same = ("width_l0", "height_l0", "mpp_x", "mpp_y", "mpp_source", "backend", "vendor", "fingerprint")
        same += ("tile_px", "tile_mpp", "overlap", "level", "read_w", "read_h", "version")
        assert [getattr(new.slide, n) for n in same] == [getattr(old.slide, n) for n in same]
        assert (new.slide.config_hash, new.slide.check) == ("", "none")
        metadata = pq.read_schema(tiles_path(tmp_path / "back", slide_id)).metadata
        assert json.loads(metadata[b"slidegrad"])["tiler"] == {"imported_from": kind}
        assert paths[slide_id] == (small_cohort / "slides" / f"{slide_id}.svs").resolve()
    (listed,) = (tmp_path / "back" / "paths").iterdir()
    assert stat.S_IMODE(listed.stat().st_mode) == 0o600
    slide, rows = open_slide(paths[SLIDE]), np.arange(len(after[SLIDE]))
    assert np.array_equal(read_tiles(slide, after[SLIDE], rows), read_tiles(slide, before[SLIDE], rows))


def test_awkward_names_are_found_again(small_cohort: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    for name in (unicodedata.normalize("NFD", "Schnitt ä"), 'a, "b"', "007", "L" * 240, "two.dots", "a/same", "b/same"):
        (archive / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(small_cohort / "slides" / f"{SLIDE}.svs", archive / f"{name}.svs")
    tile_archive(str(archive), tmp_path / "m", TilerConfig(tile_px=32, mpp=2.0), Job(num_workers=0))
    before = open_manifests(tmp_path / "m")
    assert {"Schnitt ä", 'a, "b"', "007", "a__same"} <= set(before)
    for kind in FORMATS:
        _export(kind, tmp_path / "m", tmp_path / kind)
        back = tmp_path / f"back_{kind}"
        result, code = Import(kind=kind, files=(tmp_path / kind,), slides=str(archive), out=back).run()
        assert (code, result["ok"]) == (0, 7)
        after = open_manifests(back)
        assert {s: _corners(after[s]) for s in after} == {s: _corners(before[s]) for s in before}


def test_slides_are_known_by_id_file_name_and_stem_where_that_is_one_slide() -> None:
    slides = {"Schnitt ä": "x/Schnitt ä.svs", "a__same": "a/same.svs", "b__same": "b/same.svs", "t.1": "t.1.tif"}
    archive = Archive(Path("/archive"), slides)
    for name, slide_id in (("Schnitt ä", "Schnitt ä"), ("t.1.tif", "t.1"), ("a__same", "a__same"), ("same", None)):
        assert archive.match((unicodedata.normalize("NFD", name),)) == slide_id
    assert archive.match(("nobody", "t.1")) == "t.1"


def test_one_bad_slide_does_not_end_the_import(small_cohort: Path, tmp_path: Path) -> None:
    files = tmp_path / "Jane Doe"
    files.mkdir()
    _clam(files / "good.h5", [[0, 0], [64, 0]])
    _clam(files / "past_edge.h5", [[0, 0], [32, 32]], "synth_0001.svs")
    _clam(files / "outside.h5", [[0, 0], [5000, 0]], "synth_0002")
    _clam(files / "no_level.h5", [[0, 0]], "synth_0003", level=7)
    _clam(files / "twice.h5", [[0, 0]])
    _clam(files / "nobody.h5", [[0, 0]], "nobody")
    (files / "synth_0004.h5").write_text("no HDF5")
    archive, out = small_cohort / "slides", tmp_path / "out"
    result, code = Import(kind="clam", files=(files,), slides=str(archive), out=out, workers=2).run()
    assert code == 1
    assert [result[name] for name in ("num_slides", "ok", "empty", "failed", "num_tiles")] == [7, 2, 0, 5, 4]
    assert read_manifest(tiles_path(out, "synth_0001")).slide.status == "ok"
    for slide_id, words in (("synth_0002", "1 of 2 tiles begin outside"), ("synth_0003", "tiles of level 7")):
        record = read_manifest(tiles_path(out, slide_id)).slide
        assert record.status == "failed"
        assert record.error.startswith(f"slide {slide_id}: {words}")
    assert set(open_manifests(out)) == {SLIDE, "synth_0001", "synth_0002", "synth_0003"}


def test_an_import_that_fails_leaves_a_good_manifest(
    small_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, out, file = str(small_cohort / "slides"), tmp_path / "m", tmp_path / "a.h5"
    place = tiles_path(out, SLIDE)

    def load(coords: list[list[int]]) -> tuple[dict[str, Any], int]:
        return Import(kind="clam", files=(_clam(file, coords),), slides=archive, out=out).run()

    assert load([[5000, 0]])[1] == 1
    assert read_manifest(place).slide.status == "failed"  # None was there: that it failed is what is known.
    for coords, status in (([[0, 0], [64, 0]], "ok"), ([], "empty")):
        assert load(coords)[1] == 0
        good, paths = place.read_bytes(), [f.read_bytes() for f in (out / "paths").iterdir()]
        capsys.readouterr()
        result, code = load([[0, 0], [5000, 0]])
        assert (code, [result[name] for name in ("num_slides", "ok", "empty", "failed")]) == (1, [1, 0, 0, 1])
        told = capsys.readouterr().err
        assert f"failed: slide {SLIDE}: 1 of 2 tiles begin outside" in told
        assert "; the manifest that is there stays" in told
        assert place.read_bytes() == good
        assert [f.read_bytes() for f in (out / "paths").iterdir()] == paths
        assert read_catalog(out).column("status").to_pylist() == [status]
    place.write_bytes(b"torn")
    load([[5000, 0]])
    assert read_manifest(place).slide.status == "failed"


def test_what_failed_is_told_without_paths(
    small_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, files = tmp_path / "archive", tmp_path / "files"
    for folder in (archive, files):
        folder.mkdir()
    (archive / "cut.svs").write_bytes((small_cohort / "slides" / f"{SLIDE}.svs").read_bytes()[:300])
    (archive / "gone.svs").symlink_to(tmp_path / "nowhere.svs")
    for name in ("cut", "gone", "nobody"):
        _clam(files / f"{name}.h5", [[0, 0]], name)
    result, code = Import(kind="clam", files=(files,), slides=str(archive), out=tmp_path / "out").run()
    told = capsys.readouterr().err
    assert (code, result["failed"]) == (1, 3)
    assert [line.split(":")[1] for line in told.splitlines()] == [" slide cut", " slide gone", " slide nobody"]
    assert str(tmp_path) not in told
    assert ".svs" not in told


def test_the_sentence_begins_with_the_id_where_ids_begin_with_folders(small_cohort: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / "slides" / folder).mkdir(parents=True)
        shutil.copy(small_cohort / "slides" / f"{SLIDE}.svs", tmp_path / "slides" / folder / "same.svs")
    file = _clam(tmp_path / "t.h5", [[5000, 0]], "a__same")
    Import(kind="clam", files=(file,), slides=str(tmp_path / "slides"), out=tmp_path / "m").run()
    error = read_manifest(tiles_path(tmp_path / "m", "a__same")).slide.error
    assert error.startswith("slide a__same: 1 of 1 tiles begin outside")


def test_a_tile_past_the_edge_is_kept_and_white_there(small_cohort: Path, tmp_path: Path) -> None:
    slide = open_slide(small_cohort / "slides" / f"{SLIDE}.svs")
    width, height = slide.size_l0
    file = _clam(tmp_path / "a.h5", [[width - 32, height - 16], [0, 0], [0, 0]])
    result, code = Import(kind="clam", files=(file,), slides=str(small_cohort / "slides"), out=tmp_path / "m").run()
    assert (code, result["num_tiles"]) == (0, 2)
    assert [note.split(";")[0] for note in result["notes"]][:2] == [
        "some tiles reach past the slide's edge",
        "some tiles came more than once and are kept once",
    ]
    manifest = read_manifest(tiles_path(tmp_path / "m", SLIDE))
    tile = read_tiles(slide, manifest, np.array([_corners(manifest).index((width - 32, height - 16))]))[0]
    assert (tile[16:] == 255).all()
    assert (tile[:, 32:] == 255).all()
    assert np.array_equal(tile[:16, :32], slide.read(width - 32, height - 16, 0, 32, 16))


def test_a_compacted_set_takes_no_import(small_cohort: Path, small_manifests: Path, tmp_path: Path) -> None:
    compact(open_stored(small_manifests), tmp_path / "set")
    before = (tmp_path / "set" / "catalog.parquet").read_bytes()
    file = _clam(tmp_path / "p.h5", [[0, 0]])
    command = Import(kind="clam", files=(file,), slides=str(small_cohort / "slides"), out=tmp_path / "set")
    with pytest.raises(TilerError, match="a compacted set takes no more slides"):
        command.run()
    assert (tmp_path / "set" / "catalog.parquet").read_bytes() == before


def test_tiling_does_not_take_an_import_for_its_own(small_cohort: Path, tmp_path: Path) -> None:
    archive, config = small_cohort / "slides" / f"{SLIDE}.svs", TilerConfig(tile_px=32, mpp=2.0)
    _clam(tmp_path / "a.h5", [[0, 0]])
    Import(kind="clam", files=(tmp_path / "a.h5",), slides=str(archive), out=tmp_path / "m").run()
    assert tile_archive(str(archive), tmp_path / "m", config, Job(num_workers=0)).num_new == 1
    assert read_manifest(tiles_path(tmp_path / "m", SLIDE)).slide.config_hash != ""


def test_a_scale_nobody_knows_is_asked_for(real_slides: Path, tmp_path: Path) -> None:
    slide_id = "TCGA-CR-7395-01A-01-TS1"
    file = _clam(tmp_path / "a.h5", [[0, 0], [224, 448]], slide_id, patch_px=224)
    (tmp_path / "mpp.csv").write_text(f"slide_id,mpp\n{slide_id},0.3\n")
    for options, expected in (
        ({}, ("failed", 0.0, 0.0, "")),
        ({"default_mpp": 0.5}, ("ok", 0.5, 0.5, "default")),
        ({"default_mpp": 0.5, "mpp_csv": tmp_path / "mpp.csv"}, ("ok", 0.3, 0.3, "csv")),
    ):
        result, code = Import(kind="clam", files=(file,), slides=str(real_slides), out=tmp_path / "m", **options).run()
        record = read_manifest(tiles_path(tmp_path / "m", slide_id)).slide
        assert (record.status, record.mpp_x, record.tile_mpp, record.mpp_source) == pytest.approx(expected)
        assert (code, result["failed"]) == ((1, 1) if record.status == "failed" else (0, 0))
        assert read_catalog(tmp_path / "m").column("status").to_pylist() == [record.status]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_manifest_that_does_not_say_how_tiles_are_read_fails_alone(kind: Format, tmp_path: Path) -> None:
    none = np.zeros(0, np.int32)
    record = SlideRecord(slide_id="bare", status="empty", width_l0=9, height_l0=9)
    write_manifest(tiles_path(tmp_path, "bare"), Manifest(record, none, none, none.astype(np.float32)))
    result, code = Export(kind=kind, manifests=str(tmp_path), out=tmp_path / "out").run()
    assert (code, result["num_slides"], result["failed"]) == (1, 0, 1)


@pytest.fixture
def mixed(small_manifests: Path, tmp_path: Path) -> Path:
    """Three slides of the small cohort, one of them with a mask that has an outline, one without any; a failed one."""
    root = tmp_path / "mixed"
    for slide_id in ("synth_0000", "synth_0001", "synth_0002"):
        tiles_path(root, slide_id).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiles_path(small_manifests, slide_id), tiles_path(root, slide_id))
    for slide_id, outline in (("synth_0000", [[[[0, 0], [8, 0], [8, 8], [0, 0]]]]), ("synth_0001", [])):
        mask_path(root, slide_id).parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(mask_path(root, slide_id), "w") as store:
            store.writestr("zarr.json", json.dumps({"attributes": {"mpp": 8.0, "px_l0": 16.0, "outline": outline}}))
    none = np.zeros(0, np.int32)
    broken = SlideRecord(slide_id="broken", status="failed", error="slide broken: cut file")
    write_manifest(tiles_path(root, "broken"), Manifest(broken, none, none, none.astype(np.float32)))
    rebuild_catalog(root)
    return root


def test_an_export_says_once_what_it_leaves_out(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _export("trident", mixed, tmp_path / "out")
    assert (result["num_slides"], result["failed"]) == (3, 0)
    assert capsys.readouterr().err.splitlines() == [
        "1 slides: failed when they were tiled, left out",
        "1 slides: no tissue mask in the manifests folder, hence no outline",
    ]
    assert [f.name for f in (tmp_path / "out" / "contours_geojson").iterdir()] == ["synth_0000.geojson"]
    assert len(list((tmp_path / "out").rglob("*_patches.h5"))) == 3
    assert _export("clam", mixed, tmp_path / "clam")["notes"] == {"failed when they were tiled, left out": 1}


def test_an_export_of_some_slides_has_those_alone(mixed: Path, tmp_path: Path) -> None:
    result = _export("geojson", mixed, tmp_path / "out", slides=("synth_0002", "synth_0000"), max_tiles=3)
    assert result["num_slides"] == 2
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["synth_0000.geojson", "synth_0002.geojson"]
    features = json.loads((tmp_path / "out" / "synth_0002.geojson").read_text())["features"]
    assert [f["properties"]["objectType"] for f in features] == ["tile"] * 3
    with pytest.raises(TilerError, match="1 ids are not in the manifests, first 'nobody'"):
        _export("csv", mixed, tmp_path / "out", slides=("synth_0002", "nobody"))


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"wide"'])
def test_a_manifest_with_a_scale_that_is_none_fails_alone(value: str, mixed: Path, tmp_path: Path) -> None:
    file = tiles_path(mixed, "synth_0001")
    table = pq.read_table(file)
    text = table.schema.metadata[b"slidegrad"].decode()
    mpp = json.dumps(read_manifest(file).slide.mpp_x)
    text = text.replace(f'"mpp_x": {mpp}', f'"mpp_x": {value}')
    pq.write_table(table.replace_schema_metadata({"slidegrad": text}), file)
    assert value in text
    result, code = Export(kind="trident", manifests=str(mixed), out=tmp_path / "out").run()
    assert (code, result["num_slides"], result["failed"]) == (1, 2, 1)


def test_a_torn_manifest_fails_alone(mixed: Path, tmp_path: Path) -> None:
    tiles_path(mixed, "synth_0001").write_bytes(b"PAR1")
    result, code = Export(kind="csv", manifests=str(mixed), out=tmp_path / "out").run()
    assert (code, result["num_slides"], result["failed"]) == (1, 2, 1)
    ids = {line.split(",")[0] for line in (tmp_path / "out" / "tiles.csv").read_text().splitlines()}
    assert ids == {"slide_id", "synth_0000", "synth_0002"}


def test_the_commands_are_called_as_documented() -> None:
    export = tyro.cli(Export, args=["clam", "M", "--out", "D", "--slides", "a", "b", "--max-tiles", "5"])
    assert export == Export(kind="clam", manifests="M", out=Path("D"), slides=("a", "b"), max_tiles=5)
    given = [
        "eagle",
        "t.csv",
        "s.csv",
        "--slides",
        "A",
        "--out",
        "M",
        "--default-mpp",
        "0.5",
        "--workers",
        "3",
        "--tile-px",
        "256",
    ]
    assert tyro.cli(Import, args=given) == Import(
        kind="eagle",
        files=(Path("t.csv"), Path("s.csv")),
        slides="A",
        out=Path("M"),
        default_mpp=0.5,
        workers=3,
        tile_px=256,
    )


@pytest.mark.parametrize(
    ("field", "value"), [("workers", 0), ("tile_px", 0), ("default_mpp", 0.0), ("default_mpp", 101)]
)
def test_wrong_values_are_refused(field: str, value: float) -> None:
    with pytest.raises(TilerError, match=f"--{field.replace('_', '-')} {value}"):
        Import(kind="clam", files=(), slides="A", out=Path("M"), **{field: value})


def test_files_that_are_not_there_are_wrong_usage(small_cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no files here"):
        Import(kind="clam", files=(tmp_path,), slides=str(small_cohort / "slides"), out=tmp_path / "m").run()
