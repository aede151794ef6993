"""`TileIndex`: manifests of one place, kept ready to be asked. No web framework, no decoding, plain Python.

Nothing has to be restarted when the tiler works on. A replaced manifest is noticed at the next request: files are told
apart by (mtime, size, inode), which costs one `stat`. The list of slides is brought up to date in the background, when
a folder of the tree says that something changed. Whoever asks gets one whole manifest, made at one moment.
"""

import dataclasses
import hashlib
import logging
import threading
import time
import unicodedata
from collections.abc import Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from manifests import Manifest, ManifestError, SlidegradError, shard
from manifests.privacy import without_paths
from services.cache import ByteCache, Flights, Meter
from services.errors import ServiceError, UnavailableError, UnknownSlideError, UnreadableManifestError
from services.labels import Labels, align_labels, read_labels
from services.queries import BBox, Draw, check_draw, draw_tiles, find_tiles
from services.search import CatalogSearch
from services.stores import Store, open_store

_log = logging.getLogger(__name__)
_THREADS = 4
"""Manifests read at a time."""
_OVERHEAD_BYTES = 4_096
"""Of a manifest in memory, beside its arrays."""
_MAX_SHARE = 0.1
"""Of the time at most spent on listing; an archive of which listing takes a second is listed every ten."""
_FRESH_S = 60
"""What is read from an address counts as unchanged for so long."""


@dataclass(frozen=True, eq=False)
class Catalog:
    """The catalogue and the labels as they were at `stamp`; `hash` changes with their content."""

    search: CatalogSearch
    hash: str
    stamp: Hashable

    @property
    def table(self) -> pa.Table:
        """One row per slide, sorted by slide_id; errors without paths."""
        return self.search.table


@dataclass(frozen=True, eq=False)
class HashedManifest:
    """A manifest and the BLAKE2b-128 of its content, in hex: of its file's bytes, if it has a file."""

    manifest: Manifest
    hash: str
    stamp: Hashable

    @property
    def slide_id(self) -> str:
        """Whose it is."""
        return self.manifest.slide.slide_id

    @cached_property
    def record_json(self) -> bytes:
        """The slide's record as JSON: every answer with tiles holds it."""
        return orjson.dumps(dataclasses.asdict(self.manifest.slide))

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        columns = (self.manifest.x_l0, self.manifest.y_l0, self.manifest.tissue)
        return _OVERHEAD_BYTES + sum(column.nbytes for column in columns)


@dataclass(frozen=True, eq=False)
class TileRows:
    """Some rows of a manifest, and what was asked to get them."""

    source: HashedManifest
    rows: NDArray[np.int64]
    num_matched: int
    """Rows that match, on all pages."""
    about: Mapping[str, Any]
    """What goes into the answer beside the rows."""


