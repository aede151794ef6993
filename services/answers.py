"""From what a request found to what is sent: caching by ETag, links to further pages, compression, and memory of it.

Whole answers are kept as they are sent, as many as the memory set aside for them holds, and given again without asking
any route while what they were made of is current. Small ones are made where the request is handled; what takes longer
goes to a thread, so that it does not hold up the probes, and is made once however many ask for it.
"""

import asyncio
import gzip
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import parse_qsl, quote, urlencode

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from services.asked import Asked, note_slide, noted_slide
from services.cache import ByteCache, Flights, Meter
from services.render import MEDIA_TYPES, Format, Links, choose_format, wants_gzip

T = TypeVar("T")
_THREADS = 2
_GZIP_LEVEL = 1
"""Coordinates: level 1 takes a third of the time of level 6, for a tenth more bytes."""
_OVERHEAD_BYTES = 2_048


class SentResponse(Response):
    """A response whose body and headers are made already."""

    def __init__(self, body: bytes, headers: list[tuple[bytes, bytes]], status: int = 200) -> None:
        self.body, self.raw_headers, self.status_code = body, headers, status
        self.background = None


@dataclass(frozen=True, eq=False)
class _Kept:
    """An answer, and what has to hold for it to be given again."""

    answer: SentResponse
    etag: str
    common: list[tuple[bytes, bytes]]
    """The headers that 304 has too."""
    is_current: Callable[[], bool]
    route: object
    slide_id: str | None


class Answers:
    """Makes answers, and keeps them.

    Args:
        max_bytes: what may be kept of them.
        meter: who counts those found in memory, and those made.
    """

    def __init__(self, max_bytes: int, meter: Meter | None = None) -> None:
        # Threads of their own: a file system that hangs must not stop what is made from memory.
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="answers")
        self._kept: ByteCache[_Kept] = ByteCache(max_bytes, meter)
        self._flights: Flights[SentResponse] = Flights(self._pool)

    def close(self) -> None:
        """Ends its threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def work(self, task: Callable[[], T]) -> T:
        """What takes more than a few milliseconds, in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, task)

    def recall(self, scope: Scope) -> Response | None:
        """The answer that was given before to what is asked, if it is current; None where a route has to be asked."""
        asked = Asked.of(scope)
        kept = self._kept.get(asked.key, lambda found: found.is_current())
        if kept is None:
            return None
        scope["route"] = kept.route
        if kept.slide_id is not None:
            note_slide(scope, kept.slide_id)
        return _unless_known(kept, asked)

    async def give(
        self,
        request: Request,
        chosen: Format,
        content_hash: str,
        encode: Callable[[], tuple[bytes, Links]],
        *,
        is_current: Callable[[], bool] | None = None,
        is_slow: bool = False,
    ) -> Response:
        """The encoded answer, or 304 without encoding where the client has it already.

        `no-cache` lets clients keep answers but ask each time: a manifest may be replaced at any moment.

        Args:
            request: checked already; its whole address is what the answer is kept under.
            chosen: the format.
            content_hash: changes with what the answer is made of.
            encode: makes the body, and the links that go into the header `Link`.
            is_current: whether what the answer is made of is still so; cheap, for it is asked each time. Without it the
                answer is not kept.
            is_slow: it takes more than a few milliseconds.
        """
        asked = Asked.of(request.scope)
        is_gzip = wants_gzip(asked.header(b"accept-encoding"))
        etag = f'"{content_hash}-{chosen}{"-gzip" if is_gzip else ""}"'
        common = [
            (b"etag", etag.encode()),
            (b"vary", b"Accept, Accept-Encoding"),
            (b"cache-control", b"private, no-cache"),
        ]
        if _is_known(etag, asked):
            return SentResponse(b"", common, 304)

        def make() -> SentResponse:
            body, links = encode()
            headers = [
                *common,
                (b"content-type", MEDIA_TYPES[chosen].encode()),
                (b"x-content-type-options", b"nosniff"),
            ]
            if links:
                headers.append((b"link", _link_header(links)))
            if is_gzip:
                body = gzip.compress(body, _GZIP_LEVEL, mtime=0)
                headers.append((b"content-encoding", b"gzip"))
            headers.append((b"content-length", str(len(body)).encode()))
            answer, scope = SentResponse(body, headers), request.scope
            if is_current is not None:
                kept = _Kept(answer, etag, common, is_current, scope.get("route"), noted_slide(scope))
                self._kept.put(asked.key, kept, len(body) + _OVERHEAD_BYTES)
            return answer

        if not is_slow and not is_gzip:
            return make()
        # Shielded: others may wait for the same answer when this client goes away.
        flight = self._flights.begin((etag, asked.key), make)
        return await asyncio.shield(asyncio.wrap_future(flight))


def choose(request: Request, asked: Format | None, offered: tuple[Format, ...]) -> Format:
    """The format of the answer, see `services.render.choose_format`."""
    return choose_format(asked, Asked.of(request.scope).header(b"accept"), offered)


def make_links(request: Request, chosen: Format, following: Mapping[str, str] | None = None) -> Links:
    """The links of an answer: to itself, and to the next page, which differs by these parameters."""
    asked = Asked.of(request.scope)
    path = quote(request.scope["root_path"] + asked.path)
    query = parse_qsl(asked.query.decode("latin-1"), keep_blank_values=True)
    links = [{"rel": "self", "href": _href(path, query), "type": MEDIA_TYPES[chosen]}]
    if following is not None:
        rest = [(name, value) for name, value in query if name not in following]
        links.append({"rel": "next", "href": _href(path, [*rest, *following.items()]), "type": MEDIA_TYPES[chosen]})
    return links


def _href(path: str, query: list[tuple[str, str]]) -> str:
    return f"{path}?{urlencode(query)}" if query else path


def _link_header(links: Links) -> bytes:
    return ", ".join(f'<{link["href"]}>; rel="{link["rel"]}"; type="{link["type"]}"' for link in links).encode("ascii")


def _unless_known(kept: _Kept, asked: Asked) -> Response:
    return SentResponse(b"", kept.common, 304) if _is_known(kept.etag, asked) else kept.answer


def _is_known(etag: str, asked: Asked) -> bool:
    if b"if-none-match" not in asked.headers:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in asked.header(b"if-none-match").split(",")]
    return etag in tags or "*" in tags
