"""Where a slide holds tissue: pure functions from a low-resolution thumbnail to a mask, one per method."""

import cv2
import numpy as np
from numpy.typing import NDArray

from tiler.config import TissueConfig

_MIN_SATURATION = 12
"""Of 255. Below this Otsu would split the scanner's noise on a slide without tissue."""

_SATURATION_CAP = 80
"""Of 255. Stained tissue has 40 to 150."""


def find_tissue(thumbnail: NDArray[np.uint8], mpp: float, config: TissueConfig) -> NDArray[np.bool_]:
    """The tissue of a slide by the method asked for, small specks dropped and small holes filled by their area.

    Args:
        thumbnail: RGB, (height, width, 3).
        mpp: microns per px of the thumbnail.
        config: method and areas.

    Returns:
        Mask, (height, width), true on tissue, pen marks and other artefacts included (see tiler/artefacts.py).
    """
    mask = {"otsu": otsu}[config.method](thumbnail)
    mask = _drop_small(mask, config.min_speck_um2 / mpp**2)
    return ~_drop_small(~mask, config.max_hole_um2 / mpp**2)


def otsu(thumbnail: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Tissue by Otsu's threshold on saturation.

    Args:
        thumbnail: RGB, (height, width, 3).

    Returns:
        Mask, (height, width), true on tissue.

    Source: Otsu, A threshold selection method from gray-level histograms, 1979; on saturation as in Lu et al.,
    Data-efficient and weakly supervised computational pathology on whole-slide images (CLAM), 2021.
    """
    saturation = cv2.medianBlur(cv2.cvtColor(np.ascontiguousarray(thumbnail), cv2.COLOR_RGB2HSV)[..., 1], 5)
    # Ink is far more saturated than tissue; uncapped, Otsu would part ink from everything else.
    saturation = np.minimum(saturation, _SATURATION_CAP)
    threshold, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return np.asarray(saturation > max(threshold, _MIN_SATURATION))


def _drop_small(mask: NDArray[np.bool_], min_area_px: float) -> NDArray[np.bool_]:
    """The mask without its 8-connected pieces below `min_area_px`."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_area_px
    keep[0] = False  # Label 0 is what the mask leaves out.
    return np.asarray(keep[labels], bool)
