"""BatchNorm by virtual rank against running statistics: test AUC of the demo recipe, same slides, same seed.

One slide a step from random weights. The number is the AUC on the demo's test slides after the recipe's epochs; with
`running` the encoder is trained by the statistics of each virtual rank and scored by running ones, with `virtual` by
each virtual rank's own in both, with `frozen` by the initial ones in both.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE_TILES = ("--tile-px", "64", "--mpp", "1.0")


def main(num_slides: int = 120, epochs: int | None = None) -> dict[str, object]:
    """Runs the three ways and returns each one's test AUC with its interval, and validation AUC by epoch."""
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _slidegrad("synth", "--out", str(root / "cohort"), "--slides", str(num_slides))
        _slidegrad("tile", str(root / "cohort/slides"), "--out", str(root / "manifests"), *RECIPE_TILES)
        inputs = ["--manifests", str(root / "manifests"), "--labels", str(root / "cohort/labels.csv")]
        for way in ("virtual", "running", "frozen"):
            run = root / way
            flags = ["--out", str(run), "--nproc", "3", "--encoder.batchnorm", way]
            flags += ["--optim.epochs", str(epochs)] if epochs else []
            result = _slidegrad("train", "demo", *inputs, *flags)
            events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            curve = [round(event["val_auc"], 2) for event in events if event["event"] == "epoch"]
            results[way] = {"test_auc": result["auc"], "test_auc_ci": result["auc_ci"], "val_auc_by_epoch": curve}
    return {"num_slides": num_slides, **results}


def _slidegrad(*arguments: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-m", "slidegrad", *arguments], stdout=subprocess.PIPE, check=True)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
