"""Whatever happened to manifests on disk is found and named; what holds together is left in peace."""

import dataclasses
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests import Manifest, ManifestError, SlideRecord, read_manifest, write_manifest
from manifests.catalog import rebuild_catalog
from manifests.checks import SlideFiles
from manifests.compact import compact
from manifests.files import tiles_path
from manifests.parse import Parsed, parse_manifest
from manifests.source import open_stored
from manifests.validate import Report, validate

SIZE = {
    "width_l0": 448 * 4,
    "height_l0": 448,
    "mpp_x": 0.25,
    "mpp_y": 0.25,
    "tile_px": 224,
    "tile_mpp": 0.5,
    "config_hash": "c",
}


def _write(file: Path, slide_id: str, x_l0: list[int], **fields: Any) -> None:
    record = SlideRecord(**{"slide_id": slide_id, "status": "ok", "num_tiles": len(x_l0), **SIZE, **fields})
    x = np.array(x_l0, np.int32)
    write_manifest(file, Manifest(record, x, x * 0, np.ones(len(x), np.float32)), '{"mpp": 0.5}')


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Slides of 1, 2, 3 and 4 tiles edge to edge, an empty and a failed one."""
    root = tmp_path / "tree"
    for n in (1, 2, 3, 4):
        _write(tiles_path(root, f"s_{n}"), f"s_{n}", [448 * i for i in range(n)], fingerprint=f"print {n}")
    _write(tiles_path(root, "nothing"), "nothing", [], status="empty")
    _write(tiles_path(root, "broken"), "broken", [], status="failed", error="cut file")
    rebuild_catalog(root)
    return root


def _found(report: Report) -> list[tuple[str, str]]:
    assert report.num_by_kind.total() == len(report.problems)
    return [(problem.kind, problem.text) for problem in report.problems]


def test_what_the_tiler_wrote_holds_together(root: Path, small_manifests: Path, tmp_path: Path) -> None:
    assert (validate(root).num_slides, _found(validate(root))) == (6, [])
    assert (validate(small_manifests).num_slides, _found(validate(small_manifests))) == (12, [])
    compact(open_stored(root), tmp_path / "set")
    assert (validate(tmp_path / "set").num_slides, _found(validate(tmp_path / "set"))) == (6, [])


def test_a_missing_catalogue_is_no_problem_and_is_not_made(root: Path) -> None:
    (root / "catalog.parquet").unlink()
    assert _found(validate(root)) == []
    assert not (root / "catalog.parquet").exists()


@pytest.mark.parametrize("harm", ["torn", "empty", "flipped", "foreign", "other columns"])
def test_a_file_that_cannot_be_read_is_named_once_and_the_rest_is_read(root: Path, harm: str) -> None:
    file = tiles_path(root, "s_2")
    data = file.read_bytes()
    if harm == "torn":
        file.write_bytes(data[:-10])
    elif harm == "empty":
        file.write_bytes(b"")
    elif harm == "flipped":
        file.write_bytes(data.replace(b'"width_l0": 1792', b'"width_l0": 1793', 1))
    elif harm == "foreign":
        pq.write_table(read_manifest(file).to_table(), file)
    else:
        pq.write_table(pa.table({"x": [1]}), file)
    report = validate(root)
    ((kind, text),) = _found(report)
    assert kind == "unreadable"
    assert text.startswith(str(file))
    assert report.num_slides == 5


def _rewrite(file: Path, old: str, new: str) -> None:
    """Changes a record's JSON as a careless program would: in all places."""
    with pq.ParquetFile(file) as opened:
        table = opened.read()
    text = table.schema.metadata[b"slidegrad"].decode()
    assert old in text
    pq.write_table(table.replace_schema_metadata({"slidegrad": text.replace(old, new)}), file)


