"""Every rank's share, for all ranks in a loop, without a process."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests import shard
from trainer.errors import TrainerError
from trainer.topology import Topology


def test_a_dedicated_aggregator_encodes_nothing() -> None:
    topology = Topology.make(4, "dedicated", 6)
    assert topology.encoder_ranks == (1, 2, 3)
    assert [list(topology.virtual_of(rank)) for rank in range(4)] == [[], [0, 1], [2, 3], [4, 5]]
    assert topology.rows_of(0, 100) == slice(0, 0)


@pytest.mark.parametrize(
    ("world_size", "mode", "encoders"), [(1, "auto", (0,)), (2, "auto", (1,)), (3, "shared", (0, 1, 2))]
)
def test_auto_shares_only_where_one_process_is_alone(world_size: int, mode: str, encoders: tuple[int, ...]) -> None:
    topology = Topology.make(world_size, mode, None)  # type: ignore[arg-type]
    assert topology.encoder_ranks == encoders
    assert topology.num_virtual == len(encoders)


def test_one_process_cannot_have_a_dedicated_aggregator() -> None:
    with pytest.raises(TrainerError, match=r"--nproc 1 with machine\.aggregator=dedicated.* give --nproc 2 or more"):
        Topology.make(1, "dedicated", None)
    with pytest.raises(TrainerError, match=r"--nproc 3 with machine\.aggregator=dedicated.* give --nproc 6 or more"):
        Topology.make(3, "dedicated", None, 3)


@pytest.mark.parametrize(("world_size", "num_groups", "fitting"), [(5, 2, 6), (2, 3, 3), (7, 3, 9)])
def test_processes_that_do_not_make_equal_groups_are_refused(world_size: int, num_groups: int, fitting: int) -> None:
    message = rf"--nproc {world_size} does not make machine\.groups={num_groups} .*give --nproc {fitting},"
    with pytest.raises(TrainerError, match=message):
        Topology.make(world_size, "auto", None, num_groups)
    Topology.make(fitting, "auto", None, num_groups)


@given(num_groups=st.integers(1, 5), first=st.integers(0, 50), count=st.integers(0, 20))
def test_every_slide_of_a_step_has_one_group_and_groups_take_turns(num_groups: int, first: int, count: int) -> None:
    topology = Topology.make(2 * num_groups, "dedicated", None, num_groups)
    found = [topology.group_of_slide(index) for index in range(first, first + count)]
    assert all(0 <= group < num_groups for group in found)
    shares = [found.count(group) for group in range(num_groups)]
    assert max(shares) - min(shares) <= 1


@given(
    world_size=st.integers(2, 9),
    mode=st.sampled_from(["dedicated", "shared"]),
    num_groups=st.integers(1, 4),
    num_virtual=st.integers(1, 24),
    num_rows=st.integers(0, 200),
)
def test_the_ranks_of_each_group_partition_virtual_ranks_and_rows(
    world_size: int, mode: str, num_groups: int, num_virtual: int, num_rows: int
) -> None:
    topology = Topology.make(num_groups * world_size, mode, num_virtual, num_groups)  # type: ignore[arg-type]
    groups = [topology.ranks_of(group) for group in range(num_groups)]
    assert [rank for group in groups for rank in group] == list(range(num_groups * world_size))
    assert topology.aggregator_ranks == tuple(group[0] for group in groups)
    assert [rank for rank in topology.encoder_ranks if rank in topology.aggregator_ranks] == (
        list(topology.aggregator_ranks) if mode == "shared" else []
    )
    rows = np.arange(num_rows)
    for group in groups:
        assert {topology.group_of(rank) for rank in group} == {groups.index(group)}
        assert [v for rank in group for v in topology.virtual_of(rank)] == list(range(num_virtual))
        by_rank = np.concatenate([rows[topology.rows_of(rank, num_rows)] for rank in group])
        assert by_rank.tolist() == rows.tolist()
    for rank in range(topology.world_size):
        parts = [shard(rows, part=v, num_parts=num_virtual) for v in topology.virtual_of(rank)]
        expected = np.concatenate(parts) if parts else rows[:0]
        assert rows[topology.rows_of(rank, num_rows)].tolist() == expected.tolist()
