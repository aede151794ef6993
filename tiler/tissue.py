"""Where a slide holds tissue: pure functions from a low-resolution thumbnail to a mask, one per method.

Not for what lies in or on the tissue without being any (tiler/artefacts.py). Before changing a threshold: the masks of
all slides move with it; tests/benchmarks/bench_tissue.py measures them against a known truth.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from tiler.config import TissueConfig

_MIN_SATURATION = 12
"""Of 255. Below this Otsu would split the scanner's noise on a slide without tissue."""
_SATURATION_CAP = 80
"""Of 255. Stained tissue has 40 to 150."""
_HSV_RANGES = (((90, 15, 40), (180, 255, 255)), ((0, 25, 40), (30, 255, 255)))
"""Hue (0 to 180), saturation and value (0 to 255): blue to pink, and red to brown."""
_TEXTURE_UM = 120.0
"""Side of the window of local entropy: about one fat cell, so that it holds a septum wherever it lies."""
_MAX_TEXTURE_PX = 15
"""Counts of 15 x 15 px fit a byte."""
_MIN_ENTROPY_BITS = 0.5
"""Reached where a tenth of the window is septa; even glass has 0."""
_MAX_GLASS_SHARE = 0.5
"""With less glass than this around it a px is tissue, however even: even tissue has no entropy."""
_SHADE_STEPS = (3, 7, 11, 15, 23, 39, 71)
"""Last grey level below glass of each bin but the last. The first bin is wider than the noise of glass."""
_SURELY_BELOW = 19
"""Grey levels below glass at which a px is tissue by itself."""

_ROWS = 512


def find_tissue(thumbnail: NDArray[np.uint8], mpp: float, config: TissueConfig) -> NDArray[np.bool_]:
    """The tissue of a slide by the method asked for, small specks dropped and small holes filled by their area.

    Args:
        thumbnail: RGB, (height, width, 3).
        mpp: microns per px of the thumbnail.
        config: method and areas.

    Returns:
        Mask, (height, width), true on tissue, pen marks and other artefacts included (see tiler/artefacts.py).
    """
    thumbnail = np.ascontiguousarray(thumbnail)
    if config.method == "entropy":
        mask = entropy(thumbnail, mpp)
    else:
        mask = {"otsu": otsu, "hsv": hsv}[config.method](thumbnail)
    mask = drop_small(mask, config.min_speck_um2 / mpp**2)
    return ~drop_small(~mask, config.max_hole_um2 / mpp**2)


