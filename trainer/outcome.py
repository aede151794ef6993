"""After the last epoch: the test slides scored, a heatmap, the result and the report."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from manifests.errors import SlidegradError
from manifests.files import atomic_path, disk_name, mask_path
from manifests.source import LocalManifests
from tiler.masks import read_mask
from trainer.checkpoint import chosen_checkpoint, read_best_state
from trainer.cohort import Case, Cohort
from trainer.comm import Comm, join_group
from trainer.errors import TrainerError
from trainer.features.cache import serve_split
from trainer.heads import Head
from trainer.job import Job
from trainer.loop import Loop
from trainer.measures.merits import MERITS, PREDICTED
from trainer.model import build_engine, export_weights, load_weights
from trainer.prepare import open_run
from trainer.reports.heatmap import render_heatmap
from trainer.reports.plots import heatmap_card
from trainer.reports.report import write_report
from trainer.sampler import draw_rows, plan_scoring
from trainer.scoring import Score, Tick, score_split, write_result, write_scores
from trainer.step import Engine
from trainer.topology import Topology


def conclude(loop: Loop) -> dict[str, Any]:
    """Scores the test slides with the best checkpoint, by all ranks; the main rank writes what a run leaves.

    Returns:
        The result on the main rank, {} elsewhere.
    """
    job, comm = loop.job, loop.comm
    scores, skipped = loop.score_best("test")
    if not comm.is_main:
        return {}
    export_weights(job.run, chosen_checkpoint(job.run))
    return _write_all(job, "test", scores, {**loop.standing.skipped, **dict(skipped)})


def evaluate(run: Path, split: str, manifests: Path | None, tick: Tick) -> dict[str, Any]:
    """Scores a split of a run in this process and writes scores and result, and for the test slides the report, anew.

    Raises:
        TrainerError: no run, no checkpoint, or no slides in the split.
    """
    job = open_run(run, manifests)
    if not job.cohort.of(split):
        raise TrainerError(f"{run}: no slides in the split {split!r}")
    scores, skipped = score_alone(job, split, tick)
    if not scores:  # What was there before is worth more.
        raise TrainerError(f"none of the {len(skipped)} slides of {split} could be scored, the first: {skipped[0][1]}")
    return _write_all(job, split, scores, dict(skipped))


def draw_one_heatmap(run: Path, slide_id: str, manifests: Path | None) -> dict[str, Any]:
    """Scores one slide of the cohort and draws its heatmap.

    Raises:
        TrainerError: not a slide of the cohort, or not readable.
    """
    job = open_run(run, manifests)
    case = next((case for case in job.cohort.cases if case.slide_id == slide_id), None)
    if case is None:
        raise TrainerError(f"slide {slide_id}: not in the cohort of {run}")
    engine = _load_alone(job)  # Of the whole cohort, whose training slides make the head.
    alone = dataclasses.replace(job, cohort=job.cohort.only(case))
    loader = serve_split(engine, alone, case.split, _silent)
    scores, skipped = score_split(engine, alone, case.split, _silent, loader)
    if skipped:
        raise TrainerError(skipped[0][1])
    file = _draw_heatmap(job, case, scores[0])
    # Numbers may be of any size; of a model that diverged they are none.
    predictions = [float(f"{p:.6g}") if math.isfinite(p) else None for p in scores[0].predictions]
    return {"slide_id": slide_id, PREDICTED[job.cohort.task]: predictions, "heatmap": str(file)}


def score_alone(job: Job, split: str, tick: Tick) -> tuple[list[Score], list[tuple[str, str]]]:
    """Scores a split in this process alone, with the run's chosen checkpoint; returns as `score_split`."""
    engine = _load_alone(job)
    return score_split(engine, job, split, tick, serve_split(engine, job, split, tick))


def _silent(**_: object) -> None:
    """No progress: one slide is soon done."""


def _load_alone(job: Job) -> Engine:
    """Both halves of the run's chosen checkpoint, in this process."""
    checkpoint = chosen_checkpoint(job.run)
    _, _, device = join_group()
    assert job.config.virtual_ranks, "a saved config is resolved"
    comm = Comm(Topology.make(1, "auto", job.config.virtual_ranks), 0, device)
    head = Head.for_cohort(job.config.head, job.cohort)
    engine = build_engine(job.config, comm, tile_px=job.tile_px, head=head, initial=False)
    load_weights(engine, checkpoint)
    return engine


def _write_all(job: Job, split: str, scores: list[Score], skipped: dict[str, str]) -> dict[str, Any]:
    result = write_scores(job.run, split, scores, job.cohort)
    best, cohort = read_best_state(job.run), job.cohort
    result |= {
        "val_auc": None,
        **{name: value for name, value in best.items() if name.startswith("val_")},
        "best_epoch": best.get("epoch"),
        "chosen_by": _chosen_by(best, MERITS[cohort.task]),
        "num_skipped": len(skipped),
        "skipped": list(skipped.values()),
        "task": cohort.task,
        **({"classes": list(cohort.classes)} if cohort.task == "classes" else {"columns": list(cohort.columns)}),
        "run": str(job.run),
    }
    cases = cohort.of(split)
    if (clearest := _clearest(scores, cases, cohort)) is not None:
        try:
            result["heatmap"] = str(_draw_heatmap(job, cases[clearest.slide_id], clearest))
        except SlidegradError as error:  # A lost thumbnail costs the picture, not the result.
            result["heatmap"] = None
            result["heatmap_error"] = str(error)
    write_result(job.run, result)
    if split == "test":  # The report tells of the test slides alone.
        result["report"] = str(write_report(job.run))
        write_result(job.run, result)
    return result


def _chosen_by(best: dict[str, Any], merit: str) -> str | None:
    """What the checkpoint was chosen by: a measure, the loss, or None where it is the last one."""
    if best.get("best_epoch") is None:
        return None
    return merit if best.get(f"val_{merit}") is not None else "loss"


def _clearest(scores: list[Score], cases: dict[str, Case], cohort: Cohort) -> Score | None:
    """The slide to look at: that with the highest score of the last class's own, or of all in the first column."""
    if cohort.task != "classes":
        return max(scores, key=lambda score: score.predictions[0], default=None)
    positive = [score for score in scores if cases[score.slide_id].label == len(cohort.classes) - 1]
    return max(positive, key=lambda score: score.predictions[-1], default=None)


def _draw_heatmap(job: Job, case: Case, score: Score) -> Path:
    """Writes RUN/heatmaps/SLIDE.png: attention over the slide's thumbnail."""
    assert isinstance(job.source, LocalManifests), "thumbnails lie beside local manifests"
    manifest = job.source[case.slide_id]
    overview = read_mask(mask_path(job.source.root, case.slide_id)).overview
    (step,) = plan_scoring({case.slide_id: case.num_tiles}, tiles=job.config.tiles)
    weights = np.full(len(manifest), math.nan)
    weights[draw_rows(step, job.config.seed)] = score.attention
    painted = render_heatmap(overview.thumbnail, overview.mpp, manifest, weights)
    file = job.run / "heatmaps" / f"{disk_name(case.slide_id)}.png"
    with atomic_path(file) as partial:
        partial.write_bytes(heatmap_card(overview.thumbnail, painted, overview.mpp))
    return file
