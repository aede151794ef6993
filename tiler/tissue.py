"""Where a slide holds tissue: pure functions from a low-resolution thumbnail to a mask, one per method."""

import cv2
import numpy as np
from numpy.typing import NDArray

_MIN_SATURATION = 12
"""Of 255. Below this Otsu would split the scanner's noise on a slide without tissue."""

_SATURATION_CAP = 80
"""Of 255. Stained tissue has 40 to 150."""


def otsu(
    thumbnail: NDArray[np.uint8], mpp: float, *, reject_pen: bool = True, min_area_um2: float = 4_000.0
) -> NDArray[np.bool_]:
    """Tissue by Otsu's threshold on saturation.

    Args:
        thumbnail: RGB, (height, width, 3).
        mpp: microns per px of the thumbnail.
        reject_pen: leave out what `pen_marks` finds.
        min_area_um2: smaller specks are dropped and smaller holes are filled, um^2.

    Returns:
        Mask, (height, width), true on tissue.

    Source: Otsu, A threshold selection method from gray-level histograms, 1979; on saturation as in Lu et al.,
    Data-efficient and weakly supervised computational pathology on whole-slide images (CLAM), 2021.
    """
    saturation = cv2.medianBlur(cv2.cvtColor(np.ascontiguousarray(thumbnail), cv2.COLOR_RGB2HSV)[..., 1], 5)
    # Ink is far more saturated than tissue; uncapped, Otsu would part ink from everything else.
    saturation = np.minimum(saturation, _SATURATION_CAP)
    threshold, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    mask = saturation > max(threshold, _MIN_SATURATION)
    mask = _drop_small(mask, min_area_um2 / mpp**2)
    mask = ~_drop_small(~mask, min_area_um2 / mpp**2)
    return mask & ~pen_marks(thumbnail) if reject_pen else mask


def pen_marks(thumbnail: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Ink of felt pens: green, blue, black, red, with a margin of one px.

    By colours that haematoxylin and eosin do not mix to: there green is always the darkest of the three channels.

    Args:
        thumbnail: RGB, (height, width, 3).

    Returns:
        Mask, (height, width). Dense nuclei, folds and blood stay out of it; a blue counterstain without eosin may not.
    """
    red, green, blue = np.moveaxis(thumbnail.astype(np.int16), -1, 0)
    brightest, darkest = thumbnail.max(-1).astype(np.int16), thumbnail.min(-1).astype(np.int16)
    green_or_blue = (green >= red - 5) & (brightest - darkest > 60)
    black = (brightest < 70) & (brightest - darkest < 40)
    red_ink = (red - np.maximum(green, blue) > 90) & (np.abs(green - blue) < 25)
    ink = (green_or_blue | black | red_ink).astype(np.uint8)
    return np.asarray(cv2.dilate(cv2.medianBlur(ink, 3), np.ones((3, 3), np.uint8)) > 0)


def _drop_small(mask: NDArray[np.bool_], min_area_px: float) -> NDArray[np.bool_]:
    """The mask without its 8-connected pieces below `min_area_px`."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_area_px
    keep[0] = False  # Label 0 is what the mask leaves out.
    return np.asarray(keep[labels], bool)
