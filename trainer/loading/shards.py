"""What passes between the loader and the step: shards with their pixels, and what reading them took."""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.sampler import StepPlan

NO_CELLS = torch.zeros(0, 2, dtype=torch.int32)


@dataclass(frozen=True)
class Shard:
    """One virtual rank's tiles, uint8 (n, tile_px, tile_px, 3); or why they could not be read."""

    virtual_rank: int
    tiles_NHWC: Tensor
    cells_N2: Tensor
    """(column, row) of each tile in the slide's tile grid, int32."""
    error: str = ""


@dataclass(frozen=True)
class Reads:
    """What reading tiles took, second readings included: tiles, compressed tiles and bytes of the file, seconds."""

    num_tiles: int = 0
    num_reread: int = 0
    """Tiles that were read a second time."""
    num_decoded: int = 0
    num_bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Reads") -> "Reads":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Reads(*(a + b for a, b in pairs))


class ShardSource(Protocol):
    """Where a slide's tiles come from again (`read_ahead.SlideTiles`)."""

    @property
    def reads(self) -> Reads:
        """What reading took so far."""

    def will_reread(self) -> bool:
        """Whether any of `again` must be read from the file; asked after the first pass."""

    def again(self) -> Iterator[Shard]:
        """The shards whose graph is not kept, without empty ones, in reversed order."""


class SlideInput(NamedTuple):
    """One slide of a step: its plan and targets, alike on every rank, and this rank's virtual ranks' tiles, in order.

    Without a source the shards are held until the second pass; with one, each is the step's until it takes the next.
    """

    plan: StepPlan
    shards: Iterable[Shard]
    targets: tuple[float, ...]
    """What is true of it, as `heads.Head` reads it."""
    source: ShardSource | None = None
