"""How well `slidegrad plan` foretells a step: 1 to 4 encoder ranks and an aggregator, by gloo, on this machine.

Measured apart from the step, in turn with it: how fast a rank encodes while its neighbours do; how fast one does alone;
the aggregator alone. And once, between two ranks: gloo's latency and bandwidth, by a ping through the exchanges that
the step uses (`Comm.gather_rows`, `scatter_rows`, `sum_over_encoders`). From these `trainer.planning.simulation`
predicts the step, twice:

    neighbours    with the encode rate that ranks have beside each other
    cores         with the rate of one alone, and the number of cores: what a plan would have to go by

The step is `Engine.step`, tiles in memory, all graphs kept, one thread a rank. All ranks read one clock, so a phase
goes from the last rank that is ready for it to the last that is done. A ratio is predicted / measured, of medians;
`crowding` is how many times slower a rank encodes beside its neighbours than alone.
Two models: one whose step is encoding, and one of few tiles and many parameters, whose step is the sum of gradients.

    python -m tests.benchmarks.bench_scaling
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from tests.benchmarks.in_memory import draw_rows, make_slide, make_tiles
from trainer.aggregators import build_aggregator
from trainer.comm import Comm
from trainer.config import Aggregator, Encoder
from trainer.encoders.encoder import TileEncoder, build_encoder
from trainer.planning.rates import Rates
from trainer.planning.simulation import Phase, StepTime, Work, simulate
from trainer.ranks import run_ranks
from trainer.step import Engine
from trainer.topology import Topology

CPU = torch.device("cpu")
PHASES: tuple[Phase, ...] = ("encoding", "gather", "aggregation", "scatter", "sum")
_PING_ROWS, _PING_WIDTH = (1, 8_192), 512
"""Of the two messages that a line is drawn through: 2 kB and 17 MB."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and a slide; twelve virtual ranks are the same shards on 1, 2, 3 and 4 encoder ranks."""

    encoder: str
    tile_px: int
    num_tiles: int
    num_virtual: int = 12


CASES = (
    Case(encoder="resnet10t", tile_px=64, num_tiles=192),
    Case(encoder="resnet18", tile_px=32, num_tiles=24),
)


def main(num_rounds: int = 7, ranks: Sequence[int] = (1, 2, 3, 4), cases: Sequence[Case] = CASES) -> dict[str, Any]:
    """Measures rates and steps, and predicts the steps.

    Args:
        num_rounds: of each measurement, one more before them not counted.
        ranks: numbers of encoder ranks.
        cases: models.
    """
    num_cores = len(os.sched_getaffinity(0))
    link = run_ranks(ping, 2, num_rounds)[0]
    steps = [
        predict(run_ranks(measure, num_encoders + 1, case, num_rounds), case, num_encoders, num_cores, link)
        for case in cases
        for num_encoders in ranks
    ]
    return {
        "torch": torch.__version__,
        "num_cores": num_cores,
        "load": round(os.getloadavg()[0], 1),
        "num_rounds": num_rounds,
        "link": link,
        "cases": [asdict(case) for case in cases],
        "steps": steps,
    }


def predict(
    by_rank: Sequence[Sequence["Round"]], case: Case, num_encoders: int, num_cores: int, link: Mapping[str, float]
) -> dict[str, Any]:
    """Measured and predicted phases of a step.

    Args:
        by_rank: of each rank, the aggregator first, what `measure` returned.
        case: the model and slide.
        num_encoders: encoder ranks.
        num_cores: of this machine.
        link: what `ping` returned.
    """
    aggregator, *encoders = by_rank
    topology = Topology.make(num_encoders + 1, "dedicated", case.num_virtual)
    # The one that encodes alone is the first encoder rank.
    rows = topology.rows_of(1, case.num_tiles)
    alone = [statistics.median(one.alone_s[way] for one in encoders[0]) / (rows.stop - rows.start) for way in (0, 1)]
    beside = [[max(one.beside_s[way] for one in ranks) for ranks in zip(*encoders, strict=True)] for way in (0, 1)]
    slowest = [statistics.median(seconds) / (rows.stop - rows.start) for seconds in beside]
    rates = Rates(
        forward_s=alone[0],
        backward_s=alone[1],
        aggregate_s=statistics.median(one.alone_s[0] for one in aggregator) / case.num_tiles,
        num_cores=num_cores,
        **link,
    )
    with_neighbours = replace(rates, num_cores=None, forward_s=slowest[0], backward_s=slowest[1])
    encoder, _ = make_halves(case)
    work = Work(
        num_tiles=case.num_tiles,
        feature_bytes=4 * encoder.num_features,
        gradient_bytes=sum(parameter.nbytes for parameter in encoder.parameters()),
    )
    measured = phases_of([[one.stamps for one in rounds] for rounds in by_rank])
    return {
        "encoder": case.encoder,
        "num_encoders": num_encoders,
        "crowding": round(sum(slowest) / sum(alone), 3),
        "measured": measured,
        "neighbours": _compare(simulate(work, with_neighbours, topology, "ring"), measured),
        "cores": _compare(simulate(work, rates, topology, "ring"), measured),
    }


