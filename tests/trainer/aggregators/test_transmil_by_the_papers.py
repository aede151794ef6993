"""TransMIL once more, in numpy, from the papers' equations and a state dict: none of the module's code.

Shao et al. 2021: embedding, class token, x + attention(norm(x)), PPEG, x + attention(norm(x)), norm, linear. Xiong et
al. 2021: softmax attention by landmarks (eq. 13), which are segment means (eq. 7, 8), and the pseudo-inverse by
iterations (eq. 11). As the module says of itself, segments are those of the sequence as it is (the first may be
shorter) and PPEG convolves over true places: on a slide whose tiles fill a square, row by row, those of the paper.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from trainer.aggregators import build_aggregator
from trainer.config import Aggregator

Array = NDArray[np.float64]
HEADS, FEATURES, OUTPUTS = 8, 10, 3
PER_HEAD = 2
WIDTH = HEADS * PER_HEAD
LANDMARKS = WIDTH // 2


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    out: Array = powers / powers.sum(-1, keepdims=True)
    return out


def normed(x: Array, w: dict[str, Array], name: str) -> Array:
    centred = x - x.mean(1, keepdims=True)
    out: Array = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * w[f"{name}.weight"]
    return out + w[f"{name}.bias"]


def segments(x: Array) -> Array:
    """Means of runs of ceil(n / LANDMARKS) tokens, counted from the sequence's end."""
    length, means, end = math.ceil(len(x) / LANDMARKS), [], len(x)
    while end > 0:
        means.append(x[max(0, end - length) : end].mean(0))
        end -= length
    return np.array(means[::-1])


def inverse(a: Array) -> Array:
    """Eq. 11: six times Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4."""
    one = np.eye(len(a))
    z: Array = a.T / (np.abs(a).sum(0).max() * np.abs(a).sum(1).max())
    for _ in range(6):
        z = z @ (13 * one - a @ z @ (15 * one - a @ z @ (7 * one - a @ z))) / 4
    return z


def attended(x: Array, w: dict[str, Array], name: str) -> Array:
    query, key, value = (x @ w[f"{name}.{part}.weight"].T for part in ("query", "key", "value"))
    heads = []
    for h in range(HEADS):
        q, k, v = (whole[:, h * PER_HEAD : (h + 1) * PER_HEAD] for whole in (query, key, value))
        mean_q, mean_k, scale = segments(q), segments(k), math.sqrt(PER_HEAD)
        first, between, last = (softmax(a @ b.T / scale) for a, b in ((q, mean_k), (mean_q, mean_k), (mean_q, k)))
        kernel = w[f"{name}.residual.weight"][h, 0, :, 0]
        padded = np.pad(v, ((16, 16), (0, 0)))
        beside = sum(kernel[tap] * padded[tap : tap + len(x)] for tap in range(33))
        heads.append(first @ inverse(between) @ last @ v + beside)
    out: Array = np.concatenate(heads, 1) @ w[f"{name}.merge.weight"].T + w[f"{name}.merge.bias"]
    return out


