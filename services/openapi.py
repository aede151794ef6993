"""What the routes answer, for readers and for machines: schemas, examples, and every error. Runs in no request."""

import dataclasses
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from manifests.schema import SlideRecord
from services.render import MEDIA_TYPES

ABOUT = """Which tiles a slide has, where they lie, and which of them a training step uses, in level-0 px.

**Formats.** The header `Accept`, or `?format=`, chooses JSON, an Arrow IPC stream, or for tiles GeoJSON. An Arrow
stream has what JSON has beside its rows as JSON in the schema's metadata, key `slidegrad`.

**Pages** are those of OGC API Features: `numberMatched`, `numberReturned`, and `links`, of which `next` leads on. They
are in the header `Link` too.

**Caching.** Each answer has an `ETag`; ask again with `If-None-Match`. It changes with the manifest.

**Errors** are problem documents (RFC 9457): `detail` is a sentence that says what to do.
"""
_RATIO = {"manifest_hash": "9f2d6c0e5b7a4c1d8e3f2a1b0c9d8e7f", "footprint_l0": [448, 448]}
_SELF = {"rel": "self", "href": "/v1/slides/case_17/tiles?limit=2", "type": "application/json"}
_NEXT = {"rel": "next", "href": "/v1/slides/case_17/tiles?limit=2&offset=2", "type": "application/json"}


Responses = dict[int | str, dict[str, Any]]
"""What FastAPI takes as a route's `responses`."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str = Field(description="One sentence, with the way out.")
    errors: list[dict[str, str]] | None = Field(None, description="Of wrong parameters: `parameter` and `reason` each.")


class Link(_Model):
    """Where to go on."""

    rel: Literal["self", "next"]
    href: str = Field(description="Begins with the service's path.")
    type: str


class _Paged(_Model):
    numberMatched: int = Field(ge=0, description="On all pages.")
    numberReturned: int = Field(ge=0, description="On this page.")
    links: list[Link]


_Labels = dict[str, str]
_Pair = Annotated[list[int], Field(min_length=2, max_length=2)]
"""Not a tuple, whose `prefixItems` many readers of OpenAPI cannot follow."""
_record_fields: dict[str, Any] = {field.name: (field.type, ...) for field in dataclasses.fields(SlideRecord)}
ListedSlide = create_model(
    "ListedSlide",
    __base__=_Model,
    __doc__="A slide's record, and its labels where the service has some.",
    **_record_fields,
    labels=(_Labels, Field(default_factory=dict)),
)
Slide = create_model(
    "Slide",
    __base__=ListedSlide,
    __doc__="A slide's record, its manifest's hash, and the level-0 px that one tile covers.",
    manifest_hash=(str, Field(pattern="^[0-9a-f]{32}$")),
    footprint_l0=(_Pair, Field(description="Width and height.")),
)


class SlideList(_Paged):
    """A page of slides."""

    slides: list[ListedSlide]  # type: ignore[valid-type]  # a model all the same


class Columns(_Model):
    """Equal-length columns."""

    row: list[int] = Field(description="The tile's row in the manifest.")
    x_l0: list[int] = Field(description="Left edge, level-0 px.")
    y_l0: list[int] = Field(description="Upper edge, level-0 px.")
    tissue: list[float] = Field(description="Share of the tile's area that is tissue.")


class _TilesOfSlide(_Paged):
    slide_id: str
    manifest_hash: str = Field(pattern="^[0-9a-f]{32}$")
    footprint_l0: _Pair


class Tiles(_TilesOfSlide):
    """A page of a slide's tiles."""

    offset: int
    limit: int
    columns: Columns


class Sample(_TilesOfSlide):
    """The tiles of a training step, or one part of them."""

    k: int
    seed: int
    epoch: int
    part: int
    num_parts: int
    columns: Columns


class _Rectangle(_Model):
    type: Literal["Polygon"]
    coordinates: list[list[_Pair]]


class _TileProperties(_Model):
    objectType: Literal["tile"]
    row: int
    tissue: float


class _Feature(_Model):
    type: Literal["Feature"]
    geometry: _Rectangle
    properties: _TileProperties


class FeatureCollection(_Paged):
    """Tiles as rectangles in level-0 px, y down."""

    type: Literal["FeatureCollection"]
    slidegrad: dict[str, Any] = Field(description="Slide, manifest's hash, and what was asked; `limit` is the cap.")
    features: list[_Feature]


class _Failure(_Model):
    reason: str
    num_slides: int
    slide_ids: list[str] = Field(description="The first of them.")


class Stats(_Model):
    """The archive in numbers."""

    num_slides: int
    status: dict[str, int]
    num_tiles: int
    num_bad_tiles: int
    tiles_per_slide: dict[str, float]
    histogram: dict[str, list[int]] = Field(description="`counts[i]` slides have `edges[i]` to `edges[i + 1]` tiles.")
    rejected: dict[str, int] = Field(description="Places of the grid that hold no tile, by reason.")
    failures: list[_Failure]
    tile_mpp: list[float]
    tile_px: list[int]


class _Run(_Model):
    run: str


class RunList(_Model):
    """Runs that have heatmaps."""

    runs: list[_Run]


