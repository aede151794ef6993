"""Who may ask, and how often was asked: the one piece of middleware.

Without a token only this machine may ask, by a loopback name: a web page that points its own host name at 127.0.0.1
(DNS rebinding) would otherwise read every coordinate through the user's browser. With a token, every route but the
probes and the empty page with its scripts asks for it.
"""

import hmac
import ipaddress
import threading
import time
from collections import Counter
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.problems import problem
from services.site import PAGE_ROUTES

OPEN_ROUTES = frozenset({"/healthz", "/readyz"}) | PAGE_ROUTES


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only be this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class RequestCounts:
    """How many requests were answered, by route and status, and how long they took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: Counter[str] = Counter()

    def add(self, route: str, status: int, seconds: float) -> None:
        """Counts one request."""
        with self._lock:
            self._requests[route, status] += 1
            self._seconds[route] += seconds  # type: ignore[assignment]  # typeshed's Counter counts whole things

    def total(self) -> int:
        """Requests on all routes."""
        with self._lock:
            return self._requests.total()

    def to_prometheus(self) -> str:
        """The counts in Prometheus' text format, version 0.0.4."""
        with self._lock:
            requests, seconds = sorted(self._requests.items()), sorted(self._seconds.items())
        lines = ["# TYPE slidegrad_http_requests_total counter"]
        lines += [f'slidegrad_http_requests_total{{route="{r}",status="{s}"}} {n}' for (r, s), n in requests]
        lines += ["# TYPE slidegrad_http_request_seconds_total counter"]
        lines += [f'slidegrad_http_request_seconds_total{{route="{r}"}} {s:.6f}' for r, s in seconds]
        return "\n".join(lines) + "\n"


class Gate:
    """ASGI middleware: lets a request in or answers it with a problem, counts it, and answers HEAD as GET.

    Args:
        app: what lies behind.
        token: what `Authorization: Bearer` must carry; None lets loopback host names in.
        counts: where requests are counted.
    """

    def __init__(self, app: ASGIApp, token: str | None, counts: RequestCounts) -> None:
        self._app = app
        self._token = None if token is None else token.encode()
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s, status = time.perf_counter(), 500
        inner = {**scope, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif scope["method"] == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            answer = self._refusal(scope["path"], Headers(scope=scope)) or self._app
            await answer(inner, receive, send_counted)
        finally:
            # Only routes of ours become a label: addresses that lead nowhere would fill the memory.
            route = getattr(inner.get("route"), "path", "other")
            self._counts.add(route, status, time.perf_counter() - started_s)

    def _refusal(self, path: str, headers: Headers) -> Response | None:
        if path in OPEN_ROUTES and self._token is not None:
            return None
        if self._token is None:
            host = _host_name(headers.get("host", ""))
            if is_loopback(host):
                return None
            detail = "this service answers on loopback names only; start it with --token-file to use another"
            return problem(HTTPStatus.MISDIRECTED_REQUEST, detail)
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._token):
            return None
        return problem(HTTPStatus.UNAUTHORIZED, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})


def _host_name(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