def ping(rank: int, world_size: int, num_rounds: int) -> dict[str, float]:
    """Latency of a message, s, and bandwidths, bytes/s, of gloo between two ranks: there and back, and of a sum."""
    comm = Comm(Topology.make(world_size, "dedicated", 1), rank, CPU)
    both = Comm(Topology.make(world_size, "shared", world_size), rank, CPU)
    messages, sums = [], []
    for num_rows in _PING_ROWS:
        mine_ND = torch.zeros(num_rows if comm.is_encoder else 0, _PING_WIDTH)
        ours = torch.zeros(num_rows, _PING_WIDTH)

        def there_and_back(mine_ND: torch.Tensor = mine_ND, num_rows: int = num_rows) -> None:
            comm.scatter_rows(comm.gather_rows(mine_ND, num_rows), mine_ND)

        def add_up(ours: torch.Tensor = ours) -> None:
            both.sum_over_encoders([ours])

        messages.append(statistics.median(_repeat(there_and_back, 4 * num_rounds, comm.barrier)))
        sums.append(statistics.median(_repeat(add_up, 4 * num_rounds, comm.barrier)))
    small, large = (rows * _PING_WIDTH * 4 for rows in _PING_ROWS)
    return {
        "latency_s": messages[0] / 2,
        "link_bytes_per_s": 2 * (large - small) / max(1e-9, messages[1] - messages[0]),
        # A ring of two sends each half of it twice.
        "sum_bytes_per_s": (large - small) / max(1e-9, sums[1] - sums[0]),
    }


class Round(NamedTuple):
    """What a rank measured in a round: alone in turn, then beside the others, then in a step."""

    alone_s: tuple[float, float]
    """Forward and backward, of the rank's tiles; of the aggregator both in the first."""
    beside_s: tuple[float, float]
    stamps: dict[str, tuple[float, float]]
    """When the step's exchanges, and the step itself, began and ended, by the machine's clock."""


def measure(rank: int, world_size: int, case: Case, num_rounds: int) -> list[Round]:
    """Rates and steps in turn, so that what else the machine does slows both."""
    comm = _Stamped(Topology.make(world_size, "dedicated", case.num_virtual), rank)
    encoder, aggregator = make_halves(case)
    engine = Engine(
        comm,
        encoder if comm.is_encoder else None,
        aggregator if comm.is_aggregator else None,
        num_features=encoder.num_features,
        seed=0,
    )
    engine.set_training(True)
    slide = make_slide(make_tiles(case.num_tiles, case.tile_px), case.num_virtual)
    shards = [shard for shard in slide.shards if shard.virtual_rank in comm.topology.virtual_of(rank)]
    slide = slide._replace(shards=shards)

    def encode() -> tuple[float, float]:
        begin = time.perf_counter()
        features = [encoder(shard.tiles_NHWC) for shard in shards]
        middle = time.perf_counter()
        for features_ND in reversed(features):
            features_ND.backward(torch.ones_like(features_ND))
        return middle - begin, time.perf_counter() - middle

    def aggregate() -> tuple[float, float]:
        begin = time.perf_counter()
        features_KD = torch.zeros(case.num_tiles, encoder.num_features, requires_grad=True)
        outputs_C, _ = aggregator(features_KD, torch.zeros(case.num_tiles, 2, dtype=torch.int32))
        outputs_C.sum().backward()
        return time.perf_counter() - begin, 0.0

    rounds = []
    for _ in range(num_rounds + 1):
        alone_s = beside_s = (0.0, 0.0)
        for whose in (0, 1):
            _clear(encoder, aggregator)
            comm.barrier()
            if rank == whose:
                alone_s = encode() if comm.is_encoder else aggregate()
        _clear(encoder, aggregator)
        comm.barrier()
        if comm.is_encoder:
            beside_s = encode()
        _clear(encoder, aggregator)
        comm.barrier()
        comm.stamps = {}
        begin = time.perf_counter()
        engine.step([slide])
        rounds.append(Round(alone_s, beside_s, {**comm.stamps, "step": (begin, time.perf_counter())}))
    return rounds[1:]


