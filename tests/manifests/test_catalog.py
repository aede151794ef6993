"""The catalogue says what the manifests say, whatever happened to it; the path lists are the owner's alone."""

import dataclasses
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import manifests.catalog as catalog_module
from manifests import Manifest, ManifestError, SlideRecord, open_manifests, write_manifest
from manifests.catalog import Place, read_catalog, read_paths, read_places, rebuild_catalog, scan_catalog, write_paths
from manifests.files import tiles_path
from manifests.schema import CATALOG_SCHEMA

RECORDS = [
    SlideRecord(slide_id="b", status="ok", num_tiles=2, mpp_x=0.25, width_l0=1000, mpp_conflict=True),
    SlideRecord(slide_id="a ä", status="failed", error="slide a ä: cut file"),
    SlideRecord(slide_id="c", status="empty"),
]


def _write(root: Path, record: SlideRecord) -> None:
    at = np.arange(record.num_tiles, dtype=np.int32)
    write_manifest(tiles_path(root, record.slide_id), Manifest(record, at, at, at.astype(np.float32)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for record in RECORDS:
        _write(tmp_path, record)
    return tmp_path


def test_one_row_for_every_outcome_sorted(root: Path) -> None:
    catalog = rebuild_catalog(root)
    assert catalog.schema.equals(CATALOG_SCHEMA)
    expected = sorted(map(dataclasses.asdict, RECORDS), key=lambda row: row["slide_id"])
    assert catalog.to_pylist() == expected
    assert pq.read_table(root / "catalog.parquet").equals(catalog)


def test_a_catalogue_that_is_there_is_used_as_it_is(root: Path) -> None:
    rebuild_catalog(root)
    _write(root, SlideRecord(slide_id="late", status="empty"))
    assert len(read_catalog(root)) == 3
    assert len(rebuild_catalog(root)) == 4
    assert len(read_catalog(root)) == 4


def _count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    seen: list[Path] = []
    read = catalog_module.read_record
    monkeypatch.setattr(catalog_module, "read_record", lambda file: seen.append(file) or read(file))
    return seen


def _age(root: Path, seconds: float) -> None:
    """Makes the catalogue believe that its listing began later than it did: manifests are as old as in real life."""
    file = root / "catalog.parquet"
    table = pq.read_table(file)
    began = json.loads(table.schema.metadata[b"slidegrad"])["scanned_at_ns"] + round(seconds * 1e9)
    pq.write_table(table.replace_schema_metadata({"slidegrad": json.dumps({"scanned_at_ns": began})}), file)


def test_a_rebuild_reads_only_what_is_new(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = rebuild_catalog(root)
    _age(root, 120)
    seen = _count_reads(monkeypatch)
    before = (root / "catalog.parquet").stat().st_mtime_ns
    assert rebuild_catalog(root).equals(first)
    assert seen == []
    assert (root / "catalog.parquet").stat().st_mtime_ns == before
    tiles_path(root, "c").unlink()
    assert rebuild_catalog(root).column("slide_id").to_pylist() == ["a ä", "b"]
    assert seen == []


def test_a_manifest_written_again_is_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rebuild_catalog(root)
    _age(root, 50)  # Within the slack: it may have been written before the listing, and named after.
    seen = _count_reads(monkeypatch)
    _write(root, dataclasses.replace(RECORDS[0], num_tiles=1))
    catalog = rebuild_catalog(root)
    assert catalog.column("num_tiles").to_pylist() == [0, 1, 0]
    assert tiles_path(root, "b") in seen


def test_writers_at_the_same_time_leave_one_whole_catalogue(root: Path) -> None:
    def write(i: int) -> None:
        _write(root, SlideRecord(slide_id=f"late_{i:02d}", status="empty"))
        rebuild_catalog(root)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(24)))
    assert len(rebuild_catalog(root)) == 27
    assert sorted(file.name for file in root.iterdir()) == ["catalog.parquet", "tiles"]


def test_leftovers_of_killed_writers_go_after_a_day(root: Path) -> None:
    (root / "masks" / "ab").mkdir(parents=True)
    old, new = (tiles_path(root, "b").with_name(f".{name}.parquet.tmp") for name in ("old", "new"))
    mask = root / "masks" / "ab" / ".x.zarr.zip.tmp"
    for file, age_s in ((old, 90_000), (new, 3_600), (mask, 90_000)):
        file.write_bytes(b"half")
        os.utime(file, (time.time() - age_s, time.time() - age_s))
    scan_catalog(root)
    assert old.exists()  # A scan writes nothing.
    rebuild_catalog(root)
    assert (old.exists(), new.exists(), mask.exists()) == (False, True, False)


def test_manifests_that_only_look_new_are_read_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rebuild_catalog(root)
    _age(root, -3_600)  # As after a copy, or chmod -R: every manifest changed after the listing.
    seen = _count_reads(monkeypatch)
    rebuild_catalog(root)
    assert len(seen) == 3
    _age(root, 120)
    rebuild_catalog(root)
    assert len(seen) == 3


def test_a_file_that_is_not_at_its_place_or_holds_nonsense_costs_itself_alone(root: Path) -> None:
    shutil.copy(tiles_path(root, "b"), tiles_path(root, "b").with_name("b (copy).parquet"))
    _write(root, SlideRecord(slide_id="odd", status="empty", mpp_x="0.5"))  # type: ignore[arg-type]
    for _ in range(2):
        assert rebuild_catalog(root).column("slide_id").to_pylist() == ["a ä", "b", "c"]


def test_an_older_path_list_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "paths").mkdir()
    pq.write_table(pa.table({"slide_id": ["a"], "archive": ["/x"], "path": ["a.svs"]}), tmp_path / "paths/p.parquet")
    assert read_places(tmp_path) == {"a": Place("/x", "a.svs")}


