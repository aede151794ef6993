"""SLIDE.geojson: the tiles as QuPath's tile objects, with attention and contribution as measurements.

In QuPath: File > Import objects; then Measure > Show measurement maps. Tiles are objects that many of may lie on a
slide, as detections; annotations would be slow from some thousands on. Source: `manifests.exchange.geojson`, whose
geometry this is, so that `slidegrad manifest import` reads the tiles too. Slide ids alone, no path.
"""

import dataclasses
import json
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from manifests import Manifest
from manifests.exchange.geojson import draw_collection, draw_tiles
from manifests.exchange.tiles import ReadPlan
from trainer.heatmaps.painting import rank_share
from trainer.heatmaps.sheet import Choice
from trainer.heatmaps.values import SlideValues

_TOP_COLOR, _BOTTOM_COLOR = [213, 94, 0], [0, 114, 178]
"""Orange and blue, as on the heatmap."""


def draw_layer(manifest: Manifest, values: SlideValues, choice: Choice) -> str:
    """The file's text: one feature for every tile of the manifest, in its order.

    Args:
        manifest: the slide's tiles.
        values: of all of them; what is NaN is left out of a tile's measurements.
        choice: the tiles that get a class.
    """
    about = {"checkpoint": values.origin.checkpoint, "aggregator": values.aggregator, "contribution_to": values.what}
    plan = dataclasses.asdict(ReadPlan.of(manifest.slide)) | {"num_tiles": len(manifest)} | about
    rows = np.arange(len(manifest), dtype=np.int64)
    return draw_collection(json.dumps(plan), draw_tiles(manifest, rows, _properties(manifest, values, choice)))


def _properties(manifest: Manifest, values: SlideValues, choice: Choice) -> Iterator[str]:
    kind = "contribution" if values.has_contributions else "attention"
    classes = dict.fromkeys(choice.top.tolist(), _class(f"Highest {kind}", _TOP_COLOR))
    classes |= dict.fromkeys(choice.bottom.tolist(), _class(f"Lowest {kind}", _BOTTOM_COLOR))
    columns: dict[str, NDArray[np.floating]] = {
        "tissue": manifest.tissue,
        "attention": values.attention,
        "attention rank": rank_share(values.attention),
        "contribution": values.contribution,
    }
    for row, numbers in enumerate(zip(*map(_rounded, columns.values()), strict=True)):
        measured = ", ".join(
            f'"{name}": {number}' for name, number in zip(columns, numbers, strict=True) if math.isfinite(number)
        )
        yield f'{classes.get(row, "")}"measurements": {{{measured}}}'


def _rounded(numbers: NDArray[np.floating]) -> list[float]:
    """Six digits."""
    return [float(f"{number:.6g}") for number in numbers.tolist()]


def _class(name: str, color: list[int]) -> str:
    return f'"classification": {json.dumps({"name": name, "color": color})}, '
