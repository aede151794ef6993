"""The service's own routes: probes and metrics."""

import asyncio

from fastapi import APIRouter
from starlette.responses import Response

from services import openapi
from services.index import TileIndex
from services.metrics import CONTENT_TYPE, Metrics
from services.render import MEDIA_TYPES, to_json


def own_routes(index: TileIndex, metrics: Metrics) -> APIRouter:
    """Routes that tell nothing of any slide."""
    router = APIRouter(default_response_class=Response)
    probe: openapi.Responses = {200: {"model": openapi.State}, **openapi.problems()}
    counts: openapi.Responses = {200: {"content": {"text/plain": {}}}, **openapi.problems()}

    @router.get("/healthz", responses=probe)
    async def get_health() -> Response:
        """The process answers."""
        return Response(to_json({"status": "ok"}), media_type=MEDIA_TYPES["json"])

    @router.get("/readyz", responses=probe)
    async def get_readiness() -> Response:
        """The manifests can be read."""
        await asyncio.to_thread(index.check)
        return Response(to_json({"status": "ready"}), media_type=MEDIA_TYPES["json"])

    @router.get("/metrics", responses=counts)
    async def get_metrics() -> Response:
        """Requests, seconds and caches of all workers, in Prometheus' text format."""
        return Response(await asyncio.to_thread(metrics.render), headers={"Content-Type": CONTENT_TYPE})

    return router
