"""Gradient equivalence on gloo, and that each way of being wrong is noticed."""

import pytest

from trainer.verify import BUILT_IN, NUM_TILES, Case, Result, verify


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_ranks_and_virtual_ranks_give_one_process(num_ranks: int) -> None:
    """All three encoders, both dtypes, 1 and 3 virtual ranks each, uneven splits and empty shards."""
    cases = [
        Case(encoder=e, dtype=d, num_tiles=n, num_ranks=num_ranks, num_virtual=num_ranks * v, keep=keep)
        for e in BUILT_IN
        for d in ("float64", "float32")
        for v, keep in ((1, None), (3, 1))
        for n in NUM_TILES
    ]
    wrong = [result for result in verify(cases) if not result.holds]
    assert not wrong


@pytest.mark.slow
def test_batchnorm_by_virtual_rank_gives_one_process_with_the_same() -> None:
    cases = [
        Case(encoder="conv", dtype="float64", num_tiles=n, num_ranks=2, num_virtual=v, batchnorm="virtual", keep=keep)
        for n in NUM_TILES
        for v in (2, 6, 12)  # 12 leave a virtual rank with a single tile
        for keep in (None, 0, 1)
    ]
    assert all(result.holds for result in verify(cases))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["scale", "drop", "swap"])
def test_every_injected_fault_is_noticed(fault: str) -> None:
    cases = [
        Case(encoder="conv", dtype=d, num_tiles=23, num_ranks=2, num_virtual=v, fault=fault)  # type: ignore[arg-type]
        for d in ("float64", "float32")
        for v in (2, 6)
    ]
    assert not any(result.holds for result in verify(cases))


def test_both_limits_count() -> None:
    case = Case(encoder="conv", dtype="float32", num_tiles=2, num_ranks=1, num_virtual=1)
    assert Result(case, 1e-5, 5e-5).holds
    assert not Result(case, 2e-5, 0).holds
    assert not Result(case, 0, 6e-5).holds
