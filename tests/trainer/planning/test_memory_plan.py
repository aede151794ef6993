"""A job fits as it says, with the fewest virtual ranks, or is refused with what would fit."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import TrainerError
from trainer.memory import Cost, Line
from trainer.planning.costs import AggregatorCosts, EncoderCosts
from trainer.planning.memory_plan import SHARE, MemoryPlan, plan_memory

ENCODER = EncoderCosts(
    name="toy",
    tile_px=10,
    precision="float32",
    num_features=4,
    num_parameters=1_000,
    weight_bytes=4_000,
    parameter_bytes=4_000,
    memory=Cost(graph=Line(1_000, 9_000), peak=Line(2_000, 9_400)),
    forward=(),
    backward=(),
)
"""A tile takes 10,000 bytes: 9,400 of a pass, and 600 for two buffers of 10 x 10 x 3 bytes."""
AGGREGATOR = AggregatorCosts(name="gma", held_bytes=100, memory=Line(0, 10), operators=())


def plan(num_tiles: int, num_bytes: float, world_size: int = 4, num_virtual: int | None = None) -> MemoryPlan:
    return plan_memory(
        ENCODER,
        AGGREGATOR,
        num_tiles=num_tiles,
        num_bytes=num_bytes,
        world_size=world_size,
        mode="auto",
        num_virtual=num_virtual,
    )


def test_a_slide_that_fits_has_one_virtual_rank_on_each_encoder_rank() -> None:
    found = plan(300, (100 * 10_000 + 2_000 + 16_000) / SHARE + 1)
    assert (found.topology.num_virtual, found.topology.num_encoders, found.topology.is_shared) == (3, 3, False)
    assert (found.tiles_per_rank, found.tiles_per_virtual, found.virtual_per_rank, found.kept) == (100, 100, 1, 1)
    assert found.encoder_bytes == 100 * 10_000 + 2_000 + 16_000
    assert found.aggregator_bytes == 100 + 3_000


def test_a_tile_too_many_makes_twice_as_many_virtual_ranks() -> None:
    found = plan(303, (100 * 10_000 + 2_000 + 16_000) / SHARE + 1)
    assert (found.topology.num_virtual, found.tiles_per_virtual, found.virtual_per_rank) == (6, 51, 2)
    # 51 tiles: 528,000 held and in a pass, and 460,000 a graph more.
    assert (found.kept, found.encoder_bytes) == (2, 16_000 + 51 * 10_000 + 2_000 + 51 * 9_000 + 1_000)


def test_alone_a_rank_holds_the_aggregator_too() -> None:
    found = plan(10, 1e6, world_size=1)
    assert found.topology.is_shared
    assert found.encoder_bytes == 16_000 + 10 * 10_000 + 2_000 + 100 + 100


@given(num_tiles=st.integers(1, 50_000), num_bytes=st.floats(1e6, 1e9), world_size=st.integers(1, 200))
def test_what_is_planned_fits_and_fewer_virtual_ranks_would_not(
    num_tiles: int, num_bytes: float, world_size: int
) -> None:
    found = plan(num_tiles, num_bytes, world_size)
    topology = found.topology
    assert 1 <= found.kept <= found.virtual_per_rank
    assert found.encoder_bytes <= SHARE * num_bytes
    if found.kept < found.virtual_per_rank:
        assert found.encoder_bytes + ENCODER.memory.graph.at(found.tiles_per_virtual) > SHARE * num_bytes
    assert topology.num_virtual % topology.num_encoders == 0
    if topology.num_virtual > topology.num_encoders:
        with pytest.raises(TrainerError, match="--virtual-ranks"):
            plan(num_tiles, num_bytes, world_size, topology.num_virtual - topology.num_encoders)


def test_virtual_ranks_that_do_not_fit_are_refused_with_the_number_that_does() -> None:
    with pytest.raises(
        TrainerError, match=r"--virtual-ranks 3 makes virtual ranks of 334 tiles, .* expected \d+ or"
    ) as e:
        plan(1_000, 1e6, num_virtual=3)
    needed = re.search(r"expected (\d+)", str(e.value))
    assert needed is not None
    enough = int(needed[1])
    assert plan(1_000, 1e6, num_virtual=enough).topology.num_virtual == enough
    with pytest.raises(TrainerError):
        plan(1_000, 1e6, num_virtual=enough - 1)


def test_memory_that_holds_not_one_tile_is_refused_with_what_would_do() -> None:
    with pytest.raises(
        TrainerError, match=r"--memory-gb 2e-05: not one tile of 10 px fits .* expected at least 3.1e-05"
    ):
        plan(1, 20_000)
    assert plan(1, 31_200).kept == 1


def test_an_aggregator_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        TrainerError, match=r"--memory-gb 0.001: gma takes 0.01 GB for 1,000,000 tiles, expected at most"
    ):
        plan(1_000_000, 1e6)
