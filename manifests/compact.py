"""Many manifests into few files: `compact` makes a set out of a tree, or out of another set.

Half a million small files are slow to list, copy and keep; a set holds them in one file per thousand slides. The shards
come first, under names made of their content; the catalogue that knows them is renamed into place last. So a set is
the old one or the new one at any moment, and readers of the old one never see tiles of the new.
"""

import contextlib
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.errors import ManifestError
from manifests.parse import Parsed
from manifests.schema import TILE_SCHEMA, records_to_catalog
from manifests.sets import NOWHERE, Contents, Shard
from manifests.source import LocalManifests, StoredSource, is_set
from manifests.writing import told_as

SLIDES_PER_SHARD = 1_000
_AT_ONCE = 64
"""Manifests held in memory: 0.5 MB each for the paper's largest slides."""
_THREADS = 8
LEFTOVER_S = 24 * 3600
"""From this age on nobody can be at work on a file that nothing names."""


@dataclass(frozen=True, kw_only=True)
class Compacted:
    """What was written."""

    num_slides: int
    num_tiles: int
    num_shards: int
    num_bytes: int


def compact(source: StoredSource, out: Path, *, progress: Callable[[int], None] | None = None) -> Compacted:
    """Writes a set; equal manifests give equal bytes.

    Args:
        source: see `manifests.source.open_stored`.
        out: the set's folder; a set that is there is replaced once the new one is whole.
        progress: called after each slide with the number of slides in all.

    Raises:
        ManifestError: a manifest that cannot be read, nothing to compact, or `out` is a folder with something else or
            one that cannot be written to.
    """
    with told_as(ManifestError, out):
        return _compact(source, out, progress)


def _compact(source: StoredSource, out: Path, progress: Callable[[int], None] | None) -> Compacted:
    _look_at_out(out)
    if isinstance(source, LocalManifests):
        source = _up_to_date(source)
    ids = list(source)
    if not ids:
        raise ManifestError("nothing to compact: no manifests; run `slidegrad tile` first")

    def tick() -> None:
        if progress is not None:
            progress(len(ids))

    with _building(out) as building:
        tables, shards, tilers = list[pa.Table](), list[Shard](), dict[str, int]()
        for start in range(0, len(ids), SLIDES_PER_SHARD):
            batch = ids[start : start + SLIDES_PER_SHARD]
            table, shard = _write_shard(building, _read_ahead(source, batch, tick), batch, len(shards), tilers)
            tables.append(table)
            shards += [shard] if shard else []
        contents = Contents(shards=tuple(shards), tilers=tuple(tilers))
        catalog = contents.describe(pa.concat_tables(tables).combine_chunks())
        pq.write_table(catalog, building / "catalog.parquet", compression="zstd", write_page_checksum=True)
        _sync(building / "catalog.parquet")
        num_bytes = sum(shard.num_bytes for shard in shards) + (building / "catalog.parquet").stat().st_size
        _move_in(building, out, shards)
    num_tiles = sum(sum(table["num_tiles"].to_numpy().tolist()) for table in tables)
    return Compacted(num_slides=len(ids), num_tiles=num_tiles, num_shards=len(shards), num_bytes=num_bytes)


def _look_at_out(out: Path) -> None:
    """Only a set, or what a killed run left of one, is written over."""
    if out.exists() and not out.is_dir():
        raise ManifestError(f"{out}: a file; give a folder for the set")
    if not out.exists():
        return
    names = {entry.name for entry in out.iterdir() if not entry.name.endswith(".tmp")}
    if names - {"shards", "catalog.parquet"} or ("catalog.parquet" in names and not is_set(out)):
        raise ManifestError(f"{out}: holds something other than a set; give a new folder, or that of a set to replace")


def _up_to_date(source: LocalManifests) -> LocalManifests:
    """The source as it is now, if it lists every manifest there is: none is left out of the set in silence."""
    source = LocalManifests(source.root)
    if unlisted := source.unlisted():
        raise ManifestError(
            f"{unlisted[0]}: a manifest that cannot be used, one of {len(unlisted)}; "
            f"`slidegrad manifest validate {source.root}` tells which and why"
        )
    return source