@pytest.mark.parametrize(
    ("old", "new", "kind", "sentence"),
    [
        ('"num_tiles": 3', '"num_tiles": 4', "unreadable", "slide s_3: 4 tiles in the record, 3 in the columns"),
        ('"width_l0": 1792', '"width_l0": "wide"', "unreadable", "slide s_3: in its record width_l0 is 'wide'"),
        ('"width_l0": 1792', '"width_l0": 3000000000', "unreadable", "in its record width_l0 is 3000000000"),
        ('"mpp_conflict": false', '"mpp_conflict": 0', "unreadable", "in its record mpp_conflict is 0"),
        ('"schema_version": 2', '"schema_version": 9', "unreadable", "manifest schema 9, this version reads 2"),
        ('"tiler": ', '"tilor": ', "unreadable", "unknown members ['tilor'] in its metadata"),
        ('"status": "ok"', '"status": "empty"', "content", "slide s_3: status empty with 3 tiles"),
        ('"mpp_x": 0.25', '"mpp_x": 0.0', "content", "tiles of 224 px at 0.5 mpp, level 0 at 0.0 x 0.25 mpp"),
        ('"mpp_x": 0.25', '"mpp_x": NaN', "content", "tiles of 224 px at 0.5 mpp, level 0 at nan x 0.25 mpp"),
        ('"mpp_y": 0.25', '"mpp_y": NaN', "content", "level 0 at 0.25 x nan mpp"),
        ('"mpp_y": 0.25', '"mpp_y": 1e-320', "content", "level 0 at 0.25 x 1e-320 mpp"),
        ('"tile_mpp": 0.5', '"tile_mpp": Infinity', "content", "tiles of 224 px at inf mpp"),
        ('"width_l0": 1792', '"width_l0": 1300', "content", "slide s_3: 1 tiles lie outside the slide"),
    ],
)
def test_a_record_that_cannot_be_is_told(root: Path, old: str, new: str, kind: str, sentence: str) -> None:
    (root / "catalog.parquet").unlink()
    _rewrite(tiles_path(root, "s_3"), old, new)
    ((found, text),) = _found(validate(root))
    assert found == kind
    assert sentence in text


@pytest.mark.parametrize("x_l0", [-1, 448 * 3 + 3, 2**31 - 1])
def test_tiles_outside_their_slide_are_counted(root: Path, x_l0: int) -> None:
    _write(tiles_path(root, "s_3"), "s_3", [0, x_l0, 448], fingerprint="print 3")
    assert _found(validate(root)) == [("content", "slide s_3: 1 tiles lie outside the slide")]


def test_an_imported_tile_may_reach_past_the_edge_but_not_begin_there(root: Path) -> None:
    for x_l0, expected in ((1_700, []), (1_792, [("content", "slide s_3: 1 tiles lie outside the slide")])):
        _write(tiles_path(root, "s_3"), "s_3", [0, x_l0, 448], fingerprint="print 3", config_hash="")
        (root / "catalog.parquet").unlink(missing_ok=True)
        assert _found(validate(root)) == expected


def test_a_tissue_share_that_is_none_is_told(root: Path) -> None:
    good = read_manifest(tiles_path(root, "s_2"))
    bad = dataclasses.replace(good, tissue=np.array([0.5, np.nan], np.float32))
    write_manifest(tiles_path(root, "s_2"), bad)
    assert _found(validate(root)) == [("content", "slide s_2: tissue shares outside 0 to 1")]


def test_every_flipped_bit_is_noticed_or_changes_nothing_that_is_read(root: Path, times: Callable[..., int]) -> None:
    file = tiles_path(root, "s_4")
    data = file.read_bytes()
    good = parse_manifest(data, "file")
    num_noticed = num_unnoticed = 0
    for at in range(len(data)):
        for bit in np.random.default_rng(at).permutation(8)[: times(1, 8)]:
            flipped = bytearray(data)
            flipped[at] ^= 1 << int(bit)
            try:
                found = parse_manifest(bytes(flipped), "file")
            except ManifestError:
                num_noticed += 1
                continue
            num_unnoticed += 1
            assert _same(found, good), f"bit {bit} of byte {at}"
    assert num_noticed > 5 * num_unnoticed


