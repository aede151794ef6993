"""How a job fits into memory: virtual ranks, graphs kept, bytes of each rank. `machine.keep=auto`, before the run.

The reckoning is that of `trainer.memory`, with what is counted here in place of what is measured there: weights,
gradients and AdamW's moments are held; the tiles at hand and the next ones too; of the rest a tenth stays free for what
allocators leave and libraries take within themselves.
"""

import math
from dataclasses import dataclass
from typing import Literal

from trainer.errors import TrainerError
from trainer.memory import count_kept
from trainer.planning.costs import AggregatorCosts, EncoderCosts
from trainer.topology import Topology

SHARE = 0.9
"""Of a device's memory that tensors may fill, as in `trainer.memory`."""
_BUFFERS = 2
"""Of a virtual rank's tiles, uint8: those at hand, and the next ones on their way."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """A job's ranks and what they hold."""

    topology: Topology
    tiles_per_rank: int
    """Of the busiest encoder rank."""
    tiles_per_virtual: int
    """Of the largest virtual rank, encoded at once."""
    virtual_per_rank: int
    kept: int
    """Graphs of the busiest rank that are kept; its other virtual ranks are encoded twice."""
    encoder_bytes: int
    """At most, on an encoder rank; on one that aggregates too, with that."""
    aggregator_bytes: int
    """At most, on a dedicated aggregator, or what aggregating takes of a rank that encodes."""


def plan_memory(
    encoder: EncoderCosts,
    aggregator: AggregatorCosts,
    *,
    num_tiles: int,
    num_bytes: float,
    world_size: int,
    mode: Literal["auto", "dedicated", "shared"],
    num_virtual: int | None,
) -> MemoryPlan:
    """Fits a slide into ranks.

    Args:
        encoder: its costs.
        aggregator: its costs.
        num_tiles: of the slide.
        num_bytes: memory of each device.
        world_size: devices.
        mode: as `machine.aggregator`.
        num_virtual: virtual ranks; None for the fewest that fit, as many on each encoder rank.

    Raises:
        TrainerError: it does not fit, with what would; or ranks that make no group.
    """
    num_encoders = Topology.make(world_size, mode, num_virtual).num_encoders
    memory, name = f"--memory-gb {num_bytes / 1e9:g}", encoder.name
    aggregator_bytes = aggregator.held_bytes + aggregator.memory.at(num_tiles)
    if aggregator_bytes > SHARE * num_bytes:
        raise TrainerError(
            f"{memory}: {aggregator.name} takes {aggregator_bytes / 1e9:.2g} GB for {num_tiles:,} tiles, expected at "
            f"most {SHARE:.0%} of it; give another --aggregator, or fewer --tiles"
        )
    is_shared = Topology.make(world_size, mode, num_virtual).is_shared
    held = encoder.held_bytes + (aggregator_bytes if is_shared else 0)
    room, graph, peak = SHARE * num_bytes - held, encoder.memory.graph, encoder.memory.peak
    buffers = _BUFFERS * 3 * encoder.tile_px**2
    most = math.floor((room - peak.fixed) / (peak.per_tile + buffers))
    if most < 1:
        needed = (held + peak.fixed + peak.per_tile + buffers) / SHARE
        raise TrainerError(
            f"{memory}: not one tile of {encoder.tile_px} px fits beside {name}; expected at least {needed / 1e9:.2g}"
        )
    fewest = math.ceil(num_tiles / most)
    if num_virtual is not None and num_virtual < fewest:
        raise TrainerError(
            f"--virtual-ranks {num_virtual} makes virtual ranks of {math.ceil(num_tiles / num_virtual):,} tiles, "
            f"{num_bytes / 1e9:g} GB hold {most:,} of {name}; expected {fewest} or more"
        )
    topology = Topology.make(world_size, mode, num_virtual or num_encoders * math.ceil(fewest / num_encoders))
    shares = [topology.rows_of(rank, num_tiles) for rank in topology.encoders_of(0)]
    size = math.ceil(num_tiles / topology.num_virtual)
    per_rank = max(len(topology.virtual_of(rank)) for rank in topology.encoders_of(0))
    kept = min(per_rank, count_kept(encoder.memory, size, math.floor(room - buffers * size)))
    return MemoryPlan(
        topology=topology,
        tiles_per_rank=max(share.stop - share.start for share in shares),
        tiles_per_virtual=size,
        virtual_per_rank=per_rank,
        kept=kept,
        encoder_bytes=round(held + buffers * size + peak.at(size) + (kept - 1) * graph.at(size)),
        aggregator_bytes=aggregator_bytes,
    )
