"""Attention, or contributions, over a slide's thumbnail: arrays in, arrays out.

Knows no model, file or figure; `cards` puts the picture beside the plain thumbnail with a colour bar. One thing to know
before changing it: colours of attention show the *rank* of a tile's weight among the slide's tiles. Attention is a
softmax over thousands of tiles, so on a linear scale one tile would be bright and all others black. Contributions have
a sign, so their colours are linear from 0, and end at a quantile.
"""

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Colormap, LinearSegmentedColormap
from numpy.typing import NDArray

from manifests import Manifest
from trainer.reports.plots import BLUE, ORANGE

RANKS = mpl.colormaps["viridis"]
"""Dark to bright also for colour-blind readers and in grey print; its green and yellow are no colours of H&E."""
SIGNS = LinearSegmentedColormap.from_list("signs", [BLUE, "#f4f4f4", ORANGE])
"""Below 0, about 0, above 0; all kinds of colour vision tell its ends apart."""
SCALE_QUANTILE = 0.99
"""Of absolute contributions: where colours end. A few tiles that outdo all others do not make those look like 0."""
_ALPHA = 0.55
"""Opacity of the colour: tissue stays readable under it. Blended with grey, not with the stain, so that one colour
means one rank on eosin and on haematoxylin alike; and tissue the model did not see keeps its stain."""
_LUMA = np.array([0.299, 0.587, 0.114])
"""Red, green, blue to brightness, ITU-R BT.601."""


def rank_share(weights: NDArray[np.floating]) -> NDArray[np.float64]:
    """Where each weight stands among all, 0 (lowest) to 1 (highest), ties in the middle; NaN stays NaN.

    Args:
        weights: one per tile, (n,); NaN for tiles the model did not see.
    """
    share = np.full(len(weights), np.nan)
    seen = np.isfinite(weights)
    _, level, count = np.unique(weights[seen], return_inverse=True, return_counts=True)
    midrank = np.cumsum(count) - (count + 1) / 2  # From 0; one tile alone, as equal ones, stands in the middle.
    share[seen] = midrank[level] / (seen.sum() - 1) if seen.sum() > 1 else 0.5
    return share


def color_scale(contributions: NDArray[np.floating]) -> float:
    """The contribution, above 0, at which colours end, as they do at its negative.

    Args:
        contributions: one per tile, (n,); NaN for tiles the model did not see.
    """
    sizes = np.abs(contributions[np.isfinite(contributions)])
    # Where nearly all are 0, that of the largest; where all are, any.
    return float(np.quantile(sizes, SCALE_QUANTILE) or sizes.max()) or 1.0 if len(sizes) else 1.0


def sign_share(contributions: NDArray[np.floating], scale: float) -> NDArray[np.float64]:
    """Where each contribution stands between -scale (0) and scale (1), those beyond at the ends; NaN stays NaN."""
    return np.asarray(np.clip(0.5 + 0.5 * np.asarray(contributions, np.float64) / scale, 0, 1))


def tile_boxes(manifest: Manifest, mpp_thumb: float) -> NDArray[np.int64]:
    """Each tile's box on the thumbnail, (n, 4): left, top, right, bottom in thumbnail px, half-open, not clipped.

    Edges are rounded, not sizes: tiles that touch on the slide touch on the thumbnail, without gap or overlap. A
    thumbnail has one scale on both axes, that of the coarser axis of level 0 (see `tiler.build`).

    Args:
        manifest: the slide's tiles, level-0 px.
        mpp_thumb: microns per thumbnail px.
    """
    slide, (width_l0, height_l0) = manifest.slide, manifest.footprint_l0
    thumb_px_per_l0 = max(slide.mpp_x, slide.mpp_y) / mpp_thumb
    x_l0, y_l0 = manifest.x_l0.astype(np.int64), manifest.y_l0.astype(np.int64)
    edges_l0 = np.stack([x_l0, y_l0, x_l0 + width_l0, y_l0 + height_l0], axis=1)
    boxes = np.round(edges_l0 * thumb_px_per_l0).astype(np.int64)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)  # A tile smaller than a px is still seen.
    return boxes


def paint_tiles(size: tuple[int, int], boxes: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean value of the tiles over each px, NaN where there is none.

    Each box adds its value at two corners and takes it back at the other two; the running sum along both axes fills
    it. So 45,000 tiles cost four scatters and two sums, not 45,000 slices.

    Args:
        size: (height, width) of the picture, px.
        boxes: from `tile_boxes`, (n, 4).
        values: (n,); tiles with NaN are left out.

    Returns:
        (height, width).
    """
    height, width = size
    seen = np.isfinite(values)
    left, top, right, bottom = np.clip(boxes[seen], 0, [width, height, width, height]).T
    layers = np.zeros((2, height + 1, width + 1))  # Sum of values, and how many.
    for layer, amount in zip(layers, (values[seen], np.ones(seen.sum())), strict=True):
        for y, x, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
            np.add.at(layer, (y, x), sign * amount)
    total, count = layers.cumsum(1).cumsum(2)[:, :height, :width]
    # Counts are whole numbers, exact in floats; sums of values are not, so the count alone says where tiles are.
    return np.where(count > 0, np.clip(total / np.maximum(count, 1), 0, 1), np.nan)


def paint_slide(
    thumbnail: NDArray[np.uint8],
    mpp_thumb: float,
    manifest: Manifest,
    share: NDArray[np.float64],
    colors: Colormap = RANKS,
) -> NDArray[np.uint8]:
    """The thumbnail with every tile in its colour.

    Args:
        thumbnail: RGB of the whole slide, (h, w, 3).
        mpp_thumb: microns per thumbnail px.
        manifest: the slide's tiles.
        share: where each tile of the manifest stands on the colour map, (n,), 0 to 1 (`rank_share`, `sign_share`); NaN
            for tiles the model did not see, which stay uncoloured.
        colors: the colour map.

    Returns:
        RGB, (h, w, 3).

    Raises:
        ValueError: not one value per tile.
    """
    if share.shape != (len(manifest),):
        raise ValueError(f"slide {manifest.slide.slide_id}: values of shape {share.shape}, expected ({len(manifest)},)")
    mean_share = paint_tiles(thumbnail.shape[:2], tile_boxes(manifest, mpp_thumb), share)
    painted = np.isfinite(mean_share)
    color = colors(mean_share[painted])[:, :3] * 255
    grey = (thumbnail[painted] @ _LUMA)[:, None]
    picture = thumbnail.copy()
    picture[painted] = np.round(_ALPHA * color + (1 - _ALPHA) * grey).astype(np.uint8)
    return picture
