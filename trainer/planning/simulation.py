"""How long a step takes on so many ranks: a pure function of the work, the rates and the ranks.

A step's phases come one after another, for every rank waits for the slowest before the next (trainer/step.py): while
encoder ranks encode, a dedicated aggregator idles, and the other way round. Reading goes on beside them, a slide ahead.

    encoding      the busiest rank's virtual ranks, forward and backward, some forward twice
    gather        features and places through the aggregator's one link, a latency for each message; before it the
                  agreement, an all-reduce of a few bytes
    aggregation   on one rank, forward and backward
    scatter       the features' gradients, back through the same link
    sum           all-reduce of the encoder's gradients: by ring 2 (N-1)/N G / B + 2 (N-1) L, by tree
                  2 G / B + 2 ceil(log2 N) L, whichever is quicker (Thakur, Rabenseifner, Gropp, 2005; NCCL's trees)
    update        the optimiser

    a slide       max(reading, all of them together)

G bytes of gradients, B bytes per second, L seconds of latency, N encoder ranks. Where ranks share a CPU's cores, what
all of them do at once is slower by the ranks that a core has, and decoding takes its time from encoding. Not counted:
slides of uneven size, storage that is slow for some, networks that are shared or of two speeds.
"""

import math
from dataclasses import dataclass
from typing import Literal

from trainer.planning.rates import Rates
from trainer.topology import Topology

Phase = Literal["reading", "encoding", "gather", "aggregation", "scatter", "sum", "update"]
PLACE_BYTES = 8
"""A tile's place on the slide, as ranks send it."""
Reduction = Literal["ring", "tree", "auto"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """One slide's step."""

    num_tiles: int
    feature_bytes: int
    """Of a tile."""
    gradient_bytes: int
    """Of the encoder."""
    kept: int | None = None
    """Virtual ranks of a rank whose graph is kept; all if None."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One slide's step; `seconds` by phase, reading beside the others."""

    num_encoders: int
    seconds: dict[Phase, float]
    slide_s: float
    limit: Phase
    """What takes longest: reading if the others wait for it, else the longest of them."""
    efficiency: float
    """Share of the encoder ranks' time in which they encode, each tile once, at their full speed."""
    aggregator_idle: float
    """Share of the time in which a dedicated aggregator has nothing to do; 0 if it encodes too."""


def simulate(work: Work, rates: Rates, topology: Topology, reduction: Reduction = "auto") -> StepTime:
    """One step of one group of ranks.

    Args:
        work: the slide.
        rates: how fast things go.
        topology: who encodes what.
        reduction: how gradients are summed; auto is the quicker way.
    """
    num_encoders, encoders = topology.num_encoders, topology.encoders_of(0)
    crowd = max(1.0, num_encoders / rates.num_cores) if rates.num_cores else 1.0
    seconds: dict[Phase, float] = {
        "reading": 0.0,
        "encoding": crowd * max(_encoding_s(work, rates, topology, rank) for rank in encoders),
        "gather": 0.0,
        "aggregation": rates.aggregate_pass_s + rates.aggregate_s * work.num_tiles,
        "scatter": 0.0,
        "sum": crowd * all_reduce_s(work.gradient_bytes, num_encoders, rates, reduction),
        "update": rates.update_s,
    }
    rows = {rank: topology.rows_of(rank, work.num_tiles) for rank in encoders}
    others = [r.stop - r.start for rank, r in rows.items() if rank != 0]
    num_senders, num_sent = sum(n > 0 for n in others), sum(others)
    agree_s = 2 * math.ceil(math.log2(topology.world_size)) * rates.latency_s
    gathered_bytes = num_sent * (work.feature_bytes + PLACE_BYTES)
    seconds["gather"] = agree_s + 2 * num_senders * rates.latency_s + gathered_bytes / rates.link_bytes_per_s
    scattered_bytes = num_sent * work.feature_bytes
    seconds["scatter"] = num_senders * rates.latency_s + scattered_bytes / rates.link_bytes_per_s

    most = max(r.stop - r.start for r in rows.values())
    decode_s = crowd * most * rates.read_s
    seconds["reading"] = max(decode_s, work.num_tiles * rates.storage_s)
    computing: dict[Phase, float] = {phase: s for phase, s in seconds.items() if phase != "reading"}
    computing_s = sum(computing.values())
    # On a CPU the cores decode, or encode.
    slide_s = max(seconds["reading"], computing_s + (decode_s if rates.num_cores else 0.0))
    limit: Phase = max(computing, key=lambda phase: computing[phase])
    apart_s = seconds["gather"] + seconds["aggregation"] + seconds["scatter"]
    return StepTime(
        num_encoders=num_encoders,
        seconds=seconds,
        slide_s=slide_s,
        limit="reading" if seconds["reading"] > computing_s else limit,
        efficiency=work.num_tiles * (rates.forward_s + rates.backward_s) / (num_encoders * slide_s),
        aggregator_idle=0.0 if topology.is_shared else 1 - apart_s / slide_s,
    )


def all_reduce_s(num_bytes: float, num_ranks: int, rates: Rates, reduction: Reduction = "auto") -> float:
    """Seconds until every rank has the sum of `num_bytes`."""
    if num_ranks == 1:
        return 0.0
    once_s = 2 * num_bytes / (rates.sum_bytes_per_s or rates.link_bytes_per_s)
    ring_s = once_s * (num_ranks - 1) / num_ranks + 2 * (num_ranks - 1) * rates.latency_s
    tree_s = once_s + 2 * math.ceil(math.log2(num_ranks)) * rates.latency_s
    ways: dict[Reduction, float] = {"ring": ring_s, "tree": tree_s, "auto": min(ring_s, tree_s)}
    return ways[reduction]


def _encoding_s(work: Work, rates: Rates, topology: Topology, rank: int) -> float:
    """A rank's time: its tiles forward and backward, those without a graph forward once more."""
    mine = topology.virtual_of(rank)
    rows = topology.rows_of(rank, work.num_tiles)
    num_tiles: int = rows.stop - rows.start
    num_passes = len(mine)
    again = 0 if work.kept is None else max(0, num_passes - work.kept)
    share = again / num_passes if num_passes else 0.0
    forward_s = rates.forward_s * num_tiles * (1 + share) + rates.forward_pass_s * (num_passes + again)
    return forward_s + rates.backward_s * num_tiles + rates.backward_pass_s * num_passes
