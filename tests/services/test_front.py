"""What holds for all requests: room, time, and what is told of them."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from services.answers import Answers
from services.asked import Asked
from services.front import Front
from services.gate import Gate
from services.metrics import Metrics


def _front(app: ASGIApp, **limits: Any) -> Front:
    gate, answers = Gate(None, (), 16_384), Answers(10_000)
    limits = {"max_requests": 9, "request_s": 30, **limits}
    return Front(app, gate=gate, answers=answers, metrics=Metrics(), root_path="", **limits)


async def _ask(front: Front, path: str = "/v1/slides") -> tuple[int, dict[str, str], bytes]:
    """Status, headers, body."""
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"host", b"localhost")],
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await front(scope, receive, send)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message["body"] for message in sent[1:])


def test_requests_without_room_are_asked_to_come_again_and_probes_are_answered() -> None:
    async def run() -> None:
        may_end = asyncio.Event()

        async def wait(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] != "/healthz":
                await may_end.wait()
            await PlainTextResponse("done")(scope, receive, send)

        front = _front(wait, max_requests=2)
        first = [asyncio.create_task(_ask(front)) for _ in range(2)]
        await asyncio.sleep(0)
        status, headers, body = await _ask(front)
        assert (status, headers["retry-after"]) == (503, "1")
        assert json.loads(body)["detail"] == "too many requests in hand"
        assert (await _ask(front, "/healthz"))[0] == 200
        may_end.set()
        assert [status for status, _, _ in await asyncio.gather(*first)] == [200, 200]
        assert (await _ask(front))[0] == 200

    asyncio.run(run())


def test_a_request_that_takes_too_long_is_told_so() -> None:
    async def sleep(_: Scope, __: Receive, ___: Send) -> None:
        await asyncio.sleep(3600)

    status, headers, body = asyncio.run(_ask(_front(sleep, request_s=0.01)))
    assert (status, headers["retry-after"], headers["content-type"]) == (503, "5", "application/problem+json")
    assert "took longer than 0.01 s" in json.loads(body)["detail"]


@pytest.mark.parametrize("after_start", [False, True])
def test_an_answer_that_breaks_off_is_not_mended_with_another(after_start: bool) -> None:
    async def fail(_: Scope, __: Receive, send: Send) -> None:
        if after_start:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("secret")

    asked: Callable[[], Awaitable[tuple[int, dict[str, str], bytes]]] = lambda: _ask(_front(fail))  # noqa: E731
    if after_start:
        with pytest.raises(ConnectionAbortedError):
            asyncio.run(asked())  # type: ignore[arg-type]
    else:
        status, _, body = asyncio.run(asked())  # type: ignore[arg-type]
        assert (status, b"secret" in body) == (500, False)


@pytest.mark.parametrize(
    ("given", "is_kept"), [(b"abc-1", True), (b"a b", False), (b"", False), (b"x" * 65, False), (b"a/b", False)]
)
def test_a_request_id_that_is_a_plain_word_is_kept(given: bytes, is_kept: bool) -> None:
    found = Asked("/", b"", {b"x-request-id": given}, 0).request_id()
    assert (found == given) is is_kept
    assert found
