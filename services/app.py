"""`create_app(settings)`: HTTP around a `TileIndex`. Routes check limits, ask the index, choose an encoder; no more.

Routes are plain functions: the framework runs them in threads, so that one large answer does not hold up the probes.
"""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, FastAPI, Query, Request
from starlette.responses import PlainTextResponse, Response

from services.errors import BadQueryError
from services.gate import Gate, RequestCounts
from services.index import TileIndex, TileRows
from services.parameters import FormatQuery, SampleQuery, SlidesQuery, TilesQuery
from services.problems import install_problems
from services.queries import BBox, Draw, find_slides
from services.render import (
    MEDIA_TYPES,
    Format,
    choose_format,
    slide_json,
    slides_arrow,
    slides_json,
    tiles_arrow,
    tiles_geojson,
    tiles_json,
    to_json,
)
from services.settings import Settings
from services.site import site_routes
from services.stats import summarise
from services.viewing import viewing_routes

_SLIDES_PER_PAGE = 100
_TILES_PER_ANSWER = 100_000
_TILE_ENCODERS: dict[Format, Callable[[TileRows], bytes]] = {
    "json": tiles_json,
    "arrow": tiles_arrow,
    "geojson": tiles_geojson,
}


def create_app(settings: Settings) -> FastAPI:
    """The service over one manifests folder.

    Raises:
        ManifestError: the folder holds no manifests.
        ServiceError: the token file or the folder of runs cannot be used.
    """
    index = TileIndex(settings.manifests, max_cached=settings.max_cached_manifests)
    counts = RequestCounts()
    app = FastAPI(title="Slidegrad tile index", version="1", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.counts = counts
    app.add_middleware(Gate, token=settings.read_token(), counts=counts)
    install_problems(app)
    app.include_router(_slide_routes(index, settings))
    app.include_router(viewing_routes(index, settings))
    app.include_router(site_routes())
    app.include_router(_own_routes(index, counts))
    return app


def _slide_routes(index: TileIndex, settings: Settings) -> APIRouter:
    router = APIRouter(prefix="/v1", default_response_class=Response)

    @router.get("/slides")
    def list_slides(request: Request, query: Annotated[SlidesQuery, Query()]) -> Response:
        """Slides by status and id, page by page."""
        limit = _limit(query.limit, _SLIDES_PER_PAGE, settings.max_slides)
        catalog = index.catalog()
        page = find_slides(catalog.table, status=query.status, q=query.q, limit=limit, cursor=query.cursor)
        chosen = _choose(request, query, ("json", "arrow"))
        return _respond(
            request, catalog.hash, chosen, lambda: (slides_arrow if chosen == "arrow" else slides_json)(page)
        )

    @router.get("/slides/{slide_id}")
    def get_slide(request: Request, slide_id: str, query: Annotated[FormatQuery, Query()]) -> Response:
        """One slide's record, its manifest's hash and the level-0 px that one tile covers."""
        source = index.manifest(slide_id)
        return _respond(request, source.hash, _choose(request, query, ("json",)), lambda: slide_json(source))

    @router.get("/slides/{slide_id}/tiles")
    def get_tiles(request: Request, slide_id: str, query: Annotated[TilesQuery, Query()]) -> Response:
        """Tiles that intersect a rectangle and hold enough tissue."""
        limit = _limit(query.limit, _TILES_PER_ANSWER, settings.max_tiles)
        bbox = None if query.bbox is None else BBox.parse(query.bbox)
        found = index.tiles(slide_id, bbox=bbox, min_tissue=query.min_tissue, limit=limit, offset=query.offset)
        return _respond_tiles(request, query, found)

    @router.get("/slides/{slide_id}/sample")
    def get_sample(request: Request, slide_id: str, query: Annotated[SampleQuery, Query()]) -> Response:
        """The tiles of a training step, or one shard of them: row for row what the trainer draws."""
        _check_limit("k", query.k, settings.max_k)
        num_tiles = index.manifest(slide_id).manifest.slide.num_tiles
        if num_tiles:
            _check_limit("k", query.k, num_tiles * settings.max_draws_per_tile)
        return _respond_tiles(request, query, index.sample(slide_id, Draw(**query.model_dump(exclude={"format"}))))

    @router.get("/stats")
    def get_stats(request: Request, query: Annotated[FormatQuery, Query()]) -> Response:
        """Counts over all slides."""
        catalog = index.catalog()
        chosen = _choose(request, query, ("json",))
        return _respond(request, catalog.hash, chosen, lambda: to_json(summarise(catalog.table)))

    return router


def _own_routes(index: TileIndex, counts: RequestCounts) -> APIRouter:
    router = APIRouter(default_response_class=Response)

    @router.get("/healthz")
    def get_health() -> Response:
        """The process answers."""
        return Response(to_json({"status": "ok"}), media_type=MEDIA_TYPES["json"])

    @router.get("/readyz")
    def get_readiness() -> Response:
        """The manifests can be read."""
        index.catalog()
        return Response(to_json({"status": "ready"}), media_type=MEDIA_TYPES["json"])

    @router.get("/metrics")
    def get_metrics() -> Response:
        """Requests by route and status, in Prometheus' text format."""
        return PlainTextResponse(counts.to_prometheus(), media_type="text/plain; version=0.0.4")

    return router


def _limit(asked: int | None, usual: int, limit: int) -> int:
    """What was asked for if it is within the limit, else the usual, which a smaller limit lowers."""
    if asked is None:
        return min(usual, limit)
    _check_limit("limit", asked, limit)
    return asked


def _check_limit(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise BadQueryError(f"{name} is {value}, at most {limit} here")


def _choose(request: Request, query: FormatQuery, offered: tuple[Format, ...]) -> Format:
    return choose_format(query.format, ",".join(request.headers.getlist("accept")), offered)


def _respond_tiles(request: Request, query: FormatQuery, found: TileRows) -> Response:
    chosen = _choose(request, query, tuple(_TILE_ENCODERS))
    return _respond(request, found.source.hash, chosen, lambda: _TILE_ENCODERS[chosen](found))


def _respond(request: Request, content_hash: str, chosen: Format, encode: Callable[[], bytes]) -> Response:
    """The encoded answer, or 304 without encoding where the client has it already.

    `no-cache` lets clients keep answers but ask each time: a manifest may be replaced at any moment.
    """
    etag = f'"{content_hash}-{chosen}"'
    headers = {"ETag": etag, "Vary": "Accept", "Cache-Control": "private, no-cache"}
    known = [tag.strip().removeprefix("W/") for tag in ",".join(request.headers.getlist("if-none-match")).split(",")]
    if etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(encode(), media_type=MEDIA_TYPES[chosen], headers=headers)
