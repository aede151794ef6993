"""Answers as bytes: Arrow IPC streams, columnar JSON, GeoJSON; and which of them a client wants.

Columnar, not one object per tile: 45,056 tiles are dumped from three lists, not from 45,056 dicts. Only GeoJSON, which
has no other shape, is written tile by tile, as text.
"""

import dataclasses
import json
from typing import Any, Literal

import pyarrow as pa

from manifests.schema import SCHEMA_VERSION
from services.errors import BadQueryError
from services.index import HashedManifest, TileRows
from services.queries import SlidePage

Format = Literal["json", "arrow", "geojson"]
MEDIA_TYPES: dict[Format, str] = {
    "json": "application/json",
    "arrow": "application/vnd.apache.arrow.stream",
    "geojson": "application/geo+json",
}


def choose_format(asked: Format | None, accept: str, offered: tuple[Format, ...]) -> Format:
    """The format asked for by `?format=`, else the offered one the Accept header likes best, else JSON.

    Raises:
        BadQueryError: `?format=` names one that is not offered here.
    """
    if asked is not None:
        if asked not in offered:
            raise BadQueryError(f"format is {asked!r}, here it is one of {', '.join(offered)}")
        return asked
    likings: dict[str, float] = {}
    for entry in accept.split(","):
        media_type, _, parameters = entry.partition(";")
        likings.setdefault(media_type.strip().lower(), _quality(parameters))
    best = max(offered, key=lambda name: likings.get(MEDIA_TYPES[name], 0.0))  # The first of equals: json.
    return best if likings.get(MEDIA_TYPES[best], 0.0) > 0 else "json"


def slides_json(page: SlidePage) -> bytes:
    """The page as a list of records: a page of slides is read by people."""
    head = {"num_matched": page.num_matched, "next_cursor": page.next_cursor}
    return to_json({**head, "slides": page.slides.to_pylist()})


def slides_arrow(page: SlidePage) -> bytes:
    """The page in the catalogue's schema; the counts are JSON in the metadata key `slidegrad`."""
    return _stream(page.slides, {"num_matched": page.num_matched, "next_cursor": page.next_cursor})


def slide_json(source: HashedManifest) -> bytes:
    """One slide's record."""
    return to_json({**dataclasses.asdict(source.manifest.slide), **_identity(source)})


def tiles_json(found: TileRows) -> bytes:
    """Equal-length columns, level-0 px; `row` is the tile's row in the manifest."""
    manifest, rows = found.source.manifest, found.rows
    columns = {
        "row": rows.tolist(),
        "x_l0": manifest.x_l0[rows].tolist(),
        "y_l0": manifest.y_l0[rows].tolist(),
        "tissue": manifest.tissue[rows].tolist(),
    }
    head = {"slide_id": manifest.slide.slide_id, **_identity(found.source), **found.about}
    return to_json({**head, "columns": columns})


def tiles_arrow(found: TileRows) -> bytes:
    """`row` (int64) and the manifest's own columns; `SlideRecord.from_json` reads the metadata key `slidegrad`."""
    manifest, rows = found.source.manifest, found.rows
    table = manifest.to_table().take(pa.array(rows)).add_column(0, "row", pa.array(rows))
    record = {"schema_version": SCHEMA_VERSION, "slide": dataclasses.asdict(manifest.slide)}
    return _stream(table, {**record, **_identity(found.source), **found.about})


def tiles_geojson(found: TileRows) -> bytes:
    """One rectangle per tile in level-0 px, y down: what QuPath imports, not RFC 7946's longitude and latitude."""
    manifest, rows = found.source.manifest, found.rows
    width, height = manifest.footprint_l0
    columns = (
        rows.tolist(),
        manifest.x_l0[rows].tolist(),
        manifest.y_l0[rows].tolist(),
        manifest.tissue[rows].tolist(),
    )
    features = ",".join(
        f'{{"type":"Feature","geometry":{{"type":"Polygon","coordinates":[[[{x},{y}],[{x + width},{y}],'
        f"[{x + width},{y + height}],[{x},{y + height}],[{x},{y}]]]}},"
        f'"properties":{{"objectType":"tile","row":{row},"tissue":{tissue:.6g}}}}}'
        for row, x, y, tissue in zip(*columns, strict=True)
    )
    head = to_json({"slide_id": manifest.slide.slide_id, **_identity(found.source), **found.about}).decode()
    return f'{{"type":"FeatureCollection","slidegrad":{head},"features":[{features}]}}'.encode()


def to_json(value: Any) -> bytes:
    """Compact JSON, UTF-8; a NaN raises ValueError rather than leave as no JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _identity(source: HashedManifest) -> dict[str, Any]:
    return {"manifest_hash": source.hash, "footprint_l0": list(source.manifest.footprint_l0)}


def _stream(table: pa.Table, metadata: dict[str, Any]) -> bytes:
    table = table.replace_schema_metadata({b"slidegrad": to_json(metadata)}).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _quality(parameters: str) -> float:
    """The q of one Accept entry: 1 where it is missing, 0 where it is no number."""
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0
