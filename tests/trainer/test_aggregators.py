"""Aggregators against plain formulas: where tiles lie, how they attend to each other; and every run gives the same."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer.aggregators import build_aggregator, contributions_of, nystrom
from trainer.aggregators.nystrom import NUM_HEADS, NystromAttention, pseudo_inverse, segment_means
from trainer.aggregators.places import Places, convolve_places
from trainer.aggregators.transmil import PositionEncoding
from trainer.config import Aggregator
from trainer.errors import TrainerError

NAMES = ("gma", "transmil", "mean", "max")


def built(name: str, *, num_features: int = 12, hidden: int = 16, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = Aggregator(name=name, hidden=hidden, dropout=dropout)  # type: ignore[arg-type]
    return build_aggregator(config, num_features, 3).double()


def random_tiles(num_tiles: int, *, num_features: int = 12, side: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features and cells, some of which come several times."""
    generator = torch.Generator().manual_seed(seed)
    features_ND = torch.randn(num_tiles, num_features, generator=generator, dtype=torch.float64)
    return features_ND, torch.randint(0, side, (num_tiles, 2), generator=generator, dtype=torch.int32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_tiles", [1, 2, 7, 8, 9, 100])
def test_attention_is_shares_and_every_parameter_learns(name: str, num_tiles: int) -> None:
    """TransMIL has 8 landmarks here: as many tokens as landmarks are 7 tiles and the class token."""
    aggregator = built(name)
    features_ND, cells_N2 = random_tiles(num_tiles)
    outputs_C, attention_N = aggregator(features_ND.requires_grad_(), cells_N2)
    assert outputs_C.shape == (3,)
    assert attention_N.shape == (num_tiles,)
    assert (attention_N >= 0).all()
    assert attention_N.sum().item() == pytest.approx(1, abs=1e-6)  # max counts in float32
    outputs_C.square().sum().backward()
    for parameter in [features_ND, *aggregator.parameters()]:
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", ["gma", "mean", "max"])
def test_where_tiles_lie_does_not_matter_to_a_pooling(name: str) -> None:
    aggregator, (features_ND, cells_N2) = built(name), random_tiles(20)
    for with_cells, without in zip(aggregator(features_ND, cells_N2), aggregator(features_ND), strict=True):
        assert torch.equal(with_cells, without)


def test_gated_attention_is_the_formula_of_its_paper() -> None:
    gma, (features_ND, _) = built("gma"), random_tiles(20)
    scores = []
    for feature_D in features_ND:
        tanh_H = torch.tanh(gma.tanh.weight @ feature_D + gma.tanh.bias)  # type: ignore[operator,union-attr]
        gate_H = torch.sigmoid(gma.gate.weight @ feature_D + gma.gate.bias)  # type: ignore[operator,union-attr]
        scores.append((gma.score.weight[0] * tanh_H * gate_H).sum().exp())  # type: ignore[index,union-attr]
    shares_N = torch.stack(scores) / sum(scores)
    outputs_C, attention_N = gma(features_ND)
    torch.testing.assert_close(attention_N, shares_N)
    torch.testing.assert_close(outputs_C, gma.classify((shares_N[:, None] * features_ND).sum(0)))  # type: ignore[operator]


@pytest.mark.parametrize("name", ["gma", "mean"])
@pytest.mark.parametrize("num_tiles", [1, 2, 500])
def test_contributions_and_the_bias_add_up_to_the_outputs(name: str, num_tiles: int) -> None:
    """To rounding, each of three outputs; in scoring mode, where a dropout of the config is off."""
    aggregator, (features_ND, cells_N2) = built(name, dropout=0.5).eval(), random_tiles(num_tiles)
    outputs_C, attention_N = aggregator(features_ND, cells_N2)
    parts_NC = contributions_of(aggregator, features_ND, cells_N2)
    assert parts_NC is not None
    assert parts_NC.shape == (num_tiles, 3)
    bias_C = aggregator.classify.bias  # type: ignore[union-attr]
    torch.testing.assert_close(parts_NC.sum(0) + bias_C, outputs_C, rtol=0, atol=1e-10)
    weight_CD = aggregator.classify.weight  # type: ignore[union-attr]
    for part_C, share, feature_D in zip(parts_NC, attention_N, features_ND, strict=True):
        torch.testing.assert_close(part_C, share * (weight_CD @ feature_D), rtol=0, atol=1e-10)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["max", "transmil"])
