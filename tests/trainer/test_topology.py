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
    with pytest.raises(TrainerError, match=r"--nproc 1 with machine\.aggregator=dedicated"):
        Topology.make(1, "dedicated", None)


@given(
    world_size=st.integers(2, 9),
    mode=st.sampled_from(["dedicated", "shared"]),
    num_virtual=st.integers(1, 24),
    num_rows=st.integers(0, 200),
)
def test_ranks_partition_virtual_ranks_and_rows(world_size: int, mode: str, num_virtual: int, num_rows: int) -> None:
    topology = Topology.make(world_size, mode, num_virtual)  # type: ignore[arg-type]
    virtual = [v for rank in range(world_size) for v in topology.virtual_of(rank)]
    assert virtual == list(range(num_virtual))
    rows = np.arange(num_rows)
    by_rank = np.concatenate([rows[topology.rows_of(rank, num_rows)] for rank in range(world_size)])
    assert by_rank.tolist() == rows.tolist()
    for rank in range(world_size):
        parts = [shard(rows, part=v, num_parts=num_virtual) for v in topology.virtual_of(rank)]
        expected = np.concatenate(parts) if parts else rows[:0]
        assert rows[topology.rows_of(rank, num_rows)].tolist() == expected.tolist()
