"""What the service is told when it starts: arguments first, then environment variables SLIDEGRAD_<FIELD>."""

import ipaddress
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, PositiveFloat, PositiveInt
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from services.errors import ServiceError

_MIN_TOKEN_CHARS = 16


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only be this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Limits(BaseSettings):
    """How much one request, one client and one worker may take."""

    model_config = SettingsConfigDict(env_prefix="SLIDEGRAD_", frozen=True, extra="forbid")

    max_slides: PositiveInt = 1_000
    """Slides per page of the list; 100 unless asked for."""
    max_tiles: PositiveInt = 200_000
    """Tiles per answer; 100,000 unless asked for. Slides with more are told in pages."""
    max_geojson_tiles: PositiveInt = 20_000
    """Tiles per answer as GeoJSON, which takes 250 bytes a tile, ten times what Arrow does."""
    max_k: PositiveInt = 262_144
    """Tiles per sample."""
    max_header_bytes: PositiveInt = 16_384
    """Address and headers of a request; more is answered 431."""
    max_requests: PositiveInt = 512
    """Requests in hand per worker; more are answered 503 with Retry-After."""
    max_connections: PositiveInt = 4_096
    """Connections per worker; more are closed with 503."""
    request_s: PositiveFloat = 30
    """A request that takes longer is answered 503."""
    header_s: PositiveFloat = 10
    """A client that takes longer to send its headers is dropped."""
    stalled_s: PositiveFloat = 30
    """A client that reads nothing of its answer for so long is dropped."""
    max_manifests_mb: PositiveInt = 256
    """Manifests kept in memory per worker; 45,056 tiles take 0.5 MB."""
    max_answers_mb: PositiveInt = 64
    """Whole answers kept in memory per worker, as they are sent."""
    decode_processes: PositiveInt = 2
    """Processes per worker that read thumbnails and tiles."""
    decode_time_s: PositiveFloat = 20
    """What one picture may take."""
    decode_memory_gb: PositiveFloat = 2
    """Resident memory that one of these processes may take."""
    picture_cache_mb: PositiveInt = 64
    """Thumbnails and areas kept in memory per worker, as JPEG and PNG."""


def _check_root_path(path: str) -> str:
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)*", path) or path.startswith("/v1"):
        raise ValueError("expected a path such as /tiles, without a slash at its end, and not /v1")
    return path


def _split(text: object) -> object:
    return tuple(filter(None, (part.strip() for part in text.split(",")))) if isinstance(text, str) else text


_Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
"""As a variable: separated by commas."""


class Settings(Limits):
    """The service's settings."""

    manifests: Path
    """A folder or an address, of a tree of manifests or a compacted set."""
    token_file: Path | None = None
    """A file with the token that every request must carry."""
    runs: Path | None = None
    """A run's folder, or one that holds runs: their heatmaps are shown on the page."""
    archive: Path | None = None
    """Where the slides are mounted here, if not where they were when they were tiled."""
    labels: Path | None = None
    """A labels.csv whose columns slides can be filtered by; patient_id and specimen_id are never served."""
    root_path: Annotated[str, AfterValidator(_check_root_path)] = ""
    """Where a reverse proxy has the service, such as /tiles."""
    allow_host: _Names = ()
    """Names that the service answers to beside this machine's own; with a token and none given, to any."""
    cors: _Names = ()
    """Origins whose pages may read answers, such as https://viewer.example; none unless given."""
    log_json: bool = False
    """A line of JSON on stderr for each request, and for all else that is logged."""
    rescan_s: PositiveFloat = 10
    """How often it is looked whether the list of slides changed."""

    def read_token(self) -> str | None:
        """The token, or None where none is asked for.

        Raises:
            ServiceError: the file cannot be read, or its token is short or not ASCII.
        """
        if self.token_file is None:
            return None
        try:
            token = self.token_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not ASCII text"
            raise ServiceError(f"--token-file {self.token_file}: {reason}") from None
        if len(token) < _MIN_TOKEN_CHARS:
            found = f"the token has {len(token)} characters, expected at least {_MIN_TOKEN_CHARS}"
            raise ServiceError(f"--token-file {self.token_file}: {found}")
        return token