def test_aggregators_that_are_no_sum_over_tiles_tell_no_contributions(name: str) -> None:
    assert contributions_of(built(name), *random_tiles(5)) is None


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_on_the_features(name: str) -> None:
    """Dropping by hand, by the same random numbers, gives the same."""
    aggregator, (features_ND, cells_N2) = built(name, dropout=0.5), random_tiles(20)
    torch.manual_seed(3)
    outputs_C, _ = aggregator(features_ND, cells_N2)
    torch.manual_seed(3)
    dropped_ND = F.dropout(features_ND, 0.5)
    assert torch.equal(aggregator.eval()(dropped_ND, cells_N2)[0], outputs_C)
    assert not torch.equal(aggregator(features_ND, cells_N2)[0], outputs_C)


@pytest.mark.parametrize(("hidden", "fits"), [(1, "8"), (100, "104"), (515, "520")])
def test_a_width_that_heads_cannot_share_is_refused(hidden: int, fits: str) -> None:
    with pytest.raises(TrainerError, match=rf"^aggregator\.hidden is {hidden}: expected .* of 8 .*, such as {fits}$"):
        built("transmil", hidden=hidden)


def test_transmil_without_cells_says_what_is_missing() -> None:
    with pytest.raises(TrainerError, match="no cells"):
        built("transmil")(random_tiles(5)[0])


def dense(features_ND: Tensor, weight_D77: Tensor, cells_N2: Tensor) -> Tensor:
    """The same by torch's own convolution over a grid that holds everything."""
    width = features_ND.shape[1]
    num_cols, num_rows = (cells_N2.amax(0) + 1).tolist()
    sums = features_ND.new_zeros(num_rows, num_cols, width)
    counts = features_ND.new_zeros(num_rows, num_cols, 1)
    for feature_D, (col, row) in zip(features_ND, cells_N2.tolist(), strict=True):
        sums[row, col] += feature_D
        counts[row, col] += 1
    grid_1DRC = (sums / counts.clamp(min=1)).permute(2, 0, 1)[None]
    out_DRC = F.conv2d(grid_1DRC, weight_D77[:, None], padding=3, groups=width)[0]
    return torch.stack([out_DRC[:, row, col] for col, row in cells_N2.tolist()])


