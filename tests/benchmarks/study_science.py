"""What the paper shows, asked of a synthetic cohort: does more of a slide help, and does learning end to end?

Set beforehand, before any of it was run: the cohort, its difficulty and seed (LARGE, not those of the demo), the
splits, the recipe, epochs and values of K below; test slides choose nothing. Encoders start from random weights, the
same for every method in a split. Three questions:

- K: final training loss (mean over splits) against tiles per slide; Spearman's rho. And test AUC of the largest K less
  that of the smallest, with the 95 % interval over splits (Nadeau and Bengio's, as splits overlap).
- Methods at the largest K: test AUC of each less end-to-end's on the same splits, likewise.
- Processes: the final training loss of one seed on one process, which runs both virtual ranks, and on an aggregator
  with two encoder ranks.

The folder is kept if --out names one; the same command then goes on.
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
    lr: float = 5e-4
    """The demo's."""
    jobs: int = 2


LARGE = Study(
    num_slides=120,
    seed=11,
    num_splits=5,
    ks=(4, 12, 24, 48, 96),
    epochs=30,
    methods=("end_to_end", "frozen_gma", "frozen_transmil", "tile_mean", "tile_max", "max_pool"),
)


def main(study: Study, root: Path) -> dict[str, Any]:
    """Runs a study in a folder, or what is left of it, and returns what it found."""
    if not (root / "manifests").exists():
        slidegrad("synth", "--out", root / "cohort", "--slides", study.num_slides, "--seed", study.seed)
        slidegrad("tile", root / "cohort/slides", "--out", root / "manifests", "--tile-px", 32, "--mpp", 2.0)
    inputs = ("--manifests", root / "manifests", "--labels", root / "cohort/labels.csv")
    shares = ("--val-fraction", 0.15, "--test-fraction", 0.35)
    slidegrad("splits", *inputs, "--out", root / "splits", "--num", study.num_splits, *shares)
    of_all = ("sweep", "demo", *inputs, "--splits", root / "splits", "--jobs", study.jobs)
    flags = ("--optim.epochs", study.epochs, "--optim.lr", study.lr)
    by_k = slidegrad(*of_all, "--out", root / "by_k", "--k", _listed(study.ks), *flags)
    methods = slidegrad(
        *of_all, "--out", root / "methods", "--k", study.ks[-1], "--method", _listed(study.methods), *flags
    )
    (trend,) = by_k["trends"]
    return {
        "loss_rho": trend["loss_rho"],
        "auc_largest_less_smallest": trend["test_auc"],
        "methods_less_end_to_end": {line["method"]: line["test_auc"] for line in methods["differences"]},
        "final_losses": final_losses(root, inputs, study, flags),
        "tables": [by_k["table"], methods["table"]],
    }


def final_losses(root: Path, inputs: tuple[Any, ...], study: Study, flags: tuple[Any, ...]) -> dict[str, float]:
    """The last epoch's training loss of one seed on one process, and on three, of which two encode."""
    found = {}
    for name, num_processes in (("one process, two virtual ranks", 1), ("an aggregator and two encoder ranks", 3)):
        run = root / f"nproc{num_processes}"
        if not (run / "result.json").exists():
            how = ("--out", run, "--nproc", num_processes, "--split", root / "splits/split_000.csv")
            slidegrad("train", "demo", *inputs, *how, "--tiles.k", study.ks[-1], *flags)
        found[name] = [e["train_loss"] for e in read_events(run) if e["event"] == "epoch"][-1]
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
