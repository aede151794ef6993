"""The trainer's commands: train and verify. Others have packages of their own."""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import tyro
from rich.console import Console

from tiler.progress import Counter, progress_bar
from trainer.config import AggregatorName, RunConfig
from trainer.errors import TrainerError
from trainer.phases import Phases, silent
from trainer.recipes import METHODS, RECIPES, describe_choices, get_recipe

if TYPE_CHECKING:
    import torch

    from trainer.topology import Topology

_LAUNCHER_S = 10.0
"""In which the launcher notices that a rank has ended."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a recipe on whole slides, end to end, then score the test slides and write a report."""

    manifests: Path
    """The manifests folder, from `slidegrad tile`."""
    labels: Path
    """CSV with slide_id, label (or what --head.columns names) [, specimen_id] [, patient_id] [, split]."""
    split: Path | None = None
    """CSV with slide_id, split = train | val | test, as `slidegrad splits` draws them; if neither it nor the labels
    name a split, patients are split by the seed and --cohort.…"""
    out: Path
    """The run's folder."""
    index: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """Address of a service (`slidegrad serve`) that tells where tiles lie; --manifests tells where slides lie, and the
    rest while the service does not answer. SLIDEGRAD_TOKEN, or SLIDEGRAD_TOKEN_FILE a file's name: its token."""
    nproc: int = 1
    """Processes on this machine, the aggregator included."""
    restarts: int = 0
    """How often all processes are started again, from the newest checkpoint, after one has died."""
    resume: bool = False
    """Go on with the run in --out from its newest checkpoint."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Self:
        """Reads a command line: the recipe (its first word) gives the defaults, or the run that is resumed does.

        Raises:
            TrainerError: no recipe, or one that is not the resumed run's.
        """
        recipe, rest = (arguments[0], arguments[1:]) if arguments and arguments[0][0] != "-" else ("", arguments)
        if not recipe and not {"-h", "--help"} & set(arguments):
            raise TrainerError(
                f"train needs a recipe as its first word, RECIPE or RECIPE+METHOD; recipes are {', '.join(RECIPES)}, "
                f"methods {', '.join(METHODS)}"
            )
        default = _saved_config(rest) or (get_recipe(recipe) if recipe else RunConfig())
        if recipe and default.recipe != recipe:
            raise TrainerError(f"--out holds a run of recipe {default.recipe!r}, not {recipe!r}; give another --out")
        return tyro.cli(
            cls,
            args=list(rest),
            prog=f"slidegrad train {recipe or 'RECIPE[+METHOD]'}",
            description=None if recipe else f"{cls.__doc__}\n\n{describe_choices()}",
            default=cls(manifests=tyro.MISSING, labels=tyro.MISSING, out=tyro.MISSING, config=default),
        )

    def run(self) -> tuple[dict[str, Any], int]:
        from trainer.job import cores_per_rank
        from trainer.launch.launcher import is_launched, launch

        if self.nproc < 1:
            raise TrainerError(f"--nproc {self.nproc}: expected at least 1")
        if self.restarts < 0 or (self.restarts and self.nproc == 1):
            raise TrainerError(f"--restarts {self.restarts}: expected 0, or more with --nproc from 2")
        if is_launched() or self.nproc == 1:
            return self._run_rank()
        topology = self._topology(self.nproc)
        self._prepare(topology)
        launch(self._rank_arguments(), self.nproc, cores_per_rank(topology), self.restarts)
        result = json.loads((self.out / "result.json").read_text())
        return result, 1 if result["num_skipped"] else 0

    def _topology(self, num_processes: int) -> "Topology":
        from trainer.topology import Topology

        machine = self.config.machine
        return Topology.make(num_processes, machine.aggregator, self.config.virtual_ranks, machine.groups)

    def _prepare(self, topology: "Topology") -> None:
        from manifests.files import write_text
        from trainer.launch.launcher import launch_id
        from trainer.prepare import prepare_run

        # A run that this launch began is gone on with when its ranks start again.
        begun = self.out / "launch_id"
        is_ours = bool(launch_id()) and begun.exists() and begun.read_text() == launch_id()
        prepare_run(
            self.out,
            self.config,
            manifests=self.manifests,
            labels=self.labels,
            split=self.split,
            topology=topology,
            resume=self.resume or is_ours,
            index=self.index,
            is_restart=is_ours,
        )
        if launch_id():
            write_text(begun, launch_id())

    def _run_rank(self) -> tuple[dict[str, Any], int]:
        """This rank's part of the run. Only the main rank has the result; launched ranks always end with 0."""
        from trainer.comm import is_lost_rank, join_group, leave_group
        from trainer.launch.launcher import end_with_launcher, is_launched, is_ours
        from trainer.memory import full_memory_told
        from trainer.stopping import listening

        try:
            with listening(), full_memory_told():
                if is_launched():
                    end_with_launcher()
                result = self._train(*join_group())
        except RuntimeError as error:
            if not is_lost_rank(error):
                raise
            time.sleep(_LAUNCHER_S)  # It ends this rank too; the one to tell about is the one that was first.
            raise TrainerError("another rank has ended, so this one does too; see above for its message") from None
        leave_group()  # Not after an error: the others are waiting elsewhere, and the launcher ends them.
        if is_ours():
            return {}, 0
        return result, 1 if result.get("num_skipped") and not is_launched() else 0

    def _train(self, rank: int, world_size: int, device: "torch.device") -> dict[str, Any]:
        """Trains, and returns the result; on the main rank."""
        from trainer.comm import Comm
        from trainer.loop import Loop
        from trainer.outcome import conclude
        from trainer.prepare import open_run

        topology = self._topology(world_size)
        comm = Comm(topology, rank, device)
        if comm.is_main:
            self._prepare(topology)
        comm.barrier()
        job = open_run(self.out, index=self.index, tells=comm.is_first_encoder)
        with (
            progress_bar() as bar,
            closing(Loop(job, comm, Phases(bar) if comm.is_main else silent)) as loop,
        ):
            loop.run()
            return conclude(loop)

    def _rank_arguments(self) -> list[str]:
        """The command line of a rank; everything that matters is in `config.yaml` by now."""
        given = {"--manifests": self.manifests, "--labels": self.labels, "--out": self.out, "--index": self.index}
        words = [str(word) for pair in given.items() if pair[1] is not None for word in pair]
        return [self.config.recipe, *words, "--resume"]


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Show that ranks, virtual ranks and groups give one process's answer, to rounding; exit 1 if they do not."""

    encoder: tuple[str, ...] = ()
    """linear, conv, or any timm model; by default these two, test_resnet and vit_tiny_patch16_224, or with --bn virtual
    those that have BatchNorm."""
    aggregator: tuple[AggregatorName, ...] = ("gma",)
    """Aggregators."""
    dtype: tuple[Literal["float64", "float32", "bf16"], ...] = ()
    """bf16: the encoder in half precision. By default all; with --bn virtual not bf16, of whose rounding it makes too
    much."""
    ranks: Annotated[str, tyro.conf.arg(metavar="N,N,…")] = "1,3"
    """Encoder ranks of a group; the aggregator is one more process, or one of them."""
    virtual_ranks: Annotated[str, tyro.conf.arg(metavar="V,V,…")] = "1,3"
    """Virtual ranks that each encoder rank runs."""
    groups: Annotated[str, tyro.conf.arg(metavar="G,G,…")] = "1,2"
    """Groups of ranks, each at a slide of its own."""
    tiles: Annotated[str, tyro.conf.arg(metavar="K,K,…")] = ""
    """Tiles of each slide of a step; by default 23,2,9: 23 seldom split evenly, 2 leave virtual ranks without any; with
    --bn virtual 95,40,1: over two or three tiles BatchNorm makes so much of a rounding that nothing holds."""
    steps: int = 5
    """Optimiser steps."""
    bn: Literal["frozen", "virtual"] = "frozen"
    """frozen: against one single pass; virtual: BatchNorm per virtual rank, against one process with the same."""
    inject_fault: Literal["none", "scale", "drop", "swap", "group"] = "none"
    """Do one thing wrong, to see that it is noticed: a factor, a rank's or a group's gradients lost, tiles swapped."""
    plot: Path | None = None
    """A PNG to draw the errors into."""

    def run(self) -> tuple[dict[str, Any], int]:
        from manifests.files import atomic_path
        from trainer.verify.comparison import DEFAULT_DTYPES, DEFAULT_ENCODERS, DEFAULT_TILES, plan_cases, verify
        from trainer.verify.plot import plot_errors
        from trainer.verify.table import build_table, describe_cases, describe_limits, summarise

        if self.plot is not None and not (self.plot.suffix == ".png" and self.plot.parent.is_dir()):
            raise TrainerError(f"--plot {self.plot}: expected a .png in a folder that exists; make it, or give another")
        cases = plan_cases(
            encoders=self.encoder or DEFAULT_ENCODERS[self.bn],
            aggregators=self.aggregator,
            dtypes=self.dtype or DEFAULT_DTYPES[self.bn],
            ranks=_counts("--ranks", self.ranks),
            virtual_ranks=_counts("--virtual-ranks", self.virtual_ranks),
            groups=_counts("--groups", self.groups),
            num_tiles=_counts("--tiles", self.tiles or DEFAULT_TILES[self.bn]),
            num_steps=self.steps,
            batchnorm=self.bn,
            fault=self.inject_fault,
        )
        console = Console(file=sys.stderr, width=146)
        console.print(describe_cases(cases[0]), highlight=False)
        found = {}
        with Counter("comparing") as counter:
            counter.start(len(cases))
            for result in verify(cases):
                found[result.case] = result
                counter.advance()
        results = [found[case] for case in cases]
        console.print(build_table(results))
        for sentence in describe_limits(results):
            console.print(sentence, highlight=False)
        summary = summarise(results)
        if self.plot is not None:
            with atomic_path(self.plot) as partial:
                partial.write_bytes(plot_errors(results))
            summary["plot"] = str(self.plot)
        return summary, int(not summary["holds"])


def _saved_config(arguments: Sequence[str]) -> RunConfig | None:
    """The config of the run that --resume goes on with, for the flags' defaults."""
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--out=") else [word])]
    if "--resume" not in words or "--out" not in words[:-1]:
        return None
    file = Path(words[words.index("--out") + 1]) / "config.yaml"
    return RunConfig.from_yaml(file.read_text(), str(file)) if file.exists() else None


def _counts(flag: str, text: str) -> list[int]:
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise TrainerError(f"{flag} {text}: expected numbers from 1, separated by commas")
    return counts
