"""Tile coordinates from a service (`slidegrad train --index URL`), with the manifests folder behind it.

When a run begins, `RUN/manifests.parquet` is written: the catalogue's rows of the cohort's slides, each with the hash
of its manifest. From then on a rank takes a slide's manifest from the service, or from the folder while the service
does not give it, but only one with that hash. So every rank decides alone and at once, and no two of them, nor a run
and its resumption, ever use two versions of a slide. A slide of which neither has the run's version fails as one that
cannot be read does: the group is told, and skips it.
"""

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from manifests import Manifest, ManifestError
from manifests.answers import NUM_TRIES, ServiceAwayError, ServiceClient
from manifests.checks import check_manifest
from manifests.files import atomic_path, read_hashed, read_table, tiles_path
from manifests.schema import CATALOG_SCHEMA
from manifests.service import ServiceManifests
from tiler.progress import Counter
from trainer.errors import TrainerError
from trainer.targets import few

_FILE, _HASH = "manifests.parquet", "manifest_hash"
_SCHEMA = pa.schema([*CATALOG_SCHEMA, pa.field(_HASH, pa.string())])
_AT_ONCE = 8
"""Slides asked for at a time when a run begins."""
_AGAIN_S = 30.0
"""After which a service that did not answer is asked again, once."""
_KEPT_BYTES = 256_000_000
"""Of a rank's memory: manifests of 500 of the paper's largest slides, so that a service is asked for each once."""


class Trouble(NamedTuple):
    """What went otherwise than with the service alone."""

    num_local: int
    """Manifests that came from the folder."""
    reason: str
    """Why the first of them did; empty without any."""


class IndexedManifests:
    """A run's manifests on one rank (`manifests.ManifestSource`). Safe to use from many threads.

    Args:
        service: asked first.
        root: the manifests folder.
        record: what `describe_manifests` made.
        tells: says once, on stderr, that the service does not answer.
    """

    def __init__(self, service: ServiceManifests, root: Path, record: pa.Table, *, tells: bool) -> None:
        self.service = service
        self._root, self._tells = root, tells
        self._catalog = record.drop_columns(_HASH)
        self._hashes = dict(zip(record["slide_id"].to_pylist(), record[_HASH].to_pylist(), strict=True))
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Manifest] = OrderedDict()
        self._kept_bytes = 0
        self._away_until = 0.0
        """By the monotonic clock; 0 while the service answers."""
        self._trouble = Trouble(0, "")

    def catalog(self) -> pa.Table:
        """The rows of the run's slides, as they were when the run began."""
        return self._catalog

    def __iter__(self) -> Iterator[str]:
        return iter(self._hashes)

    def __getitem__(self, slide_id: str) -> Manifest:
        with self._lock:
            if slide_id in self._kept:
                self._kept.move_to_end(slide_id)
                return self._kept[slide_id]
        if slide_id not in self._hashes:
            raise ManifestError(f"slide {slide_id}: not one of the run's slides")
        manifest, reason = self._ask(slide_id)
        if manifest is None:
            manifest = self._look_up(slide_id, reason)
        self._keep(slide_id, manifest)
        return manifest

    def take_trouble(self) -> Trouble:
        """What there was since the last call."""
        with self._lock:
            trouble, self._trouble = self._trouble, Trouble(0, "")
            return trouble

    def _ask(self, slide_id: str) -> tuple[Manifest | None, str]:
        """The run's version as the service gives it, or why it does not."""
        if time.monotonic() < self._away_until:
            return None, "the index did not answer a moment ago"
        try:
            num_tries = 1 if self._away_until else NUM_TRIES  # Once waited for it in full, not again for each slide.
            manifest, found = self.service.read_hashed(slide_id, num_tries)
        except ServiceAwayError as error:
            self._away_until = time.monotonic() + _AGAIN_S
            return None, str(error)
        except ManifestError as error:
            return None, str(error)
        self._away_until = 0.0
        if found != self._hashes[slide_id]:
            return None, f"the index has another manifest of slide {slide_id} than when the run began"
        if problem := next(check_manifest(manifest), None):
            return None, f"the index's answer is damaged ({problem.text})"
        return manifest, ""

    def _look_up(self, slide_id: str, reason: str) -> Manifest:
        """The run's version as the folder has it.

        Raises:
            ManifestError: it has none, or another.
        """
        try:
            manifest, found = read_hashed(tiles_path(self._root, slide_id))
        except ManifestError as error:
            raise ManifestError(f"slide {slide_id}: no manifest from the index ({reason}) nor here ({error})") from None
        if found != self._hashes[slide_id]:
            raise ManifestError(
                f"slide {slide_id}: its manifest is another than when the run began; bring that one back, or start "
                "another run"
            )
        with self._lock:
            self._trouble = Trouble(self._trouble.num_local + 1, self._trouble.reason or reason)
            tells, self._tells = self._tells, False
        if tells:
            print(
                f"note: {reason}; meanwhile the run goes on with the same manifests from its folder",
                file=sys.stderr,
            )
        return manifest

    def _keep(self, slide_id: str, manifest: Manifest) -> None:
        with self._lock:
            if slide_id not in self._kept:
                self._kept[slide_id] = manifest
                self._kept_bytes += _count_bytes(manifest)
            while self._kept_bytes > _KEPT_BYTES:
                _, gone = self._kept.popitem(last=False)
                self._kept_bytes -= _count_bytes(gone)


