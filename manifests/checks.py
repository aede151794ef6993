"""What can be wrong with one manifest, with its row of the catalogue, and with the slide file it was made of.

Knows neither how manifests are found nor how they are read: that is `manifests.validate`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifests.errors import SlidegradError
from manifests.schema import CATALOG_SCHEMA, Manifest, SlideRecord, records_to_catalog
from manifests.sets import find_row

_FIELD_TYPES: Mapping[object, tuple[type, ...]] = {int: (int,), float: (float, int), bool: (bool,)}

_LEAST_MPP, _MOST_MPP = 1e-4, 1e4
"""Atoms, and a slide in ten px: beyond, and at NaN, a record is wrong."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that does not hold."""

    kind: str
    """unreadable | place | content | catalogue | leftover | slide | shard."""
    slide_id: str
    """The slide, or the file's stem where the slide cannot be known; "" where it is about no slide."""
    text: str
    """One sentence."""


def about_slide(kind: str, slide_id: str, text: str) -> Problem:
    """A problem whose sentence begins with the slide."""
    return Problem(kind=kind, slide_id=slide_id, text=f"slide {slide_id}: {text}")


def check_record(record: SlideRecord) -> Iterator[Problem]:
    """Values that the catalogue could not hold."""
    for f in dataclasses.fields(record):
        value = getattr(record, f.name)
        is_wrong = not isinstance(value, _FIELD_TYPES.get(f.type, (str,)))
        if is_wrong or (f.type is int and not -(2**31) <= value < 2**31):
            yield about_slide("unreadable", str(record.slide_id), f"in its record {f.name} is {value!r}")


def check_manifest(manifest: Manifest) -> Iterator[Problem]:
    """Tiles and scale that cannot be."""
    slide, num_tiles = manifest.slide, len(manifest)
    if (slide.status == "ok") != (num_tiles > 0):
        yield about_slide("content", slide.slide_id, f"status {slide.status} with {num_tiles} tiles")
    if not num_tiles:
        return
    if slide.tile_px < 1 or not all(_LEAST_MPP < mpp < _MOST_MPP for mpp in (slide.tile_mpp, slide.mpp_x, slide.mpp_y)):
        text = f"tiles of {slide.tile_px} px at {slide.tile_mpp} mpp, level 0 at {slide.mpp_x} x {slide.mpp_y} mpp"
        yield about_slide("content", slide.slide_id, text)
        return
    width, height = manifest.footprint_l0
    if not slide.config_hash:  # Imported: other programs keep tiles that reach past the right and lower edge.
        width = height = 2  # With the slack: one px.
    x_l0, y_l0 = manifest.x_l0.astype(np.int64), manifest.y_l0.astype(np.int64)
    # One px of slack: the footprint is rounded to whole level-0 px.
    outside = (x_l0 < 0) | (y_l0 < 0) | (x_l0 + width - 1 > slide.width_l0) | (y_l0 + height - 1 > slide.height_l0)
    if outside.any():
        yield about_slide("content", slide.slide_id, f"{int(outside.sum())} tiles lie outside the slide")
    if not ((manifest.tissue >= 0) & (manifest.tissue <= 1)).all():
        yield about_slide("content", slide.slide_id, "tissue shares outside 0 to 1")


@dataclass(frozen=True, kw_only=True)
class SlideFiles:
    """Where the slides lie, and how to tell whether one is still what it was."""

    paths: Mapping[str, Path]
    fingerprint: Callable[[Path], str]

    def check(self, record: SlideRecord) -> Iterator[Problem]:
        """What is wrong with the slide file of a record; the sentence does not name it."""
        path = self.paths.get(record.slide_id)
        text = ""
        if path is None:
            text = "no slide file is known; tile the archive again"
        elif not path.exists():
            text = "its slide file is gone; give --archive if the archive is mounted elsewhere"
        elif record.fingerprint:
            try:
                if self.fingerprint(path) != record.fingerprint:
                    text = "its slide file changed since it was tiled; tile it again"
            except (OSError, SlidegradError) as error:
                text = f"its slide file cannot be read ({getattr(error, 'strerror', None) or type(error).__name__})"
        if text:
            yield about_slide("slide", record.slide_id, text)


class CatalogRows:
    """The catalogue's rows, ticked off as manifests come by."""

    def __init__(self, catalog: pa.Table) -> None:
        self._catalog = catalog.sort_by("slide_id").combine_chunks()
        self._ids = self._catalog.column("slide_id").combine_chunks()
        self._is_seen = np.zeros(len(catalog), bool)

    def compare(self, records: list[SlideRecord]) -> Iterator[Problem]:
        """Records without a row, and rows that say something else."""
        rows = {}
        for record in sorted(records, key=lambda record: record.slide_id):
            row = find_row(self._ids, record.slide_id)
            if row is None:
                yield about_slide("catalogue", record.slide_id, "has a manifest, no row in catalog.parquet")
            else:
                rows[row] = record
        places = np.fromiter(rows, np.int64)
        self._is_seen[places] = True
        ours, theirs = records_to_catalog(list(rows.values())), self._catalog.take(pa.array(places))
        for name in CATALOG_SCHEMA.names:
            if ours[name].equals(theirs[name]):
                continue
            differs = pc.fill_null(pc.not_equal(ours[name], theirs[name]), True)
            for i in np.flatnonzero(differs.to_numpy()).tolist():
                listed, own = theirs[name][i].as_py(), ours[name][i].as_py()
                if listed != listed and own != own:  # Both NaN: one and the same.
                    continue
                text = f"catalog.parquet says {name} {listed!r}, its manifest {own!r}"
                yield about_slide("catalogue", ours["slide_id"][i].as_py(), text)

    def unseen(self) -> Iterator[str]:
        """Ids of the rows that no record was compared with; a slide's second row, too."""
        for row in np.flatnonzero(~self._is_seen).tolist():
            yield self._ids[row].as_py()
