"""Augmentation of training tiles, a shard at a time, on the device where the tiles are.

All random numbers come from torch's CPU generator and are drawn for the whole shard before any pixel is touched: a GPU
draws what a CPU draws, and no draw depends on how the work is cut into chunks. Not for how often and under which random
state this is called (step.py).

N tiles, H rows, W columns, C colours (R, G, B), S stains (haematoxylin, eosin, residual).
"""

import math
from collections.abc import Iterator

import torch
import torchvision.transforms.v2.functional as F
from skimage.color import hed_from_rgb, rgb_from_hed
from torch import Tensor

from trainer.config import Augment

_CHUNK_PX = 64 * 224**2
"""Most px that are floating-point at once: 39 MB a copy, where a whole shard of 4,096 tiles would be 2.5 GB."""
_CHUNK_PX_CPU = 4 * 224**2
"""The same on a CPU, for its caches: twice the speed."""
_ONE_BY_ONE = ("cpu",)
"""Devices that turn tiles one by one, three times as fast on a CPU as gathering those that get the same turn."""
_BACKGROUND_OD, _TISSUE_OD = 0.05, 0.5
"""Mean optical density (natural logarithm) up to which the shift of stains is left out, and from which it is whole:
grey 243, a scanner's white, and 155."""
_BLUR_SIGMAS_PX = (0.5, 0.75, 1.0, 1.25, 1.5)
"""A few, so that tiles of one sigma share a call."""


def draw_stain(augment: Augment | None) -> Tensor | None:
    """One slide's stain jitter, from torch's CPU generator.

    Returns:
        float64 (S, 2) on the CPU: the factor on each stain's density, within 1 +- `augment.stain`, and the shift of its
        optical density, within +- `augment.stain`, both uniform; None if there is none to apply.

    Source: Tellez et al., Whole-slide mitosis detection in H&E breast histology using PHH3 as a reference to train
    distilled stain-invariant convolutional networks, 2018; 0.05 and 0.2 are HED-light and HED-strong of the same
    authors' Quantifying the effects of data augmentation and stain color normalization, 2019. They draw for each tile;
    a slide is stained once, and its tiles should stay alike.
    """
    if augment is None or not augment.stain:
        return None
    return torch.tensor([1.0, 0.0]) + augment.stain * (2 * torch.rand(3, 2, dtype=torch.float64) - 1)


