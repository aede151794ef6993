"""A request as the service looks at it: read out of the ASGI scope once, for the gate, the answers and the log."""

import os
import re
from typing import NamedTuple, Self

from starlette.types import Scope

_KEY = "slidegrad.asked"
_SLIDE_KEY = "slidegrad.slide_id"
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_WANTED = frozenset(
    {
        b"host",
        b"authorization",
        b"accept",
        b"accept-encoding",
        b"if-none-match",
        b"content-length",
        b"transfer-encoding",
        b"x-request-id",
    }
)


class Asked(NamedTuple):
    """What a request says."""

    path: str
    """Without the prefix that a reverse proxy gives."""
    query: bytes
    headers: dict[bytes, bytes]
    """Those that matter here; several of one name are joined by commas, as HTTP has it."""
    num_bytes: int
    """Of address and headers together."""

    @classmethod
    def read(cls, scope: Scope, root_path: str) -> Self:
        """Reads a request, whether a proxy takes its prefix away or not, and leaves it in the scope."""
        path: str = scope["path"]
        if root_path and path.startswith(f"{root_path}/"):
            path = path[len(root_path) :]
        headers: dict[bytes, bytes] = {}
        num_bytes = len(scope["path"]) + len(scope["query_string"])
        for name, value in scope["headers"]:
            num_bytes += len(name) + len(value)
            if name in _WANTED:
                headers[name] = headers[name] + b"," + value if name in headers else value
        asked = scope[_KEY] = cls(path, scope["query_string"], headers, num_bytes)
        return asked

    @classmethod
    def of(cls, scope: Scope) -> "Asked":
        """What `read` left."""
        found: Asked = scope[_KEY]
        return found

    def header(self, name: bytes) -> str:
        """A header's text; empty where there is none."""
        return self.headers.get(name, b"").decode("latin-1")

    @property
    def key(self) -> tuple[str, bytes, bytes, bytes]:
        """All that an answer depends on, beside what the service holds."""
        accepted, coding = self.headers.get(b"accept", b""), self.headers.get(b"accept-encoding", b"")
        return self.path, self.query, accepted, coding

    def request_id(self) -> bytes:
        """The one that a proxy gave, if it is a plain word, else a new one."""
        given = self.headers.get(b"x-request-id", b"")
        return given if _ID.fullmatch(given) else os.urandom(8).hex().encode()


def note_slide(scope: Scope, slide_id: str) -> None:
    """Leaves the id of the slide that a route found, for the log: what was asked for may be anything."""
    scope[_SLIDE_KEY] = slide_id


def noted_slide(scope: Scope) -> str | None:
    """What `note_slide` left."""
    found: str | None = scope.get(_SLIDE_KEY)
    return found
