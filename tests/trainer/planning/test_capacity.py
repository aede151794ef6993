"""The search finds what fits, and what it finds is what a real step takes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import Encoder
from trainer.planning.capacity import FINENESS, Capacity, largest, measure_capacity, predict_capacity
from trainer.planning.costs import Precision, count_encoder

CPU = torch.device("cpu")


@given(answer=st.integers(0, 3_000), most=st.integers(1, 5_000))
def test_the_search_finds_a_known_answer(answer: int, most: int) -> None:
    tried: list[int] = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= answer

    found, trials = largest(fits, most, fineness=10**9)
    assert found == min(answer, most)
    assert trials == len(tried) == len(set(tried)) <= 26
    assert all(1 <= number <= most for number in tried)


@given(answer=st.integers(1, 10**6))
def test_the_search_stops_when_it_is_fine_enough(answer: int) -> None:
    found, _ = largest(lambda number: number <= answer, 2**20)
    assert found <= answer <= found * (1 + 1 / FINENESS) + 1


def test_it_doubles_then_halves_the_gap() -> None:
    tried: list[int] = []
    largest(lambda number: tried.append(number) or number <= 11, 100)  # type: ignore[func-returns-value]
    assert tried == [1, 2, 4, 8, 16, 12, 10, 11]


@pytest.mark.parametrize(
    ("name", "tile_px", "precision", "cap"),
    [
        ("test_resnet", 32, "float32", 50e6),
        ("test_vit", 160, "bf16", 60e6),
    ],
)
def test_the_prediction_stands_beside_the_measurement(
    name: str, tile_px: int, precision: Precision, cap: float
) -> None:
    config = Encoder(name=name)
    measured, trials = measure_capacity(config, tile_px, precision, CPU, cap, 10_000)
    predicted = predict_capacity(count_encoder(config, tile_px, precision, "cpu"), cap)
    assert measured > 10
    assert trials > 5
    assert predicted == pytest.approx(measured, rel=0.04)


def test_nothing_fits_where_weights_do_not() -> None:
    assert measure_capacity(Encoder(name="test_resnet"), 32, "float32", CPU, 1e6, 100) == (0, 1)
    assert predict_capacity(count_encoder(Encoder(name="test_resnet"), 32, "float32", "cpu"), 1e6) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_cap_is_kept_to() -> None:
    config, device = Encoder(name="resnet18"), torch.device("cuda", 0)
    measured, _ = measure_capacity(config, 224, "float32", device, 4e9, 10_000)
    assert predict_capacity(count_encoder(config, 224, "float32"), 4e9) == pytest.approx(measured, rel=0.15)
    assert measure_capacity(config, 224, "float32", device, 8e9, 10_000)[0] > 1.8 * measured


def test_the_papers_numbers_stand_beside_its_encoders_alone() -> None:
    numbers = {
        (name, precision): Capacity(encoder=name, precision=precision, predicted=1).paper
        for name in ("resnet50", "vit_base_patch16_224", "resnet18")
        for precision in ("float32", "bf16")
    }
    assert list(numbers.values()) == [840, 1_848, 528, 728, None, None]


@pytest.mark.parametrize(("precision", "within"), [("float32", 0.1), ("bf16", 0.05)])
def test_resnet50_on_80_gb_is_near_the_paper(precision: Precision, within: float) -> None:
    predicted = predict_capacity(count_encoder(Encoder(name="resnet50"), 224, precision), 80e9)
    assert predicted == pytest.approx(Capacity(encoder="resnet50", precision=precision, predicted=0).paper, rel=within)