def open_index(run: Path, url: str, root: Path, *, tells: bool) -> IndexedManifests:
    """The manifests of a run that was prepared with an index, which is asked for nothing yet.

    Args:
        run: the run's folder.
        url: address of the service.
        root: the manifests folder.
        tells: see `IndexedManifests`.

    Raises:
        TrainerError: the run's record is damaged.
        ManifestError: no such address.
    """
    record = read_record(run)
    assert record is not None, "the run is prepared with one"
    return IndexedManifests(ServiceManifests(ServiceClient(url)), root, record, tells=tells)


def describe_manifests(service: ServiceManifests, slide_ids: Collection[str]) -> pa.Table:
    """What a run's manifests are now: the catalogue's rows, with the hash of each manifest.

    Raises:
        TrainerError: the service does not know all of the slides.
        ManifestError: it does not answer.
    """
    table = service.catalog()
    table = table.filter(pc.is_in(table["slide_id"], pa.array(sorted(slide_ids), pa.string())))
    known = table["slide_id"].to_pylist()
    if missing := sorted(set(slide_ids) - set(known)):
        raise TrainerError(f"--index: {len(missing)} of the run's slides are not in it: {few(missing)}")
    hashes: list[str] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool, Counter("asking the index") as counter:
        counter.start(len(known))
        for found in pool.map(service.hash_of, known):
            hashes.append(found)
            counter.advance()
    return table.append_column(_HASH, pa.array(hashes, pa.string()))


def write_record(run: Path, record: pa.Table) -> None:
    """Puts what `describe_manifests` made into the run's folder."""
    with atomic_path(run / _FILE) as partial:
        pq.write_table(record, partial, compression="zstd", write_page_checksum=True)


def read_record(run: Path) -> pa.Table | None:
    """What `write_record` wrote; None in a run that has had no index so far.

    Raises:
        TrainerError: damaged.
    """
    if not (run / _FILE).exists():
        return None
    try:
        record = read_table(run / _FILE)
    except (OSError, pa.ArrowException):
        record = None
    if record is None or not record.schema.equals(_SCHEMA):
        raise TrainerError(
            f"{run}: {_FILE}, the manifests that the run began with, is damaged; bring a copy back, or go on without "
            "--index"
        )
    return record


def _count_bytes(manifest: Manifest) -> int:
    return manifest.x_l0.nbytes + manifest.y_l0.nbytes + manifest.tissue.nbytes
