"""One way to get at manifests, wherever they lie: `open_manifests(root)`.

A source maps slide ids to manifests and knows the catalogue: a tree as the tiler writes it or a compacted set, in a
folder of this machine, in an object store, or behind a web server; or a tile-index service.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.catalog import read_catalog, read_known, rebuild_catalog, scan_catalog
from manifests.errors import ManifestError
from manifests.files import read_manifest, tiles_key, tiles_path
from manifests.folders import Folder, LocalFolder, is_web, open_folder
from manifests.parse import Parsed, parse_manifest, parse_table
from manifests.schema import Manifest
from manifests.service import find_service
from manifests.sets import SET_KEY, CompactedManifests, complete_catalog

_ADDRESS = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/+(.*)", re.DOTALL)
"""`pathlib` makes one slash of two: s3:/bucket is taken for s3://bucket. One letter is a Windows drive."""


class ManifestSource(Protocol):
    """What every source answers."""

    def catalog(self) -> pa.Table:
        """One row per slide, in `CATALOG_SCHEMA`, sorted by slide_id."""

    def __getitem__(self, slide_id: str) -> Manifest:
        """The slide's manifest; raises ManifestError if there is none."""

    def __iter__(self) -> Iterator[str]:
        """Slide ids, sorted."""


class StoredSource(ManifestSource, Protocol):
    """A source whose files can be read: all that there are, except services."""

    def read(self, slide_id: str) -> Parsed:
        """The slide's manifest, and what else its file says; raises ManifestError if there is none."""


class LocalManifests:
    """Manifests in a folder, as the tiler writes them.

    Opening costs one listing of tiles/ and a read of each manifest that came since the catalogue was written (twice
    where it changed): a tiler that was killed did not write it again. Where nothing may be written it is not.

    Raises:
        ManifestError: no manifests there, or they may not be looked at.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._catalog = _bring_up_to_date(root)

    def catalog(self) -> pa.Table:
        """The catalogue as it was when the source was opened."""
        return self._catalog

    def __getitem__(self, slide_id: str) -> Manifest:
        return read_manifest(tiles_path(self.root, slide_id))

    def __iter__(self) -> Iterator[str]:
        return iter(self._catalog.column("slide_id").to_pylist())

    def read(self, slide_id: str) -> Parsed:
        """A slide's manifest, and what else its file says."""
        file = tiles_path(self.root, slide_id)
        try:
            return parse_manifest(file.read_bytes(), str(file))
        except FileNotFoundError:
            raise ManifestError(f"{file}: no such manifest") from None
        except OSError as error:
            raise ManifestError(f"{file}: cannot be read ({error.strerror})") from None

    def unlisted(self) -> list[Path]:
        """Manifests in tiles/ that the catalogue leaves out: they cannot be read, or hold another slide."""
        listed = {tiles_key(slide_id) for slide_id in self}
        files = sorted((self.root / "tiles").glob("??/*.parquet"))
        return [file for file in files if f"{file.parent.name}/{file.stem}" not in listed]


class RemoteManifests:
    """A tree of manifests behind an address: `catalog.parquet` tells the slides, each is one small file."""

    def __init__(self, folder: Folder, table: pa.Table) -> None:
        self.folder = folder
        self._catalog = complete_catalog(table, f"{folder.where}/catalog.parquet")

    def catalog(self) -> pa.Table:
        """The catalogue as it was when the source was opened."""
        return self._catalog

    def __getitem__(self, slide_id: str) -> Manifest:
        return self.read(slide_id).manifest

    def __iter__(self) -> Iterator[str]:
        return iter(self._catalog.column("slide_id").to_pylist())

    def read(self, slide_id: str) -> Parsed:
        """A slide's manifest, and what else its file says."""
        name = tiles_path(Path(), slide_id).as_posix()
        try:
            return parse_manifest(self.folder.read(name), f"{self.folder.where}/{name}")
        except FileNotFoundError:
            raise ManifestError(f"{self.folder.where}/{name}: no such manifest") from None


def open_manifests(root: str | Path) -> ManifestSource:
    """Opens manifests.

    Args:
        root: a folder, or an address such as s3://bucket/manifests or https://server/manifests, that holds a tree of
            manifests or a compacted set; or the address of a service, which is told from a web server by its answer.

    Raises:
        ManifestError: nothing there, or an address of a kind that cannot be read.
    """
    url = _ADDRESS.sub(r"\1://\2", str(root))
    service = find_service(url) if is_web(url) else None
    return open_stored(root) if service is None else service


def open_stored(root: str | Path) -> StoredSource:
    """As `open_manifests`, for those who want the files' content besides."""
    path = local_path(root)
    if path is None:
        return _open_folder(open_folder(_ADDRESS.sub(r"\1://\2", str(root))))
    if os.path.isdir(path / "tiles"):  # Unlike pathlib's, it stands a folder that may not be looked into.
        return LocalManifests(path)
    if is_set(path):
        return _open_folder(LocalFolder(path))
    if os.path.isdir(path / "shards"):
        raise ManifestError(
            f"{path}: half a set (shards/ without a readable catalog.parquet); copy it whole, or compact anew"
        )
    return LocalManifests(path)  # Says what is missing.


def local_path(root: str | Path) -> Path | None:
    """The folder of this machine that `root` names; None for an address elsewhere."""
    address = _ADDRESS.fullmatch(str(root))
    if address is None:
        return Path(root)
    if address[1].lower() != "file":
        return None
    return Path(url2pathname(urlsplit(f"file:///{address[2]}").path))


def is_set(path: Path) -> bool:
    """Whether a folder of this machine holds a compacted set."""
    try:
        return SET_KEY in (pq.read_schema(path / "catalog.parquet").metadata or {})
    except (OSError, pa.ArrowException):
        return False


def _bring_up_to_date(root: Path) -> pa.Table:
    """The catalogue of what lies in tiles/ now; written only where it changed, for others watch its file."""
    try:
        if not (root / "tiles").is_dir():
            return read_catalog(root)  # Says what is missing.
        known = read_known(root)
        catalog = scan_catalog(root, known)
    except OSError as error:
        raise ManifestError(f"{root}: cannot be looked into ({error.strerror}); make it readable for you") from None
    if known is None or not catalog.equals(known):
        with contextlib.suppress(OSError):  # Mounted read-only, or somebody else's.
            return rebuild_catalog(root).replace_schema_metadata()
    return catalog


def _open_folder(folder: Folder) -> StoredSource:
    """A set, or a tree whose files are only read."""
    try:
        table = parse_table(folder.read("catalog.parquet"), f"{folder.where}/catalog.parquet")
    except FileNotFoundError:
        what = "a manifests folder, a set or a service"
        if is_web(folder.where) and find_spec("httpx") is None:
            what += " (which needs httpx; pip install httpx)"
        raise ManifestError(
            f"{folder.where}: no manifests here (no catalog.parquet); give the address of {what}"
        ) from None
    if SET_KEY in (table.schema.metadata or {}):
        return CompactedManifests(folder, table)
    return RemoteManifests(folder, table)
