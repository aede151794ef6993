"""HTTP on the wire: uvicorn's protocol, with limits on clients that send or read too slowly, or too much.

uvicorn waits for ever for headers, and for clients that stop reading. Here every connection has until `header_s` for
the headers of a request, a connection whose answer does not move for `stalled_s` is cut, and headers that never end are
refused. What is refused before there is a request is a problem document too.
"""

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.render import to_json
from services.settings import Limits


def make_protocol(limits: Limits) -> type[asyncio.Protocol]:
    """The protocol class for `uvicorn.Config(http=…)`."""

    class LimitedProtocol(_Limited):
        _limits = limits

    return LimitedProtocol


class _Limited(HttpToolsProtocol):
    _limits: Limits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections; try again in a moment")
            return
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._header_timer)
        self._stop(self._stall_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._is_answering():
            self._await_headers()  # uvicorn stops waiting for an idle client at its first byte.
        self._header_bytes += len(data)
        super().data_received(data)
        is_refused = self._header_timer is not None and self._header_bytes > self._limits.max_header_bytes
        if is_refused and not self._is_answering():
            detail = f"address and headers are longer than {self._limits.max_header_bytes} bytes"
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, detail)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_headers()  # Of a request that came in one piece with the one before, too.

    def on_headers_complete(self) -> None:
        self._header_timer = self._stop(self._header_timer)
        self._header_bytes = 0
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._stall_timer = self._stop(self._stall_timer)
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's sentence is no problem document
        self._refuse(HTTPStatus.BAD_REQUEST, "this is no HTTP request")

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_headers(self) -> None:
        if self._header_timer is None:
            self._header_bytes = 0
            self._header_timer = self.loop.call_later(self._limits.header_s, self._give_up)

    def _give_up(self) -> None:
        self._header_timer = None
        if self._is_answering():
            self._await_headers()
        else:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "the request's headers did not come in time")

    def _watch(self, waiting_bytes: int) -> None:
        """Looks again later whether the client has read any of what waits for it."""

        def look() -> None:
            still_bytes = self.transport.get_write_buffer_size()
            if still_bytes >= waiting_bytes:
                self.transport.abort()
            else:
                self._watch(still_bytes)

        self._stall_timer = self.loop.call_later(self._limits.stalled_s, look)

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        self._header_timer = self._stop(self._header_timer)
        if self.transport.is_closing():
            return
        body = to_json({"type": "about:blank", "title": status.phrase, "status": int(status), "detail": detail})
        retry = "retry-after: 1\r\n" if status == HTTPStatus.SERVICE_UNAVAILABLE else ""
        head = (
            f"HTTP/1.1 {int(status)} {status.phrase}\r\ncontent-type: application/problem+json\r\n{retry}"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
