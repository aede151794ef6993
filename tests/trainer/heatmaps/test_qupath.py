"""The layer for QuPath: one tile object for every tile, where the manifest says it lies."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from manifests.exchange.geojson import read_geojson
from tests.trainer.heatmaps.made_values import ODD_ID, made_manifest, made_values
from trainer.heatmaps.qupath import draw_layer
from trainer.heatmaps.sheet import choose_tiles

PARTS = np.array([0.5, -0.25, np.nan, 0.123456789, 1e-9, -3.0, 0.0])
MANIFEST = made_manifest(len(PARTS))


def layer(**changes: Any) -> dict[str, Any]:
    values = made_values(PARTS, **changes)
    text = draw_layer(MANIFEST, values, choose_tiles(values.leading, 2))
    assert not re.search("NaN|Infinity", text), "no JSON of other programs"
    collection: dict[str, Any] = json.loads(text)
    return collection


def test_boxes_are_the_manifests_and_there_is_one_for_each_tile() -> None:
    collection = layer()
    assert collection["type"] == "FeatureCollection"
    assert len(collection["features"]) == len(MANIFEST)
    for i, feature in enumerate(collection["features"]):
        x, y = int(MANIFEST.x_l0[i]), int(MANIFEST.y_l0[i])
        ring = [[x, y], [x + 128, y], [x + 128, y + 64], [x, y + 64], [x, y]]
        assert feature["geometry"] == {"type": "Polygon", "coordinates": [ring]}
        assert feature["properties"]["objectType"] == "tile"


def test_measurements_are_rounded_and_what_was_not_seen_has_none() -> None:
    measured = [feature["properties"]["measurements"] for feature in layer()["features"]]
    assert set(measured[0]) == {"tissue", "attention", "attention rank", "contribution"}
    assert set(measured[2]) == {"tissue"}
    assert measured[3]["contribution"] == 0.123457
    assert measured[4]["contribution"] == 1e-9
    assert [tile.get("attention rank") for tile in measured] == [0, 0.2, None, 0.4, 0.6, 0.8, 1]


def test_only_the_highest_and_the_lowest_tiles_have_a_class() -> None:
    classes = [feature["properties"].get("classification") for feature in layer()["features"]]
    high = {"name": "Highest contribution", "color": [213, 94, 0]}
    low = {"name": "Lowest contribution", "color": [0, 114, 178]}
    assert classes == [high, low, None, high, None, low, None]
    by_attention = layer(what="", base=None, total=None, contribution=np.full(len(PARTS), np.nan, np.float32))
    names = [(feature["properties"].get("classification") or {}).get("name") for feature in by_attention["features"]]
    assert names == ["Lowest attention"] * 2 + [None] * 3 + ["Highest attention"] * 2


def test_it_tells_the_slide_by_its_id_and_reads_back_as_tiles(tmp_path: Path) -> None:
    collection = layer()
    assert collection["slidegrad"]["slide_id"] == ODD_ID
    assert collection["slidegrad"]["checkpoint"] == "epoch_0003"
    file = tmp_path / "any.geojson"
    file.write_text(json.dumps(collection))
    found = read_geojson(file)
    assert found.names[0] == ODD_ID
    assert found.x_l0.tolist() == MANIFEST.x_l0.tolist()
    assert found.y_l0.tolist() == MANIFEST.y_l0.tolist()
    assert found.tissue is not None
    assert np.allclose(found.tissue, MANIFEST.tissue, rtol=1e-5)
