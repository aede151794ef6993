"""`TileIndex`: the manifests of one folder, kept ready to be asked. No web framework, no decoding.

Nothing has to be restarted when the tiler replaces a manifest: files are told apart by (mtime, size, inode) at each
request, which costs one `stat`, and read again when that changed. The list of slides is the catalogue: slides that are
being tiled appear in it when the tiler has written it, but each can be asked for as soon as it has a manifest.
"""

import dataclasses
import hashlib
import logging
import re
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from manifests import Manifest, ManifestError, open_manifests
from manifests.catalog import scan_catalog
from manifests.files import tiles_path
from manifests.parse import parse_manifest
from manifests.source import is_set
from services.errors import UnavailableError, UnknownSlideError, UnreadableManifestError
from services.queries import BBox, Draw, draw_tiles, find_tiles

_log = logging.getLogger(__name__)
_ABSOLUTE_PATH = re.compile(r"""(?<![\w.])(?:[A-Za-z]:[\\/]|\\\\|/)(?=[^\s/\\])[^:;,'"()<>\n]*""")

Stamp = tuple[tuple[int, int, int], ...]
"""(mtime in ns, size in bytes, inode) of one or several files."""


@dataclass(frozen=True, eq=False)
class Catalog:
    """The catalogue as it was at `stamp`; `hash` changes with its content."""

    table: pa.Table
    hash: str
    stamp: Stamp


@dataclass(frozen=True, eq=False)
class HashedManifest:
    """A manifest and the BLAKE2b-128 of its file's bytes, in hex."""

    manifest: Manifest
    hash: str
    stamp: Stamp


@dataclass(frozen=True, eq=False)
class TileRows:
    """Some rows of a manifest, and what was asked to get them."""

    source: HashedManifest
    rows: NDArray[np.int64]
    about: Mapping[str, Any]
    """What goes into the answer beside the rows."""


class TileIndex:
    """Answers queries about one manifests folder; safe to call from many threads.

    Args:
        root: the manifests folder.
        max_cached: manifests kept in memory, the least recently asked one leaves first.

    Raises:
        ManifestError: `root` holds no manifests, or is a compacted set.
    """

    def __init__(self, root: Path, *, max_cached: int = 64) -> None:
        if is_set(root):
            raise ManifestError(f"{root}: a compacted set cannot be served yet; give the folder it was made from")
        self._root = root
        self._max_cached = max_cached
        self._lock = threading.Lock()
        self._manifests: OrderedDict[str, HashedManifest] = OrderedDict()
        self._catalog = _load_catalog(root)

    def catalog(self) -> Catalog:
        """The catalogue as it is now.

        Raises:
            UnavailableError: it cannot be read.
        """
        try:
            if self._catalog.stamp != _catalog_stamp(self._root):
                self._catalog = _load_catalog(self._root)
        except (ManifestError, OSError):
            _log.exception("cannot read the catalogue")
            raise UnavailableError("the catalogue cannot be read now; the service's log says why") from None
        return self._catalog

    def manifest(self, slide_id: str) -> HashedManifest:
        """The slide's manifest as it is now.

        Raises:
            UnknownSlideError: there is none.
            UnreadableManifestError: it is damaged.
        """
        slide_id = unicodedata.normalize("NFC", slide_id)
        file = tiles_path(self._root, slide_id)
        try:
            stamp = _stamp(file)
            with self._lock:
                found = self._manifests.get(slide_id)
            if found is None or found.stamp != stamp:
                found = _load_manifest(file)
        except FileNotFoundError:
            raise UnknownSlideError(f"no slide {slide_id[:200]!r}") from None
        except (ManifestError, OSError):
            _log.exception("cannot read a manifest")
            text = f"slide {slide_id}: its manifest cannot be read; the service's log says why, tile the slide again"
            raise UnreadableManifestError(text) from None
        if found.manifest.slide.slide_id != slide_id:  # Another id may lead to the same file, on disk or by its case.
            raise UnknownSlideError(f"no slide {slide_id[:200]!r}")
        self._keep(slide_id, found)
        return found

    def tiles(self, slide_id: str, *, bbox: BBox | None, min_tissue: float, limit: int, offset: int) -> TileRows:
        """Tiles that intersect `bbox` (level-0 px) and hold at least `min_tissue`; raises as `manifest`."""
        source = self.manifest(slide_id)
        rows = find_tiles(source.manifest, bbox=bbox, min_tissue=min_tissue)
        next_offset = offset + limit if offset + limit < len(rows) else None
        about = {"num_matched": len(rows), "offset": offset, "next_offset": next_offset}
        return TileRows(source, rows[offset : offset + limit], about)

    def sample(self, slide_id: str, draw: Draw) -> TileRows:
        """The tiles of a step, or one part of them; raises as `manifest` and `services.queries.draw_tiles`."""
        source = self.manifest(slide_id)
        return TileRows(source, draw_tiles(source.manifest, draw), dataclasses.asdict(draw))

    def _keep(self, slide_id: str, found: HashedManifest) -> None:
        with self._lock:
            self._manifests[slide_id] = found
            self._manifests.move_to_end(slide_id)
            while len(self._manifests) > self._max_cached:
                self._manifests.popitem(last=False)


def without_paths(sentence: str) -> str:
    """The sentence with absolute paths cut out: errors of readers like to repeat them, and they hold people's names."""
    return _ABSOLUTE_PATH.sub("…", sentence)


def _stamp(file: Path) -> Stamp:
    stat = file.stat()
    return ((stat.st_mtime_ns, stat.st_size, stat.st_ino),)


def _catalog_stamp(root: Path) -> Stamp:
    """The catalogue's, or where there is none those of the 256 folders whose content it would list."""
    try:
        return _stamp(root / "catalog.parquet")
    except FileNotFoundError:
        return tuple(_stamp(folder)[0] for folder in sorted((root / "tiles").glob("??")))


def _load_catalog(root: Path) -> Catalog:
    stamp = _catalog_stamp(root)  # Before reading: a file replaced meanwhile is read again at the next request.
    try:
        table = open_manifests(root).catalog()
    except OSError:  # The catalogue is missing and the folder is mounted read-only.
        table = scan_catalog(root)
    errors = pa.array([without_paths(error) for error in table["error"].to_pylist()], pa.string())
    table = table.set_column(table.schema.get_field_index("error"), "error", errors)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return Catalog(table, hashlib.blake2b(sink.getvalue(), digest_size=16).hexdigest(), stamp)


def _load_manifest(file: Path) -> HashedManifest:
    """One manifest. A file that the tiler replaces meanwhile is read again at the next request: the stamp is older."""
    stamp = _stamp(file)
    content = file.read_bytes()
    manifest = parse_manifest(content, str(file)).manifest
    slide = dataclasses.replace(manifest.slide, error=without_paths(manifest.slide.error))
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return HashedManifest(dataclasses.replace(manifest, slide=slide), digest, stamp)
