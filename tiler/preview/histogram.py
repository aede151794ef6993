"""Tiles per slide as a histogram: plain numbers here, an inline SVG from `page.html`. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LOG_FROM = 30
"""From this ratio of the largest to a small slide (5 %) on, the axis is logarithmic."""
_NUM_BINS = 40


@dataclass(frozen=True)
class Bin:
    """Slides with `low` to `high` tiles (both included); places are shares of the axis, 0 to 1."""

    low: int
    high: int
    num_slides: int
    left: float
    right: float


@dataclass(frozen=True)
class Mark:
    """A value on the axis: a tick, or a number worth marking."""

    text: str
    value: float
    at: float


@dataclass(frozen=True)
class Histogram:
    """What there is to draw."""

    bins: list[Bin]
    ticks: list[Mark]
    marks: list[Mark]
    """Median, 95 %, 99 % and the largest, in this order."""
    num_most: int
    """Slides in the fullest bin."""
    is_log: bool


def tile_histogram(num_tiles: Sequence[int]) -> Histogram | None:
    """Bins slides by their number of tiles; slides without tiles are left out, and None is the answer if all are."""
    counts = np.array([n for n in num_tiles if n > 0], np.int64)
    if not len(counts):
        return None
    least, most = int(counts.min()), int(counts.max())
    is_log = most / max(1.0, float(np.percentile(counts, 5))) > _LOG_FROM
    edges = _log_edges(least, most) if is_log else _even_edges(most)
    found = np.histogram(counts, edges)[0]
    low, high = float(edges[0]), float(edges[-1])

    def place(value: float) -> float:
        if is_log:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    bins = [
        Bin(int(a), int(b) - 1, int(num), place(a), place(b))
        for a, b, num in zip(edges, edges[1:], found, strict=False)
        if num
    ]
    ticks = _log_ticks(low, high) if is_log else _even_ticks(high)
    # A count that is there, not a mean of two: "half of the slides have at most so many".
    cuts = [(f"{share} %", float(np.percentile(counts, share))) for share in (95, 99)]
    median = float(np.percentile(counts, 50))
    marks = [("median", median), *cuts, ("largest", float(most))]
    return Histogram(
        bins,
        [Mark(_short(value), value, place(value)) for value in ticks],
        [Mark(name, value, place(value)) for name, value in marks],
        int(found.max()),
        is_log,
    )


def _short(value: float) -> str:
    """A round number for an axis, short enough for a narrow screen."""
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e4 else f"{value:,.0f}"


def _even_edges(most: int) -> NDArray[np.float64]:
    """Edges at whole numbers, from 0, all bins equally wide, the last beyond `most`."""
    width = math.ceil((most + 1) / _NUM_BINS)
    return np.array([width * i for i in range(math.ceil((most + 1) / width) + 1)], np.float64)


def _log_edges(least: int, most: int) -> NDArray[np.float64]:
    """Edges at whole numbers, each bin about as wide as the last in ratio, the last beyond `most`."""
    return np.unique(np.round(np.geomspace(least, most + 1, _NUM_BINS + 1)).astype(np.float64))


def _even_ticks(high: float) -> list[float]:
    """0 and multiples of 1, 2 or 5 times a power of ten, at most six."""
    rough = max(1.0, high / 5)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min(m for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [float(value) for value in np.arange(0, high * (1 + 1e-9), step)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 times them where there would be fewer than three."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5)):
        ticks = [m * 10.0**p for p in powers for m in steps if low <= m * 10.0**p <= high]
        if len(ticks) >= 3:
            break
    return ticks
