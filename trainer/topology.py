"""Which rank does what, from integers alone.

Rank 0 aggregates. Encoder ranks carry the virtual ranks, in order and contiguously: so each encoder rank's tiles are
one contiguous run of the slide's rows, whatever the number of ranks.
"""

from dataclasses import dataclass
from typing import Literal

from manifests import part_bounds
from trainer.errors import TrainerError

AGGREGATOR_RANK = 0


@dataclass(frozen=True)
class Topology:
    """The ranks of a run.

    Attributes:
        world_size: processes, the aggregator included.
        encoder_ranks: ranks that encode, ascending.
        num_virtual: virtual ranks, shards of every slide.
    """

    world_size: int
    encoder_ranks: tuple[int, ...]
    num_virtual: int

    @classmethod
    def make(cls, world_size: int, mode: Literal["auto", "dedicated", "shared"], num_virtual: int | None) -> "Topology":
        """Resolves `machine.aggregator`.

        Args:
            world_size: processes in all.
            mode: dedicated, shared, or auto (shared if there is one process, else dedicated).
            num_virtual: virtual ranks; None for as many as encoder ranks.

        Raises:
            TrainerError: one process cannot have a dedicated aggregator.
        """
        if world_size < 1:
            raise TrainerError(f"--nproc {world_size}: expected at least 1")
        if mode == "dedicated" and world_size == 1:
            raise TrainerError(
                "--nproc 1 with machine.aggregator=dedicated leaves no rank to encode; give --nproc 2 or more, "
                "or --machine.aggregator shared"
            )
        first = 0 if mode == "shared" or world_size == 1 else 1
        encoders = tuple(range(first, world_size))
        return cls(world_size, encoders, num_virtual or len(encoders))

    @property
    def num_encoders(self) -> int:
        """Ranks that encode."""
        return len(self.encoder_ranks)

    def virtual_of(self, rank: int) -> range:
        """The virtual ranks that `rank` runs, one after another; empty for a dedicated aggregator."""
        if rank not in self.encoder_ranks:
            return range(0)
        i = self.encoder_ranks.index(rank)
        return range(*part_bounds(self.num_virtual, i, self.num_encoders))

    def rows_of(self, rank: int, num_rows: int) -> slice:
        """The run of a slide's `num_rows` drawn rows that `rank` encodes."""
        mine = self.virtual_of(rank)
        if not mine:
            return slice(0, 0)
        begin, _ = part_bounds(num_rows, mine[0], self.num_virtual)
        _, end = part_bounds(num_rows, mine[-1], self.num_virtual)
        return slice(begin, end)
