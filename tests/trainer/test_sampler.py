"""What is used follows from the seed alone: the same slides and tiles on any number of ranks, and after a resume."""

import json
from collections import defaultdict

import numpy as np
import pytest

from trainer.config import Tiles
from trainer.sampler import Balance, SlideSampler, draw_rows, plan_epoch, plan_scoring
from trainer.topology import Topology

SLIDES = {f"case_{i}": 5 + 7 * i for i in range(8)} | {"tiny": 1}
FIXED = Tiles(tiles="fixed", k=12)


def rows_by_slide(world_size: int, mode: str, tiles: Tiles, epoch: int = 0) -> list[tuple[str, list[int]]]:
    """(slide, rows in order) as all ranks together use them."""
    topology = Topology.make(world_size, mode, 6)  # type: ignore[arg-type]
    found: dict[int, dict[int, list[int]]] = defaultdict(dict)
    names = {}
    for rank in range(world_size):
        sampler = SlideSampler(SLIDES, topology, rank, seed=3, tiles=tiles)
        sampler.set_epoch(epoch)
        for shard in sampler:
            found[shard.step.index][shard.virtual_rank] = shard.rows.tolist()
            names[shard.step.index] = shard.step.slide_id
    return [(names[i], [row for v in range(6) for row in found[i][v]]) for i in sorted(found)]


@pytest.mark.parametrize("tiles", [FIXED, Tiles(tiles="all"), Tiles(tiles="all", max_tiles=10)])
def test_any_number_of_ranks_uses_the_same_tiles_in_the_same_order(tiles: Tiles) -> None:
    one = rows_by_slide(1, "shared", tiles)
    assert one == rows_by_slide(3, "dedicated", tiles) == rows_by_slide(4, "shared", tiles)
    assert sorted(slide for slide, _ in one) == sorted(SLIDES)
    for slide, rows in one:
        expected = tiles.k or min(SLIDES[slide], tiles.max_tiles)
        assert len(rows) == expected
        assert rows == sorted(rows)
        assert len(set(rows)) == min(expected, SLIDES[slide])


def test_epochs_differ_in_order_and_in_tiles() -> None:
    first, second = rows_by_slide(1, "shared", FIXED, 0), rows_by_slide(1, "shared", FIXED, 1)
    assert [slide for slide, _ in first] != [slide for slide, _ in second]
    assert dict(first)["case_7"] != dict(second)["case_7"]


def test_a_share_of_the_slides_is_drawn_anew_each_epoch() -> None:
    drawn = [
        {step.slide_id for step in plan_epoch(SLIDES, epoch=e, seed=0, fraction=0.5, tiles=FIXED)} for e in range(20)
    ]
    assert {len(slides) for slides in drawn} == {5}  # 9 slides: half, rounded up
    assert set.union(*drawn) == set(SLIDES)
    assert len({frozenset(slides) for slides in drawn}) > 10


@pytest.mark.parametrize("balance", ["once", "epoch"])
def test_balanced_classes_have_as_many_slides_as_the_rarest(balance: Balance) -> None:
    labels = {slide_id: int(i % 3 == 0) for i, slide_id in enumerate(SLIDES)}
    epochs = [
        [
            step.slide_id
            for step in plan_epoch(SLIDES, epoch=e, seed=0, fraction=1, tiles=FIXED, balance=balance, labels=labels)
        ]
        for e in range(20)
    ]
    for slides in epochs:
        assert sorted(labels[slide_id] for slide_id in slides) == [0, 0, 0, 1, 1, 1]
    assert len({tuple(slides) for slides in epochs}) > 10
    assert (len({frozenset(slides) for slides in epochs}) == 1) == (balance == "once")


@pytest.mark.parametrize("balance", ["once", "epoch"])
def test_a_class_without_training_slides_leaves_the_others_balanced(balance: Balance) -> None:
    """Of the classes 0, 1, 2 nobody trains 1, as it may be where a class is rare."""
    labels = {slide_id: 2 * int(i % 3 == 0) for i, slide_id in enumerate(SLIDES)}
    steps = plan_epoch(SLIDES, epoch=0, seed=0, fraction=1, tiles=FIXED, balance=balance, labels=labels)
    assert sorted(labels[step.slide_id] for step in steps) == [0, 0, 0, 2, 2, 2]