def ppeg_by_places(x: Array, cells: NDArray[np.int64], w: dict[str, Array]) -> Array:
    """At each tile's place, three kernels over the mean features of the places around it."""
    places: dict[tuple[int, int], Array] = {}
    for place in {(int(c), int(r)) for c, r in cells}:
        places[place] = x[(cells == place).all(1)].mean(0)
    out = np.array(x)
    for n, (col, row) in enumerate(cells.tolist()):
        out[n] += w["position.bias_D"]
        for size in (7, 5, 3):
            kernel = w[f"position.conv{size}.weight"][:, 0]
            for i in range(size):
                for j in range(size):
                    found = places.get((col + j - size // 2, row + i - size // 2))
                    out[n] += 0 if found is None else kernel[:, i, j] * found
    return out


def ppeg_of_the_paper(x: Array, w: dict[str, Array]) -> Array:
    """Squaring: the sequence row by row in a square, three padded convolutions and the square itself."""
    side = math.isqrt(len(x))
    assert side**2 == len(x)
    square = x.reshape(side, side, WIDTH)
    out = square + w["position.bias_D"]
    for size in (7, 5, 3):
        edge = size // 2
        padded = np.pad(square, ((edge, edge), (edge, edge), (0, 0)))
        for i in range(size):
            for j in range(size):
                out += w[f"position.conv{size}.weight"][:, 0, i, j] * padded[i : i + side, j : j + side]
    return out.reshape(-1, WIDTH)


def transmil(w: dict[str, Array], features: Array, cells: NDArray[np.int64] | None) -> Array:
    tiles = np.maximum(features @ w["embed.weight"].T + w["embed.bias"], 0)
    x = np.concatenate([w["class_token_1D"], tiles])
    x = x + attended(normed(x, w, "norm1"), w, "attention1")
    placed = ppeg_of_the_paper(x[1:], w) if cells is None else ppeg_by_places(x[1:], cells, w)
    x = np.concatenate([x[:1], placed])
    x = x + attended(normed(x, w, "norm2"), w, "attention2")
    out: Array = normed(x, w, "norm3")[0] @ w["classify.weight"].T + w["classify.bias"]
    return out


def drawn(num_tiles: int) -> tuple[Any, dict[str, Array], torch.Tensor]:
    """Every weight and bias random, of a size that makes attention sharp; and features."""
    torch.manual_seed(num_tiles)
    module = build_aggregator(Aggregator(name="transmil", hidden=WIDTH), FEATURES, OUTPUTS).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    weights = {name: value.numpy() for name, value in module.state_dict().items()}
    return module.eval(), weights, torch.randn(num_tiles, FEATURES, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("num_tiles", [1, 3, 7, 8, 24, 31, 50])
def test_outputs_are_those_of_the_equations_whatever_the_number_of_tiles(num_tiles: int) -> None:
    """Fewer tokens than landmarks, as many, more; several tiles in one place, and gaps."""
    module, weights, features_ND = drawn(num_tiles)
    cells = np.random.default_rng(num_tiles).integers(0, 6, (num_tiles, 2))
    outputs_C, _ = module(features_ND, torch.from_numpy(cells))
    assert outputs_C.numpy() == pytest.approx(transmil(weights, features_ND.numpy(), cells), abs=1e-9)
    single_C, _ = module.float()(features_ND.float(), torch.from_numpy(cells))
    assert single_C.numpy() == pytest.approx(outputs_C.numpy(), abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", [1, 2, 3, 5, 8])
def test_on_a_square_that_is_full_it_is_the_papers_squaring(side: int) -> None:
    module, weights, features_ND = drawn(side**2)
    cells_N2 = torch.tensor([(col, row) for row in range(side) for col in range(side)])
    outputs_C, _ = module(features_ND, cells_N2)
    assert outputs_C.numpy() == pytest.approx(transmil(weights, features_ND.numpy(), None), abs=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("num_tiles", [1, 2, 37])
def test_gated_attention_is_equations_8_and_9_of_ilse(num_tiles: int) -> None:
    torch.manual_seed(num_tiles)
    gma = build_aggregator(Aggregator(name="gma", hidden=7), FEATURES, OUTPUTS).double().eval()
    for parameter in gma.parameters():
        parameter.add_(torch.randn_like(parameter))
    w = {name: value.numpy() for name, value in gma.state_dict().items()}
    h = torch.randn(num_tiles, FEATURES, dtype=torch.float64).numpy()
    tanh = np.tanh(h @ w["tanh.weight"].T + w["tanh.bias"])
    gate = 1 / (1 + np.exp(-(h @ w["gate.weight"].T + w["gate.bias"])))
    powers = np.exp((tanh * gate) @ w["score.weight"][0])
    a = powers / powers.sum()
    z = sum(a[n] * h[n] for n in range(num_tiles))
    outputs_C, attention_N = gma(torch.from_numpy(h))
    assert attention_N.numpy() == pytest.approx(a, abs=1e-12)
    assert outputs_C.numpy() == pytest.approx(w["classify.weight"] @ z + w["classify.bias"], abs=1e-12)
