"""OpenSlide: the vendors' formats, and the vendor's fields of all of them."""

from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray

from tiler.backends.pixels import PAD_VALUE, Level


class OpenslidePixels:
    """OpenSlide: interpolates where x_l0 / downsample is no whole number; exact at whole downsamples only."""

    name = "openslide"

    def __init__(self, path: Path) -> None:
        self._slide = openslide.OpenSlide(path)
        self.properties = prop = dict(self._slide.properties)
        self.vendor: str = prop.get("openslide.vendor", "")
        self.levels = tuple(
            Level(
                w,
                h,
                int(prop.get(f"openslide.level[{i}].tile-width", 256)),
                int(prop.get(f"openslide.level[{i}].tile-height", 256)),
                d,
            )
            for i, ((w, h), d) in enumerate(
                zip(self._slide.level_dimensions, self._slide.level_downsamples, strict=True)
            )
        )

    def read(self, x_l0: int, y_l0: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        rgba = np.asarray(self._slide.read_region((x_l0, y_l0), level, (width, height)))
        rgb = rgba[..., :3].copy()
        rgb[rgba[..., 3] == 0] = PAD_VALUE  # Transparent: past the edge, or never scanned.
        return rgb

    def is_exact(self, level: int) -> bool:
        return float(self.levels[level].downsample).is_integer()
