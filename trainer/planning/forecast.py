"""The forecast of a job: how it fits, what a slide's step takes, and the same for more and more ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from trainer.errors import TrainerError
from trainer.planning.costs import AggregatorCosts, EncoderCosts
from trainer.planning.memory_plan import MemoryPlan, plan_memory
from trainer.planning.rates import Rates
from trainer.planning.simulation import StepTime, Work, simulate

SCALES = tuple(2**exponent for exponent in range(11))
"""Encoder ranks from 1 to 1,024, each number of them beside an aggregator."""
GOOD = 0.5
"""Scaling has ended where encoder ranks encode less than this share of their time."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is planned: a slide of so many tiles on devices of so much memory."""

    encoder: EncoderCosts
    aggregator: AggregatorCosts
    num_tiles: int
    device_bytes: float
    num_virtual: int | None = None
    """None: the fewest that fit."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A job on so many devices."""

    memory: MemoryPlan
    step: StepTime

    def epoch_h(self, num_slides: int) -> float:
        """Hours to train on so many slides; validation comes on top."""
        return self.step.slide_s * num_slides / 3_600

    def to_dict(self) -> dict[str, Any]:
        """As the result has it: seconds to the microsecond, shares to the thousandth."""
        topology, memory, step = self.memory.topology, self.memory, self.step
        return {
            "num_encoders": topology.num_encoders,
            "has_dedicated_aggregator": not topology.is_shared,
            "virtual_ranks": topology.num_virtual,
            "tiles_per_rank": memory.tiles_per_rank,
            "tiles_per_virtual_rank": memory.tiles_per_virtual,
            "virtual_ranks_per_rank": memory.virtual_per_rank,
            "graphs_kept_per_rank": memory.kept,
            "encoder_gb": round(memory.encoder_bytes / 1e9, 3),
            "aggregator_gb": round(memory.aggregator_bytes / 1e9, 3),
            "slide_s": round(step.slide_s, 6),
            "seconds": {phase: round(seconds, 6) for phase, seconds in step.seconds.items()},
            "limit": step.limit,
            "efficiency": round(step.efficiency, 3),
            "aggregator_idle": round(step.aggregator_idle, 3),
        }


def forecast(job: Job, rates: Rates, world_size: int, mode: Literal["auto", "dedicated", "shared"]) -> Forecast:
    """A job on `world_size` devices.

    Raises:
        TrainerError: it does not fit.
    """
    memory = plan_memory(
        job.encoder,
        job.aggregator,
        num_tiles=job.num_tiles,
        num_bytes=job.device_bytes,
        world_size=world_size,
        mode=mode,
        num_virtual=job.num_virtual,
    )
    work = Work(
        num_tiles=job.num_tiles,
        feature_bytes=4 * job.encoder.num_features,
        gradient_bytes=job.encoder.parameter_bytes,
        kept=memory.kept,
    )
    return Forecast(memory=memory, step=simulate(work, rates, memory.topology))


def scale(job: Job, rates: Rates, note: Callable[[str], None] = lambda _: None) -> list[Forecast]:
    """The job on 1 to 1,024 encoder ranks, where it fits, up to as many as the slide has tiles."""
    found = []
    for num_encoders in SCALES:
        if num_encoders > job.num_tiles:
            break
        try:
            found.append(forecast(job, rates, num_encoders + 1, "dedicated"))
        except TrainerError as error:
            note(f"{num_encoders} encoder ranks: {error}")
    return found


def end_of_scaling(forecasts: list[Forecast]) -> Forecast | None:
    """The first on which encoder ranks encode less than half of their time; None if all do more."""
    return next((one for one in forecasts if one.step.efficiency < GOOD), None)
