"""Tile-level learning: a classifier of tiles that takes the slide's label for the label of each of its tiles.

The paper's first baselines (Campanella et al. 2024, Table 1): supervised learning on tiles, and with the highest-ranked
tile alone max-pool MIL (Campanella et al., Clinical-grade computational pathology using weakly supervised deep learning
on whole slide images, Nature Medicine 2019). One thing to know before changing it: in training it gives outputs of each
tile, whose losses `heads.Head.loss` averages; in scoring one row of outputs, of which `heads.Head.predict` makes the
mean or the highest of the tiles' predictions.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.targets import Task

Pool = Literal["mean", "max"]


class TileClassifier(nn.Module):
    """A linear layer on each tile's feature.

    A slide's prediction is, by `pool`:
        mean    the mean over its tiles of their probabilities, or numbers.
        max     of classes those of one tile: where the most probable of all classes but the first is most probable (the
                first is what a slide is without a finding; of two classes it is the tile most probable to be of the
                second). Of yes-or-no columns each column's highest. Numbers have none: `RunConfig` refuses that.

    Args:
        num_features: width of the features.
        num_outputs: C.
        dropout: on the features.
        pool: what a slide's prediction is of its tiles'.
        task: what the outputs mean, as in `heads.Head`.
    """

    def __init__(self, num_features: int, num_outputs: int, dropout: float, pool: Pool, task: Task) -> None:
        super().__init__()
        self.pool, self.task = pool, task
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(num_features, num_outputs)

    def forward(self, features_ND: Tensor, cells_N2: Tensor | None = None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Outputs, (N, C) in training and (C,) in scoring; and shares of the tiles (N,), which sum to 1.

        A tile's share grows with the probability of what is looked for in it: of the most probable class but the first,
        of the most probable column; of numbers with the sum over columns, above that of the slide's lowest tile. In
        float64: probabilities near 1 are told apart there that are one number in float32.
        """
        outputs_NC: Tensor = self.classify(self.dropout(features_ND))
        shares_N = self._shares(outputs_NC.detach().double())
        return (outputs_NC if self.training else self._pool(outputs_NC, shares_N)), shares_N

    def _shares(self, outputs_NC: Tensor) -> Tensor:
        match self.task:
            case "classes":
                found_N = outputs_NC.softmax(1)[:, 1:].amax(1)
            case "multilabel":
                found_N = outputs_NC.sigmoid().amax(1)
            case "regression":
                found_N = outputs_NC.sum(1)
                found_N = found_N - found_N.amin()
        total = found_N.sum()
        return torch.where(total > 0, found_N / total, 1 / len(found_N))

    def _pool(self, outputs_NC: Tensor, shares_N: Tensor) -> Tensor:
        """Outputs (C,) whose predictions are the mean or the highest of the tiles'."""
        if self.pool == "max":
            return outputs_NC[shares_N.argmax()] if self.task == "classes" else outputs_NC.amax(0)
        match self.task:
            case "classes":  # Softmax leaves the logarithms of probabilities that sum to 1 as they are.
                return _log_mean(outputs_NC.log_softmax(1))
            case "multilabel":  # Sigmoid undoes log p - log(1 - p).
                return _log_mean(F.logsigmoid(outputs_NC)) - _log_mean(F.logsigmoid(-outputs_NC))
            case "regression":
                return outputs_NC.mean(0)


def _log_mean(logs_NC: Tensor) -> Tensor:
    """Logarithm of the mean over the tiles (C,), never leaving logarithms: probabilities may be as small as e^-1000."""
    return logs_NC.logsumexp(0) - math.log(len(logs_NC))
