"""A plan for people: lines and tables."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from tiler.doctor.words import count, duration
from trainer.planning.capacity import Capacity
from trainer.planning.costs import EncoderCosts
from trainer.planning.forecast import GOOD, Forecast, Job, end_of_scaling
from trainer.planning.rates import Rates
from trainer.planning.simulation import Phase

PHASES: tuple[Phase, ...] = ("reading", "encoding", "gather", "aggregation", "scatter", "sum", "update")


def describe_costs(costs: EncoderCosts) -> str:
    """What a tile and the weights take."""
    return (
        f"{costs.num_parameters / 1e6:.1f} M parameters; a tile takes {costs.memory.graph.per_tile / 1e6:.1f} MB for "
        f"its graph, {costs.memory.peak.per_tile / 1e6:.1f} MB at most; {costs.forward_flop / 1e9:.1f} GFLOP forward, "
        f"{costs.backward_flop / 1e9:.1f} backward"
    )


def describe_plan(found: Forecast, job: Job, rates: Rates, num_slides: int) -> dict[str, str]:
    """The plan as lines."""
    memory, step, topology = found.memory, found.step, found.memory.topology
    aggregates = "one of which aggregates too" if topology.is_shared else "and one that aggregates"
    again = memory.virtual_per_rank - memory.kept
    twice = f"; {again:,} of a rank's {memory.virtual_per_rank:,} are encoded twice" if again else ""
    on_apart = "of it for aggregating" if topology.is_shared else "on the aggregator"
    encoders = count(topology.num_encoders, "encoder rank")
    lines = {
        "ranks": f"{encoders}, {aggregates}; {memory.tiles_per_rank:,} tiles a rank",
        "virtual ranks": f"{topology.num_virtual:,} of {memory.tiles_per_virtual:,} tiles{twice}",
        "memory": f"{memory.encoder_bytes / 1e9:.3g} GB on an encoder rank, {memory.aggregator_bytes / 1e9:.2g} GB "
        f"{on_apart}; {job.device_bytes / 1e9:g} GB there are",
        "a tile": f"{1 / (rates.forward_s + rates.backward_s):,.0f} tiles/s a rank, forward and backward",
        "a slide": f"{_seconds(step.slide_s)}; the limit is {step.limit}, {step.efficiency:.0%} of the encoder ranks' "
        "time is spent on encoding each tile once",
        "an epoch": f"about {duration(3_600 * found.epoch_h(num_slides))} for {count(num_slides, 'slide')}, validation "
        "not counted",
    }
    if not topology.is_shared:
        lines["aggregator"] = (
            f"idle {step.aggregator_idle:.0%} of the time; --aggregator-rank shared lets it encode too"
        )
    return lines


def build_scaling(forecasts: Sequence[Forecast]) -> Table:
    """Seconds of a slide by phase, a row for each number of ranks."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("encoder ranks", "virtual", "kept", *PHASES, "slide", "efficiency", "limit"):
        table.add_column(name, justify="left" if name == "limit" else "right", no_wrap=True)
    for one in forecasts:
        step, memory = one.step, one.memory
        ranks = (f"{step.num_encoders:,}", f"{memory.topology.num_virtual:,}")
        times = [_seconds(step.seconds[phase]) for phase in PHASES]
        kept = f"{memory.kept} of {memory.virtual_per_rank}"
        table.add_row(*ranks, kept, *times, _seconds(step.slide_s), f"{step.efficiency:.0%}", step.limit)
    return table


def describe_scaling(forecasts: list[Forecast]) -> str:
    """Where it ends."""
    end = end_of_scaling(forecasts)
    if end is None:
        return f"encoder ranks encode {GOOD:.0%} of their time or more, on up to {forecasts[-1].step.num_encoders:,}"
    where = f"from {count(end.step.num_encoders, 'encoder rank')} on they encode less than {GOOD:.0%} of their time"
    return f"{where}; the limit there is {end.step.limit}"


def build_capacities(found: Sequence[Capacity]) -> Table:
    """The largest step in one graph, a row for each encoder and precision."""
    has_measured = any(one.measured is not None for one in found)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    columns = ("encoder", "precision", "predicted", *(("measured", "predicted / measured") if has_measured else ()))
    for name in (*columns, "paper, 80 GB"):
        table.add_column(name, justify="left" if name in ("encoder", "precision") else "right", no_wrap=True)
    for one in found:
        cells = [one.encoder, one.precision, f"{one.predicted:,}"]
        if has_measured:
            ratio = f"{one.predicted / one.measured:.3f}" if one.measured else "-"
            cells += ["-" if one.measured is None else f"{one.measured:,}", ratio]
        table.add_row(*cells, f"{one.paper:,}" if one.paper else "-")
    return table


def _seconds(seconds: float) -> str:
    """In the unit that suits it."""
    if seconds >= 1 or seconds == 0:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
