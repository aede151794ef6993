"""Files come back as they were written, or tell that they are torn; they appear whole or not at all."""

import dataclasses
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests import Manifest, ManifestError, SlideRecord, read_manifest, write_manifest
from manifests.files import atomic_path, disk_name, mask_path, read_record, tiles_path, write_text

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def _manifest(slide_id: str = "case_1", num_tiles: int = 5, **fields: object) -> Manifest:
    record = SlideRecord(slide_id=slide_id, status="ok", num_tiles=num_tiles, **fields)  # type: ignore[arg-type]
    at = np.arange(num_tiles, dtype=np.int32)
    return Manifest(record, at * 448, at * 3, np.linspace(0, 1, num_tiles, dtype=np.float32))


def _same(a: Manifest, b: Manifest) -> bool:
    return a.slide == b.slide and a.to_table().equals(b.to_table())


@given(texts, texts, st.integers(0, 200), st.floats(0, 100), st.booleans())
def test_a_manifest_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, slide_id: str, error: str, num_tiles: int, mpp: float, conflict: bool
) -> None:
    manifest = _manifest(slide_id, num_tiles, error=error, mpp_x=mpp, mpp_conflict=conflict)
    file = tmp_path_factory.getbasetemp() / "roundtrip.parquet"
    write_manifest(file, manifest, '{"tile_px": 224}')
    assert _same(read_manifest(file), manifest)
    assert read_record(file) == manifest.slide
    stored = json.loads(pq.read_schema(file).metadata[b"slidegrad"])
    assert stored["tiler"] == {"tile_px": 224}
    assert stored["slide"] == dataclasses.asdict(manifest.slide)


def test_a_file_torn_at_any_byte_is_refused(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole.parquet", tmp_path / "torn.parquet"
    write_manifest(whole, _manifest())
    content = whole.read_bytes()
    for length in {*range(0, len(content), 7), *range(len(content) - 32, len(content))}:
        torn.write_bytes(content[:length])
        for read in (read_manifest, read_record):
            with pytest.raises(ManifestError, match=re.escape(str(torn))):
                read(torn)


def test_a_damaged_byte_is_refused_or_harmless_but_never_a_crash(tmp_path: Path) -> None:
    file = tmp_path / "damaged.parquet"
    write_manifest(file, _manifest())
    content = file.read_bytes()
    num_refused = 0
    for at in range(0, len(content), 3):
        file.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
        for read in (read_manifest, read_record):
            try:
                read(file)
            except ManifestError:
                num_refused += 1
    assert num_refused > len(content) // 6


def _write_foreign(file: Path, metadata: dict[str, str] | None = None, **columns: pa.Array) -> None:
    good = {"x_l0": pa.array([1], pa.int32()), "y_l0": pa.array([1], pa.int32()), "tissue": pa.array([1], pa.float32())}
    pq.write_table(pa.table(columns or good).replace_schema_metadata(metadata), file)


_RECORD = json.loads(SlideRecord(slide_id="a", status="ok", num_tiles=1).to_json())


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        (None, "not a Slidegrad manifest"),
        ({"pandas": "{}"}, "not a Slidegrad manifest"),
        ({"slidegrad": "{"}, "not a Slidegrad manifest"),
        ({"slidegrad": "[1]"}, "not a Slidegrad manifest"),
        ({"slidegrad": json.dumps({"schema_version": 1, "slide": None})}, "not a Slidegrad manifest"),
        ({"slidegrad": json.dumps({**_RECORD, "schema_version": 3})}, "manifest schema 3, this version reads 2"),
        ({"slidegrad": json.dumps({**_RECORD, "slide": {"slide_id": "a"}})}, "incomplete manifest record .*status"),
        ({"slidegrad": json.dumps({**_RECORD, "slide": _RECORD["slide"] | {"px": 1}})}, r"unknown .* \['px'\]"),
        ({"slidegrad": json.dumps({**_RECORD, "slide": _RECORD["slide"] | {"status": "fine"}})}, "status 'fine'"),
        ({"slidegrad": json.dumps({**_RECORD, "slide": _RECORD["slide"] | {"num_tiles": 9}})}, "9 tiles in the record"),
    ],
)
def test_other_metadata_is_refused(tmp_path: Path, metadata: dict[str, str] | None, sentence: str) -> None:
    file = tmp_path / "foreign.parquet"
    _write_foreign(file, metadata)
    with pytest.raises(ManifestError, match=sentence):
        read_manifest(file)


