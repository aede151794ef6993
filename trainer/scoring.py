"""Scores of whole slides: by all ranks together for validation and test, and what they add up to."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from manifests.files import atomic_path, write_text
from trainer.cohort import Cohort
from trainer.job import Job
from trainer.loader import TileLoader
from trainer.sampler import plan_scoring, shards_of
from trainer.statistics import auc, bootstrap_auc, macro_auc
from trainer.step import Engine, SlideInput


class Tick(Protocol):
    """Progress: one call for each slide done."""

    def __call__(self, *, doing: str, total: int, about: str = "", note: str = "") -> None:
        """Tells what is being done, to how many slides in all; `about` stands beside the bar, `note` in a line."""


@dataclass(frozen=True)
class Score:
    """One slide's class probabilities (C,), loss, and attention per row of its manifest that was scored."""

    slide_id: str
    probs: NDArray[np.float64]
    loss: float
    attention: NDArray[np.float64]


def score_split(
    engine: Engine, job: Job, split: str, tick: Tick, loader: TileLoader | None = None
) -> tuple[list[Score], list[tuple[str, str]]]:
    """Scores every slide of a split, whole; called by all ranks together.

    Args:
        engine: the model.
        job: the run.
        split: which slides.
        tick: progress.
        loader: whose memory to use; one of its own by default.

    Returns:
        Scores (on the aggregator rank, else empty), and (slide_id, reason) of slides that could not be read.
    """
    cases = job.cohort.of(split)
    steps = plan_scoring(job.cohort.num_tiles(split), tiles=job.config.tiles)
    comm = engine.comm
    engine.set_training(False)
    loader = loader or job.loader(comm)
    scores, skipped = [], []
    with loader.read(shards_of(steps, comm.topology, comm.rank, job.config.seed)) as reading:
        for step in steps:
            outcome = engine.score(SlideInput(step, reading.slide(step).first(), cases[step.slide_id].label))
            tick(doing=f"scoring {split}", total=len(steps))
            if outcome.error:
                skipped.append((step.slide_id, outcome.error))
            elif outcome.logits_C is not None and outcome.attention_K is not None:
                probs = outcome.logits_C.double().softmax(0).cpu().numpy()
                scores.append(Score(step.slide_id, probs, outcome.loss, outcome.attention_K.double().cpu().numpy()))
    return scores, skipped


def split_auc(scores: list[Score], cohort: Cohort) -> float:
    """AUC of scored slides; one-vs-rest mean for more than two classes; NaN if only one class is there."""
    if not scores:
        return float("nan")
    label = {case.slide_id: case.label for case in cohort.cases}
    labels = np.array([label[score.slide_id] for score in scores])
    probs = np.stack([score.probs for score in scores])
    return auc(labels, probs[:, 1]) if probs.shape[1] == 2 else macro_auc(labels, probs)


def write_scores(run: Path, split: str, scores: list[Score], cohort: Cohort) -> dict[str, Any]:
    """Puts a split's scores into `scores.parquet`, and returns the result: AUC, its 95 % interval, counts."""
    cases = {case.slide_id: case for case in cohort.cases}
    rows = [
        {
            "slide_id": score.slide_id,
            "patient_id": cases[score.slide_id].patient_id,
            "split": split,
            "label": cases[score.slide_id].label,
            "probs": score.probs.tolist(),
        }
        for score in scores
    ]
    schema = pa.schema(
        [
            ("slide_id", pa.string()),
            ("patient_id", pa.string()),
            ("split", pa.string()),
            ("label", pa.int32()),
            ("probs", pa.list_(pa.float32())),
        ]
    )
    file = run / "scores.parquet"
    others = [row for row in pq.read_table(file).to_pylist() if row["split"] != split] if file.exists() else []
    with atomic_path(file) as partial:
        pq.write_table(pa.Table.from_pylist([*others, *rows], schema=schema), partial)
    labels = np.array([row["label"] for row in rows])
    point = split_auc(scores, cohort)
    interval = [float("nan")] * 2
    if len(cohort.classes) == 2 and np.isfinite(point):
        found = bootstrap_auc(labels, np.stack([score.probs for score in scores])[:, 1])
        interval = [found.low, found.high]
    return {
        "auc": _rounded(point),
        "auc_ci": [_rounded(v) for v in interval],
        "num_slides": len(rows),
        "num_per_class": [int((labels == c).sum()) for c in range(len(cohort.classes))],
        "split": split,
    }


def write_result(run: Path, result: dict[str, Any]) -> None:
    """Writes what the run's commands print as their last line: `result.json`, of another split than test beside it."""
    name = "result.json" if result["split"] == "test" else f"result_{result['split']}.json"
    write_text(run / name, json.dumps(result, indent=1))


def _rounded(value: float) -> float | None:
    """JSON knows no NaN."""
    return round(value, 4) if np.isfinite(value) else None
