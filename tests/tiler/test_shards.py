"""Every slide is in one shard, whatever else is in the archive; job arrays are read as their schedulers number them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiler.errors import TilerError
from tiler.shards import Shard, parse_shard


@given(st.text(), st.integers(1, 50))
def test_every_slide_is_in_one_shard(slide_id: str, count: int) -> None:
    assert sum(Shard(index, count).holds(slide_id) for index in range(count)) == 1


def test_shards_are_of_like_size() -> None:
    counts = [sum(Shard(index, 8).holds(f"case_{i}") for i in range(8_000)) for index in range(8)]
    assert min(counts) > 900


@pytest.mark.parametrize(("text", "shard"), [("0/4", Shard(0, 4)), ("3/4", Shard(3, 4)), (None, Shard(0, 1))])
def test_a_shard_is_named_from_0(text: str | None, shard: Shard) -> None:
    assert parse_shard(text, {}) == shard


@pytest.mark.parametrize("text", ["4/4", "1", "-1/4", "a/b", "0/0", "1/2/3", ""])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(TilerError, match="expected I/N with I from 0 to N-1, or auto"):
        parse_shard(text, {})


def _slurm(at: int, first: int, last: int, step: int, count: int) -> dict[str, str]:
    numbers = {"ID": at, "MIN": first, "MAX": last, "STEP": step, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers.items()}


@pytest.mark.parametrize(
    ("environment", "index", "count"),
    [
        (_slurm(0, 0, 9, 1, 10), 0, 10),
        (_slurm(4, 1, 10, 1, 10), 3, 10),
        (_slurm(6, 2, 10, 4, 3), 1, 3),
        ({"LSB_JOBINDEX": "3", "LSB_JOBINDEX_END": "8"}, 2, 8),
        ({"LSB_JOBINDEX": "5", "LSB_JOBINDEX_END": "8", "LSB_JOBINDEX_STEP": "2"}, 2, 4),
    ],
)
def test_auto_reads_the_arrays_variables(environment: dict[str, str], index: int, count: int) -> None:
    shard = parse_shard("auto", environment)
    assert (shard.index, shard.count) == (index, count)
    assert all(f"{name}=" in shard.source for name in environment if not name.endswith("COUNT"))


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({}, "neither SLURM_ARRAY_TASK_ID nor LSB_JOBINDEX is set"),
        ({"LSB_JOBINDEX": "0"}, "neither SLURM_ARRAY_TASK_ID nor LSB_JOBINDEX is set"),
        (_slurm(7, 3, 7, 1, 2), "an array with gaps"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_MIN is ''"),
        (_slurm(1, 0, 3, 0, 4), "SLURM_ARRAY_TASK_STEP is '0'"),
    ],
)
def test_an_array_that_does_not_say_its_part_is_refused(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(TilerError, match=sentence):
        parse_shard("auto", environment)
