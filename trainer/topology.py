"""Which rank does what, from integers alone.

Ranks form groups of equal size, each at a slide of its own. In a group the first rank aggregates; encoder ranks carry
the virtual ranks, in order and contiguously: so each encoder rank's tiles are one contiguous run of the slide's rows,
whatever the number of ranks. Ranks are the run's, 0 to `world_size`, also where a group is meant.
"""

import functools
from dataclasses import dataclass
from typing import Literal

from manifests import part_bounds
from trainer.errors import TrainerError

MAIN_RANK = 0
"""The rank that speaks for the run: it keeps the journal, writes results, and aggregates in the first group."""


@dataclass(frozen=True)
class Topology:
    """The ranks of a run.

    Attributes:
        world_size: processes, the aggregators included.
        num_groups: groups of ranks, each at a slide of its own.
        is_shared: aggregators encode too.
        num_virtual: virtual ranks, shards of every slide.
    """

    world_size: int
    num_groups: int
    is_shared: bool
    num_virtual: int

    @classmethod
    def make(
        cls,
        world_size: int,
        mode: Literal["auto", "dedicated", "shared"],
        num_virtual: int | None,
        num_groups: int = 1,
    ) -> "Topology":
        """Resolves `machine.aggregator` and `machine.groups`.

        Args:
            world_size: processes in all.
            mode: dedicated, shared, or auto (shared if a group is one process, else dedicated).
            num_virtual: virtual ranks; None for as many as a group has encoder ranks.
            num_groups: groups, of equal size.

        Raises:
            TrainerError: the processes do not make such groups, or one process should aggregate and leave encoding to
                nobody.
        """
        if world_size < 1:
            raise TrainerError(f"--nproc {world_size}: expected at least 1")
        size, rest = divmod(world_size, num_groups)
        if rest or not size:
            fitting = num_groups * max(1, size + (rest > 0))
            raise TrainerError(
                f"--nproc {world_size} does not make machine.groups={num_groups} groups of one size; give "
                f"--nproc {fitting}, or other --machine.groups"
            )
        if mode == "dedicated" and size == 1:
            raise TrainerError(
                f"--nproc {world_size} with machine.aggregator=dedicated leaves no rank to encode; give --nproc "
                f"{2 * num_groups} or more, or --machine.aggregator shared"
            )
        is_shared = mode == "shared" or size == 1
        num_encoders = size if is_shared else size - 1
        return cls(world_size, num_groups, is_shared, num_virtual or num_encoders)

    @property
    def group_size(self) -> int:
        """Ranks of a group."""
        return self.world_size // self.num_groups

    @property
    def num_encoders(self) -> int:
        """Ranks that encode one slide: those of a group."""
        return self.group_size if self.is_shared else self.group_size - 1

    @functools.cached_property
    def encoder_ranks(self) -> tuple[int, ...]:
        """All ranks that encode, ascending."""
        return tuple(rank for group in range(self.num_groups) for rank in self.encoders_of(group))

    @functools.cached_property
    def aggregator_ranks(self) -> tuple[int, ...]:
        """The first rank of each group."""
        return tuple(group * self.group_size for group in range(self.num_groups))

    def group_of(self, rank: int) -> int:
        """The group that a rank is in."""
        return rank // self.group_size

    def group_of_slide(self, index: int) -> int:
        """The group that works at a slide, by its position in the epoch: in turn."""
        return index % self.num_groups

    def ranks_of(self, group: int) -> range:
        """All ranks of a group."""
        return range(group * self.group_size, (group + 1) * self.group_size)

    def encoders_of(self, group: int) -> range:
        """The ranks of a group that encode."""
        return self.ranks_of(group)[-self.num_encoders :]

    def virtual_of(self, rank: int) -> range:
        """The virtual ranks that `rank` runs, one after another; empty for a dedicated aggregator."""
        encoders = self.encoders_of(self.group_of(rank))
        if rank not in encoders:
            return range(0)
        return range(*part_bounds(self.num_virtual, rank - encoders[0], self.num_encoders))

    def rows_of(self, rank: int, num_rows: int) -> slice:
        """The run of a slide's `num_rows` drawn rows that `rank` encodes."""
        mine = self.virtual_of(rank)
        if not mine:
            return slice(0, 0)
        begin, _ = part_bounds(num_rows, mine[0], self.num_virtual)
        _, end = part_bounds(num_rows, mine[-1], self.num_virtual)
        return slice(begin, end)
