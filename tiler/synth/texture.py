"""Pixels of one slide: `draw_texture` places everything once, `render_block` colours any square of it.

A block's pixels do not depend on the other blocks, so a slide is rendered JPEG tile by JPEG tile and empty glass costs
nothing. Both kinds of focus are brought to one mean colour here (`_focus_gain`): change what a focus is made of, and
the gain follows.
"""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from tiler.synth.config import CELL_PX
from tiler.synth.fibre import draw_fibre_map, fibre_angle, fibre_atlas
from tiler.synth.layout import LOOKALIKE, TUMOUR, Field, Layout
from tiler.synth.nuclei import MARGIN_PX, Plane
from tiler.synth.scatter import EPITHELIUM, LUMEN, draw_planes
from tiler.synth.stain import Stain, colour

Pixels = NDArray[np.uint8]

_HAZE = 3
"""Haematoxylin of all tissue, in density steps (hundredths of optical density)."""
_EPITHELIUM_EOSIN, _EPITHELIUM_HAZE = 36, 16
"""Densities of gland cells beside their nuclei."""
_FOCUS_EOSIN, _FOCUS_HAZE = 30, 16
"""Densities between the nuclei of a focus."""
_FOCUS_GRAIN = 2
"""How much stronger the grain is there: without it one exact shade of cytoplasm would give the kind of focus away."""
_GRAIN = 0.08
"""Density steps per step of the grain picture."""
_NOISE_PX = 512


@dataclass(frozen=True, kw_only=True)
class Texture:
    """All that one slide's pixels are made from."""

    layout: Layout
    """Where tissue, foci and pen lie."""
    stain: Stain
    """Colours."""
    nuclei: Plane
    """Haematoxylin density of nuclei, with MARGIN_PX around the slide."""
    glands: Plane
    """0 stroma, 128 epithelium, 255 lumen, with MARGIN_PX around the slide."""
    fibre_x: Field
    """Where in the fibre picture a cell's centre lies, x in px."""
    fibre_y: Field
    """The same, y in px."""
    focus_gain: dict[int, NDArray[np.float32]]
    """Per kind of focus the factor on (R, G, B) that brings its mean colour to the stain's focus colour."""


def draw_texture(rng: np.random.Generator, layout: Layout, stain: Stain) -> Texture:
    """Places fibres, glands and nuclei over a slide."""
    fibre_x, fibre_y = draw_fibre_map(rng, layout.tissue.shape)
    nuclei, glands = draw_planes(rng, layout, fibre_angle(fibre_y))
    truth = layout.truth
    return Texture(
        layout=layout,
        stain=stain,
        nuclei=nuclei,
        glands=glands,
        fibre_x=fibre_x,
        fibre_y=fibre_y,
        focus_gain={code: _focus_gain(nuclei, truth == code, stain) for code in (TUMOUR, LOOKALIKE)},
    )


def render_block(texture: Texture, x_px: int, y_px: int, size_px: int) -> Pixels | None:
    """RGB (size, size, 3) of the square at (x, y) in level-0 px; None where it holds empty glass only.

    The square may reach over the slide's right and lower edge: there is empty glass. It is 512 px at most.
    """
    layout, block = texture.layout, (x_px, y_px, size_px)
    tissue = _sample(layout.tissue, block)
    pen = _sample(layout.pen, block)
    has_tissue, has_pen = tissue.max() > -1, pen.max() > -0.2
    if not has_tissue and not has_pen:
        return None
    rgb = _render_tissue(texture, block, CELL_PX * tissue) if has_tissue else _glass(texture.stain, size_px)
    if has_pen:
        ink = np.clip(0.5 + 4 * pen, 0, 1)[..., None]
        absorbed = np.float32(1) - np.float32(0.9 / 255) * np.array(layout.pen_rgb, np.float32)
        rgb = np.rint(rgb * (1 - ink * absorbed)).astype(np.uint8)
    return _with_noise(rgb, x_px, y_px)


def empty_block(stain: Stain, size_px: int) -> Pixels:
    """RGB (size, size, 3) of empty glass."""
    return _with_noise(_glass(stain, size_px), 0, 0)


