"""One way to get at manifests, wherever they lie: `open_manifests(root)`.

A source maps slide ids to manifests and knows the catalogue. Local trees today; compacted sets and the HTTP service
answer the same protocol.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from manifests.catalog import read_catalog
from manifests.errors import ManifestError
from manifests.files import read_manifest, tiles_path
from manifests.schema import Manifest


class ManifestSource(Protocol):
    """What every source answers."""

    def catalog(self) -> pa.Table:
        """One row per slide, in `CATALOG_SCHEMA`, sorted by slide_id."""

    def __getitem__(self, slide_id: str) -> Manifest:
        """The slide's manifest; raises ManifestError if there is none."""

    def __iter__(self) -> Iterator[str]:
        """Slide ids, sorted."""


class LocalManifests:
    """Manifests in a folder, as the tiler writes them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._catalog = read_catalog(root)

    def catalog(self) -> pa.Table:
        """The catalogue as it was when the source was opened."""
        return self._catalog

    def __getitem__(self, slide_id: str) -> Manifest:
        return read_manifest(tiles_path(self.root, slide_id))

    def __iter__(self) -> Iterator[str]:
        return iter(self._catalog.column("slide_id").to_pylist())


def open_manifests(root: str | Path) -> ManifestSource:
    """Opens a manifests root.

    Raises:
        ManifestError: nothing there, or an address of a kind that cannot be read.
    """
    if "://" in str(root):
        raise ManifestError(f"{root}: manifests over a network address are not supported yet; give a folder")
    return LocalManifests(Path(root))
