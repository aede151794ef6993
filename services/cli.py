"""The service's command: `slidegrad serve`."""

import errno
import os
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from services.errors import ServiceError

if TYPE_CHECKING:
    from services.settings import Settings

_FLAGS = ("token_file", "labels", "root_path", "allow_host", "cors", "log_json", "runs", "archive")
"""Fields of `services.settings.Settings` that are flags; the others are environment variables alone."""


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Answer tile coordinate queries over HTTP, and show the slides on a page.

    Limits on clients, memory and time are environment variables: `services/settings.py` lists them. Every flag but
    MANIFESTS, --host, --port and --workers has one too, such as SLIDEGRAD_TOKEN_FILE.
    """

    manifests: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MANIFESTS")]
    """A folder or an address (s3://…), of a tree of manifests or a compacted set."""
    host: str = "127.0.0.1"
    """Address to listen on; any other than this machine's own needs --token-file."""
    port: int = 8080
    """Port to listen on; 0 takes a free one and prints it."""
    token_file: Path | None = None
    """File with a token of at least 16 characters; requests carry it as `Authorization: Bearer TOKEN`."""
    labels: Path | None = None
    """A labels.csv whose columns slides can be filtered by; patient_id and specimen_id are never served."""
    workers: int = 1
    """Processes that answer; one that dies is replaced."""
    root_path: str | None = None
    """Where a reverse proxy has the service, such as /tiles."""
    allow_host: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A host name to answer to beside this machine's own; may be given several times."""
    cors: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An origin whose pages may read answers, such as https://viewer.example; may be given several times."""
    log_json: bool = False
    """A line of JSON on stderr for each request: route, status, time, slide id."""
    runs: Path | None = None
    """A run's folder, or one that holds runs: what `slidegrad heatmap` left there is shown on the page."""
    archive: Path | None = None
    """Where the slides are mounted here, if not where they were when they were tiled; read for tiles on the page."""

    def run(self) -> tuple[dict[str, Any], int]:
        if self.workers < 1:
            raise ServiceError(f"--workers {self.workers}: expected at least 1")
        with tempfile.TemporaryDirectory(prefix="slidegrad-counts-") as folder:
            if self.workers > 1:  # Read when `prometheus_client` is imported, here and in the workers.
                os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
            return self._serve(Path(folder))

    def _serve(self, folder: Path) -> tuple[dict[str, Any], int]:
        try:
            from services.settings import is_loopback

            settings = self._settings()
            settings.read_token()
            if settings.token_file is None and not is_loopback(self.host):
                raise ServiceError(f"--host {self.host}: other machines could read everything; give --token-file too")
            listener = self._listen()
            # Takes a second: what is wrong with the settings is said before.
            from services.serving import serve_here, serve_with_workers
        except ModuleNotFoundError as error:
            raise ServiceError(f"serve needs {error.name}; pip install 'slidegrad[serve]'") from None
        host, port = listener.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

        def tell() -> None:
            print(f"serving {self.manifests} at {address} (Ctrl-C stops)", file=sys.stderr, flush=True)

        if self.workers == 1:
            num_requests = serve_here(settings, listener, tell)
        else:
            num_requests = serve_with_workers(settings, listener, self.workers, folder, tell)
        return {"address": address, "num_requests": num_requests}, 0

    def _settings(self) -> "Settings":
        from pydantic import ValidationError

        from services.settings import Settings

        # Only what was given: an argument that is there, None included, hides its environment variable.
        given = {name: getattr(self, name) for name in _FLAGS if getattr(self, name) not in (None, (), False)}
        try:
            return Settings(manifests=self.manifests, **given)
        except ValidationError as error:
            fault = error.errors()[0]
            name = str(fault["loc"][0])
            source = f"--{name.replace('_', '-')}" if name in given else f"SLIDEGRAD_{name.upper()}"
            raise ServiceError(f"{source}: {fault['msg']}, got {fault['input']!r}") from None

    def _listen(self) -> socket.socket:
        """A listening socket: once the address is printed, connections are taken."""
        if not 0 <= self.port < 2**16:
            raise ServiceError(f"--port {self.port}: expected 0 to 65535")
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            listener = socket.create_server((self.host, self.port), family=family, backlog=1024)
            # asyncio sets it only on sockets made with an explicit protocol; without it small answers take 44 ms, not 1
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return listener
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServiceError(f"--port {self.port}: in use on {self.host}; give another, or 0") from None
            raise ServiceError(f"--host {self.host} --port {self.port}: cannot listen ({error.strerror})") from None
