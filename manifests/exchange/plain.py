"""A plain CSV of all tiles: OUT/tiles.csv, one row a tile, for spreadsheets, R and other languages.

Slides without tiles have no row. The file is written and read slide by slide.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from manifests.errors import ManifestError
from manifests.exchange.tables import csv_line, read_groups
from manifests.exchange.tiles import Add, Outline, TileSet, whole_numbers
from manifests.files import atomic_path
from manifests.schema import Manifest

EMPTY = "no tiles, hence no row in tiles.csv"
_PLAN = {"level": pa.int64(), "read_w": pa.int64(), "read_h": pa.int64(), "tile_px": pa.int64()}
_COLUMNS = {"x_l0": pa.float64(), "y_l0": pa.float64(), "tissue": pa.float32(), **_PLAN, "tile_mpp": pa.float64()}


@contextlib.contextmanager
def export_csv(out: Path, max_tiles: int) -> Iterator[Add]:
    """Yields the function that adds one slide's rows."""
    del max_tiles
    with atomic_path(out / "tiles.csv") as partial, partial.open("w", newline="", encoding="utf-8") as stream:
        stream.write(csv_line("slide_id", *_COLUMNS))

        def add(manifest: Manifest, outline: Outline) -> list[str]:
            del outline
            record = manifest.slide
            slide_id = csv_line(record.slide_id).removesuffix("\n")
            plan = csv_line(record.level, record.read_w, record.read_h, record.tile_px, record.tile_mpp)
            columns = manifest.x_l0.tolist(), manifest.y_l0.tolist(), manifest.tissue
            stream.writelines(f"{slide_id},{x},{y},{tissue},{plan}" for x, y, tissue in zip(*columns, strict=True))
            return [] if len(manifest) else [EMPTY]

        yield add


def read_csv(file: Path) -> Iterator[TileSet | ManifestError]:
    """Reads tiles.csv slide by slide; a slide whose rows disagree comes as the error that says so.

    Raises:
        ManifestError: not such a file.
    """
    for slide_id, rows in read_groups(file, "slide_id", _COLUMNS):
        try:
            yield _tile_set(slide_id, rows)
        except ManifestError as error:
            yield error


def _tile_set(slide_id: str, rows: pa.Table) -> TileSet:
    where = f"slide {slide_id}"
    level, read_w, read_h, tile_px = (int(only_value(rows, name, where)) for name in _PLAN)
    return TileSet(
        names=(slide_id,),
        x_l0=whole_numbers(rows.column("x_l0").to_numpy(), where),
        y_l0=whole_numbers(rows.column("y_l0").to_numpy(), where),
        tissue=rows.column("tissue").to_numpy(),
        tile_px=tile_px,
        tile_mpp=only_value(rows, "tile_mpp", where),
        level=level,
        read_size=(read_w, read_h),
    )


def only_value(rows: pa.Table, name: str, where: str) -> float:
    """The one value that all rows of a slide have in a column.

    Raises:
        ManifestError: several, or none.
    """
    values = np.unique(rows.column(name).to_numpy())
    if len(values) != 1 or not np.isfinite(values[0]):
        listed = ", ".join(f"{value:g}" for value in values[:3])
        raise ManifestError(f"{where}: several values of {name} ({listed}); one slide's tiles are read in one way")
    return float(values[0])
