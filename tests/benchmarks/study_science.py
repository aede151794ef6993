"""What the paper shows, asked of a synthetic cohort: does more of a slide help, and does learning end to end?

Set beforehand: the cohort's difficulty is that of `slidegrad synth`, its seed no other's; epochs, steps and values of K
below were tried on the demo's slides (seed 0) alone, by their training loss; test slides choose nothing. Encoders start
from random weights, the same for every method in a split. Three questions:

- K: final training loss (mean over splits) against tiles per slide; Spearman's rho. And test AUC of the largest K less
  that of the smallest.
- Methods at the largest K: test AUC of each less end-to-end's on the same splits.
- Processes: the final training loss of one seed on one process with one virtual rank, on one that runs both virtual
  ranks, and on an aggregator with two encoder ranks. They add up gradients in other orders; AdamW makes steps of full
  size of gradients that are nothing but rounding, so that in float32 such runs drift apart: hence float64 beside it.

Intervals (95 %) of differences are over splits: Nadeau and Bengio's, as splits overlap. The folder is kept if --out
names one; the same command then goes on.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.journal import read_events


@dataclass(frozen=True)
class Study:
    """A cohort and what is run on it."""

    num_slides: int
    seed: int
    num_splits: int
    ks: tuple[int, ...]
    epochs: int
    methods: tuple[str, ...]
    shares: tuple[float, float] = (0.15, 0.35)
    """Of validation and test slides."""
    loss_epochs: int = 12
    """Of the runs whose final losses are compared."""
    precisions: tuple[str, ...] = ("float32", "float64")
    """Of these runs."""
    jobs: int = 2


LARGE = Study(
    num_slides=120,
    seed=11,
    num_splits=5,
    ks=(4, 8, 16, 32, 64),
    epochs=12,
    methods=("end_to_end", "frozen_gma", "frozen_transmil", "tile_mean", "tile_max", "max_pool"),
)


def main(study: Study, root: Path) -> dict[str, Any]:
    """Runs a study in a folder, or what is left of it, and returns what it found."""
    if not (root / "manifests").exists():
        slidegrad("synth", "--out", root / "cohort", "--slides", study.num_slides, "--seed", study.seed)
        slidegrad("tile", root / "cohort/slides", "--out", root / "manifests", "--tile-px", 32, "--mpp", 2.0)
    inputs = ("--manifests", root / "manifests", "--labels", root / "cohort/labels.csv")
    shares = ("--val-fraction", study.shares[0], "--test-fraction", study.shares[1])
    slidegrad("splits", *inputs, "--out", root / "splits", "--num", study.num_splits, *shares)
    of_all = ("sweep", "demo", *inputs, "--splits", root / "splits", "--jobs", study.jobs)
    steps = ("--optim.slides-per-step", 1)
    flags = ("--optim.epochs", study.epochs, *steps)
    by_k = slidegrad(*of_all, "--out", root / "by_k", "--k", _listed(study.ks), *flags)
    methods = slidegrad(
        *of_all, "--out", root / "methods", "--k", study.ks[-1], "--method", _listed(study.methods), *flags
    )
    (trend,) = by_k["trends"]
    return {
        "loss_rho": trend["loss_rho"],
        "auc_largest_less_smallest": trend["test_auc"],
        "methods_less_end_to_end": {line["method"]: line["test_auc"] for line in methods["differences"]},
        "final_losses": final_losses(root, inputs, study, ("--optim.epochs", study.loss_epochs, *steps)),
        "tables": [by_k["table"], methods["table"]],
    }


def final_losses(root: Path, inputs: tuple[Any, ...], study: Study, flags: tuple[Any, ...]) -> dict[str, Any]:
    """The last epoch's training loss of one seed, by precision and by who did the work."""
    found: dict[str, dict[str, float]] = {}
    for precision in study.precisions:
        for name, num_processes, virtual_ranks in (
            ("one process, one virtual rank", 1, 1),
            ("one process, two virtual ranks", 1, 2),
            ("an aggregator and two encoder ranks", 3, 2),
        ):
            run = root / f"{precision}_nproc{num_processes}_virtual{virtual_ranks}"
            if not (run / "result.json").exists():
                how = ("--out", run, "--nproc", num_processes, "--virtual-ranks", virtual_ranks)
                of = ("--split", root / "splits/split_000.csv", "--tiles.k", study.ks[-1])
                slidegrad("train", "demo", *inputs, *how, *of, *flags, "--optim.precision", precision)
            losses = [e["train_loss"] for e in read_events(run) if e["event"] == "epoch"]
            found.setdefault(precision, {})[name] = losses[-1]
    return found


def slidegrad(*words: Any) -> dict[str, Any]:
    """One command, in a process of its own; its result."""
    command = [sys.executable, "-m", "slidegrad", *map(str, words)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def _listed(values: tuple[Any, ...]) -> str:
    return ",".join(map(str, values))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    if out is not None:
        print(json.dumps(main(LARGE, out), indent=1))
    else:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(main(LARGE, Path(folder)), indent=1))
