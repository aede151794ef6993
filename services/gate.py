"""Who may ask, and what is refused before any route sees it. Pure: a request's address and headers in, a refusal out.

Without a token only this machine may ask, by a loopback name or one given by --allow-host: a web page that points its
own host name at 127.0.0.1 (DNS rebinding) would otherwise read every coordinate through the user's browser. With a
token, every route but the probes and the empty page with its scripts asks for it.
"""

import hmac
from collections.abc import Collection
from functools import lru_cache
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.responses import Response

from services.asked import Asked
from services.problems import problem
from services.settings import is_loopback
from services.site import PAGE_ROUTES

OPEN_ROUTES = frozenset({"/healthz", "/readyz"}) | PAGE_ROUTES
_CLOSE = {"Connection": "close"}
"""What the client still sends would be taken for its next request."""


class Gate:
    """Decides over requests.

    Args:
        token: what `Authorization: Bearer` must carry; None asks for none.
        allow_hosts: names that are answered beside loopback ones.
        max_header_bytes: of address and headers together.
        open_routes: asked without a token.
    """

    def __init__(
        self,
        token: str | None,
        allow_hosts: Collection[str],
        max_header_bytes: int,
        open_routes: Collection[str] = OPEN_ROUTES,
    ) -> None:
        self._token = None if token is None else token.encode()
        self._allow_hosts = frozenset(host.lower() for host in allow_hosts)
        self._max_header_bytes = max_header_bytes
        self._open_routes = open_routes

    def refusal(self, asked: Asked) -> Response | None:
        """The problem to answer with, or None for a request that may go on."""
        if asked.num_bytes > self._max_header_bytes:
            detail = f"address and headers are longer than {self._max_header_bytes} bytes"
            return problem(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, detail, _CLOSE)
        headers = asked.headers
        if headers.get(b"content-length", b"0").strip() != b"0" or b"transfer-encoding" in headers:
            return problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "no request here takes a body", _CLOSE)
        if not self._is_known(asked.header(b"host")):
            detail = "this service does not answer to that host name; start it with --allow-host, or with --token-file"
            return problem(HTTPStatus.MISDIRECTED_REQUEST, detail)
        if self._token is None or asked.path in self._open_routes:
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._token):
            return None
        return problem(HTTPStatus.UNAUTHORIZED, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})

    def _is_known(self, host: str) -> bool:
        if self._token is not None and not self._allow_hosts:
            return True
        return _is_among(host, self._allow_hosts)


@lru_cache(maxsize=256)
def _is_among(header: str, allow_hosts: frozenset[str]) -> bool:
    """Whether a Host header names one of these, or this machine."""
    try:
        host = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    return host in allow_hosts or is_loopback(host)
