"""The catalogue says what the manifests say, whatever happened to it; the path lists are the owner's alone."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests import Manifest, ManifestError, SlideRecord, open_manifests, write_manifest
from manifests.catalog import read_catalog, read_paths, rebuild_catalog, scan_records, write_paths
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
    assert {record.slide_id for record in scan_records(root)} == {"b", "a ä", "c"}


def test_a_catalogue_that_is_there_is_used_as_it_is(root: Path) -> None:
    rebuild_catalog(root)
    _write(root, SlideRecord(slide_id="late", status="empty"))
    assert len(read_catalog(root)) == 3
    assert len(rebuild_catalog(root)) == 4
    assert len(read_catalog(root)) == 4


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


def test_a_network_address_is_not_taken_for_a_folder() -> None:
    with pytest.raises(ManifestError, match="https://host: manifests over a network address"):
        open_manifests("https://host")


def test_the_latest_path_wins_and_the_archive_may_move(tmp_path: Path) -> None:
    for age_s, (archive, paths) in enumerate(
        [("/old", {"a": "a.svs", "b": "b.svs"}), ("/new", {"b": "sub/b.svs", "schnitt_ä": "schnitt_ä.svs"})]
    ):
        before = set(tmp_path.glob("paths/*"))
        write_paths(tmp_path, Path(archive), paths)
        (written,) = set(tmp_path.glob("paths/*")) - before
        os.utime(written, (1_000 + age_s, 1_000 + age_s))
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
        write_paths(tmp_path, Path("/archive"), {"a": "Jane Doe.svs"})
    finally:
        os.umask(old)
    (file,) = (tmp_path / "paths").iterdir()
    assert file.suffix == ".parquet"
    assert file.stat().st_mode & 0o777 == 0o600