def _render_tissue(texture: Texture, block: tuple[int, int, int], inward_px: Field) -> Pixels:
    """Tissue of a block; `inward_px` is how far inside the tissue each pixel lies."""
    layout = texture.layout
    x, y = _sample(texture.fibre_x, block), _sample(texture.fibre_y, block)
    fibre = cv2.remap(fibre_atlas(), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    eosin, grain = fibre[..., 0].astype(np.float32), _GRAIN * (fibre[..., 1].astype(np.float32) - 128)
    density = _window(texture.nuclei, block).astype(np.float32)
    gland = _window(texture.glands, block)
    if gland.any():
        inner = np.minimum(gland, EPITHELIUM).astype(np.float32) / EPITHELIUM
        cells = 1 - np.maximum(gland.astype(np.float32) - EPITHELIUM, 0) / (LUMEN - EPITHELIUM)
        eosin += inner * (3 + cells * (_EPITHELIUM_EOSIN - 3 + grain) - eosin)
        density = np.maximum(density, (_EPITHELIUM_HAZE + grain) * inner * cells)
    covers = [(code, _cover(field, block)) for code, field in ((TUMOUR, layout.tumour), (LOOKALIKE, layout.lookalike))]
    covers = [(code, cover) for code, cover in covers if cover.any()]
    for _, cover in covers:
        eosin += cover * (_FOCUS_EOSIN + grain - eosin)
        density = np.maximum(density, cover * (_FOCUS_HAZE + _FOCUS_GRAIN * grain))
    edge = np.clip(0.5 + (inward_px + 0.5 * grain) / 4, 0, 1)
    haematoxylin, eosin = (np.clip(plane * edge + 0.5, 0, 255).astype(np.uint8) for plane in (density + _HAZE, eosin))
    rgb = colour(haematoxylin, eosin, texture.stain.tables())
    for code, cover in covers:
        gain = 1 + cover[..., None] * (texture.focus_gain[code] - 1)
        rgb = np.clip(rgb * gain + np.float32(0.5), 0, 255).astype(np.uint8)
    return rgb


def _focus_gain(nuclei: Plane, cells: NDArray[np.bool_], stain: Stain) -> NDArray[np.float32]:
    """Factor on (R, G, B) between the mean colour that a kind of focus has on this slide and the wanted one.

    The stains multiply and do not depend on one another, so the mean colour is the product of two means.
    """
    if not cells.any():
        return np.ones(3, np.float32)
    inner = nuclei[MARGIN_PX:-MARGIN_PX, MARGIN_PX:-MARGIN_PX]
    height, width = cells.shape
    densities = inner.reshape(height, CELL_PX, width, CELL_PX).swapaxes(1, 2)[cells]
    share = np.bincount((np.maximum(densities, _FOCUS_HAZE) + _HAZE).ravel(), minlength=256)[:256] / densities.size
    light = share @ stain.transmission(stain.haematoxylin) * stain.transmission(stain.eosin)[_FOCUS_EOSIN]
    gain: NDArray[np.float32] = (stain.focus_rgb / (stain.white * light)).astype(np.float32)
    return gain


def _sample(field: Field, block: tuple[int, int, int]) -> Field:
    """A field of cells at every pixel of a block, linear between cell centres, the border repeated outwards."""
    x_px, y_px, size_px = block
    step = 1 / CELL_PX
    to_cells = np.array([[step, 0, (x_px + 0.5) * step - 0.5], [0, step, (y_px + 0.5) * step - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    fine: Field = cv2.warpAffine(field, to_cells, (size_px, size_px), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return fine


def _cover(field: Field, block: tuple[int, int, int]) -> Field:
    """How much of each pixel a focus covers (0 to 1), with an outline 14 px soft."""
    cover: Field = np.clip(0.5 + _sample(field, block) * (CELL_PX / 14), 0, 1)
    return cover


def _window(plane: Plane, block: tuple[int, int, int]) -> Plane:
    """A block of a plane; beyond the slide's edge, 0."""
    x_px, y_px, size_px = block
    top, left = y_px + MARGIN_PX, x_px + MARGIN_PX
    window = plane[top : top + size_px, left : left + size_px]
    if window.shape == (size_px, size_px):
        return window
    padded = np.zeros((size_px, size_px), np.uint8)
    padded[: window.shape[0], : window.shape[1]] = window
    return padded


def _glass(stain: Stain, size_px: int) -> Pixels:
    return np.full((size_px, size_px, 3), np.rint(stain.white), np.uint8)


@lru_cache(maxsize=1)
def _noise() -> NDArray[np.int16]:
    """The camera's noise, (1024, 1024, 3), about 1.3 grey levels."""
    rng = np.random.default_rng(20240304)
    return np.rint(rng.normal(0, 1.3, size=(2 * _NOISE_PX, 2 * _NOISE_PX, 3))).astype(np.int16)


def _with_noise(rgb: Pixels, x_px: int, y_px: int) -> Pixels:
    size_px = rgb.shape[0]
    top, left = (x_px * 31 + y_px * 17) % _NOISE_PX, (x_px * 13 + y_px * 29) % _NOISE_PX
    noisy: Pixels = cv2.add(rgb, _noise()[top : top + size_px, left : left + size_px], dtype=cv2.CV_8U)
    return noisy