def convolved(features_ND: Tensor, weight_D77: Tensor, cells_N2: Tensor) -> Tensor:
    return convolve_places(features_ND, weight_D77, Places.of(cells_N2))


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 30), st.integers(0, 1_000))
def test_the_convolution_over_places_is_that_over_a_dense_grid(num_tiles: int, cols: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features_ND = torch.randn(num_tiles, 5, generator=generator, dtype=torch.float64)
    weight_D77 = torch.randn(5, 7, 7, generator=generator, dtype=torch.float64)
    sides = torch.tensor([cols, rows])
    cells_N2 = (torch.rand(num_tiles, 2, generator=generator) * sides).int()
    out_ND = convolved(features_ND, weight_D77, cells_N2)
    torch.testing.assert_close(out_ND, dense(features_ND, weight_D77, cells_N2))


def test_more_cells_than_are_worked_on_at_once_change_nothing() -> None:
    features_ND, cells_N2 = random_tiles(4_000, num_features=3, side=60)
    weight_D77 = torch.randn(3, 7, 7, dtype=torch.float64)
    given = [features_ND.requires_grad_(), weight_D77.requires_grad_()]
    out_ND, plain_ND = convolved(*given, cells_N2), dense(*given, cells_N2)
    torch.testing.assert_close(out_ND, plain_ND)
    for ours, theirs in zip(
        torch.autograd.grad(out_ND.square().sum(), given),
        torch.autograd.grad(plain_ND.square().sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_gradient_of_the_convolution_is_that_of_finite_differences() -> None:
    features_ND, cells_N2 = random_tiles(12, num_features=2, side=5)
    assert len(cells_N2.unique(dim=0)) < 12
    weight_D77 = torch.randn(2, 7, 7, dtype=torch.float64)
    arguments = features_ND.requires_grad_(), weight_D77.requires_grad_(), cells_N2
    assert torch.autograd.gradcheck(convolved, arguments)


def test_pieces_far_apart_are_as_pieces_alone() -> None:
    """A dense grid of these would hold 10^12 cells."""
    features_ND, cells_N2 = random_tiles(80)
    weight_D77 = torch.randn(12, 7, 7, dtype=torch.float64)
    pieces = cells_N2[:30], cells_N2[30:] + torch.tensor([1_000_000, 1_000_000], dtype=torch.int32)
    together = convolved(features_ND, weight_D77, torch.cat(pieces))
    alone = [convolved(features_ND[a:b], weight_D77, cells_N2[a:b]) for a, b in ((0, 30), (30, 80))]
    assert torch.equal(together, torch.cat(alone))


def test_a_row_does_not_touch_the_next_rows_end() -> None:
    """Tiles at both ends of neighbouring rows, further apart than the kernel reaches."""
    cells_N2 = torch.tensor([[0, 0], [0, 1], [8, 0], [8, 1], [4, 0]])
    features_ND = torch.randn(5, 2, dtype=torch.float64)
    weight_D77 = torch.randn(2, 7, 7, dtype=torch.float64)
    for ends in ([0, 1], [2, 3], [4]):
        alone = convolved(features_ND[ends], weight_D77, cells_N2[ends])
        assert torch.equal(convolved(features_ND, weight_D77, cells_N2)[ends], alone)


def test_position_encoding_is_three_convolutions_beside_the_tile_itself() -> None:
    torch.manual_seed(0)
    position = PositionEncoding(6).double()
    nn.init.normal_(position.bias_D)
    features_ND, cells_N2 = random_tiles(40, num_features=6)
    expected_ND = features_ND + position.bias_D
    for layer, size in ((position.conv7, 7), (position.conv5, 5), (position.conv3, 3)):
        weight_D77 = torch.zeros(6, 7, 7, dtype=torch.float64)
        edge = (7 - size) // 2
        weight_D77[:, edge : 7 - edge, edge : 7 - edge] = layer.weight[:, 0]
        expected_ND = expected_ND + dense(features_ND, weight_D77, cells_N2)
    torch.testing.assert_close(position(features_ND, cells_N2), expected_ND)


def test_position_encoding_does_not_depend_on_the_order_of_tiles() -> None:
    torch.manual_seed(0)
    position, (features_ND, cells_N2) = PositionEncoding(12).double(), random_tiles(60)
    order = torch.randperm(60)
    torch.testing.assert_close(position(features_ND[order], cells_N2[order]), position(features_ND, cells_N2)[order])


def plain_nystrom(attention: NystromAttention, tokens_TD: Tensor, inverse_of: object = None) -> tuple[Tensor, Tensor]:
    """Head by head, with whole matrices, over a sequence that is filled up at its front; what is filled in is masked.

    Returns:
        The output (T, D), and the mean over the heads of the T x T matrix of attention.
    """
    num_tokens, width = tokens_TD.shape
    most, head_width = attention.num_landmarks, width // NUM_HEADS
    length = int(np.ceil(num_tokens / most))
    num_fill = length * most - num_tokens
    is_token = torch.arange(length * most) >= num_fill
    runs = is_token.reshape(most, length)
    query_TD, key_TD, value_TD = (tokens_TD @ m.weight.T for m in (attention.query, attention.key, attention.value))
    outs, matrices = [], []
    for head in range(NUM_HEADS):
        own = slice(head * head_width, (head + 1) * head_width)
        query, key, value = (x[:, own] for x in (query_TD, key_TD, value_TD))
        landmarks = []
        for x in (query, key):
            filled = torch.cat([x.new_zeros(num_fill, head_width), x]).reshape(most, length, head_width)
            landmarks.append((filled.sum(1) / runs.sum(1, keepdim=True).clamp(min=1))[runs.any(1)])
        scale = 1 / np.sqrt(head_width)
        to_landmarks = torch.softmax(scale * query @ landmarks[1].T, 1)
        between = torch.softmax(scale * landmarks[0] @ landmarks[1].T, 1)
        from_landmarks = torch.softmax(scale * landmarks[0] @ key.T, 1)
        if inverse_of is not None:
            inverse = inverse_of(between)  # type: ignore[operator]
        else:
            inverse = between.T / (between.abs().sum(0).max() * between.abs().sum(1).max())
            one = torch.eye(len(between), dtype=between.dtype)
            for _ in range(6):
                step = between @ inverse
                inverse = 0.25 * inverse @ (13 * one - step @ (15 * one - step @ (7 * one - step)))
        matrices.append(to_landmarks @ inverse @ from_landmarks)
        out = matrices[-1] @ value
        kernel = attention.residual.weight[head, 0, :, 0]
        for at in range(num_tokens):
            for tap in range(33):
                if 0 <= at + tap - 16 < num_tokens:
                    out[at] = out[at] + kernel[tap] * value[at + tap - 16]
        outs.append(out)
    return attention.merge(torch.cat(outs, 1)), torch.stack(matrices).mean(0)


def tokens_and_attention(num_tokens: int, num_landmarks: int) -> tuple[Tensor, NystromAttention]:
    torch.manual_seed(num_tokens)
    attention = NystromAttention(16, num_landmarks).double()
    for layer in (attention.query, attention.key):  # Sharper than at the start: otherwise all is close to a mean.
        nn.init.normal_(layer.weight, std=0.7)
    return torch.randn(num_tokens, 16, dtype=torch.float64), attention


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 16, 17, 20, 41, 64])
def test_attention_is_that_of_whole_matrices(num_tokens: int) -> None:
    tokens_TD, attention = tokens_and_attention(num_tokens, 8)
    out_TD, matrix_TT = plain_nystrom(attention, tokens_TD)
    torch.testing.assert_close(attention(tokens_TD), out_TD)
    first_1D, row_T = attention.attend_first(tokens_TD)
    torch.testing.assert_close(first_1D, out_TD[:1])
    torch.testing.assert_close(row_T, matrix_TT[0])


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 5, 24])
def test_with_a_landmark_for_every_token_it_is_exact_softmax_attention(
    num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S pinv(S) S = S, with the true pseudo-inverse in place of six iterations; its cut of small values leaves 1e-7."""
    tokens_TD, attention = tokens_and_attention(num_tokens, 24)
    nn.init.zeros_(attention.residual.weight)
    monkeypatch.setattr(nystrom, "pseudo_inverse", torch.linalg.pinv)
    heads = []
    for layer in (attention.query, attention.key, attention.value):
        heads.append(layer(tokens_TD).reshape(num_tokens, NUM_HEADS, 2).permute(1, 0, 2))
    query, key, value = heads
    exact = torch.softmax(query @ key.transpose(1, 2) / np.sqrt(2), 2)
    out_TD = attention.merge((exact @ value).permute(1, 0, 2).reshape(num_tokens, 16))
    torch.testing.assert_close(attention(tokens_TD), out_TD, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(attention.attend_first(tokens_TD)[1], exact.mean(0)[0], rtol=1e-6, atol=1e-6)


def test_the_iterations_lead_to_the_pseudo_inverse() -> None:
    torch.manual_seed(0)
    matrix_HMM = (3 * torch.randn(4, 12, 12, dtype=torch.float64)).softmax(-1)
    true_HMM = torch.linalg.pinv(matrix_HMM)
    off = [(pseudo_inverse(matrix_HMM, n) - true_HMM).norm() / true_HMM.norm() for n in (2, 6, 30)]
    assert off[0] > off[1] > off[2]
    assert off[2] < 1e-8


@given(st.integers(1, 200), st.integers(1, 40))
def test_runs_are_as_equal_as_the_nystromformers(num_tokens: int, most: int) -> None:
    means_MD = segment_means(torch.arange(num_tokens, dtype=torch.float64)[:, None], most)
    length = -(-num_tokens // most)
    bounds = sorted({max(0, num_tokens - i * length) for i in range(most + 1)})
    assert bounds[0] == 0
    expected = [(begin + end - 1) / 2 for begin, end in itertools.pairwise(bounds)]
    assert means_MD[:, 0].tolist() == pytest.approx(expected)


def test_transmil_is_its_parts_in_the_papers_order() -> None:
    """By the plain forms above, with all tokens in the last layer too."""
    transmil, (features_ND, cells_N2) = built("transmil"), random_tiles(30)
    parts = dict(transmil.named_children())
    with torch.no_grad():
        for layer in (parts["attention2"].query, parts["attention2"].key):  # Sharper, so that some shares are clipped.
            layer.weight *= 6  # type: ignore[operator,union-attr]
        tiles_ND = parts["embed"](features_ND).clamp(min=0)
        tokens_TD = torch.cat([transmil.class_token_1D, tiles_ND])  # type: ignore[list-item]
        tokens_TD = tokens_TD + plain_nystrom(parts["attention1"], parts["norm1"](tokens_TD))[0]  # type: ignore[arg-type]
        tokens_TD[1:] = parts["position"](tokens_TD[1:], cells_N2)
        out_TD, matrix_TT = plain_nystrom(parts["attention2"], parts["norm2"](tokens_TD))  # type: ignore[arg-type]
        expected_C = parts["classify"](parts["norm3"](tokens_TD + out_TD))[0]
        assert (matrix_TT[0] < 0).any()
        shares_N = matrix_TT[0, 1:].clamp(min=0)
        outputs_C, attention_N = transmil(features_ND, cells_N2)
    torch.testing.assert_close(outputs_C, expected_C)
    torch.testing.assert_close(attention_N, shares_N / shares_N.sum())


def test_transmil_knows_where_tiles_lie() -> None:
    """Moving the whole slide changes nothing, taking its pieces apart does."""
    transmil, (features_ND, cells_N2) = built("transmil"), random_tiles(30)
    outputs_C, _ = transmil(features_ND, cells_N2)
    assert torch.equal(transmil(features_ND, cells_N2 + 70)[0], outputs_C)
    apart_N2 = torch.where(cells_N2 > 4, cells_N2 + 70, cells_N2)
    assert (transmil(features_ND, apart_N2)[0] - outputs_C).abs().max() > 1e-3


@pytest.mark.parametrize("num_tiles", [1, 5, 21])
def test_the_gradient_of_transmil_is_that_of_finite_differences(num_tiles: int) -> None:
    transmil, (features_ND, cells_N2) = (
        built("transmil", num_features=3),
        random_tiles(num_tiles, num_features=3, side=4),
    )
    names, parameters = zip(*transmil.named_parameters(), strict=True)

    def outputs(features_ND: Tensor, *values: Tensor) -> Tensor:
        called = torch.func.functional_call(transmil, dict(zip(names, values, strict=True)), (features_ND, cells_N2))
        return called[0]  # type: ignore[no-any-return]

    given = features_ND.requires_grad_(), *(p.detach().requires_grad_() for p in parameters)
    assert torch.autograd.gradcheck(outputs, given, fast_mode=True)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Operations that do not repeat exactly raise."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def step_bits(name: str) -> list[Tensor]:
    """Outputs, attention and gradients in float32, for tiles of which two thirds share a cell."""
    aggregator = built(name, num_features=32, hidden=32).float()
    features_ND, cells_N2 = random_tiles(3_000, num_features=32, side=32)
    features_ND = features_ND.float().requires_grad_()
    outputs_C, attention_N = aggregator(features_ND, cells_N2)
    outputs_C.square().sum().backward()
    return [outputs_C, attention_N, *(p.grad for p in (features_ND, *aggregator.parameters()) if p.grad is not None)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("deterministic")
def test_two_runs_give_the_same_bits_and_deterministic_algorithms_do_not_object(name: str) -> None:
    first = step_bits(name)
    for _ in range(3):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(step_bits(name), first, strict=True))


def test_the_same_bits_without_asking_torch_for_them() -> None:
    first = step_bits("transmil")
    for _ in range(3):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(step_bits("transmil"), first, strict=True))


def test_what_is_kept_for_the_backward_pass_grows_with_the_tiles_and_not_with_their_square() -> None:
    def saved_bytes(num_tiles: int) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        features_ND, cells_N2 = random_tiles(num_tiles, side=1_000)
        transmil = built("transmil", hidden=64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            transmil(features_ND.requires_grad_(), cells_N2)
        return sum(sizes.values())

    few, many = saved_bytes(1_000), saved_bytes(4_000)
    assert many < 4.2 * few
    assert many < 4_000 * 64 * 8 * 40  # Forty tensors of the tokens' size.