class TileIndex:
    """Answers queries about the manifests of one place; safe to call from many threads.

    Args:
        root: a folder or an address, of a tree or a compacted set.
        max_bytes: what manifests may take in memory; those asked least recently leave first.
        labels: a labels.csv, see `services.labels`.
        rescan_s: in the background the list of slides is brought up to date this often, once `start` was called.
        meter: who counts what is found in memory, and what is read.

    Raises:
        ManifestError: `root` holds no manifests.
        ServiceError: the labels cannot be used.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        max_bytes: int = 256 * 2**20,
        labels: Path | None = None,
        rescan_s: float = 10,
        meter: Meter | None = None,
    ) -> None:
        self._store: Store = open_store(root, fresh_s=max(rescan_s, _FRESH_S))
        self._labels_file, self._rescan_s = labels, rescan_s
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="tile-index")
        self._manifests: ByteCache[HashedManifest] = ByteCache(max_bytes, meter)
        self._loads: Flights[HashedManifest] = Flights(self._pool)
        self._draws: ByteCache[NDArray[np.int64]] = ByteCache(max_bytes // 16)
        self._refreshing = threading.Lock()
        self._stop = threading.Event()
        self._labels: Labels = {}
        self._labels_stamp: Hashable = None
        self._catalog = self._list()
        self.trouble = ""
        """Why the last refresh failed; empty where it did not."""

    def start(self) -> None:
        """Brings the list of slides up to date in the background from now on, until `close`."""
        threading.Thread(target=self._keep_fresh, name="tile-index-list", daemon=True).start()

    def close(self) -> None:
        """Ends the work in the background."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def catalog(self) -> Catalog:
        """The list of slides as it was found last."""
        return self._catalog

    def refresh(self) -> bool:
        """Brings the list of slides up to date; says whether it had changed.

        Raises:
            UnavailableError: it cannot be read now; the one before stays.
        """
        with self._refreshing:
            before = self._catalog
            try:
                if before.stamp != self._stamp():
                    self._catalog = self._list()
            except (SlidegradError, OSError, pa.ArrowException) as error:
                self.trouble = without_paths(str(error))
                _log.warning("the list of slides cannot be brought up to date: %s", self.trouble)
                raise UnavailableError("the manifests cannot be read now; the service's log says why") from None
            self.trouble = ""
            return self._catalog.hash != before.hash

    def check(self) -> None:
        """Raises UnavailableError where the manifests cannot be read now."""
        try:
            self._store.catalog_stamp()
        except (ManifestError, OSError) as error:
            _log.warning("not ready: %s", without_paths(str(error)))
            raise UnavailableError("the manifests cannot be read now; the service's log says why") from None
        if self.trouble:
            raise UnavailableError("the manifests could not be listed; the service's log says why")

    def held(self, slide_id: str) -> HashedManifest | None:
        """The slide's manifest if it is in memory as it is now; one `stat` and nothing slower.

        Raises:
            UnknownSlideError: there is none.
        """
        slide_id = unicodedata.normalize("NFC", slide_id)
        stamp = self._look(slide_id)
        return self._manifests.get(slide_id, lambda found: found.stamp == stamp)

    def is_current(self, source: HashedManifest) -> bool:
        """Whether the slide's manifest is still this one."""
        try:
            return self._store.stamp(source.slide_id) == source.stamp
        except OSError:
            return False

    def begin(self, slide_id: str) -> "Future[HashedManifest]":
        """Loads the slide's manifest in a thread, once however many ask for it; raises as `manifest`, there or here."""
        slide_id = unicodedata.normalize("NFC", slide_id)
        stamp = self._look(slide_id)
        return self._loads.begin((slide_id, stamp), lambda: self._load(slide_id, stamp))

    def manifest(self, slide_id: str) -> HashedManifest:
        """The slide's manifest as it is now.

        Raises:
            UnknownSlideError: there is none.
            UnreadableManifestError: it is damaged.
        """
        return self.held(slide_id) or self.begin(slide_id).result()

    def tiles(
        self, source: HashedManifest, *, bbox: BBox | None, min_tissue: float, limit: int, offset: int
    ) -> TileRows:
        """Tiles that intersect `bbox` (level-0 px) and hold at least `min_tissue`."""
        rows = find_tiles(source.manifest, bbox=bbox, min_tissue=min_tissue)
        about = {"offset": offset, "limit": limit}
        return TileRows(source, rows[offset : offset + limit], len(rows), about)

    def sample(self, source: HashedManifest, draw: Draw) -> TileRows:
        """The tiles of a step, or one part of them; raises as `services.queries.check_draw`.

        The parts of one step are asked for by many ranks at once: its rows are drawn for the first of them and kept.
        """
        check_draw(source.manifest, draw)
        if draw.num_parts == 1:
            rows = draw_tiles(source.manifest, draw)
        else:
            key = (source.hash, draw.k, draw.seed, draw.epoch)
            found = self._draws.get(key)
            if found is None:
                found = draw_tiles(source.manifest, draw)
                self._draws.put(key, found, found.nbytes)
            rows = shard(found, part=draw.part, num_parts=draw.num_parts)
        return TileRows(source, rows, len(rows), dataclasses.asdict(draw))

    def labels_of(self, slide_id: str) -> dict[str, str] | None:
        """The slide's labels; None where the service has no labels."""
        return self._catalog.search.labels_of(slide_id) if self._labels_file else None

    def _look(self, slide_id: str) -> Hashable:
        try:
            return self._store.stamp(slide_id)
        except (FileNotFoundError, NotADirectoryError, UnicodeEncodeError):
            raise UnknownSlideError(f"no slide {slide_id[:200]!r}") from None
        except OSError as error:
            raise self._unreadable(slide_id, error) from None

    def _load(self, slide_id: str, stamp: Hashable) -> HashedManifest:
        found = self._manifests.get(slide_id, lambda kept: kept.stamp == stamp)
        if found is not None:  # Somebody else was quicker by a moment.
            return found
        try:
            manifest, digest = self._store.load(slide_id)
        except FileNotFoundError:
            raise UnknownSlideError(f"no slide {slide_id[:200]!r}") from None
        except (ManifestError, OSError) as error:
            raise self._unreadable(slide_id, error) from None
        if manifest.slide.slide_id != slide_id:  # Another id may lead to the same file, on disk or by its case.
            raise UnknownSlideError(f"no slide {slide_id[:200]!r}")
        slide = dataclasses.replace(manifest.slide, error=without_paths(manifest.slide.error))
        found = HashedManifest(dataclasses.replace(manifest, slide=slide), digest, stamp)
        self._manifests.put(slide_id, found, found.num_bytes)
        return found

    def _unreadable(self, slide_id: str, error: Exception) -> UnreadableManifestError:
        _log.error("slide %s: its manifest cannot be read: %s", slide_id, without_paths(str(error)))
        return UnreadableManifestError(
            f"slide {slide_id}: its manifest cannot be read; the service's log says why, tile the slide again"
        )

    def _stamp(self) -> tuple[Hashable, Hashable]:
        """Of the list, and of the labels."""
        try:
            labels = None if self._labels_file is None else self._labels_file.stat().st_mtime_ns
        except OSError as error:
            raise ServiceError(f"--labels {self._labels_file}: not readable ({error.strerror})") from None
        return self._store.catalog_stamp(), labels

    def _list(self) -> Catalog:
        """The catalogue as it is now."""
        stamp = self._stamp()  # Before reading: what changes meanwhile is seen the next time.
        table = _without_paths(self._store.catalog().replace_schema_metadata())
        labels = None
        if self._labels_file is not None:
            if stamp[1] != self._labels_stamp:
                self._labels, self._labels_stamp = read_labels(self._labels_file), stamp[1]
            labels = align_labels(self._labels, table["slide_id"].to_pylist())
        return Catalog(CatalogSearch(table, labels), _hash_tables(table, labels), stamp)

    def _keep_fresh(self) -> None:
        pause_s = self._rescan_s
        while not self._stop.wait(pause_s):
            began_s = time.monotonic()
            try:
                self.refresh()
            except UnavailableError:
                pass
            except Exception:  # noqa: BLE001 - a thread that ends would leave the list as it is for ever
                _log.exception("bringing the list of slides up to date failed")
            pause_s = max(self._rescan_s, (time.monotonic() - began_s) / _MAX_SHARE)


def _without_paths(table: pa.Table) -> pa.Table:
    """Errors of readers like to repeat paths."""
    errors = table["error"].combine_chunks().dictionary_encode()
    said = pa.array([without_paths(error) for error in errors.dictionary.to_pylist()], pa.string())
    return table.set_column(table.schema.get_field_index("error"), "error", said.take(errors.indices))


def _hash_tables(*tables: pa.Table | None) -> str:
    told = hashlib.blake2b(digest_size=16)
    for table in tables:
        if table is not None:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table.combine_chunks())
            told.update(sink.getvalue())
    return told.hexdigest()
