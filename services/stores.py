"""Where the service finds manifests: a tree, a compacted set, or either behind an address. Reads only.

A store says cheaply how a slide's manifest looks now (`stamp`), loads it with the hash of its content, and lists the
slides. One thing to know before changing it: whoever keeps what `load` gave keeps it under a stamp taken before, so
that a file replaced meanwhile is read again at the next request.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from manifests import Manifest
from manifests.catalog import read_catalog, read_known, rescan_catalog
from manifests.files import parse_hashed, tiles_key, tiles_path
from manifests.folders import LocalFolder
from manifests.parse import Parsed, parse_table
from manifests.sets import CompactedManifests, find_row
from manifests.source import RemoteManifests, StoredSource, is_set, local_path, open_stored

_log = logging.getLogger(__name__)


class Store(Protocol):
    """What every store answers. FileNotFoundError says that there is no such slide, other errors that it is damaged."""

    def stamp(self, slide_id: str) -> Hashable:
        """Changes whenever the slide's manifest does; costs one `stat` or less."""

    def load(self, slide_id: str) -> tuple[Manifest, str]:
        """The slide's manifest, and the BLAKE2b-128 of its content in hex."""

    def catalog_stamp(self) -> Hashable:
        """Changes whenever the catalogue may have; OSError or ManifestError where nothing can be read now."""

    def catalog(self) -> pa.Table:
        """The catalogue as it is now, sorted by slide_id. Called by one thread at a time."""


def open_store(root: str | Path, *, fresh_s: float) -> Store:
    """The store at a folder or an address.

    Args:
        root: see `manifests.open_manifests`.
        fresh_s: what is read from an address counts as unchanged for so long.

    Raises:
        ManifestError: no manifests there.
    """
    path = local_path(root)
    if path is None:
        return SourceStore(lambda: open_stored(root), fresh_s=fresh_s)
    if is_set(path) and not os.path.isdir(path / "tiles"):
        return SourceStore(lambda: _open_set(path), catalog_file=path / "catalog.parquet")
    return TreeStore(path)


