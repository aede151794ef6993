"""Where tissue is out of focus, from pixels finer than the thumbnail's.

Not for the other artefacts (tiler/artefacts.py). Before changing a number: a sharp slide must lose nothing, and
tests/benchmarks/bench_tissue.py says what it loses.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from manifests.geometry import level_to_l0
from tiler.backends import Level
from tiler.masks import Overview
from tiler.slide import Slide
from tiler.tissue import drop_small

_MPP = 2.0
"""Scale at which sharpness is judged: blur that matters is wider than a px, and a read costs a 16th of level 0."""
_DETAIL_UM = 2.0
"""Detail is what a Gaussian of this deviation takes away."""
_MAX_RATIO = 0.18
"""Detail is 0.3 to 0.7 of the contrast of tissue in focus, in smooth muscle 0.2; blurred by 4 microns or more it is
0.03 to 0.17."""
_MIN_CONTRAST = 2.0
"""Grey levels. With less there is nothing to judge: colloid has 0.3, tissue blurred by 16 microns 2.5 and more."""
_MAX_GREY = 190
"""Paler tissue is not judged: clouds of mucin look like tissue out of focus."""
_MIN_FILLED = 0.15
"""Share of a neighbourhood that must be tissue to be judged."""
_MIN_BLOCK_SHARE = 0.1
"""Blocks with less tissue are not read: 0.03 mm2, which would be too small an area by itself."""
_MIN_AREA_UM2 = 40_000.0
"""Smaller blurred areas are left in."""
_CELL_PX = 4
"""Verdicts are given per cell of this side, px of the thumbnail: about 32 microns."""
_WINDOW_CELLS = 5
"""Side of the neighbourhood that is judged as one: about 160 microns."""
_BLOCK_PX = (128, 256, 1024)
"""Least, usual and longest side of a read, px of the level; between the first and the last the file's own tile."""
_MAX_READ_PX = 200_000_000
"""Most px read of a slide: 800 mm2 of tissue at `_MPP`. Of more, as on a large slide without a level near that scale,
every n-th block is read, across and down, and speaks for those around it."""


@dataclass(frozen=True)
class _Blocks:
    """What is read: blocks of `side` x `side` cells; `wanted` (rows, columns), every `step`-th of those with tissue.

    `cell_px` px of the level per cell.
    """

    cell_px: float
    side: int
    wanted: NDArray[np.bool_]
    step: int

    def runs(self) -> Iterator[tuple[int, int, int, int]]:
        """Neighbouring blocks of a row, to be read together: left, top, right and bottom in cells."""
        longest = max(1, int(_BLOCK_PX[2] / (self.side * self.cell_px)))
        for row, line in enumerate(self.wanted):
            edges = np.flatnonzero(np.diff(np.pad(line.view(np.int8), 1)))
            for begin, end in edges.reshape(-1, 2).tolist():
                for left in range(begin, end, longest):
                    right = min(end, left + longest)
                    yield left * self.side, row * self.side, right * self.side, (row + 1) * self.side