def _clear(*halves: torch.nn.Module) -> None:
    for half in halves:
        half.zero_grad(set_to_none=True)


class _Stamped(Comm):
    """Notes when each exchange of a step begins and ends."""

    def __init__(self, topology: Topology, rank: int) -> None:
        super().__init__(topology, rank, CPU)
        self.stamps: dict[str, tuple[float, float]] = {}

    def _stamp(self, name: str, exchange: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        found = exchange()
        # Of two gathers, features and places, the first begins and the last ends.
        self.stamps[name] = (self.stamps.get(name, (begin,))[0], time.perf_counter())
        return found

    def agree(self, error: str, *numbers: float) -> Any:
        return self._stamp("agree", lambda: super(_Stamped, self).agree(error, *numbers))

    def gather_rows(self, mine_ND: torch.Tensor, num_rows: int) -> Any:
        return self._stamp("gather", lambda: super(_Stamped, self).gather_rows(mine_ND, num_rows))

    def scatter_rows(self, all_KD: torch.Tensor | None, mine_ND: torch.Tensor) -> Any:
        return self._stamp("scatter", lambda: super(_Stamped, self).scatter_rows(all_KD, mine_ND))

    def sum_over_encoders(self, tensors: Any) -> None:
        tensors = list(tensors)
        self._stamp("sum", lambda: super(_Stamped, self).sum_over_encoders(tensors))


def phases_of(by_rank: Sequence[Sequence[Mapping[str, tuple[float, float]]]]) -> dict[str, Any]:
    """Median seconds of each phase and of the step, and the step's spread, (max - min) / median.

    Args:
        by_rank: of each rank, the aggregator first, the stamps of its rounds.
    """
    rounds = [_phases(stamps[0], stamps[1:]) for stamps in zip(*by_rank, strict=True)]
    medians = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    steps = [one["slide"] for one in rounds]
    return {**medians, "spread": (max(steps) - min(steps)) / medians["slide"]}


def _phases(
    aggregator: Mapping[str, tuple[float, float]], encoders: Sequence[Mapping[str, tuple[float, float]]]
) -> dict[str, float]:
    everybody = (aggregator, *encoders)
    ready, gathered = max(e["agree"][0] for e in encoders), aggregator["gather"][1]
    scattering, scattered = aggregator["scatter"][0], max(e["scatter"][1] for e in encoders)
    encoded = max(e["sum"][0] for e in encoders)
    begin = max(stamps["step"][0] for stamps in everybody)
    return {
        "encoding": ready - begin + encoded - scattered,
        "gather": gathered - ready,
        "aggregation": scattering - gathered,
        "scatter": scattered - scattering,
        "sum": max(e["sum"][1] for e in encoders) - encoded,
        "slide": max(stamps["step"][1] for stamps in everybody) - begin,
    }


def _compare(step: StepTime, measured: Mapping[str, float]) -> dict[str, float]:
    """Predicted seconds, and what they are to the measured ones."""
    return {**{phase: step.seconds[phase] for phase in PHASES}, "slide": step.slide_s} | {
        "ratio": round(step.slide_s / measured["slide"], 3)
    }


def make_halves(case: Case) -> tuple[TileEncoder, torch.nn.Module]:
    """Encoder and aggregator, alike on all ranks."""
    torch.manual_seed(0)
    encoder = build_encoder(Encoder(name=case.encoder), case.tile_px, initial=False)
    return encoder, build_aggregator(Aggregator(), encoder.num_features, 2)


def _repeat(work: Callable[[], object], num_rounds: int, before_each: Callable[[], None]) -> list[float]:
    """Seconds by the clock; one round before them does not count."""
    seconds = []
    for _ in range(num_rounds + 1):
        before_each()
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def draw(result: Mapping[str, Any]) -> str:
    """The report's tables: milliseconds of each phase, measured and predicted, and the ratio of the whole step."""
    rows = []
    for step in result["steps"]:
        about = {"encoder": step["encoder"], "encoder ranks": step["num_encoders"], "crowding": step["crowding"]}
        for way in ("measured", "neighbours", "cores"):
            found = step[way]
            times = {name: f"{1e3 * found[name]:.1f}" for name in (*PHASES, "slide")}
            spread = f"{found['spread']:.2f}" if way == "measured" else ""
            rows.append({**about, "ms": way, **times, "spread": spread, "ratio": found.get("ratio", "")})
    columns = ("encoder", "encoder ranks", "crowding", "ms", *PHASES, "slide", "spread", "ratio")
    return draw_rows(columns, rows)


if __name__ == "__main__":
    found = main()
    print(draw(found), file=sys.stderr)
    print(json.dumps(found))
