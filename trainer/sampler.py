"""What each step uses: slides in an epoch, tiles of a slide, shards of the tiles. A pure function of the run's seed.

Where not all of a slide's tiles may be used, it is a function of the seed and of those that may, its eligible rows:
the tiles inside annotations (`regions`), the same in all epochs, or those that the model chose (`ranking`), which are
part of the run's state.

Nothing here depends on the number of ranks but the choice of which virtual ranks are *mine*; so a run resumes on
another number of GPUs with the same slides and the same tiles in the same order. Planning an epoch costs one hash per
slide; rows are drawn when a step asks for them.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from manifests import sample_tiles, shard
from trainer.config import Tiles
from trainer.topology import Topology

Balance = Literal["none", "once", "epoch"]
Eligible = Mapping[str, NDArray[np.int64]]
ALL: Eligible = MappingProxyType({})
"""No slide is restricted."""


@dataclass(frozen=True)
class StepPlan:
    """One step: one slide, and how many of its tiles are used. Every rank knows it."""

    epoch: int
    index: int
    """Position in the epoch, from 0."""
    slide_id: str
    num_tiles: int
    """Tiles that the slide has."""
    num_rows: int
    """Tiles that the step uses."""
    eligible: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)
    """The rows that it may use, ascending; all if None."""

    @property
    def num_usable(self) -> int:
        """Tiles that it may use."""
        return self.num_tiles if self.eligible is None else len(self.eligible)


@dataclass(frozen=True)
class ShardPlan:
    """One virtual rank's share of a step: `rows` of the slide's manifest, ascending."""

    step: StepPlan
    virtual_rank: int
    rows: NDArray[np.int64]


def plan_epoch(
    num_tiles: Mapping[str, int],
    *,
    epoch: int,
    seed: int,
    fraction: float,
    tiles: Tiles,
    balance: Balance = "none",
    labels: Mapping[str, int] | None = None,
    eligible: Eligible = ALL,
) -> list[StepPlan]:
    """The steps of an epoch: slides in an order keyed by (seed, epoch), the first `fraction` of them.

    Args:
        num_tiles: slide_id to tiles of the slide, all above 0.
        epoch: from 0.
        seed: the run's seed.
        fraction: share of the slides that an epoch draws.
        tiles: how many tiles of each are used.
        balance: of every class as many slides as of the rarest, the same ones in all epochs (once), or others (epoch).
        labels: slide_id to class, where classes are balanced.
        eligible: slide_id to the rows that its steps may use, ascending; all of a slide that is not in it. A slide
            with none is drawn and left out: no other takes its place.
    """
    drawn = _shuffled(num_tiles, seed, epoch)
    if balance != "none":
        assert labels is not None, "only classes are balanced"
        some = _balanced(drawn if balance == "epoch" else _shuffled(num_tiles, seed, "once"), labels)
        drawn = [slide_id for slide_id in drawn if slide_id in some]
    drawn = drawn[: math.ceil(fraction * len(drawn))]
    used = [slide_id for slide_id in drawn if count_eligible(slide_id, num_tiles, eligible)]
    return [
        StepPlan(epoch, i, s, num_tiles[s], count_rows(count_eligible(s, num_tiles, eligible), tiles), eligible.get(s))
        for i, s in enumerate(used)
    ]


def _shuffled(slide_ids: Iterable[str], seed: int, when: int | str) -> list[str]:
    def key(slide_id: str) -> bytes:
        return hashlib.blake2b(f"slidegrad-epoch-1\x00{seed}\x00{when}\x00{slide_id}".encode()).digest()

    return sorted(slide_ids, key=key)


def _balanced(order: Iterable[str], labels: Mapping[str, int]) -> set[str]:
    """The first slides of each class, as many as the rarest class has."""
    by_class: dict[int, list[str]] = {}
    for slide_id in order:
        by_class.setdefault(labels[slide_id], []).append(slide_id)
    num_each = min(map(len, by_class.values()), default=0)
    return {slide_id for those in by_class.values() for slide_id in those[:num_each]}


def plan_scoring(num_tiles: Mapping[str, int], *, tiles: Tiles, eligible: Eligible = ALL) -> list[StepPlan]:
    """Every slide once, in order of slide_id, with all its tiles (up to `max_tiles`), for validation and test.

    Args:
        num_tiles: slide_id to tiles of the slide.
        tiles: how many are used at most.
        eligible: see `plan_epoch`; none for validation and test, which are of whole slides.
    """
    return [
        StepPlan(0, i, s, num_tiles[s], min(count_eligible(s, num_tiles, eligible), tiles.max_tiles), eligible.get(s))
        for i, s in enumerate(sorted(num_tiles))
    ]


def count_eligible(slide_id: str, num_tiles: Mapping[str, int], eligible: Eligible) -> int:
    """Tiles that a slide's steps may use."""
    return len(eligible[slide_id]) if slide_id in eligible else num_tiles[slide_id]