def test_resume_goes_on_with_the_next_step_on_other_ranks() -> None:
    whole = SlideSampler(SLIDES, Topology.make(1, "auto", 6), 0, seed=3, tiles=FIXED)
    whole.set_epoch(2)
    slides = [step.slide_id for step in whole.steps()]
    for _ in range(4):
        whole.advance()
    resumed = SlideSampler(SLIDES, Topology.make(3, "dedicated", 6), 1, seed=3, tiles=FIXED)
    resumed.load_state_dict(whole.state_dict())
    resumed.set_epoch(2)
    assert [step.slide_id for step in resumed.steps()] == slides[4:]
    assert len(list(resumed)) == len(resumed) == 3 * (len(SLIDES) - 4)
    resumed.set_epoch(3)
    assert len(resumed.steps()) == len(SLIDES)


def test_scoring_takes_every_tile_once_up_to_the_cap() -> None:
    steps = plan_scoring(SLIDES, tiles=Tiles(tiles="all", max_tiles=20))
    assert [step.slide_id for step in steps] == sorted(SLIDES)
    assert [step.num_rows for step in steps] == [min(SLIDES[s], 20) for s in sorted(SLIDES)]


def test_planning_a_large_epoch_does_not_touch_tiles() -> None:
    cohort = {f"slide_{i}": 10_000 for i in range(13_050)}
    steps = plan_epoch(cohort, epoch=0, seed=0, fraction=0.5, tiles=Tiles(tiles="all"))
    assert len(steps) == 6_525
    assert all(isinstance(step.num_rows, int) for step in steps[:10])
    assert np.unique([step.slide_id for step in steps]).size == 6_525


TOP = Tiles(tiles="top", k=3)


def test_chosen_rows_are_an_epochs_rows_and_part_of_its_state() -> None:
    """Chosen on one rank's word, told to a resumed run on three; forgotten with the epoch."""
    one = SlideSampler(SLIDES, Topology.make(1, "auto", 2), 0, seed=3, tiles=TOP)
    one.set_epoch(1)
    assert one.to_rank() == SLIDES
    one.chosen |= {slide_id: np.arange(num)[-3:] for slide_id, num in SLIDES.items() if slide_id != "case_0"}
    assert one.to_rank() == {"case_0": SLIDES["case_0"]}
    one.chosen["case_0"] = np.zeros(0, np.int64)  # It could not be read.
    one.advance()
    state = json.loads(json.dumps(one.state_dict()))
    for rank in range(3):
        other = SlideSampler(SLIDES, Topology.make(3, "shared", 2), rank, seed=3, tiles=TOP)
        other.load_state_dict(state)
        assert other.to_rank() == {}
        steps = other.steps()
        assert [step.slide_id for step in steps] == [step.slide_id for step in one.steps()]
        assert len(steps) == len(SLIDES) - 2
        for step in steps:
            assert draw_rows(step, 3).tolist() == list(range(SLIDES[step.slide_id]))[-3:]
    one.set_epoch(2)
    assert one.to_rank() == SLIDES


def test_only_the_slides_that_an_epoch_draws_are_ranked() -> None:
    sampler = SlideSampler(SLIDES, Topology.make(1, "auto", 2), 0, seed=3, fraction=0.5, tiles=TOP)
    assert set(sampler.to_rank()) == {step.slide_id for step in sampler.steps()}
    assert len(sampler.to_rank()) == 5


def test_a_state_of_before_rows_were_chosen_is_understood() -> None:
    sampler = SlideSampler(SLIDES, Topology.make(1, "auto", 2), 0, seed=3, tiles=FIXED)
    sampler.load_state_dict({"epoch": 4, "next_step": 2})
    assert (sampler.epoch, len(sampler.steps()), sampler.to_rank()) == (4, len(SLIDES) - 2, {})
