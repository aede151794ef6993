"""Values and manifests for the tests of heatmaps, made by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from manifests import Manifest, SlideRecord
from trainer.heatmaps.values import Origin, SlideValues

ORIGIN = Origin(manifest_hash="12ab", checkpoint="epoch_0003", weights_hash="34cd", output="tumour")
ODD_ID = "病理 Größe $x_y"


def made_manifest(num_tiles: int, *, tile_px: int = 32, slide_id: str = ODD_ID, columns: int = 4) -> Manifest:
    """Tiles in rows of four from (640, 320) on, each 4 level-0 px a px wide and 2 high: mpp differs by axis."""
    record = SlideRecord(
        slide_id=slide_id,
        status="ok",
        num_tiles=num_tiles,
        width_l0=40_000,
        height_l0=30_000,
        mpp_x=0.25,
        mpp_y=0.5,
        tile_px=tile_px,
        tile_mpp=1.0,
        read_w=tile_px,
        read_h=tile_px,
    )
    row = np.arange(num_tiles)
    x_l0 = 640 + row % columns * 4 * tile_px
    y_l0 = 320 + row // columns * 2 * tile_px
    tissue = np.linspace(0.25, 1, num_tiles, dtype=np.float32)
    return Manifest(record, x_l0.astype(np.int32), y_l0.astype(np.int32), tissue)


def made_values(contribution: Sequence[float] | np.ndarray, /, **changes: Any) -> SlideValues:
    """Values with these contributions, and attention that rises with the row."""
    parts = np.asarray(contribution, np.float32)
    attention = np.arange(1, len(parts) + 1) / (len(parts) * (len(parts) + 1) / 2)
    facts: dict[str, Any] = {
        "slide_id": ODD_ID,
        "origin": ORIGIN,
        "aggregator": "gma",
        "outputs": ("normal", "tumour"),
        "predictions": (0.25, 0.75),
        "what": "log-odds of class tumour over normal",
        "base": -0.25,
        "total": 1.0986,
        "attention": np.where(np.isfinite(parts), attention, np.nan).astype(np.float32),
        "contribution": parts,
    }
    return SlideValues(**facts | changes)
