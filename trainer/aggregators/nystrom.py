"""Nyström attention: softmax attention of all tokens to all, in memory that grows with their number, not its square.

The softmax matrix S of T x T is approximated by F Z B: all queries to the landmarks' keys (T x M), a pseudo-inverse of
the landmarks' queries to their keys (M x M), the landmarks' queries to all keys (M x T). Landmarks are means over runs
of neighbouring tokens. F (Z (B V)), multiplied from the right, is two plain attentions, which torch computes without
storing F or B. Where every token is a landmark F = B = S and Z its pseudo-inverse, so F Z B = S: exact attention, up to
the few iterations that Z is given.

Source: Xiong et al., Nyströmformer: a Nyström-based algorithm for approximating self-attention, AAAI 2021.

Suffixes: 1 torch's batch, H heads, E width of a head, D = H E; T tokens, Q those that ask, M landmarks.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_HEADS = 8
_ITERATIONS = 6
_REACH = 16
"""Tokens to either side that the convolution over values sees: its kernel is 33."""


class _Landmarks(NamedTuple):
    query_1HME: Tensor
    key_1HME: Tensor
    inverse_1HMM: Tensor


class NystromAttention(nn.Module):
    """Multi-head Nyström attention, and beside it a convolution of the values along the sequence, one kernel per head.

    The landmarks and the convolution depend on the order of the tokens.

    Args:
        width: D, a multiple of `NUM_HEADS`.
        num_landmarks: most landmarks; fewer if there are fewer tokens.
    """

    def __init__(self, width: int, num_landmarks: int) -> None:
        super().__init__()
        self.num_landmarks = num_landmarks
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        kernel, padding = (2 * _REACH + 1, 1), (_REACH, 0)
        self.residual = nn.Conv2d(NUM_HEADS, NUM_HEADS, kernel, padding=padding, groups=NUM_HEADS, bias=False)
        self.merge = nn.Linear(width, width)

    def forward(self, tokens_TD: Tensor) -> Tensor:
        """What every token makes of all tokens (T, D)."""
        query_1HTE, key_1HTE, value_1HTE = (_split(layer(tokens_TD)) for layer in (self.query, self.key, self.value))
        return self._attend(query_1HTE, key_1HTE, value_1HTE, self._landmarks(tokens_TD))

    def attend_first(self, tokens_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The same for the first token alone, at a fraction of the cost.

        Returns:
            What it makes of all tokens (1, D). And how it attends to each of them (T,), mean over the heads: a row of
            F Z B, which may be negative here and there; without the convolution's share, and without a gradient.
        """
        query_1H1E = _split(self.query(tokens_TD[:1]))
        key_1HTE, value_1HTE = _split(self.key(tokens_TD)), _split(self.value(tokens_TD))
        landmarks = self._landmarks(tokens_TD)
        with torch.no_grad():
            row_1H1M = _softmax_scores(query_1H1E, landmarks.key_1HME) @ landmarks.inverse_1HMM
            # Head by head: B of all heads together would take 370 MB for 45,056 tiles and 256 landmarks.
            heads = zip(row_1H1M[0], landmarks.query_1HME[0], key_1HTE[0], strict=True)
            rows = [(row_1M @ _softmax_scores(query_ME, key_TE))[0] for row_1M, query_ME, key_TE in heads]
        return self._attend(query_1H1E, key_1HTE, value_1HTE, landmarks), torch.stack(rows).mean(0)

    def _landmarks(self, tokens_TD: Tensor) -> _Landmarks:
        means_MD = segment_means(tokens_TD, self.num_landmarks)
        # The mean of queries is the query of the mean: they are linear.
        query_1HME, key_1HME = _split(self.query(means_MD)), _split(self.key(means_MD))
        return _Landmarks(query_1HME, key_1HME, pseudo_inverse(_softmax_scores(query_1HME, key_1HME)))

    def _attend(self, query_1HQE: Tensor, key_1HTE: Tensor, value_1HTE: Tensor, landmarks: _Landmarks) -> Tensor:
        """What the first Q tokens make of all tokens (Q, D)."""
        mixed_1HME = F.scaled_dot_product_attention(landmarks.query_1HME, key_1HTE, value_1HTE)
        mixed_1HME = landmarks.inverse_1HMM @ mixed_1HME
        out_1HQE = F.scaled_dot_product_attention(query_1HQE, landmarks.key_1HME, mixed_1HME)
        num_queries = query_1HQE.shape[2]
        beside_1HQE = self.residual(value_1HTE[:, :, : num_queries + _REACH])[:, :, :num_queries]
        out: Tensor = self.merge((out_1HQE + beside_1HQE)[0].transpose(0, 1).flatten(1))
        return out


def segment_means(tokens_TD: Tensor, most: int) -> Tensor:
    """Means over at most `most` runs of equal length, the first one shorter where they do not fit.

    These are the runs of the Nyströmformer, which fills the sequence up with zeros at its front. Here what is filled up
    is not counted: a run of zeros alone is no landmark, and a run that begins with zeros is the mean of its tokens.
    """
    num_tokens, width = tokens_TD.shape
    length = -(-num_tokens // most)
    num_runs = -(-num_tokens // length)
    num_first = num_tokens - (num_runs - 1) * length
    rest_MD = tokens_TD[num_first:].reshape(num_runs - 1, length, width).mean(1)
    return torch.cat([tokens_TD[:num_first].mean(0, keepdim=True), rest_MD])


def pseudo_inverse(matrix_MM: Tensor, num_iterations: int = _ITERATIONS) -> Tensor:
    """Approximate Moore-Penrose inverse of softmax matrices (..., M, M), by products alone.

    Source: Xiong et al.; the iteration is that of Razavi et al. 2014. The start is scaled head by head.
    """
    identity_MM = torch.eye(matrix_MM.shape[-1], dtype=matrix_MM.dtype, device=matrix_MM.device)
    # Norms: the largest sum of a column times that of a row, which is 1.
    inverse_MM = matrix_MM.mT / matrix_MM.sum(-2).amax(-1)[..., None, None]
    for _ in range(num_iterations):
        near_MM = matrix_MM @ inverse_MM
        inner_MM = 15 * identity_MM - near_MM @ (7 * identity_MM - near_MM)
        inverse_MM = inverse_MM @ (13 * identity_MM - near_MM @ inner_MM) / 4
    return inverse_MM


def _softmax_scores(query: Tensor, key: Tensor) -> Tensor:
    """Softmax over the keys of scaled products, as torch's attention has it."""
    scores: Tensor = query @ key.mT * query.shape[-1] ** -0.5
    return scores.softmax(-1)


def _split(tokens_TD: Tensor) -> Tensor:
    """(T, D) to heads (1, H, T, E)."""
    heads_THE: Tensor = tokens_TD.unflatten(1, (NUM_HEADS, -1))
    return heads_THE.transpose(0, 1)[None]
