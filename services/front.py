"""The one piece of middleware: everything that holds for all requests, in the order in which it happens.

A request gets an id, is counted, may be refused (`services.gate`), must find room, has only so much time, and is told
of in the log by route and slide id alone. Whatever goes wrong behind is one problem document, without a trace of it.
"""

import asyncio
import logging
import time
from http import HTTPStatus

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.answers import Answers
from services.asked import Asked, noted_slide
from services.gate import OPEN_ROUTES, Gate
from services.metrics import Metrics
from services.problems import problem

_log = logging.getLogger(__name__)
_requests = logging.getLogger("services.requests")


class Front:
    """ASGI middleware around everything.

    Args:
        app: what lies behind.
        gate: refuses.
        answers: may have the answer from before.
        metrics: counts.
        root_path: the prefix that a reverse proxy gives.
        max_requests: in hand at once; the probes are always answered.
        request_s: what a request may take.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        gate: Gate,
        answers: Answers,
        metrics: Metrics,
        root_path: str,
        max_requests: int,
        request_s: float,
    ) -> None:
        self._app, self._gate, self._answers, self._metrics = app, gate, answers, metrics
        self._root_path, self._max_requests, self._request_s = root_path, max_requests, request_s
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s, status = time.perf_counter(), 0
        is_head = scope["method"] == "HEAD"
        inner = {**scope, "root_path": self._root_path, "method": "GET" if is_head else scope["method"]}
        asked = Asked.read(inner, self._root_path)
        inner["path"] = self._root_path + asked.path
        request_id = asked.request_id()

        async def send_known(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # A list of its own: answers that are kept share theirs.
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id)]}
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        self._num_requests += 1
        try:
            known = self._at_once(inner, asked)
            if known is not None:
                await known(inner, receive, send_known)
                return
            try:
                async with asyncio.timeout(self._request_s):
                    await self._app(inner, receive, send_known)
            except TimeoutError:
                detail = f"this took longer than {self._request_s:g} s; ask for less at once"
                late = problem(HTTPStatus.SERVICE_UNAVAILABLE, detail, {"Retry-After": "5"})
                await _apologise(late, status, inner, receive, send_known)
            except Exception:  # noqa: BLE001 - the outermost boundary of a request: logged, and told as 500
                _log.exception("unexpected error in request %s", request_id.decode())
                sorry = problem(HTTPStatus.INTERNAL_SERVER_ERROR, "unexpected error; the service's log has it")
                await _apologise(sorry, status, inner, receive, send_known)
        finally:
            self._num_requests -= 1
            seconds = time.perf_counter() - began_s
            # Only routes of ours become a label: addresses that lead nowhere would fill the memory.
            route = getattr(inner.get("route"), "path", "other")
            self._metrics.answered(route, status, seconds, self._num_requests)
            if _requests.isEnabledFor(logging.INFO):
                told = {"request_id": request_id.decode(), "route": route, "status": status}
                told |= {"ms": round(1e3 * seconds, 3), "slide_id": noted_slide(inner)}
                _requests.info("request", extra={"told": told})

    def _at_once(self, scope: Scope, asked: Asked) -> Response | None:
        """What can be answered without asking a route."""
        if (refused := self._gate.refusal(asked)) is not None:
            return refused
        if scope["method"] == "GET" and (kept := self._answers.recall(scope)) is not None:
            return kept
        if self._num_requests > self._max_requests and asked.path not in OPEN_ROUTES:
            return problem(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests in hand", {"Retry-After": "1"})
        return None


async def _apologise(answer: ASGIApp, status: int, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with a problem, unless an answer has begun: then the server cuts it off."""
    if status:
        raise ConnectionAbortedError("the answer had begun")
    await answer(scope, receive, send)