def augment_tiles(tiles_NHWC: Tensor, augment: Augment | None, stain_S2: Tensor | None) -> Tensor:
    """One shard's tiles: turned, then stained, then blurred, as far as `augment` asks for it.

    Args:
        tiles_NHWC: uint8, square; left as they are.
        augment: what to do; nothing if None.
        stain_S2: the slide's stain jitter, see `draw_stain`.

    Returns:
        uint8 (N, H, W, C) on the same device; the input itself where no tile changes.
    """
    if augment is None:
        return tiles_NHWC
    chunk_px = _CHUNK_PX_CPU if tiles_NHWC.device.type == "cpu" else _CHUNK_PX
    size = max(1, chunk_px // tiles_NHWC.shape[1] ** 2)
    symmetry_N = torch.randint(8, (len(tiles_NHWC),)) if augment.flips else None
    blur_N = _draw_blur(len(tiles_NHWC), augment.blur)
    if symmetry_N is not None:
        out_NHWC = torch.empty_like(tiles_NHWC)
        turns = _one_by_one(symmetry_N) if tiles_NHWC.device.type in _ONE_BY_ONE else _alike(symmetry_N, size)
        for symmetry, which in turns:
            out_NHWC[which] = _turned(tiles_NHWC[which], symmetry)
    elif stain_S2 is not None or blur_N.any():
        out_NHWC = tiles_NHWC.clone()
    else:
        return tiles_NHWC
    if stain_S2 is not None:
        for chunk_NHWC in out_NHWC.split(size):
            _stain_in_place(chunk_NHWC, stain_S2)
    for blur, which in _alike(blur_N, size):
        if blur:
            out_NHWC[which] = _blurred(out_NHWC[which], _BLUR_SIGMAS_PX[blur - 1])
    return out_NHWC


def _draw_blur(num_tiles: int, share: float) -> Tensor:
    """For each tile 0 if it stays sharp, else the 1-based place of its sigma."""
    if not share:
        return torch.zeros(num_tiles, dtype=torch.int64)
    blur_N = torch.randint(1, len(_BLUR_SIGMAS_PX) + 1, (num_tiles,))
    return torch.where(torch.rand(num_tiles) < share, blur_N, 0)


def _one_by_one(class_N: Tensor) -> Iterator[tuple[int, slice]]:
    """(class, which tile) of each tile."""
    for i, number in enumerate(class_N.tolist()):
        yield number, slice(i, i + 1)


def _alike(class_N: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """(class, which tiles) for all tiles, at most `size` of one class at a time."""
    for number in class_N.unique().tolist():
        for which in (class_N == number).nonzero()[:, 0].split(size):
            yield number, which


def _turned(tiles_NHWC: Tensor, symmetry: int) -> Tensor:
    """One of the eight symmetries of the square, 0 to 7: tissue has no upright, so all are equally true."""
    flips = [dim for dim in (1, 2) if symmetry & dim]
    tiles_NHWC = tiles_NHWC.flip(flips) if flips else tiles_NHWC
    return tiles_NHWC.transpose(1, 2) if symmetry & 4 else tiles_NHWC


def _stain_in_place(tiles_NHWC: Tensor, stain_S2: Tensor) -> None:
    """Multiplies and shifts the stains' densities, the shift only where there is tissue: empty glass stays white.

    The stains are linear in optical density, so separation, factors and mixing are one 3x3 matrix. Nothing is clipped
    on the way (skimage clips negative densities): a factor of 1 with a shift of 0 gives every pixel back.

    Source: Ruifrok and Johnston, Quantification of histochemical staining by color deconvolution, 2001, with the
    matrix of `skimage.color`.
    """
    factor_S, shift_S = stain_S2.unbind(1)
    stain_to_rgb_SC = torch.tensor(rgb_from_hed)
    mix_CC = (torch.tensor(hed_from_rgb) * factor_S) @ stain_to_rgb_SC
    shift_C = shift_S @ stain_to_rgb_SC
    # Colour by colour: planes are twice as fast as triples, and sums of planes never depend on the chunk or on TF32.
    # Black has no finite density: a quarter of a grey level, which is 0 again when rounded.
    r, g, b = (
        tiles_NHWC.permute(3, 0, 1, 2)
        .to(torch.float32, memory_format=torch.contiguous_format)
        .clamp_(min=0.25)
        .div_(255)
        .log_()
        .neg_()
    )
    tissue_NHW = ((r + g + b) / 3).sub_(_BACKGROUND_OD).div_(_TISSUE_OD - _BACKGROUND_OD).clamp_(0, 1)
    for colour, ((from_r, from_g, from_b), shift) in enumerate(zip(mix_CC.T.tolist(), shift_C.tolist(), strict=True)):
        density_NHW = (r * from_r).add_(g, alpha=from_g).add_(b, alpha=from_b).add_(tissue_NHW, alpha=shift)
        tiles_NHWC[..., colour] = density_NHW.neg_().exp_().mul_(255).round_().clamp_(max=255)


def _blurred(tiles_NHWC: Tensor, sigma_px: float) -> Tensor:
    """Gaussian blur, mirrored at the edges, cut off at three sigma; along rows, then along columns."""
    # A tile can only be mirrored as far as it is wide.
    side = 2 * min(math.ceil(3 * sigma_px), tiles_NHWC.shape[1] - 1) + 1
    pixels_NCHW = tiles_NHWC.permute(0, 3, 1, 2).float()
    for size in ([side, 1], [1, side]):
        pixels_NCHW = F.gaussian_blur(pixels_NCHW, size, [sigma_px, sigma_px])
    blurred_NHWC: Tensor = pixels_NCHW.round_().permute(0, 2, 3, 1).to(torch.uint8)
    return blurred_NHWC