def test_other_columns_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "foreign.parquet"
    _write_foreign(file, {"slidegrad": json.dumps(_RECORD)}, x_l0=pa.array([1], pa.int64()))
    for read in (read_manifest, read_record):
        with pytest.raises(ManifestError, match=r"columns \['x_l0'\], expected \['x_l0', 'y_l0', 'tissue'\]"):
            read(file)


def test_a_file_that_is_not_there_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"nothing\.parquet: no such manifest"):
        read_manifest(tmp_path / "nothing.parquet")


def test_columns_must_fit_the_record() -> None:
    none = np.zeros(0, np.int32)
    with pytest.raises(ManifestError, match="slide a: 3 tiles in the record, 0 in the columns"):
        Manifest(SlideRecord(slide_id="a", status="ok", num_tiles=3), none, none, none.astype(np.float32))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    def break_off(final: Path) -> None:
        with atomic_path(final) as partial:
            partial.write_text("half")
            raise error

    write_text(tmp_path / "old.txt", "old")
    for name in ("old.txt", "new.txt"):
        with pytest.raises(error):
            break_off(tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["old.txt"]
    assert (tmp_path / "old.txt").read_text() == "old"


def test_a_half_written_file_does_not_pass_for_a_manifest(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "tiles" / "ab" / "case.parquet", mode=0o600) as partial:
        partial.touch()
        assert partial.parent == tmp_path / "tiles" / "ab"
        assert not list(tmp_path.glob("tiles/??/*.parquet"))
    assert [file.stat().st_mode & 0o777 for file in tmp_path.glob("tiles/??/*.parquet")] == [0o600]


def test_concurrent_writers_leave_one_valid_version(tmp_path: Path) -> None:
    file = tmp_path / "tiles" / "contested.parquet"
    versions = {n: _manifest(num_tiles=n, version=str(n)) for n in (10, 200, 3_000)}
    write_manifest(file, versions[10])

    def write(n: int) -> None:
        for _ in range(8):
            write_manifest(file, versions[n])

    with ThreadPoolExecutor(len(versions)) as pool:
        writers = [pool.submit(write, n) for n in versions]
        num_reads = 0
        while num_reads < 5 or not all(writer.done() for writer in writers):
            seen = read_manifest(file)
            assert _same(seen, versions[len(seen)])
            num_reads += 1
    for writer in writers:
        writer.result()
    assert [entry.name for entry in file.parent.iterdir()] == ["contested.parquet"]


@given(texts.filter(bool))
def test_disk_names_are_plain_short_and_safe(slide_id: str) -> None:
    for given_id in (slide_id, slide_id * 30):
        name = disk_name(given_id)
        assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name)
        assert len(name) <= 120
        assert disk_name(name) == name


@given(st.lists(st.text("aA. _-/ä\u0308\0", min_size=1, max_size=6), unique=True, min_size=2, max_size=30))
def test_two_slides_never_share_a_file(slide_ids: list[str]) -> None:
    assert len({disk_name(slide_id) for slide_id in slide_ids}) == len(slide_ids)


def test_disk_names_that_need_no_change_are_the_slide_id() -> None:
    for slide_id in ("case_1", "TCGA-CR-7395-01A-01-TS1", "a.b.c", "x" * 120):
        assert disk_name(slide_id) == slide_id
    assert disk_name("x" * 121).startswith("x" * 107 + "-")
    assert len(disk_name("x" * 121)) == 120
    assert re.fullmatch(r"schnitt__-[0-9a-f]{12}", disk_name("schnitt_ä"))
    assert disk_name("..").startswith("-")


def test_where_a_slide_lies(tmp_path: Path) -> None:
    # First two hex digits of `printf case_1 | b2sum`.
    assert tiles_path(tmp_path, "case_1") == tmp_path / "tiles" / "3a" / "case_1.parquet"
    assert mask_path(tmp_path, "case_1") == tmp_path / "masks" / "3a" / "case_1.zarr.zip"
