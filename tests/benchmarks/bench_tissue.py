"""How well tissue and artefacts are found where the truth is known, and what finding them costs.

- `overlap`: Dice of the tissue left after the artefacts with the truth of a synthetic cohort, by method: least and
  median of the slides without pen marks, and of those with. Under a stroke the truth is pen, not tissue. Every slide of
  a second cohort has pen marks.
- `lost`: greatest share of a slide's true tissue, pen aside, that each artefact takes, by method otsu.
- `outline`: least Dice of a slide's mask with its outline drawn again.
- `stains`: greatest share of a square of stained tissue, without any artefact, that is missed or taken for one; by
  method otsu, at the scale of thumbnails.
- `blur`: slides with their left half blurred by a Gaussian of so many microns: least share of its tissue that is found,
  100 microns and more from the border, and greatest share of the sharp half's that is, up to the border. 0 microns is
  the slide as it is, with the greatest share of both.
- `seconds`: the best of the rounds on one core, for the parts of tiling a slide of `side_px` at 0.5 mpp.

With `--slides` the blur is measured on a folder of real slides too; 0.5 mpp is taken where a slide does not say.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from tests.benchmarks.big_slides import write_big_slide
from tests.tiler.pictures import STAINS, blurred, section, write_slide
from tiler import open_slide
from tiler.artefacts import find_artefacts
from tiler.config import TissueConfig
from tiler.focus import out_of_focus
from tiler.masks import MaskRecord, label_areas, read_overview, trace_outline, write_mask
from tiler.outside import read_outside
from tiler.synth import CohortConfig, make_cohort
from tiler.synth.layout import LOOKALIKE, PEN, TISSUE
from tiler.tissue import find_tissue

_METHODS = ("otsu", "hsv", "entropy")
_BLUR_UM = (0, 2, 3, 4, 8, 16)
_BORDER_UM = 100


def main(
    num_slides: int = 24,
    side_px: int = 20_000,
    num_rounds: int = 7,
    config: CohortConfig | None = None,
    slides: Path | None = None,
) -> dict[str, object]:
    """Runs everything; see the module's docstring for what comes back."""
    cv2.setNumThreads(1)
    config = config or CohortConfig()
    inked = CohortConfig(width_px=config.width_px, height_px=config.height_px, pen_every=1, scant_every=0)
    with tempfile.TemporaryDirectory() as folder:
        cohort, pens = Path(folder, "cohort"), Path(folder, "pens")
        paths = make_cohort(cohort, num_slides, seed=11, config=config)
        make_cohort(pens, num_slides, seed=21, config=inked)
        result: dict[str, object] = {"num_slides": num_slides, "side_px": side_px}
        plain = {method: _overlaps(cohort, method) for method in _METHODS}
        result["overlap"] = {
            method: {
                "plain": _spread([o for o, has_pen in plain[method]["overlap"] if not has_pen]),
                "pen": _spread([o for o, has_pen in plain[method]["overlap"] if has_pen]),
                "pen_cohort": _spread([o for o, _ in _overlaps(pens, method)["overlap"]]),
            }
            for method in _METHODS
        }
        result["lost"] = {reason: max(shares) for reason, shares in plain["otsu"]["lost"].items()}
        result["outline"] = min(plain["otsu"]["outline"])
        result["stains"] = {stain: _stain_loss(stain) for stain in STAINS}
        result["blur"] = {"synthetic": _blur(paths[2::5] or paths, Path(folder, "blurred.svs"))}
        if slides is not None:
            result["blur"]["real"] = _blur(sorted(slides.glob("*.svs")), Path(folder, "blurred.svs"))
        result["seconds"] = _seconds(Path(folder), side_px, num_rounds)
    return result


def _overlaps(cohort: Path, method: str) -> dict[str, object]:
    config, overlap, outline = TissueConfig(method=method), [], []
    lost: dict[str, list[float]] = {}
    for path in sorted(cohort.glob("slides/*.svs")):
        truth = cv2.imread(str(cohort / "truth" / f"{path.stem}.png"), cv2.IMREAD_UNCHANGED)
        tissue, has_pen = (truth >= TISSUE) & (truth <= LOOKALIKE), bool((truth == PEN).any())
        slide = open_slide(path)
        overview = read_overview(slide, 0.5)
        found = find_tissue(overview.thumbnail, overview.mpp, config)
        artefacts = find_artefacts(slide, overview, found, config)
        clean = label_areas(found, artefacts) == 1
        overlap.append((_dice(clean, tissue), has_pen))
        for reason, mask in artefacts.items():
            # Next to the strokes the margin is taken on purpose.
            lost.setdefault(reason, []).append(0 if reason == "pen" and has_pen else _share(mask & found, tissue))
        file = cohort / "outline.geojson"
        file.write_text(
            json.dumps({"type": "MultiPolygon", "coordinates": trace_outline(clean, overview.px_l0)}), encoding="utf-8"
        )
        covers = clean.shape[1] * overview.px_l0, clean.shape[0] * overview.px_l0
        outline.append(round(_dice(read_outside(file, clean.shape, covers, ()), clean), 4))
    return {"overlap": overlap, "lost": lost, "outline": outline}


