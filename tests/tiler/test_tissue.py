"""Each method finds the tissue of slides whose truth is known, keeps every stain, and finds none on bare glass."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.tiler.pictures import STAINS, fat, section
from tiler import open_slide
from tiler.artefacts import find_artefacts
from tiler.config import Method, TissueConfig
from tiler.masks import read_overview
from tiler.synth.layout import LOOKALIKE, PEN, TISSUE
from tiler.tissue import find_tissue, glass_level

METHODS: tuple[Method, ...] = ("otsu", "hsv", "entropy")


@pytest.mark.parametrize(("method", "least"), [("otsu", 0.94), ("hsv", 0.9), ("entropy", 0.85)])
def test_tissue_without_its_artefacts_agrees_with_the_truth(small_cohort: Path, method: Method, least: float) -> None:
    num_pen, config = 0, TissueConfig(method=method)
    for path in sorted(small_cohort.glob("slides/*.svs")):
        truth = cv2.imread(str(small_cohort / "truth" / f"{path.stem}.png"), cv2.IMREAD_UNCHANGED)
        assert truth is not None
        slide = open_slide(path)
        overview = read_overview(slide, 0.5)
        found = find_tissue(overview.thumbnail, overview.mpp, config)
        clean = found.copy()
        for mask in find_artefacts(slide, overview, found, config).values():
            clean &= ~mask
        tissue, pen = (truth >= TISSUE) & (truth <= LOOKALIKE), truth == PEN
        assert clean.shape == tissue.shape
        overlap = 2 * (clean & tissue).sum() / (clean.sum() + tissue.sum())
        # On so small a slide the margin round the strokes is a good part of the tissue.
        assert overlap > least - (0.05 if pen.any() else 0), path.name
        if pen.any():
            num_pen += 1
            assert not (clean & pen).any()
            assert method == "hsv" or (found & pen).sum() > 0.8 * pen.sum()
    assert num_pen == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("noise", [0, 3])
def test_a_slide_without_tissue_has_an_empty_mask(noise: int, method: Method) -> None:
    rng = np.random.default_rng(0)
    white = (245 + rng.integers(-noise, noise + 1, (300, 400, 3))).astype(np.uint8)
    mask = find_tissue(white, 8.0, TissueConfig(method=method))
    assert mask.shape == (300, 400)
    assert mask.dtype == bool
    assert not mask.any()


@pytest.mark.parametrize("stain", STAINS)
def test_every_stain_is_tissue(stain: str) -> None:
    picture, truth = section(STAINS[stain])
    inside = cv2.erode(truth.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    for method in METHODS:
        if (stain, method) != ("light green", "hsv"):  # hsv: its ranges leave green out.
            assert find_tissue(picture, 8.0, TissueConfig(method=method))[inside].mean() > 0.95, method


@pytest.mark.parametrize("cell_um", [60, 90])
def test_fat_with_thin_septa_is_tissue_by_its_texture(cell_um: int) -> None:
    picture, truth = fat(cell_um)
    assert find_tissue(picture, 8.0, TissueConfig(method="entropy"))[truth].mean() > 0.8
    # And no more than that: half a window beyond its outline there is none.
    far = cv2.dilate(truth.astype(np.uint8), np.ones((15, 15), np.uint8)) == 0
    assert not find_tissue(picture, 8.0, TissueConfig(method="entropy"))[far].any()
    assert find_tissue(picture, 8.0, TissueConfig(method="otsu"))[truth].mean() < 0.1


@pytest.mark.parametrize("colour", [(200, 110, 160), (240, 229, 237)])
def test_even_tissue_without_texture_is_tissue_too(colour: tuple[int, int, int]) -> None:
    mask = find_tissue(_drawn((slice(40, 160), slice(40, 160), colour)), 8.0, TissueConfig(method="entropy"))
    assert mask[45:155, 45:155].all()
    assert not mask[:30].any()


def test_glass_is_not_the_fill_around_it() -> None:
    darkest = np.full((200, 200), 255, np.uint8)
    darkest[50:150, 20:180] = 238
    darkest[80:120, 60:120] = 150
    assert glass_level(darkest) == 238
    assert glass_level(np.full((200, 200), 255, np.uint8)) == 255


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
