"""Areas of a slide that are no tissue to learn from: ink, black, blank, out of focus; each reason gives a mask.

Pure functions of the thumbnail, but for blur, which needs finer pixels (tiler/focus.py). Colours are OpenCV's hue (0 to
180), saturation and value (0 to 255). Before changing a range: at 8 microns per px a nucleus is one px, so stains are
paler here than at full scale, and ink is not.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from tiler.config import TissueConfig
from tiler.focus import out_of_focus
from tiler.masks import Overview
from tiler.slide import Slide
from tiler.tissue import glass_level

_INKS = {
    # colour: (surely ink, perhaps ink), each the least and the greatest of hue, saturation and value. A blue
    # counterstain has the hue of blue ink at a third of the saturation; light green and methyl green have that of
    # green ink at half of it; eosin lies below hue 173 and blood below saturation 160.
    "blue": (((100, 150, 30), (132, 255, 210)), ((98, 90, 20), (140, 255, 230))),
    "green": (((35, 140, 30), (85, 255, 220)), ((32, 45, 20), (105, 255, 230))),
    "red": (((176, 165, 100), (180, 255, 255)), ((172, 140, 90), (180, 255, 255))),
}
_MIN_INK_UM2 = 5_000.0
"""Least area that is surely ink: a dot of a felt pen is a hundred times larger, a clump of pigment smaller."""
_MAX_UNSURE = 0.5
"""What only may be ink is ink with the piece it hangs together with if it is at most this many times as large as what
surely is ink, or if it is as flat as ink."""
_FLAT_RANGE = 16
"""Grey levels between the darkest and the brightest of 3 x 3 px. Ink is flat; stained tissue at this scale is not."""
_MIN_FLAT_SHARE = 0.2
"""Least share of flat px in a piece of ink: the rest is the edge of a narrow stroke, or tissue that shows through."""
_INK_FRINGE_UM = 16.0
"""So far from what is surely ink, perhaps is enough."""

_DARK_VALUE = 70
"""Black ink and fill are darker. CLAM calls a patch black below a mean of 40 to 50 in all channels."""
_FILL_VALUE = 25
"""A scanner's fill is darker; ink lets more light through."""
_DARK_CHROMA = 22
"""Black has no colour: dense nuclei and folds are purple by 40 grey levels and more."""
_BROWN = 4
"""Blue this far below green is the brown of melanin and DAB; black ink over tissue has more blue than green."""
_MIN_DARK_UM2 = 10_000.0
"""Smaller black pieces are carbon or dirt."""