def otsu(thumbnail: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Tissue by Otsu's threshold on saturation.

    Args:
        thumbnail: RGB, (height, width, 3).

    Returns:
        Mask, (height, width), true on tissue. Of fat the septa, not the cells.

    Source: Otsu, A threshold selection method from gray-level histograms, 1979; on saturation as in Lu et al.,
    Data-efficient and weakly supervised computational pathology on whole-slide images (CLAM), 2021.
    """
    saturation = cv2.extractChannel(cv2.cvtColor(thumbnail, cv2.COLOR_RGB2HSV), 1)
    # Ink is far more saturated than tissue; uncapped, Otsu would part ink from everything else.
    saturation = np.minimum(cv2.medianBlur(saturation, 5), _SATURATION_CAP)
    threshold, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return np.asarray(saturation > max(threshold, _MIN_SATURATION))


def hsv(thumbnail: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Tissue by fixed ranges of hue, saturation and value: no slide changes what counts as tissue on another.

    Args:
        thumbnail: RGB, (height, width, 3).

    Returns:
        Mask, (height, width), true on tissue. Green stains stay out of it.

    Source: the first range is that of Vorontsov et al., Virchow, 2024 (hue 90 to 180, saturation from 8, value from
    103). Here saturation starts at 15, above the fringe of colour that JPEG draws round tissue, and value at 40, for
    dense tissue; the second range is added for DAB and red chromogens.
    """
    picture = cv2.medianBlur(cv2.cvtColor(thumbnail, cv2.COLOR_RGB2HSV), 5)
    inside = [cv2.inRange(picture, np.array(low), np.array(high)) for low, high in _HSV_RANGES]
    return np.asarray(cv2.bitwise_or(*inside) > 0)


def entropy(thumbnail: NDArray[np.uint8], mpp: float) -> NDArray[np.bool_]:
    """Tissue by texture: the entropy of shades around each px, so that fat with thin septa is tissue as a whole.

    A window that only touches tissue has entropy too; the mask is cut back by half a window, which leaves gaps up to
    a window wide closed.

    Args:
        thumbnail: RGB, (height, width, 3).
        mpp: microns per px of the thumbnail.

    Returns:
        Mask, (height, width), true on tissue.

    Source: local entropy as in Song et al., An automatic entropy method to efficiently mask histology whole-slide
    images (EntropyMasker), 2023; shades are counted from the colour of the glass, with a fixed threshold.
    """
    darkest = cv2.min(cv2.min(*cv2.split(thumbnail)[:2]), cv2.extractChannel(thumbnail, 2))
    below = cv2.subtract(np.full_like(darkest, glass_level(darkest)), darkest)
    shades = cv2.LUT(below, np.searchsorted(_SHADE_STEPS, np.arange(256)).astype(np.uint8))
    side_px = min(_MAX_TEXTURE_PX, max(3, round(_TEXTURE_UM / mpp) | 1))
    share = np.arange(256) / side_px**2
    millibits = np.rint(-1000 * share * np.log2(np.maximum(share, 1e-9))).clip(0).astype(np.uint16)
    total = np.zeros(shades.shape, np.uint16)
    glass = shades
    for shade in range(len(_SHADE_STEPS) + 1):
        count = cv2.boxFilter(cv2.inRange(shades, shade, shade) & 1, -1, (side_px, side_px), normalize=False)
        cv2.add(total, cv2.LUT(count, millibits), dst=total)
        glass = count if shade == 0 else glass
    found = (total >= 1000 * _MIN_ENTROPY_BITS) | (glass < _MAX_GLASS_SHARE * side_px**2)
    # Half a window, and one px more: a window is found before it is half full.
    cut = cv2.erode(found.astype(np.uint8), np.ones((side_px + 2, side_px + 2), np.uint8))
    return np.asarray((cut > 0) | (below > _SURELY_BELOW))


def glass_level(darkest: NDArray[np.uint8]) -> int:
    """The darkest channel of bare glass, 0 to 255: the commonest bright value among px as even as glass.

    Scanners fill what they did not scan with 255; where there is glass too, it is the darker of the two.

    Args:
        darkest: least of the three channels, (height, width).
    """
    even = cv2.morphologyEx(darkest, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) <= 3
    counts = cv2.calcHist([darkest], [0], even.astype(np.uint8), [256], [0, 256]).ravel()
    glass = counts[200:251]
    return 200 + int(glass.argmax()) if glass.sum() >= 0.01 * darkest.size else 255


def drop_small(mask: NDArray[np.bool_], min_area_px: float) -> NDArray[np.bool_]:
    """The mask without its 8-connected pieces below `min_area_px`."""
    # Twice as fast as OpenCV's default algorithm on one core.
    _, labels, stats, _ = cv2.connectedComponentsWithStatsWithAlgorithm(
        mask.view(np.uint8), 8, cv2.CV_32S, cv2.CCL_GRANA
    )
    keep = stats[:, cv2.CC_STAT_AREA] >= min_area_px
    keep[0] = False  # Label 0 is what the mask leaves out.
    kept = np.empty_like(mask)
    for top in range(0, len(mask), _ROWS):  # Whole, its copy of the labels in 64 bits would be the most memory of all.
        np.take(keep, labels[top : top + _ROWS], out=kept[top : top + _ROWS])
    return kept
