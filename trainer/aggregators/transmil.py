"""TransMIL: a transformer over all tiles of a slide that knows where each of them lies.

Source: Shao et al., TransMIL: transformer based correlated multiple instance learning for whole slide image
classification, NeurIPS 2021. Three things are built otherwise. To convolve over the tiles the paper fills their
sequence up with the first ones and reshapes it into a square, which lays tiles beside each other that do not touch,
unless the tissue is a square without holes; here the convolution runs over the tiles' true places. The last layer asks
for the class token alone, all that the outputs are made from. Dropout is on the features, not on what attention gives.

The landmarks of the attention, and its convolution along the sequence, depend on the order of the tiles: slide order,
along a Hilbert curve, in which neighbours in the sequence are near each other on the slide.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.aggregators.nystrom import NUM_HEADS, NystromAttention
from trainer.aggregators.places import Places, convolve_places
from trainer.errors import TrainerError


class TransMIL(nn.Module):
    """Tokens, a class token before them, attention, position encoding, attention, and outputs of the class token.

    Suffixes: N tiles, T = N + 1 tokens, D their width.

    Args:
        num_features: width of the features.
        hidden: D; a multiple of 8. Half of it is the number of landmarks.
        num_outputs: C.
        dropout: on the features.

    Raises:
        TrainerError: `hidden` is no multiple of 8.
    """

    def __init__(self, num_features: int, hidden: int, num_outputs: int, dropout: float) -> None:
        super().__init__()
        if hidden % NUM_HEADS:
            near = -(-hidden // NUM_HEADS) * NUM_HEADS
            raise TrainerError(
                f"aggregator.hidden is {hidden}: expected a multiple of {NUM_HEADS} for transmil, such as {near}"
            )
        self.dropout = nn.Dropout(dropout)
        self.embed = nn.Linear(num_features, hidden)
        self.class_token_1D = nn.Parameter(torch.randn(1, hidden))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(hidden) for _ in range(3))
        self.attention1, self.attention2 = (NystromAttention(hidden, hidden // 2) for _ in range(2))
        self.position = PositionEncoding(hidden)
        self.classify = nn.Linear(hidden, num_outputs)

    def forward(self, features_ND: Tensor, cells_N2: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs (C,) and attention (N,), which sums to 1.

        Attention is the class token's in the last layer, mean over the heads. It is approximate: what Nyström attention
        makes negative is taken as 0, and the convolutions, through which tiles count too, have no part in it.

        Raises:
            TrainerError: no cells.
        """
        if cells_N2 is None:
            raise TrainerError(
                "transmil: no cells; expected the (column, row) of every tile, as Manifest.cells has them"
            )
        tiles_ND = F.relu(self.embed(self.dropout(features_ND)))
        tokens_TD = torch.cat([self.class_token_1D, tiles_ND])
        tokens_TD = tokens_TD + self.attention1(self.norm1(tokens_TD))
        tokens_TD = torch.cat([tokens_TD[:1], self.position(tokens_TD[1:], cells_N2)])
        class_1D, row_T = self.attention2.attend_first(self.norm2(tokens_TD))
        class_1D = tokens_TD[:1] + class_1D
        return self.classify(self.norm3(class_1D))[0], _shares(row_T[1:])


class PositionEncoding(nn.Module):
    """PPEG: depthwise convolutions of 7, 5 and 3 over the tiles' cells, added to each tile's features.

    Tiles in one cell are averaged for the convolutions, and keep their own features beside them.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (7, 5, 3)
        self.conv7, self.conv5, self.conv3 = (nn.Conv2d(width, width, n, groups=width, bias=False) for n in sizes)
        self.bias_D = nn.Parameter(torch.zeros(width))  # Three of them would be one, learnt at three times the rate.

    def forward(self, features_ND: Tensor, cells_N2: Tensor) -> Tensor:
        """Features (N, D) that know what lies around them."""
        # The sum of three convolutions is one, by the sum of their kernels.
        inner_D55 = self.conv5.weight[:, 0] + F.pad(self.conv3.weight[:, 0], (1, 1, 1, 1))
        weight_D77 = self.conv7.weight[:, 0] + F.pad(inner_D55, (1, 1, 1, 1))
        return features_ND + convolve_places(features_ND, weight_D77, Places.of(cells_N2)) + self.bias_D


def _shares(weights_N: Tensor) -> Tensor:
    """Weights clipped at 0, as shares of their sum; equal ones where none is above 0."""
    weights_N = weights_N.clamp(min=0)
    total = weights_N.sum()
    return torch.where(total > 0, weights_N / total, 1 / len(weights_N))
