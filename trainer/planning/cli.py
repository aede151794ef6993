"""`slidegrad plan`: what a job takes of memory and time, before it is started, and where more ranks stop helping."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from trainer.config import AggregatorName
from trainer.errors import TrainerError
from trainer.planning.rates import DEVICES, RateInputs

if TYPE_CHECKING:
    import torch

    from trainer.config import RunConfig
    from trainer.planning.capacity import Capacity
    from trainer.planning.costs import EncoderCosts, Precision
    from trainer.planning.forecast import Forecast, Job
    from trainer.planning.rates import Rates

PAPER_ENCODERS = "resnet18,resnet50,vit_small_patch16_224,vit_base_patch16_224"
"""Those of the paper's Fig. 1a, b."""
_MOST_TILES = 2**20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Tell what a job would take: ranks, virtual ranks, memory, seconds of a slide by phase, hours of an epoch, and how
    that scales from 1 to 1,024 encoder ranks.

    Bytes and operations are counted from the model itself, on any machine; rates come from data sheets, from
    --rates.…, or with --measure from the device at hand.
    """

    encoder: Annotated[str, tyro.conf.arg(metavar="NAME,…")] = PAPER_ENCODERS
    """Encoders, as in a recipe. The first is planned; how many tiles fit one device is told of all."""
    tiles: int = 45_056
    """Tiles of a slide."""
    gpus: int = 12
    """Devices, one for each rank, the aggregator's included."""
    device: Literal["h100", "h200", "a100", "rtx3090"] | None = None
    """Which, by its data sheet; h100 if not given. With --measure it is the one at hand."""
    memory_gb: float | None = None
    """Memory of a device, GB (1e9 bytes); by default all that it has. With --measure a cap on what is tried."""
    tile_px: int = 224
    """Tile side, px."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: the encoder under autocast."""
    aggregator: AggregatorName = "gma"
    """Aggregator."""
    aggregator_rank: Literal["auto", "dedicated", "shared"] = "auto"
    """As machine.aggregator: shared lets the first rank encode too; auto does with one device."""
    virtual_ranks: int | None = None
    """Shards of a slide; by default the fewest that fit, the same number on each encoder rank."""
    slides: int = 13_050
    """Slides that an epoch trains on."""
    measure: bool = False
    """Measure encoding, aggregation and the optimiser here, and search for the largest step that fits this device, for
    each encoder in float32 and bf16."""
    plot: Path | None = None
    """A PNG to draw both into."""
    rates: RateInputs = field(default_factory=RateInputs)

    def run(self) -> tuple[dict[str, Any], int]:
        from rich.console import Console

        from tiler.doctor.words import tell
        from trainer.planning.costs import count_aggregator, count_encoder
        from trainer.planning.forecast import Job, forecast, scale
        from trainer.planning.tables import (
            build_capacities,
            build_scaling,
            describe_costs,
            describe_plan,
            describe_scaling,
        )

        names = self._check()
        here = _device_at_hand() if self.measure else None
        num_bytes, title = self._memory(here)
        kind: Literal["cuda", "cpu"] = "cpu" if here is not None and here.type == "cpu" else "cuda"
        config = self._config(names[0])
        costs = {
            (name, precision): count_encoder(self._config(name).encoder, self.tile_px, precision, kind)
            for name in names
            for precision in _PRECISIONS
        }
        encoder = costs[names[0], self.precision]
        job = Job(
            encoder=encoder,
            aggregator=count_aggregator(config.aggregator, encoder.num_features),
            num_tiles=self.tiles,
            device_bytes=num_bytes,
            num_virtual=self.virtual_ranks,
        )
        about = f"{names[0]}, {self.precision}, {self.tile_px} px, {self.aggregator}, on {self.gpus:,} x {title}"
        tell({"job": f"{self.tiles:,} tiles a slide, {about}", "encoder": describe_costs(encoder)})
        rates = self._rates(job, config, here)
        found = forecast(job, rates, self.gpus, self.aggregator_rank)
        tell(describe_plan(found, job, rates, self.slides) | {"rates": self._sources(title)})

        console = Console(file=sys.stderr, width=146)
        scaling = scale(job, rates, lambda note: tell({"note": note}))
        if scaling:
            console.print("\none slide on more and more ranks, an aggregator beside them", highlight=False)
            console.print(build_scaling(scaling))
            console.print(describe_scaling(scaling), highlight=False)
        console.print(f"\nthe largest step in one graph, tiles, in {num_bytes / 1e9:g} GB", highlight=False)
        capacities = self._capacities(costs, num_bytes, here)
        console.print(build_capacities(capacities))
        result = self._result(title, encoder, rates, found, scaling, capacities)
        if self.plot is not None:
            self._draw(about, scaling or [found], capacities)
            result["plot"] = str(self.plot)
        return result, 0

    def _check(self) -> list[str]:
        """The encoders' names.

        Raises:
            TrainerError: flags that make no sense, or would have no effect.
        """
        for flag, number in (
            ("--tiles", self.tiles),
            ("--gpus", self.gpus),
            ("--tile-px", self.tile_px),
            ("--slides", self.slides),
            ("--virtual-ranks", self.virtual_ranks),
        ):
            if number is not None and number < 1:
                raise TrainerError(f"{flag} {number}: expected at least 1")
        if self.memory_gb is not None and not 0 < self.memory_gb < float("inf"):
            raise TrainerError(f"--memory-gb {self.memory_gb:g}: expected a number above 0")
        names = [name.strip() for name in self.encoder.split(",")]
        if not all(names) or len(set(names)) < len(names):
            raise TrainerError(f"--encoder {self.encoder}: expected names of encoders, each once, separated by commas")
        if self.gpus == 1 and self.aggregator_rank == "dedicated":
            raise TrainerError("--aggregator-rank dedicated: expected --gpus 2 or more, or nobody is left to encode")
        if self.measure and self.device is not None:
            raise TrainerError(f"--device {self.device} would have no effect: --measure takes the device at hand")
        self._check_rates()
        if self.plot is not None and not (self.plot.suffix == ".png" and self.plot.parent.is_dir()):
            raise TrainerError(f"--plot {self.plot}: expected a .png in a folder that exists; make it, or give another")
        return names

    def _check_rates(self) -> None:
        given, usual = asdict(self.rates), asdict(RateInputs())
        for name, value in given.items():
            flag = f"--rates.{name.replace('_', '-')} {value:g}"
            is_free = name in ("operator_us", "latency_us")
            if not (0 < value < float("inf") or (is_free and value == 0)):
                raise TrainerError(f"{flag}: expected a number above 0{', or 0' if is_free else ''}")
            if name == "share" and value > 1:
                raise TrainerError(f"{flag}: expected at most 1, all of what the data sheet says")
            if self.measure and name in ("share", "operator_us") and value != usual[name]:
                raise TrainerError(f"{flag} would have no effect: --measure measures that")

    def _config(self, encoder: str) -> "RunConfig":
        from trainer.config import Aggregator, Encoder, Optim, RunConfig

        return RunConfig(
            encoder=Encoder(name=encoder),
            aggregator=Aggregator(name=self.aggregator),
            optim=Optim(precision=self.precision),
        )

    def _memory(self, here: "torch.device | None") -> tuple[float, str]:
        """Bytes of a device, and its name.

        Raises:
            TrainerError: more than the GPU at hand has.
        """
        if here is None:
            device = DEVICES[self.device or "h100"]
            return 1e9 * (self.memory_gb or device.memory_gb), device.title
        if here.type == "cpu":
            from tiler.pool import share_memory

            return 1e9 * self.memory_gb if self.memory_gb else share_memory(1), "CPU"
        import torch

        properties = torch.cuda.get_device_properties(here)
        if self.memory_gb and 1e9 * self.memory_gb > properties.total_memory:
            has = f"{properties.total_memory / 1e9:.1f}, which the {properties.name} at hand has"
            raise TrainerError(f"--memory-gb {self.memory_gb:g}: expected at most {has}")
        return 1e9 * self.memory_gb if self.memory_gb else properties.total_memory, properties.name

    def _rates(self, job: "Job", config: "RunConfig", here: "torch.device | None") -> "Rates":
        from trainer.planning.memory_plan import plan_memory
        from trainer.planning.rates import predict_rates

        if here is None:
            return predict_rates(job.encoder, job.aggregator, DEVICES[self.device or "h100"], self.rates)
        from trainer.planning.measuring import measure_rates

        memory = plan_memory(
            job.encoder,
            job.aggregator,
            num_tiles=self.tiles,
            num_bytes=job.device_bytes,
            world_size=self.gpus,
            mode=self.aggregator_rank,
            num_virtual=self.virtual_ranks,
        )
        at_once = memory.tiles_per_virtual
        return measure_rates(
            config, self.tile_px, num_tiles=self.tiles, at_once=at_once, device=here, inputs=self.rates
        )

    def _sources(self, title: str) -> str:
        """Where the rates come from."""
        given = self.rates
        others = (
            f"network {given.link_gb_per_s:g} GB/s a rank and {given.latency_us:g} us, storage "
            f"{given.storage_gb_per_s:g} GB/s for all, {given.core_tiles_per_s:,.0f} tiles/s read by each of "
            f"{given.cores} cores a rank; give yours as --rates.…"
        )
        own = "measured here" if self.measure else f"{given.share:.0%} of the data sheet of {title}, not measured"
        return f"computing: {own}; {others}"

    def _capacities(
        self,
        costs: "dict[tuple[str, Precision], EncoderCosts]",
        num_bytes: float,
        here: "torch.device | None",
    ) -> "list[Capacity]":
        from tiler.progress import progress_bar
        from trainer.planning.capacity import Capacity, measure_capacity, predict_capacity

        found = []
        with progress_bar() as bar:
            task = bar.add_task("trying how many tiles fit", total=len(costs), visible=here is not None)
            for (name, precision), counted in costs.items():
                measured, trials = None, 0
                if here is not None:
                    encoder = self._config(name).encoder
                    measured, trials = measure_capacity(encoder, self.tile_px, precision, here, num_bytes, _MOST_TILES)
                found.append(
                    Capacity(
                        encoder=name,
                        precision=precision,
                        predicted=predict_capacity(counted, num_bytes),
                        measured=measured,
                        trials=trials,
                    )
                )
                bar.advance(task)
        return found

    def _draw(self, title: str, scaling: "list[Forecast]", capacities: "list[Capacity]") -> None:
        from manifests.files import atomic_path
        from trainer.planning.plot import plot_plan

        assert self.plot is not None, "asked before"
        with atomic_path(self.plot) as partial:
            partial.write_bytes(plot_plan(f"{self.tiles:,} tiles a slide, {title}", scaling, capacities))

    def _result(
        self,
        title: str,
        encoder: "EncoderCosts",
        rates: "Rates",
        found: "Forecast",
        scaling: "list[Forecast]",
        capacities: "list[Capacity]",
    ) -> dict[str, Any]:
        from trainer.planning.forecast import end_of_scaling

        end = end_of_scaling(scaling)
        return {
            "encoder": encoder.name,
            "precision": self.precision,
            "tile_px": self.tile_px,
            "num_tiles": self.tiles,
            "gpus": self.gpus,
            "device": title,
            "is_measured": self.measure,
            "costs": {
                "num_parameters": encoder.num_parameters,
                "held_bytes": encoder.held_bytes,
                "graph_bytes_per_tile": round(encoder.memory.graph.per_tile),
                "peak_bytes_per_tile": round(encoder.memory.peak.per_tile),
                "forward_flop_per_tile": round(encoder.forward_flop),
                "backward_flop_per_tile": round(encoder.backward_flop),
            },
            "rates": asdict(rates),
            "plan": found.to_dict(),
            "epoch_h": round(found.epoch_h(self.slides), 4),
            "num_slides": self.slides,
            "limit": found.step.limit,
            "scaling": [one.to_dict() for one in scaling],
            "scaling_ends_at": end.step.num_encoders if end else None,
            "capacity": [{**asdict(one), "paper_80_gb": one.paper} for one in capacities],
        }


_PRECISIONS: "tuple[Precision, ...]" = ("float32", "bf16")


def _device_at_hand() -> "torch.device":
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