def count_rows(num_tiles: int, tiles: Tiles) -> int:
    """Tiles that a training step uses of a slide that has `num_tiles` to use."""
    if tiles.k is None:
        return min(num_tiles, tiles.max_tiles)
    return min(num_tiles, tiles.k) if tiles.tiles == "top" else tiles.k


def draw_rows(step: StepPlan, seed: int) -> NDArray[np.int64]:
    """The step's rows, ascending; all that it may use, in order, if it uses so many."""
    num = step.num_usable
    if step.num_rows == num:
        rows = np.arange(num)
    else:
        rows = sample_tiles(num, k=step.num_rows, seed=seed, epoch=step.epoch, slide_id=step.slide_id)
    return rows if step.eligible is None else step.eligible[rows]


class SlideSampler(Sampler[ShardPlan]):
    """This rank's shards, step by step: for each slide of the epoch, one `ShardPlan` per virtual rank it carries.

    Args:
        num_tiles: slide_id to tiles of the slide.
        topology: the ranks of the run.
        rank: this rank; a dedicated aggregator has no shards.
        seed: the run's seed.
        fraction: share of the slides that an epoch draws.
        tiles: how many tiles of each are used.
        balance: see `plan_epoch`.
        labels: likewise.
        eligible: likewise, in all epochs.

    Attributes:
        chosen: slide_id to the rows chosen for this epoch, where the model chooses them; a part of the state. They take
            the place of the eligible ones.
    """

    def __init__(
        self,
        num_tiles: Mapping[str, int],
        topology: Topology,
        rank: int,
        *,
        seed: int,
        fraction: float = 1.0,
        tiles: Tiles,
        balance: Balance = "none",
        labels: Mapping[str, int] | None = None,
        eligible: Eligible = ALL,
    ) -> None:
        self._num_tiles, self._topology, self._rank = num_tiles, topology, rank
        self._seed, self._fraction, self._tiles = seed, fraction, tiles
        self._balance, self._labels = balance, labels
        self.eligible = eligible
        self.epoch, self.next_step = 0, 0
        self.chosen: dict[str, NDArray[np.int64]] = {}

    def set_epoch(self, epoch: int) -> None:
        """Begins another epoch at its first step; nothing happens if it is the epoch at hand."""
        if epoch != self.epoch:
            self.epoch, self.next_step, self.chosen = epoch, 0, {}

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: the epoch and the next step in it, and the rows chosen for it; JSON-ready."""
        chosen = {slide_id: rows.tolist() for slide_id, rows in self.chosen.items()}
        return {"epoch": self.epoch, "next_step": self.next_step, "chosen": chosen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken, whatever the number of ranks was."""
        self.epoch, self.next_step = int(state["epoch"]), int(state["next_step"])
        self.chosen = {slide_id: np.array(rows, np.int64) for slide_id, rows in state.get("chosen", {}).items()}

    def to_rank(self) -> dict[str, int]:
        """slide_id to tiles of this epoch's slides for which the model has still to choose rows."""
        if self._tiles.tiles != "top":
            return {}
        return {step.slide_id: step.num_tiles for step in self._plan(self.eligible) if step.slide_id not in self.chosen}

    def advance(self) -> None:
        """Tells that the step at hand is done."""
        self.next_step += 1

    def steps(self) -> list[StepPlan]:
        """The steps of this epoch that are not done yet, the same on every rank."""
        return self._plan({**self.eligible, **self.chosen})[self.next_step :]

    def _plan(self, eligible: Eligible) -> list[StepPlan]:
        return plan_epoch(
            self._num_tiles,
            epoch=self.epoch,
            seed=self._seed,
            fraction=self._fraction,
            tiles=self._tiles,
            balance=self._balance,
            labels=self._labels,
            eligible=eligible,
        )

    def __iter__(self) -> Iterator[ShardPlan]:
        return shards_of(self.steps(), self._topology, self._rank, self._seed)

    def __len__(self) -> int:
        mine = steps_of(self.steps(), self._topology, self._rank)
        return len(mine) * len(self._topology.virtual_of(self._rank))


def steps_of(steps: list[StepPlan], topology: Topology, rank: int) -> list[StepPlan]:
    """Those of `steps` that the group of `rank` works at."""
    group = topology.group_of(rank)
    return [step for step in steps if topology.group_of_slide(step.index) == group]


def shards_of(steps: list[StepPlan], topology: Topology, rank: int, seed: int) -> Iterator[ShardPlan]:
    """The shards of `steps` that `rank` encodes, in order."""
    mine = topology.virtual_of(rank)
    for step in steps_of(steps, topology, rank) if mine else ():
        rows = draw_rows(step, seed)
        for part in mine:
            yield ShardPlan(step, part, shard(rows, part=part, num_parts=topology.num_virtual))
