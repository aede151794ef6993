"""How long a training step waits for its tiles, and what reading costs it: `slidegrad train` on slides of 224-px tiles.

Both are read from the run's own journal: `data_wait` is the share of the steps' time that the slowest rank waited for
tiles, with two virtual ranks and one process; `again` the same where no graph is kept and memory holds one shard, so
that every tile is read twice. The encoder is what the machine has to do besides; the smaller it is, the harder to hide
the reading.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiler.archive import Job, tile_archive
from tiler.config import TilerConfig
from tiler.synth import CohortConfig, make_cohort
from trainer.cli import Train
from trainer.reports.runlog import read_events

_ENCODERS = ("resnet18", "test_resnet")


def main(
    num_slides: int = 12, side_px: int = 4_096, num_tiles: int = 64, encoders: Sequence[str] = _ENCODERS
) -> dict[str, Any]:
    """Trains one epoch with each encoder; returns shares of the steps' time and rates, by encoder."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = CohortConfig(width_px=(side_px, side_px), height_px=(side_px, side_px), scant_every=0)
        make_cohort(folder / "cohort", num_slides, seed=0, config=config)
        tile_archive(str(folder / "cohort" / "slides"), folder / "manifests", TilerConfig(), Job())
        for encoder in encoders:
            for way, flags in {
                "data_wait": (),
                "again": ("--machine.keep", "0", "--machine.read-ahead-gb", "1e-6"),
            }.items():
                run = folder / f"{encoder}-{way}"
                _train(folder, run, encoder, num_tiles, flags)
                found[f"{encoder} {way}"] = _describe(run)
    return found


def _train(folder: Path, run: Path, encoder: str, num_tiles: int, flags: Sequence[str]) -> None:
    paths = ["--manifests", folder / "manifests", "--labels", folder / "cohort" / "labels.csv", "--out", run]
    sizes = ["--tiles.tiles", "fixed", "--tiles.k", num_tiles, "--tiles.max-tiles", num_tiles, "--virtual-ranks", 2]
    words = ["demo", *paths, *sizes, "--encoder.name", encoder, "--encoder.batchnorm", "running", "--optim.epochs", 1]
    Train.parse([str(word) for word in (*words, "--optim.slides-per-step", 1, *flags)]).run()


def _describe(run: Path) -> dict[str, float]:
    # The first step waits for its tiles whatever happens: nothing could be read before it.
    steps = [event for event in read_events(run) if event["event"] == "step"][1:]
    total_s = sum(step["step_s"] for step in steps)
    return {
        "wait_share": round(sum(step["data_wait_s"] for step in steps) / total_s, 4),
        "tiles_per_s": round(sum(step["num_tiles"] for step in steps) / total_s, 1),
        "read_tiles_per_s": round(sum(step["read_tiles_per_s"] for step in steps) / len(steps)),
        "decoded_per_tile": round(sum(step["decoded_per_tile"] for step in steps) / len(steps), 2),
        "reread_share": round(sum(step["reread_tiles"] for step in steps) / sum(s["num_tiles"] for s in steps), 2),
    }


if __name__ == "__main__":
    print(json.dumps(main()))
