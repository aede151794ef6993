"""A bank of nuclei, drawn once per process, and the stamping of thousands of them on a plane.

Each stamp is a small uint8 picture of haematoxylin density (hundredths of optical density). The bank is drawn from a
constant seed: what differs between slides is which stamp lies where, not the bank.
"""

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.uint8]

MARGIN_PX = 32
"""Planes are this much larger on every side, so that no stamp needs clipping."""
NUM_ANGLES = 24
"""Directions in which elongated nuclei are drawn, over half a turn."""
_PER_ANGLE = 5
_EDGE = 50
"""Density from which a stamp hides what lies below it; its softer outline only darkens."""


@dataclass(frozen=True, kw_only=True)
class NucleusKind:
    """How one kind of nucleus looks; lengths in level-0 px (0.5 microns)."""

    semi_major_px: tuple[float, float]
    """Half the length, least and greatest."""
    semi_minor_px: tuple[float, float]
    """Half the width, least and greatest."""
    density: tuple[float, float]
    """Haematoxylin optical density, least and greatest."""
    irregularity: float
    """How far the outline leaves an ellipse (0: not at all)."""
    vesicular: float
    """How much paler the inside is than the rim (0 to 1)."""
    clumps: float
    """Strength of the chromatin's coarse grain (0 to 1)."""
    has_nucleolus: bool = False
    """One dark dot inside."""


SPINDLE = NucleusKind(
    semi_major_px=(8, 14), semi_minor_px=(2.2, 3.4), density=(0.95, 1.5), irregularity=0.12, vesicular=0, clumps=0.15
)
GLANDULAR = NucleusKind(
    semi_major_px=(8, 11), semi_minor_px=(4.6, 6), density=(0.8, 1.15), irregularity=0.05, vesicular=0.15, clumps=0.25
)
# These two make the foci. Density, chromatin and (in scatter.py) spacing were searched for together, so that at
# 1 micron per px both have the same distribution of density (quantiles 0.02 apart on average): only size differs.
LYMPHOCYTE = NucleusKind(
    semi_major_px=(5.3, 6.3), semi_minor_px=(4.9, 5.8), density=(0.75, 1.2), irregularity=0.06, vesicular=0, clumps=0.45
)
TUMOUR = NucleusKind(
    semi_major_px=(11.5, 16),
    semi_minor_px=(8.5, 12),
    density=(0.95, 1.4),
    irregularity=0.13,
    vesicular=0.35,
    clumps=0.5,
    has_nucleolus=True,
)


@cache
def stamps(kind: NucleusKind) -> tuple[Plane, ...]:
    """The bank of one kind, by angle: stamp `a * 5 + v` points at `a / 24` of half a turn."""
    rng = np.random.default_rng(20240304)
    angles = np.repeat(np.arange(NUM_ANGLES) * np.pi / NUM_ANGLES, _PER_ANGLE)
    return tuple(_draw_nucleus(rng, kind, float(angle)) for angle in angles)


def pick(rng: np.random.Generator, angles: NDArray[np.floating]) -> NDArray[np.int64]:
    """Stamp numbers for nuclei that point along `angles` (radians, from x towards y)."""
    steps = np.rint(np.asarray(angles) / np.pi * NUM_ANGLES).astype(np.int64) % NUM_ANGLES
    return steps * _PER_ANGLE + rng.integers(_PER_ANGLE, size=steps.shape)


def stamp(plane: Plane, kind: NucleusKind, xy_px: NDArray[np.floating], numbers: NDArray[np.int64]) -> None:
    """Stamps nuclei on a plane, each hiding what it lies on.

    Args:
        plane: (height + 2 * MARGIN_PX, width + 2 * MARGIN_PX) density, changed in place.
        kind: Which bank.
        xy_px: (N, 2) centres in level-0 px; those outside the slide are left out.
        numbers: (N,) stamp numbers, see `pick`.
    """
    bank = stamps(kind)
    size = bank[0].shape[0]
    corners = np.rint(xy_px - size / 2).astype(np.int64) + MARGIN_PX
    height, width = plane.shape
    inside = (corners >= 0).all(axis=1) & (corners[:, 0] <= width - size) & (corners[:, 1] <= height - size)
    for (x, y), number in zip(corners[inside].tolist(), numbers[inside].tolist(), strict=True):
        view = plane[y : y + size, x : x + size]
        np.copyto(view, bank[number], where=bank[number] > np.minimum(view, _EDGE))


def draw_outline(rng: np.random.Generator, turn: NDArray[np.float64], spread: float) -> NDArray[np.float64]:
    """Radius of a smooth irregular outline, about 1, at each direction `turn` in radians."""
    radius = np.ones_like(turn)
    for waves in (2, 3, 4):
        radius += rng.normal(0, spread / waves) * np.cos(waves * turn + rng.uniform(0, 2 * np.pi))
    return radius


def _draw_nucleus(rng: np.random.Generator, kind: NucleusKind, angle: float) -> Plane:
    size = 2 * round(kind.semi_major_px[1] * (1 + kind.irregularity) + 3)
    y, x = np.mgrid[0:size, 0:size] - (size - 1) / 2
    semi_major, semi_minor = rng.uniform(*kind.semi_major_px), rng.uniform(*kind.semi_minor_px)
    along = (x * np.cos(angle) + y * np.sin(angle)) / semi_major
    across = (y * np.cos(angle) - x * np.sin(angle)) / semi_minor
    if kind is SPINDLE:
        across = across + rng.uniform(-0.6, 0.6) * (along**2 - 0.4)
    turn = np.arctan2(across, along)
    outline = draw_outline(rng, turn, kind.irregularity)
    inward_px = (outline - np.hypot(along, across)) * semi_minor
    density = np.full((size, size), rng.uniform(*kind.density))
    density *= 1 - kind.vesicular * np.clip((inward_px - 1.2) / 2.0, 0, 1)
    grain = cv2.GaussianBlur(rng.standard_normal((size, size)), (0, 0), 1.3)
    density *= 1 + kind.clumps * np.clip(grain / grain.std(), -2, 2) / 2
    if kind.has_nucleolus:
        cx, cy = rng.uniform(-0.35, 0.35, 2) * semi_minor
        dot = np.clip(rng.uniform(2.0, 3.2) - np.hypot(x - cx, y - cy), 0, 1)
        density = np.maximum(density, 1.65 * dot)
    covered = np.clip(inward_px / 1.4 + 0.5, 0, 1)
    nucleus: Plane = np.rint(100 * np.clip(density, 0, 2.5) * covered).astype(np.uint8)
    return nucleus
