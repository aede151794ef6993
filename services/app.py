"""`create_app(settings)`: HTTP around a `TileIndex`. Routes check limits, ask the index, choose an encoder; no more.

Routes run in the event loop: what they find in memory is answered in less time than a thread takes to wake up. A
manifest that must be read, and an answer that takes long to make, go to the index's threads (`services.answers`).
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from services import openapi
from services.answers import Answers, choose, make_links
from services.asked import note_slide
from services.errors import BadQueryError
from services.front import Front
from services.gate import Gate
from services.index import HashedManifest, TileIndex, TileRows
from services.metrics import Metrics
from services.own import own_routes
from services.parameters import RecordQuery, SampleQuery, SlidesQuery, TilesQuery, describe_parameters, read_query
from services.problems import install_problems
from services.queries import BBox, Draw, check_draw
from services.render import (
    Format,
    Links,
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
_ROWS_AT_ONCE: dict[Format, int] = {"json": 10_000, "arrow": 100_000, "geojson": 1_000}
"""Rows that are encoded in the event loop, in about 1 ms; more go to a thread."""
_DRAWS_AT_ONCE = 32_768
_TILE_ENCODERS: dict[Format, Callable[[TileRows, Links], bytes]] = {
    "json": tiles_json,
    "arrow": tiles_arrow,
    "geojson": tiles_geojson,
}
_TILE_FORMATS: tuple[Format, ...] = tuple(_TILE_ENCODERS)


def create_app(settings: Settings) -> FastAPI:
    """The service over one place of manifests.

    Raises:
        ManifestError: there are no manifests.
        ServiceError: the token file, the labels or the folder of runs cannot be used.
    """
    metrics = Metrics()
    index = TileIndex(
        settings.manifests,
        max_bytes=settings.max_manifests_mb * 2**20,
        labels=settings.labels,
        rescan_s=settings.rescan_s,
        meter=metrics.cache("manifests"),
    )
    answers = Answers(settings.max_answers_mb * 2**20, metrics.cache("answers"))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        index.start()
        yield
        index.close()
        answers.close()

    app = FastAPI(
        title="Slidegrad tile index",
        version="1",
        description=openapi.ABOUT,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.metrics = metrics
    gate = Gate(settings.read_token(), settings.allow_host, settings.max_header_bytes)
    app.add_middleware(
        Front,
        gate=gate,
        answers=answers,
        metrics=metrics,
        root_path=settings.root_path,
        max_requests=settings.max_requests,
        request_s=settings.request_s,
    )
    if settings.cors:  # Outermost: a refusal must be readable by the page, too, and a preflight carries no token.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors,
            allow_methods=["GET", "HEAD"],
            allow_headers=["Authorization", "If-None-Match"],
            expose_headers=["ETag", "Link", "X-Request-Id", "Retry-After"],
        )
    install_problems(app)
    app.include_router(_slide_routes(index, answers, settings))
    app.include_router(viewing_routes(index, settings))
    app.include_router(site_routes())
    app.include_router(own_routes(index, metrics))
    app.openapi = lambda: _describe(app)  # type: ignore[method-assign]  # FastAPI's way to change it
    return app


def _slide_routes(index: TileIndex, answers: Answers, settings: Settings) -> APIRouter:
    router = APIRouter(prefix="/v1", default_response_class=Response)

    async def find(request: Request, slide_id: str) -> HashedManifest:
        source = index.held(slide_id)
        if source is None:
            # Shielded: others may wait for the same manifest when this client goes away.
            source = await asyncio.shield(asyncio.wrap_future(index.begin(slide_id)))
        note_slide(request.scope, source.slide_id)
        return source

    @router.get(
        "/slides",
        responses=openapi.describe(openapi.SlideList, 400, formats=("json", "arrow")),
        openapi_extra=describe_parameters(SlidesQuery, limit=settings.max_slides),
    )
    async def list_slides(request: Request) -> Response:
        """Finds slides, page by page."""
        query = read_query(SlidesQuery, request)
        limit = _limit(query.limit, _SLIDES_PER_PAGE, settings.max_slides)
        chosen = choose(request, query.format, ("json", "arrow"))
        catalog = index.catalog()
        search = query.to_search()
        find_page = partial(catalog.search.page, search, limit=limit, cursor=query.cursor)
        page = find_page() if catalog.search.is_quick(search) else await answers.work(find_page)

        def encode() -> tuple[bytes, Links]:
            links = make_links(request, chosen, {"cursor": page.next_cursor} if page.next_cursor else None)
            return (slides_arrow if chosen == "arrow" else slides_json)(page, links), links

        return await answers.give(request, chosen, catalog.hash, encode, is_current=lambda: index.catalog() is catalog)

    @router.get(
        "/slides/{slide_id}",
        responses=openapi.describe(openapi.Slide, 400, 404),
        openapi_extra=describe_parameters(RecordQuery),
    )
    async def get_slide(request: Request, slide_id: str) -> Response:
        """One slide's record, its manifest's hash and the level-0 px that one tile covers."""
        query = read_query(RecordQuery, request)
        chosen = choose(request, query.format, ("json",))
        source = await find(request, slide_id)
        catalog, labels = index.catalog(), index.labels_of(source.slide_id)
        # The labels change with the catalogue, the record with the manifest.
        content_hash = source.hash if labels is None else f"{source.hash}-{catalog.hash}"
        return await answers.give(
            request,
            chosen,
            content_hash,
            lambda: (slide_json(source, labels), ()),
            is_current=lambda: index.is_current(source) and (labels is None or index.catalog() is catalog),
        )

    @router.get(
        "/slides/{slide_id}/tiles",
        responses=openapi.describe(openapi.Tiles, 400, 404, formats=_TILE_FORMATS),
        openapi_extra=describe_parameters(TilesQuery, limit=settings.max_tiles),
    )
    async def get_tiles(request: Request, slide_id: str) -> Response:
        """Tiles that intersect a rectangle and hold enough tissue, page by page."""
        query = read_query(TilesQuery, request)
        chosen = choose(request, query.format, _TILE_FORMATS)
        highest = min(settings.max_tiles, settings.max_geojson_tiles) if chosen == "geojson" else settings.max_tiles
        limit = _limit(query.limit, _TILES_PER_ANSWER, highest)
        bbox = None if query.bbox is None else BBox.parse(query.bbox)
        source = await find(request, slide_id)

        def encode() -> tuple[bytes, Links]:
            found = index.tiles(source, bbox=bbox, min_tissue=query.min_tissue, limit=limit, offset=query.offset)
            is_last = query.offset + limit >= found.num_matched
            links = make_links(request, chosen, None if is_last else {"offset": str(query.offset + limit)})
            return _TILE_ENCODERS[chosen](found, links), links

        is_slow = min(limit, len(source.manifest)) > _ROWS_AT_ONCE[chosen]
        return await answers.give(
            request, chosen, source.hash, encode, is_current=lambda: index.is_current(source), is_slow=is_slow
        )

    @router.get(
        "/slides/{slide_id}/sample",
        responses=openapi.describe(openapi.Sample, 400, 404, 409, formats=_TILE_FORMATS),
        openapi_extra=describe_parameters(SampleQuery, k=settings.max_k),
    )
    async def get_sample(request: Request, slide_id: str) -> Response:
        """The tiles of a training step, or one part of them: row for row what the trainer draws."""
        query = read_query(SampleQuery, request)
        chosen = choose(request, query.format, _TILE_FORMATS)
        _check_limit("k", query.k, settings.max_k)
        if chosen == "geojson":
            _check_limit("k", query.k, settings.max_geojson_tiles)
        draw = Draw(k=query.k, seed=query.seed, epoch=query.epoch, part=query.part, num_parts=query.num_parts)
        source = await find(request, slide_id)
        check_draw(source.manifest, draw)

        def encode() -> tuple[bytes, Links]:
            links = make_links(request, chosen)
            return _TILE_ENCODERS[chosen](index.sample(source, draw), links), links

        # Not kept: each rank asks for its part of a step once, and memory that is written over and over stays quick.
        return await answers.give(
            request,
            chosen,
            source.hash,
            encode,
            is_slow=draw.k > min(_ROWS_AT_ONCE[chosen], _DRAWS_AT_ONCE),
        )

    @router.get(
        "/stats", responses=openapi.describe(openapi.Stats, 400), openapi_extra=describe_parameters(RecordQuery)
    )
    async def get_stats(request: Request) -> Response:
        """Counts over all slides."""
        chosen, catalog = choose(request, read_query(RecordQuery, request).format, ("json",)), index.catalog()
        return await answers.give(
            request,
            chosen,
            catalog.hash,
            lambda: (to_json(summarise(catalog.table)), ()),
            is_current=lambda: index.catalog() is catalog,
            is_slow=True,
        )

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


def _describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, made once."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        app.openapi_schema = openapi.complete(made)
    return app.openapi_schema
