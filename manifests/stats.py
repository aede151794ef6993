"""How many tiles the slides have, by what, and how many devices it takes to hold the largest of them.

Pure: a catalogue in, numbers out. Columns are never turned into Python objects: half a million slides take a second.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from manifests.errors import ManifestError
from manifests.schema import REASONS, Status

PAPER_K: Mapping[str, int] = {
    "ResNet50 fp32": 840,
    "ResNet50 AMP": 1848,
    "ViT-B fp32": 528,
    "ViT-B AMP": 728,
}
"""Tiles that one 80 GB H100 holds for a training step (Campanella et al. 2024, arXiv 2403.04865, Fig. 1)."""
_MAX_BINS = 20


@dataclass(frozen=True, kw_only=True)
class Count:
    """So many slides, with so many tiles."""

    slides: int
    tiles: int


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Tiles per slide; percentiles interpolate, as `numpy.percentile` does."""

    median: float
    p95: float
    p99: float
    max: int


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Slides by their number of tiles: `counts[i]` have `edges[i] <= tiles < edges[i + 1]`."""

    counts: tuple[int, ...]
    edges: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Devices:
    """How many devices that hold `k` tiles each a slide of so many tiles needs (the paper's Fig. 1c)."""

    k: int
    name: str
    """What holds so many, "" where the user gave the number."""
    median: int
    p95: int
    p99: int
    max: int


@dataclass(frozen=True, kw_only=True)
class CatalogStats:
    """Counts over a whole catalogue; spread, histogram and devices over its ok slides."""

    num_slides: int
    num_tiles: int
    num_bad_tiles: int
    status: Mapping[str, Count]
    tiles_per_slide: Spread
    histogram: Histogram
    devices: tuple[Devices, ...]
    mpp_source: Mapping[str, Count]
    vendor: Mapping[str, Count]
    backend: Mapping[str, Count]
    rejected: Mapping[str, int]
    """Places of the grid without a tile, by reason."""
    tile_px: tuple[int, ...]
    tile_mpp: tuple[float, ...]


def summarise_catalog(catalog: pa.Table, capacities: Mapping[str, int] | tuple[int, ...] = PAPER_K) -> CatalogStats:
    """Sums a catalogue up.

    Args:
        catalog: a table in `manifests.schema.CATALOG_SCHEMA`.
        capacities: tiles that a device holds; by what holds them, or the bare numbers.

    Raises:
        ManifestError: a capacity below 1.
    """
    ok = catalog.filter(pc.equal(catalog["status"], "ok"))
    tiles = ok["num_tiles"].to_numpy()
    spread = _spread(tiles)
    named = capacities.items() if isinstance(capacities, Mapping) else [("", k) for k in capacities]
    found = _count_by(catalog, "status")
    return CatalogStats(
        num_slides=len(catalog),
        num_tiles=_sum(catalog, "num_tiles"),
        num_bad_tiles=_sum(catalog, "num_bad_tiles"),
        status={name: found.get(name, Count(slides=0, tiles=0)) for name in get_args(Status)},
        tiles_per_slide=spread,
        histogram=_histogram(tiles),
        devices=tuple(_devices(name, k, spread) for name, k in named),
        mpp_source=_count_by(catalog, "mpp_source"),
        vendor=_count_by(catalog, "vendor"),
        backend=_count_by(catalog, "backend"),
        rejected={reason: _sum(catalog, f"rejected_{reason}") for reason in REASONS},
        tile_px=_distinct(catalog, "tile_px"),
        tile_mpp=_distinct(catalog, "tile_mpp"),
    )


def _spread(tiles: NDArray[np.int32]) -> Spread:
    if not len(tiles):
        return Spread(median=0, p95=0, p99=0, max=0)
    median, p95, p99 = (float(value) for value in np.percentile(tiles, (50, 95, 99)))
    return Spread(median=median, p95=p95, p99=p99, max=int(tiles.max()))


def _histogram(tiles: NDArray[np.int32]) -> Histogram:
    """At most `_MAX_BINS` bins whose width is 1, 2 or 5 times a power of ten."""
    highest = int(tiles.max(initial=0))
    width = next(w for e in range(10) for w in (10**e, 2 * 10**e, 5 * 10**e) if highest // w < _MAX_BINS)
    edges = np.arange(highest // width + 2, dtype=np.int64) * width
    counts = np.bincount(tiles // width, minlength=len(edges) - 1)
    return Histogram(counts=tuple(counts.tolist()), edges=tuple(edges.tolist()))


def _devices(name: str, k: int, spread: Spread) -> Devices:
    if k < 1:
        raise ManifestError(f"--k {k}: expected at least 1 tile per device")
    median, p95, p99, most = (math.ceil(n / k) for n in (spread.median, spread.p95, spread.p99, spread.max))
    return Devices(k=k, name=name, median=median, p95=p95, p99=p99, max=most)


def _count_by(catalog: pa.Table, column: str) -> dict[str, Count]:
    grouped = catalog.group_by(column).aggregate([([], "count_all"), ("num_tiles", "sum")]).sort_by(column)
    return {
        row[column] or "unknown": Count(slides=row["count_all"], tiles=row["num_tiles_sum"] or 0)
        for row in grouped.to_pylist()  # One row per value.
    }


def _sum(catalog: pa.Table, column: str) -> int:
    return pc.sum(catalog[column]).as_py() or 0


def _distinct(catalog: pa.Table, column: str) -> tuple[Any, ...]:
    """The values that occur, ascending; 0 stands for none."""
    return tuple(sorted(set(pc.unique(catalog[column]).to_pylist()) - {0}))