@contextlib.contextmanager
def _building(out: Path) -> Iterator[Path]:
    """A folder inside `out` to build in; it goes in the end, and `out` with it if nothing came of it."""
    building = out / f".compact.{uuid.uuid4().hex}.tmp"
    building.mkdir(parents=True)
    try:
        for leftover in out.glob(".compact.*.tmp"):
            if time.time() - leftover.stat().st_mtime > LEFTOVER_S:
                shutil.rmtree(leftover, ignore_errors=True)
        yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)
        with contextlib.suppress(OSError):  # Not empty: there is a set.
            (out / "shards").rmdir()
        with contextlib.suppress(OSError):
            out.rmdir()


def _write_shard(
    building: Path, read: Iterable[Parsed], ids: list[str], number: int, tilers: dict[str, int]
) -> tuple[pa.Table, Shard | None]:
    """Writes the next shard, if any of these slides has tiles, and returns its rows of the catalogue."""
    file = building / "next.parquet"
    records, groups, configs = [], [], []
    num_groups = 0
    with pq.ParquetWriter(
        file, TILE_SCHEMA, compression="zstd", write_page_checksum=True, write_statistics=False
    ) as writer:
        for parsed in read:
            manifest = parsed.manifest
            records.append(manifest.slide)
            configs.append(tilers.setdefault(parsed.tiler_json, len(tilers)))
            groups.append(num_groups if len(manifest) else NOWHERE)
            if len(manifest):
                writer.write_table(manifest.to_table(), row_group_size=len(manifest))
                num_groups += 1
    rows = records_to_catalog(records)
    if rows["slide_id"].to_pylist() != ids:
        raise ManifestError("a manifest names another slide than its place; `slidegrad manifest validate` tells which")
    places = {"shard": [number if group != NOWHERE else NOWHERE for group in groups], "row_group": groups}
    for name, values in {**places, "tiler": configs}.items():
        rows = rows.append_column(name, pa.array(values, pa.int32()))
    if not num_groups:
        file.unlink()
        return rows, None
    return rows, _name_by_content(file)


def _read_ahead(source: StoredSource, ids: list[str], tick: Callable[[], None]) -> Iterator[Parsed]:
    """Manifests in order, several at a time: on a network the wait is latency."""
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for start in range(0, len(ids), _AT_ONCE):
            for found in pool.map(source.read, ids[start : start + _AT_ONCE]):
                yield found
                tick()
    finally:
        pool.shutdown(cancel_futures=True)


def _name_by_content(file: Path) -> Shard:
    with file.open("rb") as stream:
        name = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        num_bytes = stream.seek(-8, os.SEEK_END) + 8
        footer_bytes = int.from_bytes(stream.read(4), "little") + 8  # Parquet ends with footer, its length, PAR1.
    _sync(file)
    file.rename(file.with_name(f"{name}.parquet"))
    return Shard(name=name, num_bytes=num_bytes, footer_bytes=footer_bytes)


def _move_in(building: Path, out: Path, shards: list[Shard]) -> None:
    """Shards first, then the catalogue, then old shards that it does not know go.

    Another run may be at work on the same set: a young shard may be one that its catalogue will name. So those that
    an interruption leaves here stay for a day, too.
    """
    (out / "shards").mkdir(exist_ok=True)
    for shard in shards:
        (building / f"{shard.name}.parquet").replace(out / shard.file)
    (building / "catalog.parquet").replace(out / "catalog.parquet")
    try:
        schema = pq.read_schema(out / "catalog.parquet")  # Not ours any more, where the other run was later.
        named = {Path(shard.file).name for shard in Contents.of(schema.empty_table(), str(out)).shards}
    except (OSError, pa.ArrowException, ManifestError):
        return
    for file in (out / "shards").glob("*.parquet"):
        if file.name not in named:
            with contextlib.suppress(OSError):
                if time.time() - file.stat().st_mtime > LEFTOVER_S:
                    file.unlink()


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