_BLANK_UM = 120.0
"""Side of the neighbourhood that must be blank: about a tile, larger than most fat cells."""
_BLANK_SHARE = 0.95
_BLANK_BELOW_GLASS = 4
"""Grey levels."""


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

    Raises:
        ReadError: the finer pixels could not be read.
    """
    thumbnail, mpp = np.ascontiguousarray(overview.thumbnail), overview.mpp
    found = {}
    if config.reject_pen:
        found["pen"] = pen_marks(thumbnail, mpp)
    if config.reject_black:
        found["black"] = black_areas(thumbnail, mpp)
    if config.reject_white:
        found["white"] = blank_areas(thumbnail, mpp)
    if config.reject_blur:
        # Ink lies above the plane of focus and its outline would be taken for blurred tissue.
        left = tissue.copy()
        for mask in found.values():
            left &= ~mask
        found["blur"] = out_of_focus(slide, overview, left)
    return found


def pen_marks(thumbnail: NDArray[np.uint8], mpp: float) -> NDArray[np.bool_]:
    """Ink of felt pens: blue, green, red and black, with a margin of one px.

    Ink is more saturated than most stains are at this scale, and its strokes are large and flat. Where it thins out or
    lies over tissue its colour is a stain's; there it counts as far as it hangs together with what is surely ink.

    Args:
        thumbnail: RGB, (height, width, 3).
        mpp: microns per px of it.

    Returns:
        Mask, (height, width). Not told from ink: dense stains of a pen's colour over large areas without any texture
        (collagen in Masson's trichrome, Sirius red, DAB with haematoxylin so dense that it is black). A black stroke
        along the slide's border is taken for the edge of the glass. Surgical ink on a margin of tissue is left in.
    """
    strokes, _ = _dark_pieces(thumbnail, mpp)
    ink = strokes | _coloured_ink(thumbnail, mpp)
    return _grown(ink, 1) if ink.any() else ink


def black_areas(thumbnail: NDArray[np.uint8], mpp: float) -> NDArray[np.bool_]:
    """Fill of the scanner, edges of the glass and other black blocks, with a margin of one px.

    Args:
        thumbnail: RGB, (height, width, 3).
        mpp: microns per px of it.

    Returns:
        Mask, (height, width). Dense nuclei, folds and melanin stay out of it, they have colour; carbon that fills an
        area does not.

    Source: Lu et al., CLAM, 2021, leaves out patches whose mean is below 40 to 50 in every channel; here the px must
    be without colour too.
    """
    _, blocks = _dark_pieces(thumbnail, mpp)
    return _grown(blocks, 1) if blocks.any() else blocks


def blank_areas(thumbnail: NDArray[np.uint8], mpp: float) -> NDArray[np.bool_]:
    """Glass with nothing on it: px whose neighbourhood is as bright as the slide's own glass.

    Args:
        thumbnail: RGB, (height, width, 3).
        mpp: microns per px of it.

    Returns:
        Mask, (height, width). Fat stays out of it: wherever a tile lies in it, it holds septa.

    Source: Lu et al., CLAM, 2021, leaves out patches of a mean saturation below 5 to 15; here by the share of blank px,
    which a single septum changes and the colour of the glass does not.
    """
    darkest = cv2.min(cv2.min(*cv2.split(thumbnail)[:2]), cv2.extractChannel(thumbnail, 2))
    blank = cv2.threshold(darkest, glass_level(darkest) - _BLANK_BELOW_GLASS - 1, 255, cv2.THRESH_BINARY)[1]
    side_px = round(_BLANK_UM / mpp) | 1
    share = cv2.boxFilter(blank, -1, (side_px, side_px), borderType=cv2.BORDER_REFLECT)
    # Back from the neighbourhoods' middles to all that they cover.
    middles = (share >= 255 * _BLANK_SHARE).view(np.uint8)
    return np.asarray((cv2.dilate(middles, np.ones((side_px, side_px), np.uint8)) > 0) & (blank > 0))


def _coloured_ink(thumbnail: NDArray[np.uint8], mpp: float) -> NDArray[np.bool_]:
    """Ink of all colours but black."""
    picture = cv2.cvtColor(thumbnail, cv2.COLOR_RGB2HSV)
    ink = np.zeros(thumbnail.shape[:2], bool)
    for surely, perhaps in _INKS.values():
        sure = _within(picture, surely)
        if np.count_nonzero(sure) < _MIN_INK_UM2 / mpp**2:
            continue
        flat = _flat(thumbnail)
        sure = _flat_pieces(sure, flat, _MIN_INK_UM2 / mpp**2)
        unsure = _within(picture, perhaps) & ~sure
        _, labels, stats, _ = cv2.connectedComponentsWithStats((sure | unsure).view(np.uint8), connectivity=8)
        num_sure, num_unsure, num_flat = (
            np.bincount(labels[mask], minlength=len(stats)) for mask in (sure, unsure, unsure & flat)
        )
        is_ink = (num_sure > 0) & ((num_unsure <= _MAX_UNSURE * num_sure) | (num_flat >= _MIN_FLAT_SHARE * num_unsure))
        is_ink[0] = False
        ink |= is_ink[labels] | sure | (_grown(sure, round(_INK_FRINGE_UM / mpp)) & unsure)
    return ink


def _dark_pieces(thumbnail: NDArray[np.uint8], mpp: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Black pieces of a slide: (strokes of a pen, all others).

    A piece along the slide's border, as the glass's edge is, or as dark as fill is no stroke. A stroke that runs over
    the border touches it with its width, an edge with its length.
    """
    red, green, blue = cv2.split(thumbnail)
    brightest, darkest = cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue)
    dark = (brightest < _DARK_VALUE) & (cv2.subtract(brightest, darkest) <= _DARK_CHROMA)
    if np.count_nonzero(dark) < _MIN_DARK_UM2 / mpp**2:
        nothing = np.zeros(dark.shape, bool)
        return nothing, nothing
    dark &= cv2.subtract(green, blue) <= _BROWN
    dark = _flat_pieces(dark, _flat(thumbnail), _MIN_DARK_UM2 / mpp**2)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(dark.view(np.uint8), connectivity=8)
    area = stats[:, cv2.CC_STAT_AREA]
    border = np.concatenate((labels[0], labels[-1], labels[:, 0], labels[:, -1]))
    contact = np.bincount(border, minlength=len(stats))
    value = np.bincount(labels.ravel(), brightest.ravel(), minlength=len(stats)) / area
    is_stroke = (contact <= np.sqrt(area)) & (value >= _FILL_VALUE)
    is_stroke[0] = False
    strokes = is_stroke[labels]
    return strokes, dark & ~strokes


def _flat(thumbnail: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Px whose neighbours are as bright as they are."""
    grey = cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) <= _FLAT_RANGE)


def _flat_pieces(mask: NDArray[np.bool_], flat: NDArray[np.bool_], min_area_px: float) -> NDArray[np.bool_]:
    """The pieces of a mask that are large, and flat over enough of their area."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    area = stats[:, cv2.CC_STAT_AREA]
    num_flat = np.bincount(labels[mask & flat], minlength=len(stats))
    keep = (area >= min_area_px) & (num_flat >= _MIN_FLAT_SHARE * area)
    keep[0] = False
    return np.asarray(keep[labels])


def _within(picture: NDArray[np.uint8], bounds: tuple[tuple[int, int, int], tuple[int, int, int]]) -> NDArray[np.bool_]:
    return np.asarray(cv2.inRange(picture, np.array(bounds[0]), np.array(bounds[1])) > 0)


def _grown(mask: NDArray[np.bool_], by_px: int) -> NDArray[np.bool_]:
    """The mask and what lies within `by_px` of it."""
    side = 2 * by_px + 1
    return np.asarray(cv2.dilate(mask.view(np.uint8), np.ones((side, side), np.uint8)) > 0)
