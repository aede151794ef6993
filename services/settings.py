"""What the service is told when it starts: arguments first, then environment variables SLIDEGRAD_<FIELD>."""

from pathlib import Path

from pydantic import PositiveFloat, PositiveInt
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.errors import ServiceError

_MIN_TOKEN_CHARS = 16


class Settings(BaseSettings):
    """The service's settings; each limit answers 400 when a request goes beyond it."""

    model_config = SettingsConfigDict(env_prefix="SLIDEGRAD_", frozen=True, extra="forbid")

    manifests: Path
    """The manifests folder."""
    token_file: Path | None = None
    """A file with the token that every request must carry."""
    runs: Path | None = None
    """A run's folder, or one that holds runs: their heatmaps are shown on the page."""
    archive: Path | None = None
    """Where the slides are mounted here, if not where they were when they were tiled."""
    decode_processes: PositiveInt = 2
    """Processes that read thumbnails and tiles."""
    decode_time_s: PositiveFloat = 20
    """What one picture may take."""
    decode_memory_gb: PositiveFloat = 2
    """Resident memory that one of these processes may take."""
    picture_cache_mb: PositiveInt = 64
    """Thumbnails and areas kept in memory, as JPEG and PNG."""
    max_cached_manifests: PositiveInt = 64
    """Manifests kept in memory; 45,056 tiles take 0.5 MB."""
    max_slides: PositiveInt = 1_000
    """Slides per page of the list; 100 unless asked for."""
    max_tiles: PositiveInt = 200_000
    """Tiles per answer; 100,000 unless asked for. Slides with more are told in pages."""
    max_k: PositiveInt = 262_144
    """Tiles per sample."""
    max_draws_per_tile: PositiveInt = 10_000
    """k per tile of the slide: each pass over a tiny slide costs about 0.15 ms, whatever its size."""

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
