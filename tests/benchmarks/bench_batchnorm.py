"""BatchNorm four ways, the demo recipe, same slides, same seed: does it learn, and does it look at the tumour?

Numbers: AUC on the demo's test slides, and how well attention finds the tumour on its positive test slides (AUC of a
tile's attention against at least half of it being tumour by the cohort's truth maps; 0.5 is chance; median over the
slides). `virtual` and `running` train by the statistics of each virtual rank, and score by them or by running ones;
`frozen` keeps the initial ones; `calibrated` measures them on training slides before the first step.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

from trainer.measures.statistics import auc
from trainer.outcome import score_alone
from trainer.prepare import open_run

_TRUTH_PX_L0 = 16
"""Level-0 px per px of a truth map."""
_TUMOUR = 2


WAYS = ("calibrated", "virtual", "running", "frozen")


def main(
    num_slides: int = 120, seed: int = 0, ways: tuple[str, ...] = WAYS, flags: tuple[str, ...] = ()
) -> dict[str, object]:
    """Runs the ways and returns each one's test AUC with its interval, and the attention's."""
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _slidegrad("synth", "--out", root / "cohort", "--slides", num_slides, "--seed", seed)
        tiles = ("--tile-px", 32, "--mpp", 2.0)
        _slidegrad("tile", root / "cohort/slides", "--out", root / "manifests", *tiles)
        inputs = ("--manifests", root / "manifests", "--labels", root / "cohort/labels.csv", "--seed", seed)
        for way in ways:
            run = root / way
            how = ("--out", run, "--nproc", 3, "--encoder.batchnorm", way)
            result = _slidegrad("train", "demo", *inputs, *how, *flags)
            found = {"test_auc": result["auc"], "test_auc_ci": result["auc_ci"]}
            results[way] = {**found, "attention_auc": round(attention_auc(run, root / "cohort/truth"), 3)}
    return {"num_slides": num_slides, "seed": seed, **results}


def attention_auc(run: Path, truth: Path) -> float:
    """Median over a run's positive test slides of the AUC of attention for tumour tiles."""
    job = open_run(run)
    scores, _ = score_alone(job, "test", lambda **_: None)
    found = []
    for score in scores:
        manifest = job.source[score.slide_id]
        is_tumour = cv2.imread(str(truth / f"{score.slide_id}.png"), cv2.IMREAD_UNCHANGED) == _TUMOUR
        side = manifest.footprint_l0[0] // _TRUTH_PX_L0
        corners = zip(manifest.x_l0 // _TRUTH_PX_L0, manifest.y_l0 // _TRUTH_PX_L0, strict=True)
        tumour = np.array([is_tumour[y : y + side, x : x + side].mean() >= 0.5 for x, y in corners])
        if tumour.any():
            found.append(auc(tumour.astype(int), score.attention))
    return float(np.median(found)) if found else float("nan")


def _slidegrad(*arguments: object) -> dict[str, object]:
    command = [sys.executable, "-m", "slidegrad", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
