"""The running service: one process, or several workers on one socket that are watched and replaced.

The first process of several answers nothing. It hands its listening socket to each worker, waits until all are ready,
replaces those that end, and passes the end on: workers stop taking requests and finish those in hand. A worker whose
parent is gone ends too. One thing to know before changing it: a worker that ends before it was ready would do so again,
so that ends the command, with the worker's own sentence.
"""

import contextlib
import gc
import logging
import signal
import socket
import threading
from collections.abc import Callable
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvicorn

from manifests.errors import SlidegradError
from services.app import create_app
from services.errors import ServiceError
from services.logs import set_up_logging
from services.metrics import count_requests, forget_worker, shared_registry
from services.protocol import make_protocol
from services.settings import Settings

_log = logging.getLogger(__name__)
GRACE_S = 5
"""Requests in hand get this long when the service is told to stop."""
_KEEP_ALIVE_S = 30
"""Longer than a training step, so that ranks need not connect anew for each slide."""
_PAUSE_S = 5
"""Before a worker that could not start is tried again."""
_READY = "ready"


class _Server(uvicorn.Server):
    """Says when connections are taken."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()


def serve_here(settings: Settings, listener: socket.socket, on_ready: Callable[[], None]) -> int:
    """Serves in this process until SIGTERM or SIGINT; returns the number of requests answered.

    Raises:
        ManifestError: there are no manifests.
        ServiceError: the token file or the labels cannot be used.
    """
    set_up_logging(settings.log_json)
    app = create_app(settings)
    server = _make_server(app, settings, on_ready)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: _stop(server))
    server.run(sockets=[listener])
    num_requests: int = app.state.metrics.num_requests()
    return num_requests


def serve_with_workers(
    settings: Settings, listener: socket.socket, num_workers: int, folder: Path, on_ready: Callable[[], None]
) -> int:
    """Serves with several processes until SIGTERM or SIGINT; returns the number of requests answered by all.

    Args:
        settings: of the service.
        listener: where connections come in.
        num_workers: how many processes.
        folder: where the workers count, see `services.metrics`.
        on_ready: called once all take requests.

    Raises:
        ServiceError: a worker could not start.
    """
    set_up_logging(settings.log_json)
    told_to_stop, waker = socket.socketpair()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: waker.send(b"."))
    workers = [_Worker(settings, listener) for _ in range(num_workers)]
    try:
        if _await_all(workers, told_to_stop):
            on_ready()
            _watch(workers, lambda: _Worker(settings, listener), told_to_stop, folder)
    finally:
        listener.close()
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join()
    return count_requests(shared_registry(folder))


class _Worker:
    """One process that serves, as its parent sees it."""

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        context = get_context("spawn")
        self.told, telling = context.Pipe()
        self.process = context.Process(target=_work, args=(settings, listener, telling))
        self.process.start()
        telling.close()
        self.is_ready = False

    def hear(self) -> str:
        """What it says of its start, once `told` can be read: "" where it takes requests, else why it cannot."""
        try:
            said: str = self.told.recv()
        except (EOFError, OSError):
            self.process.join()
            return f"a worker ended at its start (exit code {self.process.exitcode}); what it said is above"
        self.is_ready = said == _READY
        return "" if self.is_ready else said

    def stop(self) -> None:
        """Tells it to finish what it has in hand."""
        self.told.close()

    def join(self) -> None:
        """Waits for its end; one that does not come to it is killed, and one that has nothing in hand yet at once."""
        if self.is_ready:
            self.process.join(GRACE_S + 3)
        if self.process.is_alive():
            if self.is_ready:
                _log.warning("worker %d did not end in time and is killed", self.process.pid)
            self.process.kill()
            self.process.join()


def _await_all(workers: list[_Worker], told_to_stop: socket.socket) -> bool:
    """Waits until all take requests; False if the service is told to stop meanwhile.

    Raises:
        ServiceError: one could not start.
    """
    for worker in workers:
        if told_to_stop in connection.wait([worker.told, told_to_stop]):
            return False
        if trouble := worker.hear():
            raise ServiceError(trouble)
    return True


def _watch(workers: list[_Worker], start: Callable[[], _Worker], told_to_stop: socket.socket, folder: Path) -> None:
    """Replaces workers that end, until the service is told to stop."""
    while True:
        starting = [worker.told for worker in workers if not worker.is_ready]
        found = connection.wait([told_to_stop, *(worker.process.sentinel for worker in workers), *starting])
        if told_to_stop in found:
            return
        for place, worker in enumerate(workers):
            if not worker.is_ready and worker.told in found and (trouble := worker.hear()):
                _log.error("a worker could not be replaced: %s", trouble)
                worker.process.join()
            if worker.process.is_alive():
                continue
            pid, code = worker.process.pid or 0, worker.process.exitcode
            _log.warning("worker %d ended (exit code %s) and is replaced", pid, code)
            forget_worker(pid, folder)
            worker.stop()
            # One that could not start may be able to in a moment; the others go on meanwhile.
            if not worker.is_ready and connection.wait([told_to_stop], timeout=_PAUSE_S):
                return
            workers[place] = start()


def _work(settings: Settings, listener: socket.socket, telling: Connection) -> None:
    """What a worker does. Its parent's end of the pipe closes when it shall stop, or when the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # uvicorn sends itself again what ended it.
    set_up_logging(settings.log_json)

    def say(what: str) -> None:
        with contextlib.suppress(OSError):  # The parent is gone, or ends.
            telling.send(what)

    try:
        app = create_app(settings)
    except SlidegradError as error:
        say(str(error))
        return
    server = _make_server(app, settings, lambda: say(_READY))

    def wait_for_the_end() -> None:
        with contextlib.suppress(EOFError, OSError):
            telling.recv()
        _stop(server)

    threading.Thread(target=wait_for_the_end, name="parent", daemon=True).start()
    server.run(sockets=[listener])


def _make_server(app: Any, settings: Settings, on_ready: Callable[[], None]) -> _Server:
    # What is there now stays: looking through it for garbage again and again holds up requests for 50 ms each time.
    gc.collect()
    gc.freeze()
    config = uvicorn.Config(
        app,
        http=make_protocol(settings),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )
    return _Server(config, on_ready)


def _stop(server: uvicorn.Server) -> None:
    server.should_exit = True
