"""Augmentation of tiles, in the batch, from torch's random state."""

import torch
from torch import Tensor


def random_dihedral(tiles_NHWC: Tensor) -> Tensor:
    """Each tile flipped, mirrored and transposed or not, at random: one of the eight symmetries of the square.

    Tissue has no upright, so all eight are equally true.
    """
    for dims in ((1,), (2,)):
        chosen_N = torch.rand(len(tiles_NHWC), device=tiles_NHWC.device) < 0.5
        tiles_NHWC = torch.where(chosen_N[:, None, None, None], tiles_NHWC.flip(dims), tiles_NHWC)
    chosen_N = torch.rand(len(tiles_NHWC), device=tiles_NHWC.device) < 0.5
    return torch.where(chosen_N[:, None, None, None], tiles_NHWC.transpose(1, 2), tiles_NHWC)
