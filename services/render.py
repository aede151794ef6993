"""Answers as bytes: Arrow IPC streams, columnar JSON, GeoJSON; and which of them a client wants.

Columnar, not one object per tile: 45,056 tiles are dumped from three arrays, not from 45,056 dicts. Only GeoJSON, which
has no other shape, is written tile by tile, as text.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import orjson
import pyarrow as pa

from manifests.schema import SCHEMA_VERSION, TILE_SCHEMA
from services.errors import BadQueryError
from services.index import HashedManifest, TileRows
from services.search import SlidePage, labels_as_dicts

Format = Literal["json", "arrow", "geojson"]
Links = Sequence[Mapping[str, str]]
"""`rel`, `href` and `type` each, as in OGC API Features."""
MEDIA_TYPES: dict[Format, str] = {
    "json": "application/json",
    "arrow": "application/vnd.apache.arrow.stream",
    "geojson": "application/geo+json",
}
_ROWS_SCHEMA = TILE_SCHEMA.insert(0, pa.field("row", pa.int64()))
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def choose_format(asked: Format | None, accept: str, offered: tuple[Format, ...]) -> Format:
    """The format asked for by `?format=`, else the offered one the Accept header likes best, else JSON.

    Raises:
        BadQueryError: `?format=` names one that is not offered here.
    """
    if asked is not None:
        if asked not in offered:
            raise BadQueryError(f"format is {asked!r}, here it is one of {', '.join(offered)}")
        return asked
    likings = _likings(accept)
    best = max(offered, key=lambda name: likings.get(MEDIA_TYPES[name], 0.0))  # The first of equals: json.
    return best if likings.get(MEDIA_TYPES[best], 0.0) > 0 else "json"


def wants_gzip(accept_encoding: str) -> bool:
    """Whether the client names gzip, and likes it no less than the plain answer."""
    if "gzip" not in accept_encoding:
        return False
    likings = _likings(accept_encoding)
    return likings.get("gzip", 0.0) > 0 and likings.get("gzip", 0.0) >= likings.get("identity", 0.0)


def slides_json(page: SlidePage, links: Links) -> bytes:
    """The page as a list of records: a page of slides is read by people."""
    slides = page.slides.to_pylist()
    if page.labels.num_columns:
        slides = [{**s, "labels": labels} for s, labels in zip(slides, labels_as_dicts(page.labels), strict=True)]
    return to_json({**_paging(page.num_matched, len(slides), links), "slides": slides})


def slides_arrow(page: SlidePage, links: Links) -> bytes:
    """The page in the catalogue's schema, with a column `labels`; the paging is JSON in the metadata `slidegrad`."""
    table = page.slides
    if page.labels.num_columns:
        columns = [column.cast(pa.string()).combine_chunks() for column in page.labels.columns]
        table = table.append_column("labels", pa.StructArray.from_arrays(columns, page.labels.column_names))
    return _stream(table, _paging(page.num_matched, len(table), links))


def slide_json(source: HashedManifest, labels: Mapping[str, str] | None) -> bytes:
    """One slide's record."""
    labelled = {} if labels is None else {"labels": labels}
    return to_json({**dataclasses.asdict(source.manifest.slide), **_identity(source), **labelled})


def tiles_json(found: TileRows, links: Links) -> bytes:
    """Equal-length columns, level-0 px; `row` is the tile's row in the manifest."""
    return to_json({**_head(found, links), "columns": dict(zip(_ROWS_SCHEMA.names, _columns(found), strict=True))})


def tiles_arrow(found: TileRows, links: Links) -> bytes:
    """`row` (int64) and the manifest's own columns; `SlideRecord.from_json` reads the metadata key `slidegrad`."""
    record = {"schema_version": SCHEMA_VERSION, "slide": orjson.Fragment(found.source.record_json)}
    metadata = {b"slidegrad": to_json({**record, **_head(found, links)})}
    batch = pa.record_batch(_columns(found), schema=_ROWS_SCHEMA.with_metadata(metadata))
    return b"".join((batch.schema.serialize(), batch.serialize(), _END_OF_STREAM))


def tiles_geojson(found: TileRows, links: Links) -> bytes:
    """One rectangle per tile in level-0 px, y down: what QuPath imports, not RFC 7946's longitude and latitude."""
    width, height = found.source.manifest.footprint_l0
    features = ",".join(
        f'{{"type":"Feature","geometry":{{"type":"Polygon","coordinates":[[[{x},{y}],[{x + width},{y}],'
        f"[{x + width},{y + height}],[{x},{y + height}],[{x},{y}]]]}},"
        f'"properties":{{"objectType":"tile","row":{row},"tissue":{tissue:.6g}}}}}'
        for row, x, y, tissue in zip(*(column.tolist() for column in _columns(found)), strict=True)
    )
    paging = _paging(found.num_matched, len(found.rows), links)
    head = to_json({**paging, "slidegrad": {**_whose(found), **found.about}}).decode()
    return f'{{"type":"FeatureCollection",{head[1:-1]},"features":[{features}]}}'.encode()


def to_json(value: Any) -> bytes:
    """Compact JSON, UTF-8; numpy arrays are lists, a NaN is null."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def _head(found: TileRows, links: Links) -> dict[str, Any]:
    return {**_whose(found), **_paging(found.num_matched, len(found.rows), links), **found.about}


def _whose(found: TileRows) -> dict[str, Any]:
    return {"slide_id": found.source.slide_id, **_identity(found.source)}


def _identity(source: HashedManifest) -> dict[str, Any]:
    return {"manifest_hash": source.hash, "footprint_l0": list(source.manifest.footprint_l0)}


def _paging(num_matched: int, num_returned: int, links: Links) -> dict[str, Any]:
    return {"numberMatched": num_matched, "numberReturned": num_returned, "links": links}


def _columns(found: TileRows) -> list[Any]:
    manifest, rows = found.source.manifest, found.rows
    return [rows, manifest.x_l0[rows], manifest.y_l0[rows], manifest.tissue[rows]]


def _stream(table: pa.Table, metadata: dict[str, Any]) -> bytes:
    table = table.replace_schema_metadata({b"slidegrad": to_json(metadata)}).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _likings(header: str) -> dict[str, float]:
    """What an Accept header names, to its q."""
    likings: dict[str, float] = {}
    for entry in header.split(","):
        name, _, parameters = entry.partition(";")
        likings.setdefault(name.strip().lower(), _quality(parameters))
    return likings


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
