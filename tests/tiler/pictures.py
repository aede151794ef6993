"""Thumbnails and slides drawn for the tests of tissue and artefacts: stains by their optical densities, fat, blur."""

from pathlib import Path

import cv2
import numpy as np

from tiler.synth.layout import smooth_noise
from tiler.synth.svs import encode_level, write_svs

WHITE = np.array([243.0, 240.0, 242.0])

_DENSITIES = {
    # Absorption in (R, G, B). Ruifrok and Johnston 2001 and ImageJ's Colour Deconvolution; eosin: Macenko 2009.
    "haematoxylin": (0.65, 0.70, 0.29),
    "Mayer": (0.75, 0.60, 0.35),
    "eosin": (0.216, 0.801, 0.558),
    "DAB": (0.268, 0.570, 0.776),
    "aniline blue": (0.853, 0.509, 0.113),
    "ponceau": (0.100, 0.737, 0.668),
    "methyl green": (0.980, 0.144, 0.133),
    "light green": (0.75, 0.30, 0.50),
    "AEC": (0.274, 0.680, 0.680),
}

STAINS = {
    # What lies in a section, and how much of it.
    "pale haematoxylin alone": {"haematoxylin": 0.5},
    "haematoxylin alone": {"haematoxylin": 1.0},
    "dense haematoxylin alone": {"haematoxylin": 2.0},
    "blue counterstain alone": {"Mayer": 1.0},
    "dense blue counterstain alone": {"Mayer": 2.0},
    "DAB and counterstain": {"DAB": 1.0, "Mayer": 0.5},
    "DAB alone": {"DAB": 1.2},
    "H&E": {"haematoxylin": 0.5, "eosin": 0.6},
    "eosin alone": {"eosin": 1.0},
    "dense eosin": {"eosin": 2.0},
    "trichrome collagen": {"aniline blue": 1.0},
    "trichrome muscle": {"ponceau": 1.0},
    "light green": {"light green": 0.8},
    "methyl green": {"methyl green": 0.8},
    "AEC": {"AEC": 1.0},
}


def section(mix: dict[str, float], roughness: float = 0.4, side: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """A square of stained tissue on glass at 8 microns per px, (picture, where the tissue is).

    Each stain's density varies lognormally, from px to px and over 6 px, by `roughness` together: the two real slides'
    thumbnails vary by 0.3 to 0.5.
    """
    rng = np.random.default_rng(sum(map(ord, "".join(mix))))
    density = np.zeros((side, side, 3))
    for stain, amount in mix.items():
        absorption = np.array(_DENSITIES[stain]) / np.linalg.norm(_DENSITIES[stain])
        varied = 0.6 * roughness * (smooth_noise(rng, (side, side), 6) + rng.standard_normal((side, side)))
        density += amount * np.exp(varied)[..., None] * absorption
    truth = np.pad(np.ones((side, side), bool), 20)
    picture = np.pad(WHITE * np.exp(-density), ((20, 20), (20, 20), (0, 0)))
    picture[~truth] = WHITE
    return _noisy(picture, rng), truth


def fat(cell_um: int) -> tuple[np.ndarray, np.ndarray]:
    """2 mm of fat on glass at 8 microns per px: cells with septa of 4 microns, (picture, where the fat is)."""
    rng = np.random.default_rng(cell_um)
    side = 2000
    grid = np.arange(0, side, cell_um)
    seeds = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    seeds = np.clip(seeds + rng.integers(-cell_um // 3, cell_um // 3, seeds.shape), 0, side - 1)
    empty = np.ones((side, side), np.uint8)
    empty[seeds[:, 1], seeds[:, 0]] = 0
    _, cells = cv2.distanceTransformWithLabels(empty, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    edges = cv2.morphologyEx(cells.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((2, 2))) > 0
    septa = cv2.GaussianBlur(cv2.dilate(edges.astype(np.float32), np.ones((3, 3))), (0, 0), 1)
    density = np.pad(septa, 400)[..., None] * 0.5 * np.array(_DENSITIES["eosin"])
    size = density.shape[0] // 8
    picture = cv2.resize(WHITE * np.exp(-density), (size, size), interpolation=cv2.INTER_AREA)
    return _noisy(picture, rng), np.pad(np.ones((side // 8, side // 8), bool), 50)


def blurred(pixels: np.ndarray, columns: slice, deviation_px: float) -> np.ndarray:
    """A slide's pixels with some columns out of focus; the camera's noise is sharp."""
    out = pixels.copy()
    soft = cv2.GaussianBlur(pixels, (0, 0), deviation_px)[:, columns].astype(np.float32)
    out[:, columns] = _noisy(soft, np.random.default_rng(0))
    return out


def write_slide(path: Path, pixels: np.ndarray, steps: tuple[int, ...] = (4, 16)) -> Path:
    """A slide of 0.5 microns per px with these pixels, and levels so many times smaller."""
    height, width = pixels.shape[:2]
    levels = [encode_level(pixels, 85)]
    for step in steps:
        size = width // step, height // step
        whole = np.ascontiguousarray(pixels[: size[1] * step, : size[0] * step])
        levels.append(encode_level(cv2.resize(whole, size, interpolation=cv2.INTER_AREA), 85))
    write_svs(path, levels, np.ascontiguousarray(pixels[::8, ::8]), mpp=0.5, app_mag=20, quality=85)
    return path


def _noisy(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(picture + rng.normal(0, 0.8, picture.shape), 0, 255).round().astype(np.uint8)