def _same(a: Parsed, b: Parsed) -> bool:
    tables = a.manifest.to_table(), b.manifest.to_table()
    return a.manifest.slide == b.manifest.slide and tables[0].equals(tables[1]) and a.tiler_json == b.tiler_json


@pytest.mark.parametrize("place", ["tiles/00/s_5.parquet", "tiles/s_5.parquet", "tiles/00/deep/other.parquet"])
def test_a_manifest_in_the_wrong_place_is_found(root: Path, place: str) -> None:
    (root / "catalog.parquet").unlink()
    _write(root / place, "s_5", [0])
    ((kind, text),) = _found(validate(root))
    assert kind == "place"
    assert text == f"slide s_5: its manifest lies in {root / place}; its place is {tiles_path(root, 's_5')}"


def test_a_catalogue_that_disagrees_is_told_row_by_row(root: Path) -> None:
    _write(tiles_path(root, "s_5"), "s_5", [0])
    tiles_path(root, "nothing").unlink()
    _write(tiles_path(root, "s_1"), "s_1", [448, 896], fingerprint="print 1", mpp_conflict=True)
    file = root / "catalog.parquet"
    table = pq.read_table(file)
    pq.write_table(pa.concat_tables([table, table.slice(5, 1)]), file)
    assert sorted(_found(validate(root))) == [
        ("catalogue", "slide nothing: has a row in catalog.parquet, no manifest"),
        ("catalogue", "slide s_1: catalog.parquet says mpp_conflict False, its manifest True"),
        ("catalogue", "slide s_1: catalog.parquet says num_tiles 1, its manifest 2"),
        ("catalogue", "slide s_4: has several rows in catalog.parquet"),
        ("catalogue", "slide s_5: has a manifest, no row in catalog.parquet"),
    ]


def test_a_scale_that_is_no_number_is_told_once(root: Path) -> None:
    _rewrite(tiles_path(root, "s_3"), '"mpp_x": 0.25', '"mpp_x": NaN')
    rebuild_catalog(root)
    assert [kind for kind, _ in _found(validate(root))] == ["content"]


def test_a_catalogue_that_cannot_be_read_is_one_problem(root: Path) -> None:
    file = root / "catalog.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    ((kind, text),) = _found(validate(root))
    assert kind == "catalogue"
    assert text.startswith("catalog.parquet: not a readable Parquet file")


def test_leftovers_older_than_a_day_are_found_wherever_they_lie(root: Path) -> None:
    names = ["tiles/ab/.s.parquet.0.tmp", "masks/ab/.s.zarr.zip.0.tmp", "paths/.w.parquet.0.tmp", ".catalog.0.tmp"]
    for name in [*names, "tiles/ab/.young.tmp"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"half")
    for name in names:
        os.utime(root / name, (time.time() - 90_000,) * 2)
    found = _found(validate(root))
    assert {text.split(":")[0] for _, text in found} == set(names)
    assert {kind for kind, _ in found} == {"leftover"}


def test_slides_that_changed_or_are_gone_are_found_without_their_names(root: Path, tmp_path: Path) -> None:
    paths = {f"s_{n}": tmp_path / f"Jane Doe {n}.svs" for n in (1, 2, 3, 4)}
    paths["nothing"] = paths["broken"] = tmp_path / "Jane Doe 1.svs"
    for n, content in ((1, "print 1"), (2, "changed"), (3, "print 3")):
        paths[f"s_{n}"].write_text(content)
    slides = SlideFiles(paths=paths, fingerprint=Path.read_text)
    assert sorted(_found(validate(root, slides=slides))) == [
        ("slide", "slide s_2: its slide file changed since it was tiled; tile it again"),
        ("slide", "slide s_4: its slide file is gone; give --archive if the archive is mounted elsewhere"),
    ]
    del paths["s_4"]

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    texts = [text for _, text in _found(validate(root, slides=SlideFiles(paths=paths, fingerprint=refuse)))]
    assert "slide s_4: no slide file is known; tile the archive again" in texts
    assert "slide s_1: its slide file cannot be read (Permission denied)" in texts
    assert not [text for text in texts if "Jane" in text]


