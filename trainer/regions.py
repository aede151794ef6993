"""Annotated regions: of a training slide the tiles whose centre lies inside a polygon that a pathologist drew.

Annotations are read once, when the run begins; the rows that they leave are a part of the run (`regions.parquet`). So a
run goes on with what it began with, on machines that do not have the annotations, and while others are still being
drawn: what changed since is told, and changes nothing. Validation and test know no regions: whole slides are scored.

A slide that is not annotated uses all of its tiles. A slide without a finding has nothing to annotate; and one that
nobody came to annotate says as much by its label as it does without any regions.
"""

import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from skimage.measure import points_in_poly

from manifests import Manifest, ManifestSource
from manifests.files import atomic_path, disk_name
from tiler.discover import SLIDE_SUFFIXES
from tiler.outside import Polygon, read_polygons
from tiler.progress import Counter as Progress
from trainer.cohort import Cohort
from trainer.config import Tiles
from trainer.errors import TrainerError
from trainer.targets import few

_FILE, _KEY = "regions.parquet", b"slidegrad"
_SCHEMA = pa.schema([("slide_id", pa.string()), ("rows", pa.list_(pa.int32()))])
_SUFFIXES = (".geojson", ".json")


@dataclass(frozen=True)
class Regions:
    """What annotations leave of a run's training slides."""

    rows: dict[str, NDArray[np.int64]]
    """slide_id to the rows inside its annotations, ascending, at least one; slides that use all are not in it."""
    digest: str
    """Of the annotations' files."""
    notes: tuple[str, ...] = ()
    """Sentences to tell the user once."""

    def write(self, run: Path) -> None:
        """Puts rows and digest into the run's folder."""
        table = pa.Table.from_pylist([{"slide_id": s, "rows": rows} for s, rows in self.rows.items()], schema=_SCHEMA)
        with atomic_path(run / _FILE) as partial:
            pq.write_table(table.replace_schema_metadata({_KEY: json.dumps({"digest": self.digest})}), partial)


def find_regions(tiles: Tiles, cohort: Cohort, source: ManifestSource) -> Regions:
    """Reads the annotations of the training slides.

    Args:
        tiles: where they lie, and the class that counts.
        cohort: the run's.
        source: its manifests.

    Raises:
        TrainerError: no such folder, or no training slide has a tile inside an annotation.
        TilerError: a file that is no GeoJSON.
    """
    training = cohort.num_tiles("train")
    files = _find_files(tiles, training)
    rows: dict[str, NDArray[np.int64]] = {}
    without = Counter[str]({"a file": len(training) - len(files)})
    classes: set[str] = set()
    with Progress("reading annotations") as progress:
        progress.start(len(files))
        for slide_id, file in files.items():
            polygons = read_polygons(file)
            classes.update(name for polygon in polygons for name in polygon.classes)
            polygons = [p for p in polygons if tiles.region_class is None or tiles.region_class in p.classes]
            inside = rows_inside(source[slide_id], polygons)
            if len(inside):
                rows[slide_id] = inside
            else:
                without["a tile's centre inside" if polygons else "anything drawn" + _of_class(tiles)] += 1
            progress.advance()
    if not rows:
        others = f", but {few(sorted(classes))}" if classes and tiles.region_class is not None else ""
        raise TrainerError(
            f"tiles.regions {tiles.regions}: expected SLIDE_ID.geojson with polygons in level-0 px"
            f"{_of_class(tiles)}, and of {len(training)} training slides {_listed(without)}{others}"
        )
    return Regions(rows, _digest(files), (_describe(rows, training, without),))


def changes_since(run: Path, tiles: Tiles, cohort: Cohort) -> list[str]:
    """Sentences to tell the user who goes on with a run; none if its annotations are as they were, or are not here."""
    if tiles.regions is None:
        return []
    try:
        now = _digest(_find_files(tiles, cohort.num_tiles("train")))
    except (TrainerError, OSError):
        return []
    is_changed = now != json.loads(_read(run).schema.metadata[_KEY])["digest"]
    told = "the annotations in tiles.regions changed since the run began: it goes on with those it began with; give "
    return [f"{told}another --out to train with the new ones"] if is_changed else []


