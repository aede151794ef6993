"""Tissue from outside: a mask picture or GeoJSON polygons that another program made, used instead of our own."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tiler.errors import TilerError

SUFFIXES = (".png", ".tif", ".tiff", ".geojson", ".json")


def find_mask(masks: Path, slide_id: str) -> Path:
    """The mask of a slide in the folder --masks: `SLIDE_ID` and one of `SUFFIXES`.

    Raises:
        TilerError: there is none, or more than one.
    """
    found = [masks / f"{slide_id}{suffix}" for suffix in SUFFIXES if (masks / f"{slide_id}{suffix}").is_file()]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise TilerError(f"slide {slide_id}: expected one mask in --masks ({' '.join(SUFFIXES)}), found {names}")
    return found[0]


def read_outside(
    file: Path, shape: tuple[int, int], covers_l0: tuple[float, float], values: tuple[int, ...]
) -> NDArray[np.bool_]:
    """A mask from outside, in the frame of the slide's thumbnail.

    Args:
        file: see `find_mask`. A picture covers the whole slide at any resolution; polygons are in level-0 px.
        shape: (height, width) of the thumbnail.
        covers_l0: (width, height) in level-0 px that the thumbnail covers.
        values: pixel values that mean tissue; empty: all but 0.

    Raises:
        TilerError: not readable, or not of the slide's shape.
    """
    raise NotImplementedError