def out_of_focus(slide: Slide, overview: Overview, tissue: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Tissue out of focus: its finest detail is weak beside its contrast.

    Blur takes detail away and leaves contrast, whatever the stain. Not judged are tissue with little of both, pale
    tissue, and any on a slide coarser than 2 microns per px.

    Args:
        slide: the open slide. Its coarsest level of at most 2 microns per px is read, where tissue is.
        overview: the slide's thumbnail.
        tissue: mask in the thumbnail's frame.

    Returns:
        Mask in the thumbnail's frame.

    Raises:
        ReadError: the level could not be read.

    Source: comparing a picture with itself blurred once more is the idea of Crete et al., The blur effect: perception
    and estimation with a new no-reference perceptual blur metric, 2007; here as energies over local neighbourhoods.
    """
    mpp_l0 = overview.mpp / overview.px_l0
    fine = [i for i, level in enumerate(slide.levels) if mpp_l0 * level.downsample <= _MPP * 1.05]
    if not fine or not tissue.any():
        return np.zeros(tissue.shape, bool)
    level = max(fine, key=lambda i: slide.levels[i].downsample)
    # Off the outline: it is contrast without detail wherever tissue thins out.
    inner = cv2.erode(tissue.view(np.uint8), np.ones((3, 3), np.uint8))
    blocks = _lay_blocks(slide.levels[level], overview, inner)
    blurred = _judge(_measure(slide, level, overview, inner, blocks), blocks)
    blurred = drop_small(blurred, _MIN_AREA_UM2 / (_CELL_PX * overview.mpp) ** 2)
    height, width = tissue.shape
    return np.asarray(blurred.repeat(_CELL_PX, 0)[:height].repeat(_CELL_PX, 1)[:, :width] & tissue)


def _lay_blocks(level: Level, overview: Overview, inner: NDArray[np.uint8]) -> _Blocks:
    """Blocks on the file's own tiles, as far as whole cells allow."""
    least, usual, longest = _BLOCK_PX
    cell_px = _CELL_PX * overview.px_l0 / level.downsample
    side = max(1, round((level.tile_h if least <= level.tile_h <= longest else usual) / cell_px))
    share = _reduced(inner * np.uint8(255), side * _CELL_PX)  # In bytes: the mask of a big slide is big.
    wanted = share >= 255 * _MIN_BLOCK_SHARE
    step = math.ceil(math.sqrt(max(1.0, wanted.sum() * (side * cell_px) ** 2 / _MAX_READ_PX)))
    kept = np.zeros_like(wanted)
    kept[step // 2 :: step, step // 2 :: step] = wanted[step // 2 :: step, step // 2 :: step]
    return _Blocks(cell_px, side, kept, step)


def _measure(
    slide: Slide, level: int, overview: Overview, inner: NDArray[np.uint8], blocks: _Blocks
) -> NDArray[np.float32]:
    """Per cell the share that is tissue read, and over it grey, its square and the square of its detail.

    Returns:
        (4, rows, columns).
    """
    height, width = inner.shape
    size, down = slide.levels[level], slide.levels[level].downsample
    mpp = overview.mpp / overview.px_l0 * down
    factor = max(1, math.floor(_MPP * 1.05 / mpp))
    deviation_px = _DETAIL_UM / (mpp * factor)
    kernel = 2 * math.ceil(2.5 * deviation_px) + 1
    sums = np.zeros((4, -(-height // _CELL_PX), -(-width // _CELL_PX)), np.float32)
    for left, top, right, bottom in blocks.runs():
        x, y = round(left * blocks.cell_px), round(top * blocks.cell_px)
        w, h = min(round(right * blocks.cell_px), size.width) - x, min(round(bottom * blocks.cell_px), size.height) - y
        mask = inner[top * _CELL_PX : bottom * _CELL_PX, left * _CELL_PX : right * _CELL_PX].astype(np.float32)
        if w < factor or h < factor:
            continue
        x_l0, y_l0 = level_to_l0(np.array([x, y]), down).tolist()
        grey = cv2.extractChannel(slide.read(x_l0, y_l0, level, w, h), 1)  # Green: every stain but green shows in it.
        if factor > 1:
            grey = cv2.resize(grey, (w // factor, h // factor), interpolation=cv2.INTER_AREA)
        grey = grey.astype(np.float32)
        detail = grey - cv2.GaussianBlur(grey, (kernel, kernel), deviation_px)
        for plane, values in enumerate((None, grey, cv2.multiply(grey, grey), cv2.multiply(detail, detail))):
            small = mask
            if values is not None:
                small = cv2.resize(values, mask.shape[::-1], interpolation=cv2.INTER_AREA) * mask
            cells = _reduced(small, _CELL_PX)
            sums[plane, top : top + cells.shape[0], left : left + cells.shape[1]] = cells
    return sums


def _judge(sums: NDArray[np.float32], blocks: _Blocks) -> NDArray[np.bool_]:
    """Cells in a neighbourhood out of focus.

    Contrast is taken within cells: between them, two kinds of smooth tissue differ without anything being blurred.
    Where not all blocks were read, the neighbourhood is as wide as their distance, so that it always holds one block.
    """
    share, grey, square, detail = (np.where(sums[0] >= _MIN_FILLED, plane, np.float32(0)) for plane in sums)
    contrast = np.maximum(square - grey**2 / np.maximum(share, 1e-6), 0)
    side = _WINDOW_CELLS if blocks.step == 1 else blocks.step * blocks.side
    share, grey, contrast, detail = (
        cv2.boxFilter(plane, -1, (side, side), normalize=True, borderType=cv2.BORDER_CONSTANT)
        for plane in (share, grey, contrast, detail)
    )
    blurred = (detail < _MAX_RATIO**2 * contrast) & (contrast >= _MIN_CONTRAST**2 * share) & (grey <= _MAX_GREY * share)
    blurred &= share >= _MIN_FILLED / blocks.step**2
    # A window's verdict holds for more than its middle: where one cell in six were sharp, it would be sharp.
    return np.asarray(cv2.dilate(blurred.view(np.uint8), np.ones((3, 3), np.uint8)) > 0)


def _reduced(plane: NDArray[Any], side: int) -> NDArray[Any]:
    """Means over blocks of `side` x `side`; what lies past the plane counts as 0."""
    height, width = plane.shape
    whole = np.pad(plane, ((0, -height % side), (0, -width % side))) if height % side or width % side else plane
    size = whole.shape[1] // side, whole.shape[0] // side
    return np.asarray(cv2.resize(whole, size, interpolation=cv2.INTER_AREA))
