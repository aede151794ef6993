"""`slidegrad sweep`: a recipe over tiles per slide, precision, processes, splits and methods; one table, one page."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from trainer.config import RunConfig
from trainer.errors import TrainerError
from trainer.recipes import RECIPES, get_recipe
from trainer.sweep.grid import (
    END_TO_END,
    FROZEN,
    Grid,
    K,
    Point,
    find_splits,
    parse_counts,
    parse_ks,
    parse_part,
    words,
)

if TYPE_CHECKING:
    from tiler.shards import Shard
    from trainer.sweep.plan import Plan
    from trainer.sweep.tasks import Tasks

_AXES = {
    "--tiles.tiles": "--k all, or numbers",
    "--tiles.k": "--k",
    "--tiles.k-per-rank": "--k",
    "--optim.precision": "--precision",
    "--machine.features": "--features",
}
"""Settings that a sweep gives itself, and the flag for them."""
_MOST_LISTED = 200


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Train a recipe over a product of tiles per slide, precisions, processes, splits and methods, each run in a folder
    of its own; then put all in one table, one page and the paper's figures. The same command again goes on, with more
    values on an axis extends it. `slidegrad sweep --collect SWEEP` only puts together what is there."""

    manifests: Path
    """The manifests folder, from `slidegrad tile`."""
    labels: Path
    """CSV as for `slidegrad train`."""
    out: Path
    """The sweep's folder: runs/, logs/, sweep.yaml, results.parquet, table1.md, plots/, report.html."""
    splits: Path | None = None
    """Folder of split_000.csv and so on, from `slidegrad splits`; without it one split, as `train` makes it."""
    num_splits: int | None = None
    """Of these splits the first so many."""
    k: Annotated[str, tyro.conf.arg(metavar="K,…")] = ""
    """Tiles of a slide in a training step, as 50,100,350; "all" for every tile; the recipe's if not given."""
    precision: Annotated[str, tyro.conf.arg(metavar="NAME,…")] = ""
    """As float32,bf16; the recipe's if not given."""
    nproc: Annotated[str, tyro.conf.arg(metavar="N,…")] = "1"
    """Processes of a run, the aggregator included, as 1,3."""
    method: Annotated[str, tyro.conf.arg(metavar="NAME,…")] = END_TO_END
    """Methods, as end_to_end,frozen_gma."""
    reference: str | None = None
    """The method that others are compared with; end_to_end if it is there."""
    features: Path | None = None
    """Where features of frozen encoders are kept, for all runs; SWEEP/features if not given."""
    jobs: int = 1
    """Runs at once on this machine, which share its cores and GPUs evenly."""
    part: Annotated[str | None, tyro.conf.arg(metavar="I/N|auto")] = None
    """Do one share of the runs alone, I from 1 to N; auto: as the job array (SLURM, LSF) says."""
    dry_run: bool = False
    """List the runs and how far each is, and do nothing."""
    own_words: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """The recipe's settings as they were typed, for the runs' command lines."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> "Sweep | Collect":
        """Reads a command line: the recipe (its first word) gives the settings' defaults, as in `slidegrad train`."""
        if any(word == "--collect" or word.startswith("--collect=") for word in arguments):
            return tyro.cli(Collect, args=list(arguments), prog="slidegrad sweep")
        recipe, rest = (arguments[0], arguments[1:]) if arguments and arguments[0][0] != "-" else ("", arguments)
        if not recipe and not {"-h", "--help"} & set(arguments):
            known = ", ".join(RECIPES)
            raise TrainerError(f"sweep needs a recipe as its first word, one of {known}; or --collect SWEEP")
        if "+" in recipe:
            raise TrainerError(f"sweep {recipe}: give the recipe alone, and methods as --method NAME,…")
        own_words = cls._settings_of(rest)
        default = cls(
            manifests=tyro.MISSING,
            labels=tyro.MISSING,
            out=tyro.MISSING,
            config=get_recipe(recipe) if recipe else RunConfig(),
        )
        parsed = tyro.cli(cls, args=list(rest), prog=f"slidegrad sweep {recipe or 'RECIPE'}", default=default)
        return dataclasses.replace(parsed, own_words=own_words)

    @classmethod
    def _settings_of(cls, arguments: Sequence[str]) -> tuple[str, ...]:
        """The words that are the recipe's settings, not the sweep's flags.

        Raises:
            TrainerError: a setting that is an axis.
        """
        own = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(cls)} | {"--no-dry-run"}
        kept, is_own = [], False
        for word in arguments:
            if word.startswith("--"):
                name = word.partition("=")[0].replace("_", "-")
                if name in _AXES:
                    raise TrainerError(f"{name} is the sweep's to set: give {_AXES[name]}")
                is_own = name in own
            if not is_own:
                kept.append(word)
        return tuple(kept)

    def run(self) -> tuple[dict[str, Any], int]:
        from trainer.sweep.plan import check_reference, settle_plan

        asked = self._plan()
        part = parse_part(self.part, os.environ)
        plan = settle_plan(self.out, asked)
        check_reference(plan, self.reference)
        points = _mine(asked, part)
        if part.count > 1:
            told = f" ({part.source})" if part.source else ""
            print(f"part {part.index + 1} of {part.count}{told}: {len(points)} runs", file=sys.stderr)
        if self.dry_run:
            return self._list(points), 0
        self._do(plan, points)
        from trainer.sweep.outcome import put_together

        return put_together(self.out, plan, self.reference, {point.name for point in points})

    def _plan(self) -> "Plan":
        """What is asked for.

        Raises:
            SlidegradError: whatever would stop every run.
        """
        from trainer.provenance import digest_file
        from trainer.sweep.grid import parse_precisions
        from trainer.sweep.plan import Plan, describe_data, digest_weights, read_split_method
        from trainer.topology import Topology

        if self.jobs < 1:
            raise TrainerError(f"--jobs {self.jobs}: expected at least 1")
        if self.num_splits is not None and self.splits is None:
            raise TrainerError("--num-splits has no effect without --splits")
        methods = words("--method", self.method)
        if self.features is not None and not any(method.startswith(FROZEN) for method in methods):
            raise TrainerError("--features has no effect without a method of frozen encoders, as frozen_gma")
        configs = {method: self._config(method) for method in dict.fromkeys((END_TO_END, *methods))}
        splits = find_splits(self.splits, self.num_splits) if self.splits else {}
        grid = Grid(
            ks=parse_ks(self.k) if self.k else (_k_of(self.config),),
            precisions=parse_precisions(self.precision) if self.precision else (self.config.optim.precision,),
            nprocs=parse_counts("--nproc", self.nproc),
            splits=tuple(splits) or ("",),
            methods=methods,
        )
        for nproc in grid.nprocs:
            machine = self.config.machine
            Topology.make(nproc, machine.aggregator, self.config.virtual_ranks, machine.groups)
        digests: dict[tuple[str, str | None], str | None] = {}
        for encoder in (config.encoder for config in configs.values()):
            if (encoder.name, encoder.weights) not in digests:
                digests[encoder.name, encoder.weights] = digest_weights(encoder)
        return Plan(
            recipe=self.config.recipe,
            data=describe_data(self.labels, self.manifests, self.config.head, are_split=bool(splits)),
            configs=configs,
            weights={method: digests[c.encoder.name, c.encoder.weights] for method, c in configs.items()},
            splits={name: digest_file(file) for name, file in splits.items()},
            split_method=read_split_method(self.splits) if self.splits else None,
            grids=(grid,),
        )

    def _config(self, method: str) -> RunConfig:
        """The settings of a method, with those that were typed."""
        from trainer.sweep.plan import recipe_of

        recipe = recipe_of(self.config.recipe, method)
        if method == END_TO_END:
            return self.config
        default = _Settings(config=get_recipe(recipe))
        return tyro.cli(
            _Settings, args=list(self.own_words), prog=f"slidegrad sweep {self.config.recipe}", default=default
        ).config

    def _list(self, points: Sequence[Point]) -> dict[str, Any]:
        """What --dry-run tells."""
        from rich.console import Console
        from rich.table import Table

        from trainer.sweep.states import find_state

        states = {point.name: find_state(self.out, point.name) for point in points}
        table = Table("Run", "State")
        for name in list(states)[:_MOST_LISTED]:
            table.add_row(name, states[name])
        console = Console(file=sys.stderr)
        console.print(table)
        if len(states) > _MOST_LISTED:
            console.print(f"and {len(states) - _MOST_LISTED} more, all in the result", highlight=False)
        values = list(states.values())
        return {
            "sweep": str(self.out),
            "num_runs": len(points),
            "num_done": values.count("done"),
            "num_failed": values.count("failed"),
            "runs": states,
        }

    def _do(self, plan: "Plan", points: Sequence[Point]) -> None:
        """Those that are not done."""
        from trainer.sweep.board import Board
        from trainer.sweep.plan import write_plan
        from trainer.sweep.running import run_all
        from trainer.sweep.states import find_state
        from trainer.sweep.tasks import share_machine

        open_points = [point for point in points if find_state(self.out, point.name) != "done"]
        most_nproc = max((point.nproc for point in open_points), default=1)
        num_jobs = min(self.jobs, max(1, len(open_points)))
        shares = share_machine(num_jobs, most_nproc)
        write_plan(self.out, plan)
        if not open_points:
            return
        tasks = [self._tasks(plan).make(point, num_jobs) for point in open_points]
        with closing(Board(total=len(points), done=len(points) - len(open_points))) as board:
            run_all(self.out, tasks, shares, board)

    def _tasks(self, plan: "Plan") -> "Tasks":
        from trainer.sweep.tasks import Tasks

        return Tasks(
            sweep=self.out,
            recipe=plan.recipe,
            configs=plan.configs,
            manifests=self.manifests,
            labels=self.labels,
            splits=self.splits,
            features=self.features,
            words=self.own_words,
        )


@dataclass(frozen=True, kw_only=True)
class Collect:
    """Put together what the runs of a sweep have left so far: results, table 1, figures, the page. Starts no run."""

    collect: Path
    """The sweep's folder."""
    reference: str | None = None
    """The method that others are compared with; end_to_end if it is there."""

    def run(self) -> tuple[dict[str, Any], int]:
        from trainer.sweep.plan import read_plan

        plan = read_plan(self.collect)
        if plan is None:
            raise TrainerError(f"--collect {self.collect}: no sweep here (no sweep.yaml)")
        from trainer.sweep.outcome import put_together

        return put_together(self.collect, plan, self.reference, {point.name for point in plan.points})


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """A recipe's settings alone."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]


def _mine(plan: "Plan", part: "Shard") -> list[Point]:
    from trainer.sweep.grid import share

    return share(plan.points, part)


def _k_of(config: RunConfig) -> K:
    tiles = config.tiles
    if tiles.k_per_rank is not None:
        raise TrainerError("the recipe has tiles.k_per_rank, which is not the same on every --nproc: give --k")
    return tiles.k if tiles.k is not None else "all"