class TreeStore:
    """A tree as the tiler writes it: one file per slide, found by its id.

    Raises:
        ManifestError: no manifests there.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._tiles = root, f"{root}/tiles"
        if not os.path.isdir(self._tiles):
            read_catalog(root)  # Says what is missing.
        self._known = read_known(root)

    def stamp(self, slide_id: str) -> Hashable:
        return _look(f"{self._tiles}/{tiles_key(slide_id)}.parquet")

    def load(self, slide_id: str) -> tuple[Manifest, str]:
        file = tiles_path(self._root, slide_id)
        _refuse_outside(self._root, file)
        return parse_hashed(file.read_bytes(), f"slide {slide_id}")

    def catalog_stamp(self) -> Hashable:
        # A manifest gets its name by a rename, which changes its folder: 256 of them tell of half a million files.
        with os.scandir(self._tiles) as folders:
            return tuple(sorted((entry.name, entry.stat().st_mtime_ns) for entry in folders))

    def catalog(self) -> pa.Table:
        found = self._known = rescan_catalog(self._root, self._known)
        if not (outside := set(self._outside())):
            return found
        keep = [tiles_key(slide_id) not in outside for slide_id in found["slide_id"].to_pylist()]
        return found.filter(pa.array(keep, pa.bool_()))

    def _outside(self) -> list[str]:
        """`xx/name` of manifests that symbolic links fetch from elsewhere."""
        found = []
        with os.scandir(self._tiles) as folders:
            for folder in [entry for entry in folders if entry.is_dir()]:
                with os.scandir(folder) as entries:
                    links = [entry for entry in entries if folder.is_symlink() or entry.is_symlink()]
                for entry in links:
                    try:
                        _refuse_outside(self._root, Path(entry.path))
                    except OSError:
                        found.append(f"{folder.name}/{entry.name.removesuffix('.parquet')}")
        return found


class _State:
    """A source as it was opened at `stamp`; `generation` grows when it had changed."""

    def __init__(self, generation: int, stamp: Hashable, source: StoredSource) -> None:
        self.generation, self.stamp, self.source = generation, stamp, source
        self.ids = source.catalog()["slide_id"].combine_chunks()


class SourceStore:
    """A set, or what lies behind an address: the catalogue tells the slides, and is read anew as a whole.

    A set's shards never change, so a slide of it changes with the catalogue alone. Of a tree behind an address each
    file may be replaced, which nothing tells: it is read again once it is `fresh_s` old.

    Args:
        open_source: opens it anew.
        catalog_file: of a folder of this machine, what tells that there is a new catalogue.
        fresh_s: for so long what lies behind an address counts as unchanged.

    Raises:
        ManifestError: no manifests there.
    """

    def __init__(
        self,
        open_source: Callable[[], StoredSource],
        *,
        catalog_file: Path | None = None,
        fresh_s: float = float("inf"),
    ) -> None:
        self._open_source, self._catalog_file, self._fresh_s = open_source, catalog_file, fresh_s
        self._state = _State(0, self.catalog_stamp(), open_source())

    def stamp(self, slide_id: str) -> Hashable:
        state = self._state
        if find_row(state.ids, slide_id) is None:
            raise FileNotFoundError(slide_id)
        return state.generation, 0 if isinstance(state.source, CompactedManifests) else self._period()

    def load(self, slide_id: str) -> tuple[Manifest, str]:
        source = self._state.source
        if isinstance(source, RemoteManifests):
            content = source.folder.read(tiles_path(Path(), slide_id).as_posix())
            return parse_hashed(content, f"slide {slide_id}")
        parsed = source.read(slide_id)
        return parsed.manifest, _digest_of(parsed)

    def catalog_stamp(self) -> Hashable:
        return self._period() if self._catalog_file is None else _look(self._catalog_file)

    def catalog(self) -> pa.Table:
        state = self._state
        if (stamp := self.catalog_stamp()) != state.stamp:
            fresh = self._open_source()
            is_same = _is_same(fresh, state.source)
            self._state = _State(state.generation + (not is_same), stamp, state.source if is_same else fresh)
        return self._state.source.catalog()

    def _period(self) -> int:
        return int(time.monotonic() / self._fresh_s)


class _InsideFolder(LocalFolder):
    """A folder of this machine whose files all lie inside it."""

    def read(self, name: str) -> bytes:
        _refuse_outside(self.path, self.path / name)
        return super().read(name)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        _refuse_outside(self.path, self.path / name)
        return super().read_range(name, start, stop)


def _open_set(path: Path) -> CompactedManifests:
    folder = _InsideFolder(path)
    return CompactedManifests(folder, parse_table(folder.read("catalog.parquet"), f"{path}/catalog.parquet"))


def _is_same(fresh: StoredSource, source: StoredSource) -> bool:
    if getattr(fresh, "contents", None) != getattr(source, "contents", None):
        return False
    return bool(fresh.catalog().equals(source.catalog()))


def _refuse_outside(root: Path, file: Path) -> None:
    """A symbolic link that leads out of the root is as good as no file."""
    if not file.resolve().is_relative_to(root.resolve()):
        _log.warning("a symbolic link leads out of the manifests and is not followed: %s", file.stem)
        raise FileNotFoundError(file.name)


def _look(file: str | Path) -> Hashable:
    state = os.stat(file)
    return state.st_mtime_ns, state.st_size, state.st_ino


def _digest_of(parsed: Parsed) -> str:
    """Of a set's slide, which has no file: of its record, its tiler's config, and its columns."""
    manifest, told = parsed.manifest, hashlib.blake2b(digest_size=16)
    told.update(f"{manifest.slide.to_json()}\0{parsed.tiler_json}\0".encode())
    for column in (manifest.x_l0, manifest.y_l0, manifest.tissue):
        told.update(column.tobytes())
    return told.hexdigest()
