"""What passes between the loader and the step: shards with their pixels, and what reading them took."""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from trainer.sampler import ShardPlan, StepPlan

NO_CELLS = torch.zeros(0, 2, dtype=torch.int32)
NO_TILES = torch.zeros(0, 1, 1, 3, dtype=torch.uint8)


@dataclass(frozen=True)
class Shard:
    """One virtual rank's tiles, uint8 (n, tile_px, tile_px, 3), or what a frozen encoder made of them; or why they
    could not be read."""

    virtual_rank: int
    tiles_NHWC: Tensor
    cells_N2: Tensor
    """(column, row) of each tile in the slide's tile grid, int32."""
    error: str = ""
    features_ND: Tensor | None = None
    """The tiles' features, where they are known; then there are no pixels."""

    @property
    def num_tiles(self) -> int:
        """Tiles that it stands for."""
        return len(self.tiles_NHWC if self.features_ND is None else self.features_ND)


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
    """Where a slide's tiles come from, and again (`read_ahead.SlideTiles`)."""

    @property
    def reads(self) -> Reads:
        """What reading took so far."""

    def first(self) -> Iterator[Shard]:
        """All shards, in order."""

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


class ShardReading(Protocol):
    """Slides being read, in the order of their plans (`read_ahead.Reading`); a context."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def slide(self, step: StepPlan) -> ShardSource:
        """Goes on to the next slide, `step`'s."""


class ShardLoader(Protocol):
    """Who gives shards: from the slides (`loader.TileLoader`), or from kept features."""

    def read(self, plans: Iterable[ShardPlan], keep: int | None = None) -> ShardReading:
        """Begins to read a rank's shards, those of a slide one after another; see `loader.TileLoader`."""
