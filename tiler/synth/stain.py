"""Haematoxylin and eosin: from stain densities to colour, by Beer and Lambert's law.

Densities are uint8 in hundredths of optical density, so that both stains of a pixel are two table look-ups and a
product. Not for where stain lies (texture.py).
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

_HAEMATOXYLIN = np.array([0.5626, 0.7201, 0.4062])
_EOSIN = np.array([0.2159, 0.8012, 0.5581])
"""Unit absorption per stain in (R, G, B), after Macenko et al., ISBI 2009, with their reference slide's values."""
_WHITE = np.array([243.0, 240.0, 242.0])
"""The scanner's white, slightly warm."""
DENSITY_STEP = 0.01
"""Optical density of one step of a density plane."""
FOCUS_DENSITY = (0.62, 0.30)
"""Haematoxylin and eosin density whose colour every focus has on average, whatever its kind."""


@dataclass(frozen=True, kw_only=True)
class Stain:
    """One laboratory's stain and one scanner's white."""

    haematoxylin: NDArray[np.float64]
    """Absorption per unit density, (R, G, B)."""
    eosin: NDArray[np.float64]
    """Absorption per unit density, (R, G, B)."""
    white: NDArray[np.float64]
    """Colour of empty glass, (R, G, B) in 0 to 255."""

    @property
    def focus_rgb(self) -> NDArray[np.float64]:
        """Mean colour of every focus under this stain, (R, G, B) in 0 to 255."""
        h, e = FOCUS_DENSITY
        rgb: NDArray[np.float64] = self.white * np.exp(-h * self.haematoxylin - e * self.eosin)
        return rgb

    def transmission(self, absorption: NDArray[np.float64]) -> NDArray[np.float64]:
        """Light passed per density step, (256, 3) in 0 to 1."""
        steps = np.arange(256)[:, None] * DENSITY_STEP
        light: NDArray[np.float64] = np.exp(-steps * absorption)
        return light

    def tables(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Look-up tables (256, 1, 3) for haematoxylin (the white included) and eosin."""
        haematoxylin = np.rint(self.white * self.transmission(self.haematoxylin)).astype(np.uint8)
        eosin = np.rint(255 * self.transmission(self.eosin)).astype(np.uint8)
        return haematoxylin[:, None], eosin[:, None]


def draw_stain(rng: np.random.Generator, variation: float) -> Stain:
    """Draws a stain; `variation` 0 gives the reference, 1 the spread between a few laboratories."""
    tilt = 0.03 * variation
    strength_h, strength_e = np.exp(variation * rng.normal(0, (0.10, 0.13)))
    return Stain(
        haematoxylin=_tilted(rng, _HAEMATOXYLIN, tilt) * strength_h,
        eosin=_tilted(rng, _EOSIN, tilt) * strength_e,
        white=_WHITE + variation * rng.uniform(-1.5, 1.5, 3),
    )


def colour(
    haematoxylin: NDArray[np.uint8],
    eosin: NDArray[np.uint8],
    tables: tuple[NDArray[np.uint8], NDArray[np.uint8]],
) -> NDArray[np.uint8]:
    """RGB (H, W, 3) of two density planes (H, W)."""
    light_h = cv2.LUT(cv2.cvtColor(haematoxylin, cv2.COLOR_GRAY2RGB), tables[0])
    light_e = cv2.LUT(cv2.cvtColor(eosin, cv2.COLOR_GRAY2RGB), tables[1])
    rgb: NDArray[np.uint8] = cv2.multiply(light_h, light_e, scale=1 / 255)
    return rgb


def _tilted(rng: np.random.Generator, absorption: NDArray[np.float64], tilt: float) -> NDArray[np.float64]:
    turned = np.clip(absorption + rng.normal(0, tilt, 3), 0.02, None)
    unit: NDArray[np.float64] = turned / np.linalg.norm(turned)
    return unit
