"""Ink, black, blank and blurred areas are found; no stain, nucleus, fold, fat or smooth tissue is taken for them."""

from pathlib import Path

import cv2
import numpy as np
import pytest

import tiler.focus
from manifests.schema import REASONS
from tests.tiler.pictures import STAINS, blurred, fat, section, write_slide
from tiler import open_slide
from tiler.artefacts import black_areas, blank_areas, find_artefacts, pen_marks
from tiler.config import TissueConfig
from tiler.focus import out_of_focus
from tiler.masks import read_overview
from tiler.slide import Slide
from tiler.tissue import find_tissue

INKS = {"blue": (36, 49, 126), "green": (42, 111, 68), "black": (38, 34, 40), "red": (164, 39, 48)}


@pytest.mark.parametrize("ink", INKS)
@pytest.mark.parametrize("roughness", [0.2, 0.4])
def test_a_felt_pen_is_found_on_glass_and_over_tissue(ink: str, roughness: float) -> None:
    picture, tissue = section(STAINS["H&E"], roughness)
    stroke = np.zeros(tissue.shape, bool)
    stroke[60:85, 5:110] = True
    picture = _inked(picture, stroke, INKS[ink])
    marks = pen_marks(picture, 8.0)
    assert marks[stroke].mean() > 0.99
    assert marks[~_grown(stroke, 4)].sum() < 0.01 * stroke.sum()


@pytest.mark.parametrize("stain", STAINS)
@pytest.mark.parametrize("roughness", [0.3, 0.5])
def test_no_stain_is_taken_for_ink_or_black_or_blank(stain: str, roughness: float) -> None:
    picture, truth = section(STAINS[stain], roughness)
    for find in (pen_marks, black_areas, blank_areas):
        assert find(picture, 8.0)[truth].mean() < 0.001, find


def test_a_blue_pen_beside_a_blue_counterstain_takes_none_of_it() -> None:
    picture, _ = section(STAINS["blue counterstain alone"])
    stroke = np.zeros(picture.shape[:2], bool)
    stroke[5:30, 5:150] = True
    marks = pen_marks(_inked(picture, stroke, INKS["blue"]), 8.0)
    assert marks[stroke].all()
    assert not (marks & ~_grown(stroke, 5)).any()


def test_small_spots_of_an_inks_colour_stay() -> None:
    picture, _ = section(STAINS["H&E"])
    picture[60:68, 60:68] = INKS["blue"]  # 4,096 um^2
    picture[100:110, 100:110] = INKS["black"]  # 6,400 um^2, black from 10,000 on
    assert not pen_marks(picture, 8.0).any()
    assert not black_areas(picture, 8.0).any()


@pytest.mark.parametrize(
    ("rows", "columns", "value"),
    [(slice(0, 160), slice(0, 12), 3), (slice(130, 160), slice(90, 160), 40), (slice(60, 90), slice(60, 90), 0)],
)
def test_fill_and_the_edge_of_the_glass_are_black_and_no_pen(rows: slice, columns: slice, value: int) -> None:
    picture, _ = section(STAINS["H&E"])
    picture[rows, columns] = np.random.default_rng(0).integers(value, value + 4, picture[rows, columns].shape)
    black = black_areas(picture, 8.0)
    assert black[rows, columns].all()
    block = np.zeros(black.shape, bool)
    block[rows, columns] = True
    assert not black[~_grown(block, 1)].any()
    assert not pen_marks(picture, 8.0).any()


@pytest.mark.parametrize(
    ("what", "colour"),
    [
        ("dense nuclei", (48, 32, 68)),
        ("a fold", (66, 28, 64)),
        ("melanin", (51, 38, 26)),
        ("dark melanin", (40, 27, 18)),
    ],
)
def test_dark_tissue_is_not_black(what: str, colour: tuple[int, int, int]) -> None:
    picture, _ = section(STAINS["H&E"])
    picture[50:110, 50:110] = np.random.default_rng(0).normal(colour, 1.5, (60, 60, 3))
    assert not black_areas(picture, 8.0).any(), what
    assert not pen_marks(picture, 8.0).any(), what


def test_a_blank_hole_as_large_as_a_tile_is_white_and_a_smaller_one_is_not() -> None:
    picture, _ = section(STAINS["H&E"])
    picture[40:56, 40:56], picture[100:110, 100:110] = picture[:16, :16], picture[:10, :10]
    blank = blank_areas(picture, 8.0)
    assert blank[41:55, 41:55].all()
    assert not blank[30:120, 30:120][26:].any()


@pytest.mark.parametrize("cell_um", [60, 90, 110])
def test_fat_is_not_blank(cell_um: int) -> None:
    picture, truth = fat(cell_um)
    tissue = find_tissue(picture, 8.0, TissueConfig(method="entropy")) & truth
    assert (blank_areas(picture, 8.0) & tissue).sum() < 0.01 * tissue.sum()


def test_each_reason_can_be_turned_off_and_they_come_in_order(small_cohort: Path) -> None:
    slide, tissue = _opened(small_cohort / "slides" / "synth_0006.svs")
    overview = read_overview(slide, 0.5)
    assert tuple(find_artefacts(slide, overview, tissue, TissueConfig())) == REASONS[1:]
    for reason in REASONS[1:]:
        config = TissueConfig(**{f"reject_{reason}": False})
        assert tuple(find_artefacts(slide, overview, tissue, config)) == tuple(r for r in REASONS[1:] if r != reason)


@pytest.fixture(scope="module")
def pixels(small_cohort: Path) -> np.ndarray:
    """A sharp slide of 0.5 microns per px, without pen, repeated to about 2,500 x 2,000 px."""
    slide = open_slide(small_cohort / "slides" / "synth_0002.svs")
    whole = slide.read(0, 0, 0, *slide.size_l0)
    return np.tile(whole, (3, 3, 1))


