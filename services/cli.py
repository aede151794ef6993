"""The service's command: `slidegrad serve`."""

import errno
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from services.errors import ServiceError

if TYPE_CHECKING:
    from services.settings import Settings

_GRACE_S = 5
"""Requests in hand get this long when the service is told to stop."""


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Answer tile coordinate queries over HTTP, and show the slides on a page."""

    manifests: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MANIFESTS")]
    """The manifests folder."""
    host: str = "127.0.0.1"
    """Address to listen on; any other than this machine's own needs --token-file."""
    port: int = 8080
    """Port to listen on; 0 takes a free one and prints it."""
    token_file: Path | None = None
    """File with a token of at least 16 characters; requests carry it as `Authorization: Bearer TOKEN`."""

    runs: Path | None = None
    """A run's folder, or one that holds runs: what `slidegrad heatmap` left there is shown on the page."""
    archive: Path | None = None
    """Where the slides are mounted here, if not where they were when they were tiled; read for tiles on the page."""

    def run(self) -> tuple[dict[str, Any], int]:
        try:
            import uvicorn

            from services.app import create_app
            from services.gate import is_loopback
        except ModuleNotFoundError as error:
            raise ServiceError(f"serve needs {error.name}; pip install 'slidegrad[serve]'") from None
        settings = self._settings()
        if settings.token_file is None and not is_loopback(self.host):
            raise ServiceError(f"--host {self.host}: other machines could read everything; give --token-file too")
        app = create_app(settings)
        listener = self._listen()
        server = uvicorn.Server(
            uvicorn.Config(
                app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=_GRACE_S
            )
        )
        _stop_on_signals(server)
        host, port = listener.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(f"serving {self.manifests} at {address} (Ctrl-C stops)", file=sys.stderr, flush=True)
        server.run(sockets=[listener])
        return {"address": address, "num_requests": app.state.counts.total()}, 0

    def _settings(self) -> "Settings":
        from pydantic import ValidationError

        from services.settings import Settings

        # Only what was given: an argument that is there, None included, hides its environment variable.
        named = {"token_file": self.token_file, "runs": self.runs, "archive": self.archive}
        given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        try:
            return Settings(manifests=self.manifests, **given)
        except ValidationError as error:
            fault = error.errors()[0]
            name = "_".join(str(part) for part in fault["loc"]).upper()
            raise ServiceError(f"SLIDEGRAD_{name}: {fault['msg']}, got {fault['input']!r}") from None

    def _listen(self) -> socket.socket:
        """A listening socket: once the address is printed, connections are taken."""
        if not 0 <= self.port < 2**16:
            raise ServiceError(f"--port {self.port}: expected 0 to 65535")
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            listener = socket.create_server((self.host, self.port), family=family, backlog=128)
            # asyncio sets it only on sockets made with an explicit protocol; without it small answers take 44 ms, not 1
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return listener
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServiceError(f"--port {self.port}: in use on {self.host}; give another, or 0") from None
            raise ServiceError(f"--host {self.host} --port {self.port}: cannot listen ({error.strerror})") from None


def _stop_on_signals(server: Any) -> None:
    """Ends the service as a normal end of the command: uvicorn sends itself the signal again once it has shut down."""

    def stop(*_: object) -> None:
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