@pytest.mark.parametrize("harm", ["missing", "torn", "empty", "other columns"])
def test_a_catalogue_that_cannot_be_used_is_made_anew(root: Path, harm: str) -> None:
    file = root / "catalog.parquet"
    expected = rebuild_catalog(root)
    if harm == "missing":
        file.unlink()
    elif harm == "torn":
        file.write_bytes(file.read_bytes()[:-20])
    elif harm == "empty":
        file.write_bytes(b"")
    else:
        pq.write_table(pa.table({"slide_id": ["b"]}), file)
    assert read_catalog(root).equals(expected)
    assert pq.read_table(file).equals(expected)


def test_a_folder_without_manifests_says_the_way_out(tmp_path: Path) -> None:
    for use in (read_catalog, open_manifests):
        with pytest.raises(ManifestError, match=r"no manifests here .* run `slidegrad tile ARCHIVE --out"):
            use(tmp_path)


def test_a_source_gives_ids_catalogue_and_manifests(root: Path) -> None:
    source = open_manifests(root)
    assert list(source) == ["a ä", "b", "c"]
    assert source.catalog().column("status").to_pylist() == ["failed", "ok", "empty"]
    assert len(source["b"]) == 2
    assert source["a ä"].slide == RECORDS[1]
    with pytest.raises(ManifestError, match="no such manifest"):
        source["nobody"]


def test_the_latest_path_wins_and_the_archive_may_move(tmp_path: Path) -> None:
    old = {"a": Place("/old", "a.svs", 7, 11, "f" * 32), "b": Place("/old", "b.svs")}
    new = {"b": Place("/new", "sub/b.svs"), "schnitt_ä": Place("/new", "schnitt_ä.svs")}
    for age_s, (writer, places) in enumerate([("node-1", old), ("node-2", new)]):
        write_paths(tmp_path, writer, places)
        os.utime(tmp_path / "paths" / f"{writer}.parquet", (1_000 + age_s, 1_000 + age_s))
    assert read_places(tmp_path) == old | new
    assert read_paths(tmp_path) == {
        "a": Path("/old/a.svs"),
        "b": Path("/new/sub/b.svs"),
        "schnitt_ä": Path("/new/schnitt_ä.svs"),
    }
    assert read_paths(tmp_path, Path("/mnt"))["b"] == Path("/mnt/sub/b.svs")
    assert read_paths(tmp_path / "nowhere") == {}


def test_path_lists_are_for_their_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        write_paths(tmp_path, "node", {"a": Place("/archive", "Jane Doe.svs")})
    finally:
        os.umask(old)
    (file,) = (tmp_path / "paths").iterdir()
    assert file.suffix == ".parquet"
    assert file.stat().st_mode & 0o777 == 0o600