class _ValueColumns(_Model):
    row: list[int]
    attention: list[float | None]
    contribution: list[float | None]


class RunValues(BaseModel):
    """A run's attention and contribution of every tile of a slide, and whose they are."""

    run: str
    slide_id: str
    manifest_hash: str
    columns: _ValueColumns


class State(_Model):
    """What a probe says."""

    status: Literal["ok", "ready"]


_COLUMNS = {"row": [0, 1], "x_l0": [0, 448], "y_l0": [896, 896], "tissue": [0.41, 0.87]}
_TILES = {"slide_id": "case_17", **_RATIO}
EXAMPLES: dict[type[BaseModel], dict[str, Any]] = {
    Tiles: {
        **_TILES, "numberMatched": 9841, "numberReturned": 2, "links": [_SELF, _NEXT], "offset": 0, "limit": 2,
        "columns": _COLUMNS,
    },
    Sample: {
        **_TILES, "numberMatched": 2, "numberReturned": 2, "links": [_SELF], "k": 2, "seed": 0, "epoch": 3, "part": 0,
        "num_parts": 1, "columns": _COLUMNS,
    },
    SlideList: {
        "numberMatched": 1, "numberReturned": 1, "links": [{**_SELF, "href": "/v1/slides?q=case_17"}],
        "slides": [dataclasses.asdict(SlideRecord(slide_id="case_17", status="ok", num_tiles=9841))],
    },
    Slide: {**dataclasses.asdict(SlideRecord(slide_id="case_17", status="ok", num_tiles=9841)), **_RATIO},
}  # fmt: skip
_REASONS = {
    400: "A parameter is unknown, or out of its range.",
    401: "A bearer token is needed.",
    404: "No slide has this id, or it has no such tile, picture or run.",
    405: "Routes are asked by GET and HEAD alone.",
    409: "The slide has no tiles to sample, or its file or manifest is another than it was.",
    413: "No request takes a body.",
    421: "The service does not answer to this host name.",
    431: "Address and headers are too long.",
    500: "The slide's manifest is damaged, or a fault of the service; its log says more.",
    503: "Too many requests in hand, one took too long, or the manifests or the slide cannot be read now.",
    504: "The slide's pixels did not come in time.",
}
_ALWAYS = (401, 405, 413, 421, 431, 500, 503)


def describe(model: type[BaseModel], *more: int, formats: tuple[str, ...] = ("json",)) -> Responses:
    """The `responses` of a route.

    Args:
        model: what it answers as JSON.
        more: its errors beside those that any route may answer.
        formats: what it offers.
    """
    ok: dict[str, Any] = {"model": model, "description": (model.__doc__ or "").strip(), "content": {}}
    if model in EXAMPLES:
        ok["content"]["application/json"] = {"example": EXAMPLES[model]}
    if "arrow" in formats:
        ok["content"][MEDIA_TYPES["arrow"]] = {"schema": {"type": "string", "format": "binary"}}
    if "geojson" in formats:
        # The name that FastAPI gives the model: `add_models` puts it among the schemas.
        ok["content"][MEDIA_TYPES["geojson"]] = {"schema": {"$ref": "#/components/schemas/FeatureCollection"}}
    ok["headers"] = {
        name: {"description": said, "schema": {"type": "string"}}
        for name, said in {"ETag": "Changes with the answer.", "Link": "The links again."}.items()
    }
    found: Responses = {200: ok, 304: {"description": "The client has it already."}}
    return found | problems(*more)


def picture(media_type: str, *more: int, headers: Mapping[str, str] | None = None) -> Responses:
    """The `responses` of a route that answers a picture.

    Args:
        media_type: of the picture.
        more: its errors beside those that any route may answer.
        headers: what it tells beside the picture, by name.
    """
    said = {"ETag": "Changes with the picture.", **(headers or {})}
    ok: dict[str, Any] = {
        "description": "The picture.",
        "content": {media_type: {"schema": {"type": "string", "format": "binary"}}},
        "headers": {name: {"description": about, "schema": {"type": "string"}} for name, about in said.items()},
    }
    found: Responses = {200: ok, 304: {"description": "The client has it already."}}
    return found | problems(*more)


def problems(*more: int) -> Responses:
    """The errors of a route: those given, and those that any may answer."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    headers = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
    found: Responses = {}
    for status in sorted({*more, *_ALWAYS}):
        example = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
        found[status] = {
            "description": _REASONS[status],
            "content": {
                kind: {**told, "example": {**example, "detail": _REASONS[status]}} for kind, told in content.items()
            },
            **({"headers": headers} if status == 503 else {}),
        }
    return found


def complete(schema: dict[str, Any]) -> dict[str, Any]:
    """The application's schema, with what no route names by itself, and without the framework's own errors (422)."""
    schemas = schema.setdefault("components", {}).setdefault("schemas", {})
    for model in (Problem, FeatureCollection):
        made = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= made.pop("$defs", {})
        schemas[model.__name__] = made
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            if path not in ("/healthz", "/readyz"):
                operation["security"] = [{}, {"token": []}]  # With and without: it depends on --token-file.
    return schema
