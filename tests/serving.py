"""A real tile-index service for tests: in a thread of this process, or as a process that can be killed."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn

ROOT = Path(__file__).resolve().parent.parent


class Answer(NamedTuple):
    """What a service says."""

    status: int
    headers: dict[str, str]
    body: bytes


class Meddling:
    """What stands between a service and who asks it: an app whose answers pass through `meddle(path?query, answer)`."""

    def __init__(self, app: Any, meddle: Callable[[str, Answer], Answer]) -> None:
        self.app, self.meddle = app, meddle

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, headers, body = 0, dict[str, str](), b""

        async def keep(message: Any) -> None:
            nonlocal status, headers, body
            status = message.get("status", status)
            body += message.get("body", b"")
            headers |= {name.decode(): value.decode() for name, value in message.get("headers", ())}

        await self.app(scope, receive, keep)
        answer = self.meddle(f"{scope['path']}?{scope['query_string'].decode()}", Answer(status, headers, body))
        sent = {**answer.headers, "content-length": str(len(answer.body))}
        pairs = [(name.encode(), value.encode()) for name, value in sent.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": pairs})
        await send({"type": "http.response.body", "body": answer.body})


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """An app in a thread; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def serving_process(manifests: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`slidegrad serve` as a process of its own, and its address; killed at the end if it still runs."""
    command = [sys.executable, str(ROOT / "slidegrad.py"), "serve", str(manifests), "--port", "0"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, text=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert " at http://" in line, line + process.stderr.read()
            yield process, line.split(" at ")[1].split()[0]
        finally:
            process.kill()


def closed_address() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"
