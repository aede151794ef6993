"""A sweep's axes: names, parts that cover all runs once, and what is no axis."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiler.shards import Shard
from trainer.errors import TrainerError
from trainer.sweep.grid import (
    Grid,
    Point,
    all_points,
    find_splits,
    parse_counts,
    parse_ks,
    parse_part,
    parse_precisions,
    share,
    with_grid,
)

GRID = Grid(
    ks=(50, 350, "all"),
    precisions=("float32", "bf16"),
    nprocs=(1, 3),
    splits=("s000", "s001"),
    methods=("end_to_end", "max_pool"),
)


def test_names_say_what_a_run_is() -> None:
    point = Point(k=350, precision="float32", nproc=1, split="s003")
    assert point.name == "k350_float32_n1_s003_end_to_end"
    assert Point(k="all", precision="bf16", nproc=12, method="frozen_gma").name == "kall_bf16_n12_frozen_gma"


def test_a_grid_is_the_product_and_k_no_axis_of_methods_that_choose_tiles() -> None:
    assert len(GRID.points()) == len(set(GRID.points())) == 3 * 2 * 2 * 2 * 2
    points = GRID.points({"max_pool"})
    assert [point.k for point in points if point.method == "max_pool"] == ["own"] * 8
    assert len({point.name for point in points}) == len(points) == 24 + 8
    # All of one split come before the next one's.
    splits = [point.split for point in points]
    assert splits == sorted(splits)


@given(count=st.integers(1, 9), num_splits=st.integers(1, 20))
def test_parts_cover_all_runs_once_and_are_even(count: int, num_splits: int) -> None:
    splits = tuple(f"s{i:03d}" for i in range(num_splits))
    grid = Grid(ks=(50, 350), precisions=("float32",), nprocs=(1,), splits=splits)
    parts = [share(grid.points(), parse_part(f"{i + 1}/{count}", {})) for i in range(count)]
    assert sorted(point.name for part in parts for point in part) == sorted(point.name for point in grid.points())
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_a_part_mixes_quick_and_slow_runs() -> None:
    grid = Grid(ks=(50, 4900), precisions=("float32",), nprocs=(1,), splits=tuple(f"s{i:03d}" for i in range(20)))
    num_slow = [sum(point.k == 4900 for point in share(grid.points(), Shard(i, 2))) for i in range(2)]
    assert min(num_slow) >= 5


def test_the_part_of_a_job_array() -> None:
    numbers = {"ID": "7", "MIN": "5", "MAX": "8", "COUNT": "4"}
    slurm = {f"SLURM_ARRAY_TASK_{name}": value for name, value in numbers.items()}
    assert (parse_part("auto", slurm).index, parse_part("auto", slurm).count) == (2, 4)
    lsf = {"LSB_JOBINDEX": "3", "LSB_JOBINDEX_END": "4"}
    assert (parse_part("auto", lsf).index, parse_part("auto", lsf).count) == (2, 4)
    assert parse_part(None, slurm).count == 1
    with pytest.raises(TrainerError, match="--part auto: neither SLURM"):
        parse_part("auto", {})


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", ""])
def test_no_part(text: str) -> None:
    with pytest.raises(TrainerError, match=f"--part {text}: expected I/N with I from 1 to N, or auto"):
        parse_part(text, {})


def test_axes_are_lists_of_different_values() -> None:
    assert parse_ks("50, 350,all") == (50, 350, "all")
    assert parse_counts("--nproc", "1,3") == (1, 3)
    assert parse_precisions("float32,bf16") == ("float32", "bf16")
    for parse, text in ((parse_ks, "50,,3"), (parse_ks, "50,50"), (parse_ks, "0"), (parse_ks, "x"), (parse_ks, "٣")):
        with pytest.raises(TrainerError, match=rf"--k {text}: expected"):
            parse(text)
    with pytest.raises(TrainerError, match="'half' is none of float32, tf32"):
        parse_precisions("float32,half")


def test_more_values_make_a_sweep_larger_and_fewer_leave_it() -> None:
    larger = Grid(ks=(50, 700), precisions=("float32",), nprocs=(1,))
    smaller = Grid(ks=(700,), precisions=("float32",), nprocs=(1,))
    grids = with_grid((larger,), smaller)
    assert grids == (larger,)
    both = with_grid(grids, GRID)
    assert both == (larger, GRID)
    assert len(all_points(both)) == len(larger.points()) + len(GRID.points())


def test_split_files_are_found_by_number(tmp_path: Path) -> None:
    for name in ("split_000.csv", "split_010.csv", "split_002.csv", "split_x.csv", "splits.json", "labels.csv"):
        (tmp_path / name).write_text("")
    assert list(find_splits(tmp_path)) == ["s000", "s002", "s010"]
    assert list(find_splits(tmp_path, 2)) == ["s000", "s002"]
    with pytest.raises(TrainerError, match="--num-splits 4: expected 1 to 3"):
        find_splits(tmp_path, 4)
    with pytest.raises(TrainerError, match=r"no split_000\.csv here; slidegrad splits makes"):
        find_splits(tmp_path / "none")
