"""Aggregators: a slide's features to what is predicted of it, and how much each tile counted.

Each is a module, called with `features_ND` and `cells_N2`: integers, the (column, row) of every tile in its slide's
grid. Both are in slide order; a cell may occur several times. It returns outputs (C,) and attention (N,), which sums
to 1.
"""

from torch import nn

from trainer.aggregators.pooling import GatedAttention, Pooling
from trainer.aggregators.transmil import TransMIL
from trainer.config import Aggregator

__all__ = ["build_aggregator"]


def build_aggregator(config: Aggregator, num_features: int, num_outputs: int) -> nn.Module:
    """Builds the aggregator that the config names.

    Raises:
        TrainerError: TransMIL cannot have that width.
    """
    if config.name == "gma":
        return GatedAttention(num_features, config.hidden, num_outputs, config.dropout)
    if config.name == "transmil":
        return TransMIL(num_features, config.hidden, num_outputs, config.dropout)
    return Pooling(num_features, num_outputs, config.dropout, config.name)
