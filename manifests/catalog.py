"""The catalogue and the path lists: small tables beside the manifests.

`catalog.parquet` is a cache: any writer may rebuild it from `tiles/` at any time, without locks. `paths/` is the only
place where file names are kept (file names at hospitals often hold names of people), readable by its owner alone.
"""

import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.errors import ManifestError
from manifests.files import atomic_path, read_record, read_table
from manifests.schema import CATALOG_SCHEMA, SlideRecord, records_to_catalog

_log = logging.getLogger(__name__)
_PATHS_SCHEMA = pa.schema([("slide_id", pa.string()), ("archive", pa.string()), ("path", pa.string())])


def scan_records(root: Path) -> list[SlideRecord]:
    """Every slide's record, read from the manifests' footers; an unreadable one is passed over with a warning."""
    records = []
    for file in sorted((root / "tiles").glob("??/*.parquet")):
        try:
            records.append(read_record(file))
        except ManifestError as error:
            _log.warning("left out of the catalogue: %s", error)
    return records


def rebuild_catalog(root: Path) -> pa.Table:
    """Writes `catalog.parquet` from what lies in `tiles/` and returns it."""
    catalog = records_to_catalog(scan_records(root))
    with atomic_path(root / "catalog.parquet") as partial:
        pq.write_table(catalog, partial, compression="zstd")
    return catalog


def read_catalog(root: Path) -> pa.Table:
    """The catalogue; rebuilt if it is not there or cannot be read.

    Raises:
        ManifestError: `root` holds no manifests.
    """
    if not (root / "tiles").is_dir():
        raise ManifestError(f"{root}: no manifests here (no folder tiles/); run `slidegrad tile ARCHIVE --out {root}`")
    try:
        catalog = read_table(root / "catalog.parquet")
        if catalog.schema.equals(CATALOG_SCHEMA):
            return catalog
    except (OSError, pa.ArrowException):
        pass
    return rebuild_catalog(root)


def write_paths(root: Path, archive: Path, paths: Mapping[str, str]) -> None:
    """Records where slides lie, in one small file per writing process and moment.

    Args:
        root: the manifests root.
        archive: the folder the paths are relative to.
        paths: slide_id to path under the archive.
    """
    table = pa.Table.from_pylist(
        [{"slide_id": s, "archive": str(archive), "path": p} for s, p in sorted(paths.items())], schema=_PATHS_SCHEMA
    )
    with atomic_path(root / "paths" / f"{os.uname().nodename}-{uuid.uuid4().hex}.parquet", mode=0o600) as partial:
        partial.touch(mode=0o600)
        pq.write_table(table, partial)


def read_paths(root: Path, archive: Path | None = None) -> dict[str, Path]:
    """slide_id to slide file, from all writers, the latest file winning.

    Args:
        root: the manifests root.
        archive: where the archive is mounted on this machine, if not where it was when it was tiled.
    """
    files = sorted((root / "paths").glob("*.parquet"), key=lambda file: file.stat().st_mtime_ns)
    found: dict[str, Path] = {}
    for file in files:
        try:
            rows = pq.read_table(file, schema=_PATHS_SCHEMA).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise ManifestError(
                f"{file}: path list not readable ({type(error).__name__}); tile the archive again"
            ) from None
        for row in rows:
            found[row["slide_id"]] = (archive or Path(row["archive"])) / row["path"]
    return found
