"""The service's own routes: probes, metrics, and the page."""

import asyncio
import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

from services import openapi
from services.index import TileIndex
from services.metrics import CONTENT_TYPE, Metrics
from services.render import MEDIA_TYPES, to_json


def own_routes(index: TileIndex, metrics: Metrics) -> APIRouter:
    """Routes that tell nothing of any slide."""
    router = APIRouter(default_response_class=Response)
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    page_headers = {"Content-Security-Policy": _content_policy(page), "X-Content-Type-Options": "nosniff"}
    probe: openapi.Responses = {200: {"model": openapi.State}, **openapi.problems()}
    counts: openapi.Responses = {200: {"content": {"text/plain": {}}}, **openapi.problems()}

    @router.get("/", include_in_schema=False)
    async def get_page() -> Response:
        return HTMLResponse(page, headers=page_headers)

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


def _content_policy(page: str) -> str:
    """Only the page's own script and style run, and they reach only this service."""
    own = {
        tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL)
    }
    sources = f"script-src 'sha256-{own['script']}'; style-src 'sha256-{own['style']}'"
    return f"default-src 'none'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; {sources}"
