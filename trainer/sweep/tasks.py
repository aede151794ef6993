"""From a point of the grid to its run's command line, and to what of this machine it gets.

One thing to know before changing it: settings that the user typed come last, as they were typed, so that a run is what
`slidegrad train` would make of the same words.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tiler.pool import share_memory
from trainer.config import RunConfig
from trainer.errors import TrainerError
from trainer.sweep.grid import FROZEN, K, Point
from trainer.sweep.plan import recipe_of
from trainer.sweep.running import Share, Task, divide
from trainer.sweep.states import run_folder

_MOST_GB = 8.0
"""For reading ahead, as `job.auto_budget` has it: a quarter of a rank's share of memory, at most this."""


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """What the command lines of a sweep's runs have in common."""

    sweep: Path
    """The sweep's folder."""
    recipe: str
    configs: Mapping[str, RunConfig]
    """By method."""
    manifests: Path
    labels: Path
    splits: Path | None
    """The folder of split files."""
    features: Path | None
    """Where features of frozen encoders are kept; SWEEP/features if not given."""
    words: tuple[str, ...]
    """Settings as the user typed them."""

    def make(self, point: Point, num_jobs: int) -> Task:
        """The run of a point.

        Args:
            point: which.
            num_jobs: runs side by side on this machine, which share its memory.
        """
        paths = {"--manifests": self.manifests, "--labels": self.labels, "--out": run_folder(self.sweep, point.name)}
        if point.split:
            assert self.splits is not None, "points have splits where the folder is given"
            paths["--split"] = self.splits / f"split_{point.split[1:]}.csv"
        if point.method.startswith(FROZEN):
            paths["--machine.features"] = self.features or self.sweep / "features"
        config = self.configs[point.method]
        arguments = (
            recipe_of(self.recipe, point.method),
            *(str(word) for flag, path in paths.items() for word in (flag, path.resolve())),
            *("--nproc", str(point.nproc), "--optim.precision", point.precision),
            *_words_of_k(point.k),
            *(_words_of_memory(point.nproc, num_jobs) if config.machine.read_ahead_gb is None else ()),
            *self.words,
        )
        return Task(name=point.name, arguments=arguments, nproc=point.nproc, epochs=config.optim.epochs)


def share_machine(num_jobs: int, most_nproc: int) -> list[Share]:
    """This machine, divided between the runs side by side.

    Args:
        num_jobs: runs side by side.
        most_nproc: the most processes that one of them has.

    Raises:
        TrainerError: a run would find fewer GPUs than it has processes.
    """
    import torch

    given, num_gpus = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    gpus = given.split(",")[:num_gpus] if given else [str(i) for i in range(num_gpus)]
    of_each = num_gpus // num_jobs
    if num_jobs > 1 and num_gpus and most_nproc > max(1, of_each):
        raise TrainerError(
            f"--jobs {num_jobs} leaves {of_each} of {num_gpus} GPUs to a run of --nproc {most_nproc}, which would then "
            f"train on the CPU; give --jobs {max(1, num_gpus // most_nproc)}"
        )
    return divide(num_jobs, sorted(os.sched_getaffinity(0)), gpus)


def _words_of_k(k: K) -> tuple[str, ...]:
    if k == "own":
        return ()
    kind, number = ("all", "None") if k == "all" else ("fixed", str(k))
    return "--tiles.tiles", kind, "--tiles.k", number, "--tiles.k-per-rank", "None"


def _words_of_memory(nproc: int, num_jobs: int) -> tuple[str, ...]:
    """Of memory for reading ahead a run takes a share too, where several run at once."""
    if num_jobs == 1:
        return ()
    budget_gb = min(_MOST_GB, share_memory(1) / 4e9 / max(1, nproc - 1) / num_jobs)
    return "--machine.read-ahead-gb", f"{budget_gb:.4g}"