@pytest.mark.parametrize("deviation_um", [4, 8, 16])
@pytest.mark.parametrize("steps", [(4, 16), (2, 8), ()])
def test_blur_is_found_and_what_is_sharp_beside_it_stays(
    pixels: np.ndarray, tmp_path: Path, deviation_um: float, steps: tuple[int, ...]
) -> None:
    half = pixels.shape[1] // 2
    path = write_slide(tmp_path / "slide.svs", blurred(pixels, slice(0, half), deviation_um / 0.5), steps)
    slide, tissue = _opened(path)
    blur = out_of_focus(slide, read_overview(slide, 0.5), tissue)
    left = np.arange(tissue.shape[1]) < half // 16
    assert (blur & tissue)[:, left].sum() > 0.85 * tissue[:, left].sum()
    assert (blur & tissue)[:, ~left].sum() < 0.02 * tissue[:, ~left].sum()
    assert not (blur & ~tissue).any()


def test_sharp_slides_lose_nothing_to_blur(small_cohort: Path) -> None:
    for path in sorted(small_cohort.glob("slides/*.svs")):
        slide, tissue = _opened(path)
        overview = read_overview(slide, 0.5)
        assert not find_artefacts(slide, overview, tissue, TissueConfig())["blur"].any(), path.name


@pytest.mark.parametrize("name", ["CMU-1-Small-Region", "TCGA-CR-7395-01A-01-TS1"])
def test_real_slides_lose_next_to_nothing(real_slides: Path, name: str) -> None:
    slide = open_slide(real_slides / f"{name}.svs")
    overview = read_overview(slide, 0.499 if name.startswith("CMU") else 0.2528)
    tissue = find_tissue(overview.thumbnail, overview.mpp, TissueConfig())
    assert tissue.mean() > 0.3
    for reason, mask in find_artefacts(slide, overview, tissue, TissueConfig()).items():
        assert (mask & tissue).sum() <= 0.001 * tissue.sum(), reason


def _even_tissue(rng: np.random.Generator) -> np.ndarray:
    """1 mm of tissue, even but for slow shading (contrast without detail) and, in its middle, a sharp edge."""
    shading = cv2.resize(rng.normal(0, 1, (6, 6)).astype(np.float32), (2048, 2048), interpolation=cv2.INTER_CUBIC)
    grey = 150 + 8 * shading
    grey[:, 1024:] += 40
    return np.clip(grey[..., None] + (30, -20, 10) + rng.normal(0, 1.3, (2048, 2048, 3)), 0, 255).astype(np.uint8)


def test_smooth_tissue_is_not_judged(tmp_path: Path) -> None:
    slide = open_slide(write_slide(tmp_path / "slide.svs", _even_tissue(np.random.default_rng(0))))
    overview = read_overview(slide, 0.5)
    assert not out_of_focus(slide, overview, np.ones(overview.thumbnail.shape[:2], bool)).any()


def test_a_slide_too_coarse_to_judge_is_not_read(small_cohort: Path) -> None:
    slide = open_slide(small_cohort / "slides" / "synth_0002.svs")
    overview = read_overview(slide, 2.5)
    slide.read = None  # type: ignore[method-assign,assignment]
    assert not out_of_focus(slide, overview, np.ones(overview.thumbnail.shape[:2], bool)).any()


def test_of_a_huge_slide_a_part_is_read_and_speaks_for_the_whole(
    pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = pixels.shape[1] // 2
    slide, tissue = _opened(write_slide(tmp_path / "slide.svs", blurred(pixels, slice(0, half), 10), ()))
    read_px, read = [], slide.read

    def counting(x_l0: int, y_l0: int, level: int, width: int, height: int) -> np.ndarray:
        read_px.append(width * height)
        return read(x_l0, y_l0, level, width, height)

    overview = read_overview(slide, 0.5)
    slide.read = counting  # type: ignore[method-assign]
    out_of_focus(slide, overview, tissue)
    whole = sum(read_px)
    read_px.clear()
    monkeypatch.setattr(tiler.focus, "_MAX_READ_PX", whole // 5)
    blur = out_of_focus(slide, overview, tissue)
    assert sum(read_px) <= 0.3 * whole
    # Every third block is read: near the border of blurred and sharp the verdict is one of either side's.
    column, border = np.arange(tissue.shape[1]), half // 16
    left, right = column < border - 24, column > border + 48
    assert (blur & tissue)[:, left].sum() > 0.9 * tissue[:, left].sum()
    assert not (blur & tissue)[:, right].any()


def _opened(path: Path) -> tuple[Slide, np.ndarray]:
    """A slide of 0.5 microns per px and its tissue."""
    slide = open_slide(path)
    overview = read_overview(slide, 0.5)
    return slide, find_tissue(overview.thumbnail, overview.mpp, TissueConfig())


def _inked(picture: np.ndarray, stroke: np.ndarray, ink: tuple[int, int, int]) -> np.ndarray:
    """The picture seen through a stroke that lets the ink's share of the light pass, softened by one px."""
    cover = cv2.GaussianBlur(stroke.astype(np.float32), (0, 0), 0.6)[..., None]
    seen = picture * (1 - cover * (1 - np.array(ink, np.float32) / 243))
    return np.rint(seen).astype(np.uint8)


def _grown(mask: np.ndarray, by: int) -> np.ndarray:
    return cv2.dilate(mask.astype(np.uint8), np.ones((2 * by + 1, 2 * by + 1), np.uint8)) > 0
