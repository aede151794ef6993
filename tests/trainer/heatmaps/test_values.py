"""RUN/heatmaps/SLIDE.parquet: what is written is read again, if it belongs to the model and manifest at hand."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.trainer.heatmaps.made_values import ODD_ID, ORIGIN, made_manifest, made_values
from trainer.heatmaps.values import read_values, write_values

PARTS = [0.5, -0.25, np.nan, 0.0, 1e-7]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_values(tmp_path / "s.parquet", made_manifest(5), made_values(PARTS))
    return tmp_path / "s.parquet"


def test_a_table_with_all_tiles_and_what_they_follow_from(file: Path) -> None:
    table, manifest = pq.read_table(file), made_manifest(5)
    assert table.schema.names == ["row", "x_l0", "y_l0", "attention", "contribution"]
    assert [str(type_) for type_ in table.schema.types] == ["int32", "int32", "int32", "float", "float"]
    assert table["row"].to_pylist() == [0, 1, 2, 3, 4]
    assert table["x_l0"].to_pylist() == manifest.x_l0.tolist()
    assert table["y_l0"].to_pylist() == manifest.y_l0.tolist()
    np.testing.assert_array_equal(table["contribution"].to_numpy(), np.array(PARTS, np.float32))
    assert np.isnan(table["attention"].to_numpy()).tolist() == [False, False, True, False, False]
    facts = json.loads(table.schema.metadata[b"slidegrad"])
    assert facts["slide_id"] == ODD_ID
    assert facts["origin"] == dataclasses.asdict(ORIGIN)
    assert facts["footprint_l0"] == list(manifest.footprint_l0) == [128, 64]
    assert (facts["width_l0"], facts["height_l0"]) == (40_000, 30_000)
    assert (facts["base"], facts["total"]) == (-0.25, 1.0986)


def test_it_reads_back_bit_by_bit(file: Path) -> None:
    found, made = read_values(file, ORIGIN), made_values(PARTS)
    assert found is not None
    for field in dataclasses.fields(made):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(made, field.name), err_msg=field.name)


@pytest.mark.parametrize("field", ["manifest_hash", "checkpoint", "weights_hash", "output"])
def test_values_of_another_model_manifest_or_output_are_not_taken(file: Path, field: str) -> None:
    assert read_values(file, dataclasses.replace(ORIGIN, **{field: "other"})) is None


def test_a_checkpoint_without_digests_is_compared_with_nothing(tmp_path: Path) -> None:
    origin = dataclasses.replace(ORIGIN, weights_hash="")
    write_values(tmp_path / "s.parquet", made_manifest(5), made_values(PARTS, origin=origin))
    assert read_values(tmp_path / "s.parquet", origin) is None


def test_what_is_no_sound_file_of_ours_is_no_values(file: Path, tmp_path: Path) -> None:
    assert read_values(tmp_path / "nothing.parquet", ORIGIN) is None
    whole = file.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert read_values(file, ORIGIN) is None
    for metadata in ({}, {b"slidegrad": b"{}"}, {b"slidegrad": b"[]"}, {b"slidegrad": b'{"schema_version": 1}'}):
        pq.write_table(pa.table({"row": [1]}).replace_schema_metadata(metadata), file)
        assert read_values(file, ORIGIN) is None
