"""The archive in numbers: how many slides of each kind, how many tiles they have, and why slides failed. Pure."""

import re
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from manifests.stats import summarise_catalog

_MOST_REASONS, _MOST_IDS = 50, 100
_NUMBER = re.compile(r"\d[\d.,]*(?<=\d)")


def summarise(catalog: pa.Table) -> dict[str, Any]:
    """Counts over the whole catalogue; tiles per slide over the slides that are ok.

    Args:
        catalog: a table in `manifests.schema.CATALOG_SCHEMA`, without paths in its errors.
    """
    stats = summarise_catalog(catalog)
    spread = stats.tiles_per_slide
    tiles = catalog.filter(pc.equal(catalog["status"], "ok"))["num_tiles"].to_numpy()
    return {
        "num_slides": stats.num_slides,
        "status": {name: count.slides for name, count in stats.status.items()},
        "num_tiles": stats.num_tiles,
        "num_bad_tiles": stats.num_bad_tiles,
        "tiles_per_slide": {"p50": spread.median, "p95": spread.p95, "p99": spread.p99, "max": spread.max},
        "histogram": _histogram(tiles),
        "rejected": dict(stats.rejected),
        "failures": _failures(catalog.filter(pc.equal(catalog["status"], "failed"))),
        "tile_mpp": list(stats.tile_mpp),
        "tile_px": list(stats.tile_px),
    }


def _histogram(tiles: NDArray[np.int32]) -> dict[str, list[int]]:
    """Slides by tiles, in bins that grow as 1, 2, 5, 10 …: `counts[i]` have `edges[i] <= tiles < edges[i + 1]`.

    From the bin of the slide with the fewest tiles to that of the one with the most; no bin where there is no slide.
    """
    if not len(tiles):
        return {"edges": [], "counts": []}
    edges = np.array([0, *(step * 10**power for power in range(10) for step in (1, 2, 5))], np.int64)
    bins = np.searchsorted(edges, tiles, side="right") - 1
    first, last = int(bins.min()), int(bins.max())
    counts = np.bincount(bins - first)
    return {"edges": edges[first : last + 2].tolist(), "counts": counts.tolist()}


def _failures(failed: pa.Table) -> list[dict[str, Any]]:
    """Failed slides by reason, the commonest first.

    A reason is the error without the slide's id, and with `…` for its numbers: "region at (3, 4)" and "region at
    (5, 6)" are one reason.
    """
    ids_of: defaultdict[str, list[str]] = defaultdict(list)
    for slide_id, error in zip(failed["slide_id"].to_pylist(), failed["error"].to_pylist(), strict=True):
        sentence = error.removeprefix(f"slide {slide_id}: ")
        if slide_id in sentence:
            sentence = re.sub(rf"(?<![\w.-]){re.escape(slide_id)}(?![\w-])", "…", sentence)
        ids_of[_NUMBER.sub("…", sentence) or "no reason told"].append(slide_id)
    ranked = sorted(ids_of.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        {"reason": reason, "num_slides": len(ids), "slide_ids": ids[:_MOST_IDS]}
        for reason, ids in ranked[:_MOST_REASONS]
    ]
