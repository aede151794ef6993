"""Aggregators: a slide's features to what is predicted of it, and how much each tile counted.

Each is a module, called with `features_ND` and `cells_N2`: integers, the (column, row) of every tile in its slide's
grid. Both are in slide order; a cell may occur several times. It returns outputs (C,) and attention (N,), which sums
to 1. One whose outputs are a sum over tiles has a method `contributions`, which tells each tile's part of them. In
training a tile-level one returns outputs of each tile, (N, C).
"""

from typing import Literal

from torch import Tensor, nn

from trainer.aggregators.pooling import GatedAttention, Pooling
from trainer.aggregators.tile_level import TileClassifier
from trainer.aggregators.transmil import TransMIL
from trainer.config import Aggregator
from trainer.targets import Task

__all__ = ["build_aggregator", "contributions_of"]


def build_aggregator(config: Aggregator, num_features: int, num_outputs: int, task: Task = "classes") -> nn.Module:
    """Builds the aggregator that the config names.

    Args:
        config: which.
        num_features: width of the features.
        num_outputs: classes, or columns.
        task: what the outputs mean; those of a tile-level aggregator are pooled by it.

    Raises:
        TrainerError: TransMIL cannot have that width.
    """
    if config.name == "gma":
        return GatedAttention(num_features, config.hidden, num_outputs, config.dropout)
    if config.name == "transmil":
        return TransMIL(num_features, config.hidden, num_outputs, config.dropout)
    if config.name in ("tile_mean", "tile_max"):
        pool: Literal["mean", "max"] = "mean" if config.name == "tile_mean" else "max"
        return TileClassifier(num_features, num_outputs, config.dropout, pool, task)
    return Pooling(num_features, num_outputs, config.dropout, config.name)


def contributions_of(aggregator: nn.Module, features_ND: Tensor, cells_N2: Tensor | None) -> Tensor | None:
    """Each tile's signed part of each output, (N, C), as the aggregator in scoring mode has it.

    The parts and a share that is no tile's, the last layer's bias, add up to the outputs, to rounding. None where the
    outputs are no sum over tiles.
    """
    tell = getattr(aggregator, "contributions", None)
    return None if tell is None else tell(features_ND, cells_N2)
