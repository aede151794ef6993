"""Otsu finds the tissue of the synthetic slides, and none on a white one."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from tiler import open_slide
from tiler.artefacts import pen_marks
from tiler.config import TissueConfig
from tiler.masks import read_overview
from tiler.synth.layout import LOOKALIKE, PEN, TISSUE
from tiler.tissue import find_tissue


def test_the_mask_agrees_with_the_truth_and_leaves_pen_out(small_cohort: Path) -> None:
    num_pen = 0
    for path in sorted(small_cohort.glob("slides/*.svs")):
        truth = cv2.imread(str(small_cohort / "truth" / f"{path.stem}.png"), cv2.IMREAD_UNCHANGED)
        assert truth is not None
        overview = read_overview(open_slide(path), 0.5)
        thumbnail, mpp = overview.thumbnail, overview.mpp
        found = find_tissue(thumbnail, mpp, TissueConfig())
        mask, tissue, pen = found & ~pen_marks(thumbnail), (truth >= TISSUE) & (truth <= LOOKALIKE), truth == PEN
        assert mask.shape == tissue.shape
        overlap = 2 * (mask & tissue).sum() / ((mask & ~pen).sum() + tissue.sum())
        # On so small a slide the margin round the strokes is a good part of the tissue.
        assert overlap > (0.88 if pen.any() else 0.93), path.name
        if pen.any():
            num_pen += 1
            assert (mask & pen).sum() < 0.15 * pen.sum()
            assert (found & pen).sum() > 0.8 * pen.sum()
    assert num_pen == 2


@pytest.mark.parametrize("ink", [(36, 49, 126), (42, 111, 68), (35, 30, 36), (164, 39, 48)])
def test_felt_pens_are_found_and_stains_are_not(ink: tuple[int, int, int]) -> None:
    stroke = (slice(100, 120), slice(0, 200), ink)
    marks = pen_marks(_drawn((slice(20, 80), slice(20, 180), PINK), stroke))
    assert marks[101:119].all()
    assert not marks[:98].any()
    for stain in ((220, 130, 170), (110, 70, 140), (150, 90, 160), (180, 60, 90), (230, 225, 235), (140, 110, 80)):
        assert not pen_marks(_drawn((slice(50, 150), slice(50, 150), stain))).any(), stain


@pytest.mark.parametrize("noise", [0, 3])
def test_a_slide_without_tissue_has_an_empty_mask(noise: int) -> None:
    rng = np.random.default_rng(0)
    white = (245 + rng.integers(-noise, noise + 1, (300, 400, 3))).astype(np.uint8)
    mask = find_tissue(white, 8.0, TissueConfig())
    assert mask.shape == (300, 400)
    assert mask.dtype == bool
    assert not mask.any()


def _drawn(*pieces: tuple[slice, slice, tuple[int, int, int]]) -> np.ndarray:
    picture = np.full((200, 200, 3), 245, np.uint8)
    for rows, columns, colour in pieces:
        picture[rows, columns] = colour
    return picture


def _find(picture: np.ndarray, mpp: float) -> np.ndarray:
    return find_tissue(picture, mpp, TissueConfig())


PINK, WHITE = (220, 120, 170), (245, 245, 245)


def test_small_specks_are_dropped_and_small_holes_filled() -> None:
    tissue = (slice(20, 120), slice(20, 120), PINK)
    speck, hole = (slice(150, 157), slice(150, 157), PINK), (slice(60, 67), slice(60, 67), WHITE)
    gap = (slice(80, 110), slice(80, 110), WHITE)
    mask = _find(_drawn(tissue, speck, hole, gap), 8.0)  # 4,000 um^2 are 62.5 px; speck and hole are 49
    assert mask[25:115, 25:75].all()
    assert not mask[145:165, 145:165].any()
    assert not mask[85:105, 85:105].any()
    # The same picture, finer: now the speck is 784 um^2 by its px, far below the least area, the gap too.
    finer = _find(_drawn(tissue, speck, hole, gap), 1.0)
    assert finer[25:115, 25:115].all()
    assert not finer[145:165, 145:165].any()


def test_a_speck_large_enough_stays() -> None:
    mask = _find(_drawn((slice(20, 120), slice(20, 120), PINK), (slice(150, 160), slice(150, 160), PINK)), 8.0)
    assert mask[152:158, 152:158].all()
