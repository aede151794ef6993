"""A convolution over the places where tiles lie on the slide; places without a tile are zero.

It visits the neighbours of each cell that holds a tile, so its memory grows with the number of tiles and not with what
they span: ten biopsies far apart on a slide of 3,000 x 3,000 cells cost what ten beside each other do, where a dense
grid of 512 features would take 18 GB. Forward and backward are gathers alone, in a fixed order, and so repeat to the
last bit. The price: on a full grid of 45,056 cells they take 1.2 s on two cores, torch's dense convolution 0.8 s.

Suffixes: N tiles, K cells that hold a tile, O offsets from a cell to those around it, D features.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

REACH = 3
"""Cells to either side that the kernel covers: it is 7 x 7."""
_CHUNK = 1_024
"""Cells worked on at once: 2 MB of 512 features stay in a core's cache."""


@dataclass(frozen=True)
class Places:
    """Which tiles share a cell, and which cells lie beside each other.

    Cells are numbered so that those with more tiles come first.
    """

    cell_N: Tensor
    """The number of each tile's cell."""
    count_K1: Tensor
    """How many tiles each cell holds."""
    layers: tuple[Tensor, ...]
    """In `layers[i]` the cells' tile number `i`, of those cells that have so many: the first few."""
    beside_OK: Tensor
    """The number of the cell at each offset, row by row; K where there is no tile."""

    @classmethod
    def of(cls, cells_N2: Tensor) -> "Places":
        """From the (column, row) of each tile, integers."""
        col_N, row_N = (cells_N2.long() - cells_N2.long().amin(0)).unbind(1)
        width = col_N.max() + 1 + REACH  # So that the end of one row is not beside the start of the next.
        key_K, cell_N, count_K = (row_N * width + col_N).unique(return_inverse=True, return_counts=True)
        by_count_K = count_K.argsort(descending=True, stable=True)
        number_K = by_count_K.argsort()
        cell_N, count_K = number_K[cell_N], count_K[by_count_K]
        tiles_N, first_K = cell_N.argsort(stable=True), count_K.cumsum(0) - count_K
        with_more = len(count_K) - count_K.bincount().cumsum(0)[:-1]
        layers = tuple(tiles_N[first_K[:num] + i] for i, num in enumerate(with_more.tolist()))
        steps = torch.arange(-REACH, REACH + 1, device=cells_N2.device)
        wanted_OK = (steps[:, None] * width + steps).reshape(-1, 1) + key_K
        found_OK = torch.searchsorted(key_K, wanted_OK).clamp_(max=len(key_K) - 1)
        beside_OK = torch.where(key_K[found_OK] == wanted_OK, number_K[found_OK], len(key_K))[:, by_count_K]
        return cls(cell_N, count_K[:, None], layers, beside_OK.contiguous())

    def sum(self, tiles_ND: Tensor) -> Tensor:
        """The sum over each cell's tiles (K, D)."""
        sums_KD = tiles_ND.index_select(0, self.layers[0])
        for layer in self.layers[1:]:
            sums_KD[: len(layer)] += tiles_ND.index_select(0, layer)
        return sums_KD


def convolve_places(features_ND: Tensor, weight_D77: Tensor, places: Places) -> Tensor:
    """Depthwise convolution of the cells' mean features, at each tile's cell (N, D).

    Args:
        features_ND: the tiles' features.
        weight_D77: the kernel of each feature, rows by columns, as in torch's Conv2d.
        places: where the tiles lie.
    """
    out: Tensor = _Convolution.apply(features_ND, weight_D77.flatten(1).T.contiguous(), places)
    return out


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features_ND: Tensor, weight_OD: Tensor, places: Places) -> Tensor:
        means_KD = places.sum(features_ND) / places.count_K1
        ctx.save_for_backward(means_KD, weight_OD)
        ctx.places = places
        return _weigh(means_KD, weight_OD, places.beside_OK).index_select(0, places.cell_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        means_KD, weight_OD = ctx.saved_tensors
        places: Places = ctx.places
        gradient_KD = places.sum(gradient_ND)
        # A cell that sees another at an offset is seen by it at the opposite one.
        means_gradient_KD = _weigh(gradient_KD, weight_OD.flip(0), places.beside_OK) / places.count_K1
        weight_gradient_OD = torch.zeros_like(weight_OD)
        padded_KD = _with_nothing(means_KD)
        for chunk_OK, chunk_KD in zip(places.beside_OK.split(_CHUNK, 1), gradient_KD.split(_CHUNK), strict=True):
            for offset, beside_K in enumerate(chunk_OK):
                weight_gradient_OD[offset] += (padded_KD.index_select(0, beside_K) * chunk_KD).sum(0)
        return means_gradient_KD.index_select(0, places.cell_N), weight_gradient_OD, None


def _weigh(cells_KD: Tensor, weight_OD: Tensor, beside_OK: Tensor) -> Tensor:
    """The sum over the offsets of weight times what lies there (K, D)."""
    padded_KD, out_KD = _with_nothing(cells_KD), torch.zeros_like(cells_KD)
    for chunk_OK, chunk_KD in zip(beside_OK.split(_CHUNK, 1), out_KD.split(_CHUNK), strict=True):
        for beside_K, weight_D in zip(chunk_OK, weight_OD, strict=True):
            chunk_KD.addcmul_(padded_KD.index_select(0, beside_K), weight_D)
    return out_KD


def _with_nothing(cells_KD: Tensor) -> Tensor:
    """A row of zeros behind: what lies where no tile is."""
    return torch.cat([cells_KD, cells_KD.new_zeros(1, cells_KD.shape[1])])
