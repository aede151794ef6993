"""Coordinates to and from other tools: CLAM, TRIDENT, QuPath's GeoJSON, the reference trainer's tables, plain CSV.

Each format is one module with an exporter and a reader, and says in its docstring what it cannot express. No pixels
here: an import compares a file with its slide, and the slide is opened by the tiler (tiler/exchange.py).
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from manifests.errors import ManifestError
from manifests.exchange.clam import export_clam, read_clam
from manifests.exchange.eagle import export_eagle, find_tables, read_eagle
from manifests.exchange.fit import DEFAULT_TILE_PX, Fitted, LevelSize, fit_tiles
from manifests.exchange.geojson import export_geojson, read_geojson
from manifests.exchange.outline import read_outline
from manifests.exchange.plain import export_csv, read_csv
from manifests.exchange.tiles import Add, Format, Outline, ReadPlan, TileSet
from manifests.exchange.trident import export_trident, read_trident

__all__ = [
    "EXPORTERS",
    "OUTLINED",
    "Fitted",
    "Format",
    "LevelSize",
    "Outline",
    "ReadPlan",
    "TileSet",
    "fit_tiles",
    "read_outline",
    "read_tile_sets",
]

EXPORTERS: Mapping[Format, Callable[[Path, int], AbstractContextManager[Add]]] = {
    "clam": export_clam,
    "trident": export_trident,
    "geojson": export_geojson,
    "eagle": export_eagle,
    "csv": export_csv,
}
OUTLINED: tuple[Format, ...] = ("trident", "geojson")
"""Formats that carry the tissue outline."""
_ONE_SLIDE: Mapping[Format, tuple[Callable[[Path], TileSet], tuple[str, ...]]] = {
    "clam": (read_clam, ("patches/*.h5", "*.h5")),
    "trident": (read_trident, ("patches/*.h5", "*.h5")),
    "geojson": (read_geojson, ("*.geojson",)),
}
"""Reader of one file, and where files lie in a folder: the first pattern that finds any."""


def read_tile_sets(kind: Format, files: list[Path], tile_px: int | None) -> Iterator[TileSet | ManifestError]:
    """The slides in files of another tool, one at a time; one that cannot be read comes as the error that says why.

    Args:
        kind: the files' format.
        files: files, or folders to look in.
        tile_px: output tile side, px, where the files do not tell it.

    Raises:
        ManifestError: no files, or tables that are not of that format.
    """
    if kind in _ONE_SLIDE:
        read, patterns = _ONE_SLIDE[kind]
        for file in _look_up(files, patterns):
            try:
                yield read(file)
            except ManifestError as error:
                yield error
        return
    tables = _look_up(files, ("tiles.csv", "*.csv") if kind == "csv" else ("*_data.csv",))
    if kind == "eagle":
        yield from read_eagle(*find_tables(tables), tile_px or DEFAULT_TILE_PX)
        return
    for table in tables:
        yield from read_csv(table)


def _look_up(given: list[Path], patterns: tuple[str, ...]) -> list[Path]:
    files: list[Path] = []
    for path in given:
        if os.path.isdir(path):  # Unlike pathlib's, it stands a folder that may not be looked into.
            found = next((hits for pattern in patterns if (hits := sorted(path.rglob(pattern)))), [])
            if not found:
                raise ManifestError(f"{path}: no files here (looked for {' and '.join(patterns)})")
            files.extend(found)
        else:
            files.append(path)
    if not files:
        raise ManifestError("no files to import; give files or a folder")
    return files
