"""Collagen: one seamless picture of fibres, and the smooth warp that lays it over a slide.

The picture is drawn once per process from a constant seed; every slide bends, turns and shifts it in its own way.
"""

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from tiler.synth.config import CELL_PX
from tiler.synth.layout import Field, smooth_noise

ATLAS_PX = 1024
"""Side of the seamless fibre picture, in level-0 px."""


@lru_cache(maxsize=1)
def fibre_atlas() -> NDArray[np.uint8]:
    """Seamless picture (1024, 1024, 2), fibres along x: eosin density, and a fine grain about 128."""
    rng = np.random.default_rng(20240304)
    bundles = _streaks(rng, 45, 9) + 0.5 * _streaks(rng, 26, 4)
    strands = _streaks(rng, 15, 1.5) + 0.7 * _streaks(rng, 5, 0.9)
    clefts = _streaks(rng, 22, 2.4) + 0.5 * _streaks(rng, 60, 14)
    eosin = 49 + 8 * bundles + 6.5 * strands + 3 * _streaks(rng, 0.9, 0.9)
    eosin = np.clip(eosin, 16, None) * (1 - 0.85 * np.clip((clefts - 1.5) / 0.5, 0, 1))
    grain = 128 + 42 * _streaks(rng, 1.6, 1.6)
    atlas = np.clip(np.rint(np.stack((eosin, grain), axis=-1)), 0, 255).astype(np.uint8)
    y, x = np.mgrid[0:ATLAS_PX, 0:ATLAS_PX].astype(np.float32)
    turn = np.float32(2 * np.pi / ATLAS_PX)
    crimp = 5 * np.sin(8 * turn * x + 3 * np.sin(2 * turn * y)) + 2 * np.sin(19 * turn * x + 2 * np.sin(5 * turn * y))
    crimped: NDArray[np.uint8] = cv2.remap(atlas, x, y + crimp, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    return crimped


def draw_fibre_map(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Field, Field]:
    """Where in the picture each cell's centre lies: (x, y) in px, each (height, width) cells; wraps round."""
    height, width = shape
    y, x = (np.mgrid[0:height, 0:width].astype(np.float32) + np.float32(0.5)) * CELL_PX
    angle, shift = rng.uniform(0, np.pi), rng.uniform(0, ATLAS_PX, 2)
    bend_x, bend_y = (220 * smooth_noise(rng, shape, 45) for _ in range(2))
    ripple = 22 * smooth_noise(rng, shape, 10)
    along = np.cos(angle) * x + np.sin(angle) * y + bend_x + shift[0]
    across = np.cos(angle) * y - np.sin(angle) * x + bend_y + ripple + shift[1]
    return along.astype(np.float32), across.astype(np.float32)


def fibre_angle(fibre_y: Field) -> Field:
    """Direction in which fibres run at each cell (radians, from x towards y): there the picture's y is constant."""
    dy, dx = np.gradient(fibre_y)
    angle: Field = np.arctan2(-dx, dy).astype(np.float32)
    return angle


def _streaks(rng: np.random.Generator, along_px: float, across_px: float) -> NDArray[np.float64]:
    """Seamless Gaussian noise of unit deviation, smoothed more along x than across."""
    frequency = np.fft.fftfreq(ATLAS_PX)
    blur = np.exp(-2 * np.pi**2 * ((across_px * frequency[:, None]) ** 2 + (along_px * frequency[None]) ** 2))
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((ATLAS_PX, ATLAS_PX))) * blur).real
    streaks: NDArray[np.float64] = noise / noise.std()
    return streaks
