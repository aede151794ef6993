"""GeoJSON as QuPath reads it: OUT/SLIDE.geojson with the tissue as an annotation and the tiles as tile objects.

Source: RFC 7946 and QuPath's GeoJSON of path objects (`objectType`, `classification`, `measurements`),
https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html. Coordinates are level-0 px from the
top-left corner of the full image. The read plan lies in the collection's foreign member `slidegrad`.

A view, not a store: 100 bytes a tile become 300, and viewers stop at some 10,000 objects, so that the tiles are capped.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manifests.errors import ManifestError
from manifests.exchange.tiles import Add, Outline, ReadPlan, TileSet, file_stem, whole_numbers
from manifests.files import disk_name, write_text
from manifests.schema import Manifest

CAPPED = "more tiles than --max-tiles, so that only some, evenly spread, are written"
_TISSUE = {"objectType": "annotation", "isLocked": True, "classification": {"name": "Tissue", "color": [46, 160, 67]}}


@contextlib.contextmanager
def export_geojson(out: Path, max_tiles: int) -> Iterator[Add]:
    """Yields the function that writes one slide's collection."""

    def add(manifest: Manifest, outline: Outline) -> list[str]:
        slide_id = manifest.slide.slide_id
        rows = spread_rows(len(manifest), max_tiles)
        plan = json.dumps(dataclasses.asdict(ReadPlan.of(manifest.slide)) | {"num_tiles": len(manifest)})
        measured = (f'"measurements": {{"tissue": {tissue}}}' for tissue in manifest.tissue[rows])
        features = [*_draw_tissue(outline), *draw_tiles(manifest, rows, measured)]
        write_text(out / f"{file_stem(slide_id, disk_name(slide_id))}.geojson", draw_collection(plan, features))
        return [CAPPED] if len(rows) < len(manifest) else []

    yield add


def spread_rows(num_rows: int, most: int) -> NDArray[np.int64]:
    """At most `most` of `num_rows` rows, at even steps; rows are in block order, so they spread over the tissue."""
    count = min(num_rows, most)
    return np.arange(count, dtype=np.int64) * num_rows // max(count, 1)


def _draw_tissue(outline: Outline) -> list[str]:
    shape = {"type": "MultiPolygon", "coordinates": outline}
    return [json.dumps({"type": "Feature", "geometry": shape, "properties": _TISSUE})] if outline else []


def draw_collection(plan: str, features: Iterable[str]) -> str:
    """The text of a file.

    Args:
        plan: JSON, an object with the fields of `ReadPlan`, and more.
        features: JSON, one each.
    """
    body = ",\n".join(features)
    return f'{{"type": "FeatureCollection", "slidegrad": {plan}, "features": [\n{body}\n]}}\n'


def draw_tiles(manifest: Manifest, rows: NDArray[np.int64], properties: Iterable[str]) -> Iterator[str]:
    """One feature a tile, put together as text: ten times as fast as by way of objects.

    Args:
        manifest: the slide's tiles.
        rows: which of them, (n,).
        properties: what QuPath shall know of each, n members of a JSON object as text.
    """
    width, height = manifest.footprint_l0
    corners = manifest.x_l0[rows].tolist(), manifest.y_l0[rows].tolist()
    for x, y, more in zip(*corners, properties, strict=True):
        right, bottom = x + width, y + height
        ring = f"[[{x}, {y}], [{right}, {y}], [{right}, {bottom}], [{x}, {bottom}], [{x}, {y}]]"
        yield (
            f'{{"type": "Feature", "geometry": {{"type": "Polygon", "coordinates": [{ring}]}}, "properties": '
            f'{{"objectType": "tile", "isLocked": true, {more}}}}}'
        )


def read_geojson(file: Path) -> TileSet:
    """Reads the tiles of one slide: objects of type tile, or where there are none all upright rectangles.

    Corners are rounded to whole px: QuPath cuts tiles at fractions of a pixel.

    Raises:
        ManifestError: not GeoJSON, no tiles in it, tiles of several sizes, or tiles that are no upright rectangles.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ManifestError(f"{file.name}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{file.name}: not readable as GeoJSON ({type(error).__name__})") from None
    ours = content.get("slidegrad") if isinstance(content, dict) else None
    features = _list_features(content)
    tiles = [f for f in features if _property(f, "objectType") == "tile"]
    boxes = [_box(feature) for feature in tiles or (() if ours else features)]
    if tiles and None in boxes:
        raise ManifestError(f"{file.name}: {boxes.count(None)} of {len(boxes)} tiles are no upright rectangles")
    corners = np.array([box for box in boxes if box is not None], np.float64).reshape(-1, 4)
    if not len(corners) and not isinstance(ours, dict):
        raise ManifestError(
            f"{file.name}: no tiles in it, {len(features)} contours; give contours to `slidegrad tile --masks`"
        )
    x_l0, y_l0 = whole_numbers(np.round(corners[:, :2].T), file.name)
    names = (file.stem, file.stem.removesuffix(".ome"))
    if isinstance(ours, dict):
        plan, tissue = ReadPlan.parse(ours, file.name), np.array([_tissue(f, file) for f in tiles], np.float32)
        total = ours.get("num_tiles")
        left_out = max(0, total - len(tiles)) if isinstance(total, int) else 0
        return TileSet.planned(plan, x_l0, y_l0, tissue, names, left_out)
    sizes = corners[:, 2:] - corners[:, :2]
    if (np.ptp(sizes, axis=0) > 1).any():
        raise ManifestError(
            f"{file.name}: tiles of several sizes, {_size(sizes.min(0))} to {_size(sizes.max(0))} level-0 px"
        )
    width, height = np.median(sizes, axis=0).tolist()
    return TileSet(names=names, x_l0=x_l0, y_l0=y_l0, footprint_l0=(width, height))


def _list_features(content: Any) -> list[dict[str, Any]]:
    """Features of a collection, of a bare list (QuPath up to 0.2), or the one that the file is."""
    if isinstance(content, dict):
        content = content.get("features", [content])
    return [feature for feature in content if isinstance(feature, dict)] if isinstance(content, list) else []


def _property(feature: dict[str, Any], name: str) -> Any:
    properties = feature.get("properties")
    return properties.get(name) if isinstance(properties, dict) else None


def _tissue(feature: dict[str, Any], file: Path) -> float:
    measured = _property(feature, "measurements")
    share = measured.get("tissue", 1.0) if isinstance(measured, dict) else 1.0
    if not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ManifestError(f"{file.name}: a tile's tissue is {str(share)[:40]!r}, expected a share, 0 to 1")
    return float(share)


def _box(feature: dict[str, Any]) -> tuple[float, float, float, float] | None:
    """(left, top, right, bottom) of an upright rectangle without holes; None for any other shape, and for tissue."""
    shape = feature.get("geometry")
    named = _property(feature, "classification")
    if not isinstance(shape, dict) or shape.get("type") != "Polygon":
        return None
    if isinstance(named, dict) and named.get("name") == "Tissue":
        return None
    rings = shape.get("coordinates")
    if not isinstance(rings, list):
        return None
    try:
        points = {(float(point[0]), float(point[1])) for point in rings[0]}
    except (IndexError, KeyError, TypeError, ValueError, OverflowError):
        return None
    xs, ys = ({point[axis] for point in points} for axis in (0, 1))
    if len(rings) != 1 or len(points) != 4 or len(xs) != 2 or len(ys) != 2:
        return None
    return min(xs), min(ys), max(xs), max(ys)


def _size(size: NDArray[np.float64]) -> str:
    return f"{size[0]:g}x{size[1]:g}"
