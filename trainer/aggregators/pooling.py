"""Aggregators to which a slide is a set of tiles: gated attention, mean, maximum. Where tiles lie does not matter."""

import torch
from torch import Tensor, nn


class GatedAttention(nn.Module):
    """Gated-attention MIL.

    outputs = W · Σ a_n f_n, a = softmax(w · (tanh(V f_n) ⊙ sigmoid(U f_n))).

    Source: Ilse, Tomczak, Welling, Attention-based deep multiple instance learning, ICML 2018, eq. 9.
    """

    def __init__(self, num_features: int, hidden: int, num_outputs: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.tanh, self.gate = nn.Linear(num_features, hidden), nn.Linear(num_features, hidden)
        # Without the bias of the original: softmax is blind to a shift, so its gradient is zero, and AdamW would make
        # steps out of its rounding errors.
        self.score = nn.Linear(hidden, 1, bias=False)
        self.classify = nn.Linear(num_features, num_outputs)

    def forward(self, features_ND: Tensor, cells_N2: Tensor | None = None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Returns outputs (C,) and attention (N,), which sums to 1."""
        features_ND = self.dropout(features_ND)
        hidden_NH = torch.tanh(self.tanh(features_ND)) * torch.sigmoid(self.gate(features_ND))
        attention_N = self.score(hidden_NH).squeeze(1).softmax(0)
        return self.classify(attention_N @ features_ND), attention_N

    def contributions(self, features_ND: Tensor, cells_N2: Tensor | None = None) -> Tensor:
        """Each tile's signed part of each output (N, C), a_n W f_n: their sum and the bias of W are the outputs.

        For scoring: without dropout.
        """
        _, attention_N = self(features_ND, cells_N2)
        contributions_NC: Tensor = attention_N[:, None] * (features_ND @ self.classify.weight.T)
        return contributions_NC


class Pooling(nn.Module):
    """Mean or maximum over the tiles, then a linear layer. A tile's weight is its share in the pooled vector."""

    def __init__(self, num_features: int, num_outputs: int, dropout: float, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(num_features, num_outputs)

    def forward(self, features_ND: Tensor, cells_N2: Tensor | None = None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Returns outputs (C,) and weights (N,), which sum to 1."""
        features_ND = self.dropout(features_ND)
        num_tiles, num_features = features_ND.shape
        if self.kind == "mean":
            return self.classify(features_ND.mean(0)), features_ND.new_full((num_tiles,), 1 / num_tiles)
        pooled_D, winner_D = features_ND.max(0)
        return self.classify(pooled_D), torch.bincount(winner_D, minlength=num_tiles) / num_features

    def contributions(self, features_ND: Tensor, cells_N2: Tensor | None = None) -> Tensor | None:  # noqa: ARG002
        """As `GatedAttention.contributions`, for the mean.

        None for the maximum: without its winner the next best takes its place, so no part is a tile's own.
        """
        return features_ND @ self.classify.weight.T / len(features_ND) if self.kind == "mean" else None