def test_many_problems_are_counted_and_the_first_are_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manifests.validate._MAX_KEPT", 3)
    monkeypatch.setattr("manifests.validate._BATCH", 2)
    for file in root.glob("tiles/*/*.parquet"):
        file.write_bytes(b"")
    told: list[int] = []
    report = validate(root, progress=told.append)
    assert (report.num_by_kind.total(), len(report.problems), report.num_slides) == (6, 3, 0)
    assert told == [6] * 6


@pytest.fixture
def compacted(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The set of `root`: shards of s_1 with s_2, and of s_3 with s_4."""
    monkeypatch.setattr("manifests.compact.SLIDES_PER_SHARD", 2)
    compact(open_stored(root), tmp_path / "set")
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [("gone", "missing"), ("cut", "bytes, expected"), ("flipped", "damaged"), ("folder", "not rea")],
)
def test_a_shard_that_was_harmed_is_named_once(compacted: Path, harm: str, sentence: str) -> None:
    shard = sorted((compacted / "shards").iterdir())[0]
    data = bytearray(shard.read_bytes())
    shard.unlink()
    if harm == "cut":
        shard.write_bytes(data[:-5])
    elif harm == "flipped":
        data[1] ^= 1  # A byte that no reader looks at.
        shard.write_bytes(data)
    elif harm == "folder":
        shard.mkdir()
    report = validate(compacted)
    ((kind, text),) = _found(report)
    assert kind == "shard"
    assert text.startswith(f"shards/{shard.name}: ")
    assert sentence in text
    assert text.endswith("; 2 slides lie in it")
    assert report.num_slides == 4


def test_a_set_whose_catalogue_is_harmed_is_not_opened(compacted: Path) -> None:
    file = compacted / "catalog.parquet"
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"num_bytes": ', b'"num_bytez": ', 1))
    with pytest.raises(ManifestError, match=r"catalog.parquet: damaged \(the two copies of its metadata differ\)"):
        validate(compacted)
    file.write_bytes(data[:-20])
    with pytest.raises(ManifestError, match="half a set"):
        validate(compacted)


def test_what_does_not_belong_to_a_set_is_found(compacted: Path) -> None:
    for name in ("old", "young"):  # Another `compact` may be about to name the young one.
        (compacted / "shards" / f"{name}.parquet").write_bytes(b"PAR1")
    (compacted / ".compact.0.tmp").mkdir()
    for name in (".compact.0.tmp", "shards/old.parquet"):
        os.utime(compacted / name, (time.time() - 90_000,) * 2)
    assert sorted(text.split(":")[0] for _, text in _found(validate(compacted))) == [
        ".compact.0.tmp",
        "shards/old.parquet",
    ]


def test_behind_an_address_trees_and_sets_are_looked_at_too(root: Path, compacted: Path) -> None:
    for folder, lost in ((root, tiles_path(root, "s_2")), (compacted, next((compacted / "shards").iterdir()))):
        url = f"memory://{uuid.uuid4().hex}"
        store, place = fsspec.core.url_to_fs(url)
        for file in folder.rglob("*.parquet"):
            store.pipe_file(f"{place}/{file.relative_to(folder).as_posix()}", file.read_bytes())
        assert (validate(url).num_slides, _found(validate(url))) == (6, [])
        store.rm(f"{place}/{lost.relative_to(folder).as_posix()}")
        ((kind, text),) = _found(validate(url))
        assert kind in ("unreadable", "shard")
        assert "missing" in text or "no such manifest" in text


def test_a_folder_without_manifests_is_told(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no manifests here"):
        validate(tmp_path)