def _stain_loss(stain: str) -> float:
    """The worst of three degrees of roughness."""
    worst = 0.0
    for roughness in (0.2, 0.35, 0.5):
        picture, truth = section(STAINS[stain], roughness)
        tissue = find_tissue(picture, 8.0, TissueConfig())
        with tempfile.TemporaryDirectory() as folder:
            slide = open_slide(write_slide(Path(folder, "slide.svs"), picture, ()))
            overview = read_overview(slide, 8.0)
            artefacts = find_artefacts(slide, overview, tissue, TissueConfig())
        inside = cv2.erode(truth.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        worst = max(worst, 1 - _share(label_areas(tissue, artefacts) == 1, inside))
    return round(worst, 4)


def _blur(paths: list[Path], file: Path) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    for um in _BLUR_UM:
        left, right = [], []
        for path in paths:
            slide = open_slide(path)
            mpp = (slide.mpp or (0.5, 0.5))[0]
            width, height = slide.size_l0
            pixels = slide.read(0, 0, 0, width, height)
            half = slice(0, width // 2)
            soft = open_slide(write_slide(file, blurred(pixels, half, um / mpp) if um else pixels))
            overview = read_overview(soft, mpp)
            tissue = find_tissue(overview.thumbnail, overview.mpp, TissueConfig())
            mask = out_of_focus(soft, overview, tissue)
            from_border = (np.arange(tissue.shape[1]) + 0.5) * overview.px_l0 - width / 2
            left.append(_share(mask, tissue & (from_border < -_BORDER_UM / mpp)))
            right.append(_share(mask, tissue & (from_border > 0)))
        found[f"{um} um"] = (min(left), max(right)) if um else (max(left), max(right))
    return found


def _seconds(folder: Path, side_px: int, num_rounds: int) -> dict[str, float]:
    write_big_slide(folder / "slide.svs", side_px)
    slide, config = open_slide(folder / "slide.svs"), TissueConfig()
    overview = read_overview(slide, 0.5)
    tissue = find_tissue(overview.thumbnail, overview.mpp, config)
    areas = label_areas(tissue, find_artefacts(slide, overview, tissue, config))
    record = MaskRecord(overview, areas, trace_outline(areas == 1, overview.px_l0))
    parts: dict[str, Callable[[], object]] = {"overview": lambda: read_overview(slide, 0.5)}
    for method in _METHODS:
        asked = TissueConfig(method=method)
        parts[f"tissue, {method}"] = lambda asked=asked: find_tissue(overview.thumbnail, overview.mpp, asked)
    without = TissueConfig(reject_blur=False)
    parts["pen, black, white"] = lambda: find_artefacts(slide, overview, tissue, without)
    parts["blur"] = lambda: out_of_focus(slide, overview, tissue)
    parts["outline"] = lambda: trace_outline(tissue, overview.px_l0)
    parts["writing"] = lambda: write_mask(folder / "mask.zarr.zip", record)
    best = {name: float("inf") for name in parts}
    for _ in range(num_rounds):
        for name, part in parts.items():
            started = time.perf_counter()
            part()
            best[name] = min(best[name], time.perf_counter() - started)
    return {name: round(value, 4) for name, value in best.items()}


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    return round(float((part & whole).sum() / max(1, whole.sum())), 4)


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {"num": 0}
    return {"num": len(values), "min": round(min(values), 4), "median": round(statistics.median(values), 4)}


def _show(result: dict[str, object]) -> None:
    table = Table("what", "of", "value")
    for what, found in result.items():
        for name, value in found.items() if isinstance(found, dict) else [("", found)]:
            table.add_row(what, name, json.dumps(value))
    Console(stderr=True, width=160).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-slides", type=int, default=24)
    parser.add_argument("--num-rounds", type=int, default=7)
    parser.add_argument("--slides", type=Path)
    given = parser.parse_args(sys.argv[1:])
    result = main(given.num_slides, num_rounds=given.num_rounds, slides=given.slides)
    _show(result)
    print(json.dumps(result))
