"""Files that appear whole or not at all, and where each thing lies under a manifests root.

Everything that writes under MANIFESTS/ or RUN/ goes through `atomic_path`: written beside, flushed, fsynced, renamed.
Concurrent writers of one file leave one of the versions, never a mixture.
"""

import contextlib
import hashlib
import os
import re
import unicodedata
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.errors import ManifestError
from manifests.parse import METADATA_KEY, parse_manifest
from manifests.schema import TILE_SCHEMA, Manifest, SlideRecord

_MAX_NAME_BYTES = 120
_PLAIN_NAME = re.compile(rf"[A-Za-z0-9_-][A-Za-z0-9._-]{{0,{_MAX_NAME_BYTES - 1}}}")


@contextlib.contextmanager
def atomic_path(final: Path, *, mode: int | None = None) -> Iterator[Path]:
    """Yields a path beside `final` to write to; renames it to `final` on success, removes it on any error.

    Args:
        final: where the file shall appear; its folder is made.
        mode: permission bits, set before the file gets its name.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    # Leading dot and trailing .tmp: no listing by suffix takes a half-written file for a whole one.
    partial = final.with_name(f".{final.name[:80]}.{uuid.uuid4().hex}.tmp")
    try:
        yield partial
        if mode is not None:
            partial.chmod(mode)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)


def write_text(final: Path, text: str) -> None:
    """Writes a whole text file atomically."""
    with atomic_path(final) as partial:
        partial.write_text(text, encoding="utf-8")


def disk_name(slide_id: str) -> str:
    """The slide id as a file stem: `[A-Za-z0-9._-]`, at most 120 bytes, a hash appended where anything was changed."""
    if _PLAIN_NAME.fullmatch(slide_id):
        return slide_id
    name = re.sub(r"[^A-Za-z0-9._-]", "_", unicodedata.normalize("NFC", slide_id))
    return f"{name.lstrip('.')[: _MAX_NAME_BYTES - 13]}-{hashlib.blake2b(slide_id.encode(), digest_size=6).hexdigest()}"


def tiles_key(slide_id: str) -> str:
    """`xx/name`: the folder and the stem of all that is kept of a slide."""
    return f"{hashlib.blake2b(slide_id.encode()).hexdigest()[:2]}/{disk_name(slide_id)}"


def tiles_path(root: Path, slide_id: str) -> Path:
    """Where a slide's manifest lies."""
    return root / "tiles" / f"{tiles_key(slide_id)}.parquet"


def mask_path(root: Path, slide_id: str) -> Path:
    """Where a slide's tissue mask and thumbnail lie."""
    return root / "masks" / f"{tiles_key(slide_id)}.zarr.zip"


def write_manifest(file: Path, manifest: Manifest, config_json: str = "{}") -> None:
    """Writes one manifest atomically.

    Args:
        file: see `tiles_path`.
        manifest: the slide's record and tiles; failed and empty slides have zero tiles.
        config_json: the resolved tiler config, kept beside the record.
    """
    record = manifest.slide.to_json()[:-1] + f', "tiler": {config_json}}}'
    table = manifest.to_table().replace_schema_metadata({METADATA_KEY: record.encode()})
    with atomic_path(file) as partial:
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)


def read_table(file: Path) -> pa.Table:
    """Reads a Parquet file that others may replace meanwhile: opened once, where `pq.read_table` opens it twice."""
    with pq.ParquetFile(file, page_checksum_verification=True) as opened:
        return opened.read()


def read_manifest(file: Path | str) -> Manifest:
    """Reads one manifest.

    Raises:
        ManifestError: no such file, a torn or damaged file, or another schema.
    """
    with _guarded(file):
        return parse_manifest(Path(file).read_bytes(), str(file)).manifest


def read_hashed(file: Path) -> tuple[Manifest, str]:
    """One manifest, and the BLAKE2b-128 of its file's bytes, hex; raises as `read_manifest`."""
    with _guarded(file):
        return parse_hashed(file.read_bytes(), str(file))


def parse_hashed(content: bytes, where: str) -> tuple[Manifest, str]:
    """One manifest from its file's bytes, and their BLAKE2b-128, hex, by which versions of it are told apart.

    Args:
        content: the bytes.
        where: what errors call them.

    Raises:
        ManifestError: damaged, or another schema.
    """
    return parse_manifest(content, where).manifest, hashlib.blake2b(content, digest_size=16).hexdigest()


def read_record(file: Path | str) -> SlideRecord:
    """Reads only a manifest's record, from the footer; raises as `read_manifest`, but does not look for damage."""
    with _guarded(file):
        schema = pq.read_schema(file)
        if not schema.remove_metadata().equals(TILE_SCHEMA):
            raise ManifestError(f"{file}: columns {schema.names}, expected {TILE_SCHEMA.names}")
    return SlideRecord.from_json((schema.metadata or {}).get(METADATA_KEY, b""), str(file))


@contextlib.contextmanager
def _guarded(file: Path | str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ManifestError(f"{file}: no such manifest") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # The last: a damaged column name.
        raise ManifestError(f"{file}: not a readable manifest ({error})") from None