def read_regions(run: Path) -> dict[str, NDArray[np.int64]]:
    """slide_id to the rows that its steps may use, as `Regions.write` left them.

    Raises:
        TrainerError: not there, or damaged.
    """
    table = _read(run)
    pairs = zip(table["slide_id"].to_pylist(), table["rows"], strict=True)
    return {slide_id: rows.values.to_numpy().astype(np.int64) for slide_id, rows in pairs}


def rows_inside(manifest: Manifest, polygons: Iterable[Polygon]) -> NDArray[np.int64]:
    """The rows whose tile has its centre inside any of the polygons and not in a hole of it, ascending.

    On an outer edge is inside, on a hole's edge outside.
    """
    width, height = manifest.footprint_l0
    centres_N2 = np.stack([manifest.x_l0 + width / 2, manifest.y_l0 + height / 2], axis=1)
    is_inside_N = np.zeros(len(manifest), np.bool_)
    for polygon in polygons:
        low, high = polygon.rings[0].min(axis=0), polygon.rings[0].max(axis=0)
        # Annotations are small: most tiles lie far from them.
        (near,) = np.nonzero(((centres_N2 >= low) & (centres_N2 <= high)).all(axis=1) & ~is_inside_N)
        outer, *holes = polygon.rings
        is_within = points_in_poly(centres_N2[near], outer)
        for hole in holes:
            is_within &= ~points_in_poly(centres_N2[near], hole)
        is_inside_N[near[is_within]] = True
    return np.flatnonzero(is_inside_N)


def _find_files(tiles: Tiles, training: Iterable[str]) -> dict[str, Path]:
    """slide_id to its annotations, of training slides that have any; a file may be named as the slide's file is."""
    folder = tiles.regions
    assert folder is not None, "asked for where there are regions"
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise TrainerError(f"tiles.regions {folder}: {error.strerror}; expected a folder of SLIDE_ID.geojson") from None
    known = {disk_name(slide_id): slide_id for slide_id in training} | {slide_id: slide_id for slide_id in training}
    found: dict[str, Path] = {}
    for name in names:
        suffix = next((s for s in _SUFFIXES if name.lower().endswith(s)), None)
        stem = unicodedata.normalize("NFC", name[: -len(suffix)]) if suffix else ""
        bare = next((stem[: -len(s)] for s in SLIDE_SUFFIXES if stem.lower().endswith(s)), stem)
        slide_id = known.get(stem, known.get(bare))
        if suffix is None or slide_id is None:
            continue
        if slide_id in found:
            raise TrainerError(f"tiles.regions {folder}: slide {slide_id} has two files of annotations; keep one")
        found[slide_id] = folder / name
    return dict(sorted(found.items()))


def _describe(rows: dict[str, NDArray[np.int64]], training: dict[str, int], without: Counter[str]) -> str:
    num_tiles = sum(training[slide_id] for slide_id in rows)
    return (
        f"tiles.regions: {len(rows):,} of {len(training):,} training slides use the "
        f"{sum(map(len, rows.values())):,} of their {num_tiles:,} tiles that lie inside annotations"
        + (f"; all tiles are used of {_listed(without)}" if len(rows) < len(training) else "")
    )


def _listed(without: Counter[str]) -> str:
    return ", ".join(f"{num:,} without {what}" for what, num in without.items() if num)


def _of_class(tiles: Tiles) -> str:
    return "" if tiles.region_class is None else f" of the class {tiles.region_class!r}"


def _digest(files: dict[str, Path]) -> str:
    """Of what the files hold and whose they are."""
    digest = hashlib.blake2b(digest_size=16)
    for slide_id, file in files.items():
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "blake2b").hexdigest()
        digest.update(f"{slide_id}\x00{content}\x00".encode())
    return digest.hexdigest()


def _read(run: Path) -> pa.Table:
    try:
        table = pq.read_table(run / _FILE)
        json.loads(table.schema.metadata[_KEY])["digest"]
        return table.select(_SCHEMA.names)
    except (OSError, pa.ArrowInvalid, LookupError, TypeError, ValueError):
        raise TrainerError(
            f"{run}: {_FILE}, the tiles inside annotations, is missing or damaged; bring a copy back, or give another "
            "--out to begin anew"
        ) from None
