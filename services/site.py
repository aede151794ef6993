"""The page at `/` and its files: what lies in services/page, read once, and a policy that lets it reach only us."""

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

_FOLDER = Path(__file__).with_name("page")
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGE_ROUTES = frozenset({"/", *(f"/page/{file.name}" for file in _FOLDER.iterdir())})
"""What tells nothing about the slides, and needs no token."""
_POLICY = (
    "default-src 'none'; connect-src 'self'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


def site_routes() -> APIRouter:
    """The page's routes."""
    files = {file.name: file.read_bytes() for file in _FOLDER.iterdir()}
    router = APIRouter(default_response_class=Response, include_in_schema=False)

    @router.get("/")
    def get_page(request: Request) -> Response:
        return _respond(request, "index.html", files["index.html"])

    @router.get("/page/{name}")
    def get_file(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return _respond(request, name, files[name])

    return router


def _respond(request: Request, name: str, content: bytes) -> Response:
    tag = f'"{hashlib.blake2b(content, digest_size=16).hexdigest()}"'
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": _POLICY,
        "ETag": tag,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=_MEDIA_TYPES[Path(name).suffix], headers=headers)
