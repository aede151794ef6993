"""The catalogue and the path lists: small tables beside the manifests.

`catalog.parquet` is a cache: any number of writers may rebuild it from `tiles/` at any time, without locks. It
remembers when its listing of `tiles/` began, by the file system's own clock, so that a rebuild reads only the
manifests that appeared since: seconds for half a million slides, not an hour.

`paths/` is the only place where file names are kept (file names at hospitals often hold names of people), readable by
its owner alone. It also keeps how each slide file looked (size, time of change) when its fingerprint was last
computed, so that a second run need not open the slides. The fingerprint itself knows no clock.
"""

import contextlib
import itertools
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.errors import ManifestError
from manifests.files import atomic_path, read_record, read_table, tiles_key
from manifests.schema import CATALOG_SCHEMA, SlideRecord, records_to_catalog

_log = logging.getLogger(__name__)
_METADATA_KEY = b"slidegrad"
_SLACK_NS = 60 * 10**9
"""A manifest is written, synced, then named: it may be older than a listing that did not see it yet, by so much."""
_LEFTOVER_NS = 24 * 3600 * 10**9
_THREADS = 8
"""Footers read at a time: on network file systems the wait is latency."""
_BATCH = 4_096
_PATHS_SCHEMA = pa.schema(
    [
        ("slide_id", pa.string()),
        ("archive", pa.string()),
        ("path", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("fingerprint", pa.string()),
    ]
)


class Place(NamedTuple):
    """Where a slide lies, and how the file looked when `fingerprint` was computed ("" where it was not yet)."""

    archive: str
    """The folder that `path` is relative to."""
    path: str
    size: int = -1
    mtime_ns: int = -1
    fingerprint: str = ""

    @property
    def file(self) -> str:
        """The slide file."""
        return f"{self.archive}/{self.path}"


def scan_catalog(root: Path, known: pa.Table | None = None) -> pa.Table:
    """The catalogue as `tiles/` has it now; writes nothing. An unreadable manifest is passed over with a warning.

    Args:
        root: the manifests root.
        known: an earlier catalogue with its metadata; rows of manifests that did not change since are taken from it.
    """
    return rescan_catalog(root, known).replace_schema_metadata()


def rescan_catalog(root: Path, known: pa.Table | None = None) -> pa.Table:
    """As `scan_catalog`, with the metadata that makes the answer `known` to the next call."""
    started, started_s = time.time_ns(), time.monotonic()
    listed = _list_tiles(root)
    # Where nothing may be written the file system's clock is told by its newest file; the listing took this long.
    newest = min(started, max(listed.values(), default=0))
    scanned_at = newest - round(1e9 * (time.monotonic() - started_s))
    return _mark(_scan_since(root, listed, known)[0], max(0, scanned_at))


def _scan_since(root: Path, listed: Mapping[str, int], known: pa.Table | None) -> tuple[pa.Table, int]:
    """The catalogue of what is listed, and how many manifests had to be read for it."""
    changed = dict(listed)
    kept = CATALOG_SCHEMA.empty_table()
    if known is not None and (since := _scanned_at(known)):
        keys = [tiles_key(slide_id) for slide_id in known.column("slide_id").to_pylist()]
        keep = [changed.get(key, since) < since - _SLACK_NS for key in keys]
        kept = known.filter(pa.array(keep, pa.bool_())).replace_schema_metadata()
        for key in itertools.compress(keys, keep):
            del changed[key]
    batches = [_to_rows(records) for records in _read_records(root, sorted(changed))]
    return pa.concat_tables([kept, *batches]).sort_by("slide_id"), len(changed)


def rebuild_catalog(root: Path) -> pa.Table:
    """Brings `catalog.parquet` up to what lies in `tiles/` and returns it; removes leftovers of killed writers.

    Any number of writers may do this at once. Where nothing changed nothing is written.
    """
    known, started = read_known(root), _file_clock(root)
    catalog, num_read = _scan_since(root, _list_tiles(root), known)
    if known is not None and not num_read and catalog.equals(known):
        return known
    catalog = _mark(catalog, started)
    with atomic_path(root / "catalog.parquet") as partial:
        pq.write_table(catalog, partial, compression="zstd")
    for folder in ("tiles", "masks"):
        _remove_leftovers(root / folder, older_than_ns=started - _LEFTOVER_NS)
    return catalog


def read_catalog(root: Path) -> pa.Table:
    """The catalogue; rebuilt if it is not there or cannot be read.

    Raises:
        ManifestError: `root` holds no manifests.
    """
    if not (root / "tiles").is_dir():
        raise ManifestError(f"{root}: no manifests here (no folder tiles/); run `slidegrad tile ARCHIVE --out {root}`")
    known = read_known(root)
    return rebuild_catalog(root) if known is None else known


def read_known(root: Path) -> pa.Table | None:
    """The catalogue as it was last written, or None where there is none that can be used."""
    try:
        catalog = read_table(root / "catalog.parquet")
    except (OSError, pa.ArrowException):
        return None
    return catalog if catalog.schema.equals(CATALOG_SCHEMA) else None


def _file_clock(root: Path) -> int:
    """Now, ns, by the clock of the file system under `root`: the one that the manifests' times are by."""
    with tempfile.NamedTemporaryFile(dir=root, prefix=".clock.", suffix=".tmp") as probe:
        return os.fstat(probe.fileno()).st_mtime_ns


def _mark(catalog: pa.Table, scanned_at_ns: int) -> pa.Table:
    return catalog.replace_schema_metadata({_METADATA_KEY: json.dumps({"scanned_at_ns": scanned_at_ns})})


def _scanned_at(catalog: pa.Table) -> int:
    mark = (catalog.schema.metadata or {}).get(_METADATA_KEY, b"{}")
    return int(json.loads(mark).get("scanned_at_ns", 0))


def _list_tiles(root: Path) -> dict[str, int]:
    """`xx/name` of every manifest to its time of change, ns."""
    found: dict[str, int] = {}
    for entry in _scan_shards(root / "tiles"):
        if entry.name.endswith(".parquet"):
            state = entry.stat()
            # A rename changes the ctime: a manifest that came late by its name is seen as new.
            key = f"{entry.path.split('/')[-2]}/{entry.name.removesuffix('.parquet')}"
            found[key] = max(state.st_mtime_ns, state.st_ctime_ns)
    return found


def _remove_leftovers(folder: Path, *, older_than_ns: int) -> None:
    """Removes what killed writers left. Others may do the same, or name their file, at this moment."""
    for entry in _scan_shards(folder):
        if entry.name.endswith(".tmp"):
            with contextlib.suppress(OSError):
                if entry.stat().st_mtime_ns < older_than_ns:
                    os.unlink(entry.path)


def _scan_shards(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What lies in the folders of a folder; nothing if it is not there."""
    if not folder.is_dir():
        return
    with os.scandir(folder) as shards:
        for shard in [shard for shard in shards if shard.is_dir()]:
            with os.scandir(shard) as entries:
                yield from entries


def _read_records(root: Path, keys: list[str]) -> Iterator[list[SlideRecord]]:
    """Records in batches, many footers at a time."""

    def read(key: str) -> SlideRecord | None:
        try:
            record = read_record(root / "tiles" / f"{key}.parquet")
            if tiles_key(record.slide_id) != key:
                raise ManifestError(f"{root}/tiles/{key}.parquet: holds slide {record.slide_id}, which lies elsewhere")
        except ManifestError as error:
            _log.warning("left out of the catalogue: %s", error)
            return None
        return record

    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(keys), _BATCH):
            batch = pool.map(read, keys[start : start + _BATCH])
            yield [record for record in batch if record is not None]


def _to_rows(records: list[SlideRecord]) -> pa.Table:
    """Catalogue rows; a record with values that no column can hold is passed over with a warning."""
    try:
        return records_to_catalog(records)
    except (pa.ArrowException, OverflowError) as error:
        if len(records) == 1:
            _log.warning("left out of the catalogue: slide %s (%s)", records[0].slide_id, error)
            return CATALOG_SCHEMA.empty_table()
        half = len(records) // 2
        return pa.concat_tables([_to_rows(records[:half]), _to_rows(records[half:])])


def write_paths(root: Path, writer: str, places: Mapping[str, Place]) -> None:
    """Records where slides lie, in one small file per writer; the same writer's earlier file is replaced.

    Args:
        root: the manifests root.
        writer: a name for the process and what it works on, safe as a file name.
        places: by slide_id.
    """
    ids = sorted(places)
    rows = list(zip(*(places[slide_id] for slide_id in ids), strict=True)) or [()] * 5
    table = pa.Table.from_arrays([pa.array(ids, pa.string()), *map(pa.array, rows)], names=_PATHS_SCHEMA.names)
    with atomic_path(root / "paths" / f"{writer}.parquet", mode=0o600) as partial:
        partial.touch(mode=0o600)
        pq.write_table(table.cast(_PATHS_SCHEMA), partial, compression="zstd")


def read_places(root: Path) -> dict[str, Place]:
    """slide_id to its place, from all writers, the latest file winning.

    Raises:
        ManifestError: a path list that cannot be read.
    """
    return {slide_id: place for file in _path_lists(root) for slide_id, place in _read_path_list(file)}


def find_place(root: Path, slide_id: str) -> Place | None:
    """One slide's place, as `read_places` has it; None where no list names it. Only rows that may hold it are read.

    Raises:
        ManifestError: a path list that cannot be read.
    """
    for file in reversed(_path_lists(root)):
        for _, place in _read_path_list(file, slide_id):
            return place
    return None


def _path_lists(root: Path) -> list[Path]:
    return sorted((root / "paths").glob("*.parquet"), key=lambda file: file.stat().st_mtime_ns)


def _read_path_list(file: Path, slide_id: str | None = None) -> Iterator[tuple[str, Place]]:
    """What a path list holds, or what it holds of one slide."""
    only = None if slide_id is None else [("slide_id", "=", slide_id)]
    try:
        table = pq.read_table(file, schema=_PATHS_SCHEMA, filters=only)  # Columns that an older list lacks are null.
    except PermissionError:
        raise ManifestError(
            f"{file}: belongs to another user, who alone may read where slides lie; work as that user, or ask for "
            "the right to read it"
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise ManifestError(
            f"{file}: path list not readable ({type(error).__name__}); delete it and tile the archive again"
        ) from None
    columns = [table.column(name).to_pylist() for name in _PATHS_SCHEMA.names]
    for found_id, archive, path, size, mtime_ns, fingerprint in zip(*columns, strict=True):
        yield found_id, Place(archive, path, -1 if size is None else size, mtime_ns or -1, fingerprint or "")


def read_paths(root: Path, archive: Path | None = None) -> dict[str, Path]:
    """slide_id to slide file.

    Args:
        root: the manifests root.
        archive: where the archive is mounted on this machine, if not where it was when it was tiled.
    """
    return {slide_id: (archive or Path(place.archive)) / place.path for slide_id, place in read_places(root).items()}
