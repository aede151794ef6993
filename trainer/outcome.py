"""After the last epoch: the test slides scored, a heatmap, the result and the report."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from manifests.errors import SlidegradError
from manifests.files import atomic_path, disk_name, mask_path
from manifests.source import LocalManifests
from tiler.masks import read_mask
from trainer.checkpoint import chosen_checkpoint, read_best_state
from trainer.cohort import Case
from trainer.comm import Comm, join_group
from trainer.errors import TrainerError
from trainer.heatmap import render_heatmap
from trainer.job import Job
from trainer.loop import Loop
from trainer.model import build_engine, load_weights
from trainer.plots import heatmap_card
from trainer.prepare import open_run
from trainer.report import write_report
from trainer.sampler import draw_rows, plan_scoring
from trainer.scoring import Score, Tick, score_split, write_result, write_scores
from trainer.topology import Topology


def conclude(loop: Loop) -> dict[str, Any]:
    """Scores the test slides with the best checkpoint, by all ranks; the aggregator writes what a run leaves.

    Returns:
        The result on the aggregator rank, {} elsewhere.
    """
    job, comm = loop.job, loop.comm
    scores, skipped = loop.score_best("test")
    if not comm.is_aggregator:
        return {}
    return _write_all(job, "test", scores, {**loop.skipped, **dict(skipped)})


def evaluate(run: Path, split: str, manifests: Path | None, tick: Tick) -> dict[str, Any]:
    """Scores a split of a run in this process and writes scores and result, and for the test slides the report, anew.

    Raises:
        TrainerError: no run, no checkpoint, or no slides in the split.
    """
    job = open_run(run, manifests)
    if not job.cohort.of(split):
        raise TrainerError(f"{run}: no slides in the split {split!r}")
    scores, skipped = score_alone(job, split, tick)
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
    alone = Job(
        run=run,
        config=job.config,
        cohort=job.cohort.only(case),
        source=job.source,
        paths=job.paths,
        tile_px=job.tile_px,
    )
    scores, skipped = score_alone(alone, case.split, lambda **_: None)
    if skipped:
        raise TrainerError(skipped[0][1])
    file = _draw_heatmap(job, case, scores[0])
    return {"slide_id": slide_id, "probs": [round(float(p), 4) for p in scores[0].probs], "heatmap": str(file)}


def score_alone(job: Job, split: str, tick: Tick) -> tuple[list[Score], list[tuple[str, str]]]:
    """Scores a split in this process alone, with the run's chosen checkpoint; returns as `score_split`."""
    checkpoint = chosen_checkpoint(job.run)
    _, _, device = join_group()
    assert job.config.virtual_ranks, "a saved config is resolved"
    comm = Comm(Topology.make(1, "auto", job.config.virtual_ranks), 0, device)
    engine = build_engine(job.config, comm, tile_px=job.tile_px, num_classes=len(job.cohort.classes))
    load_weights(engine, checkpoint)
    return score_split(engine, job, split, tick)


def _write_all(job: Job, split: str, scores: list[Score], skipped: dict[str, str]) -> dict[str, Any]:
    result = write_scores(job.run, split, scores, job.cohort)
    best = read_best_state(job.run)
    result |= {
        "val_auc": best.get("val_auc"),
        "best_epoch": best.get("epoch"),
        "num_skipped": len(skipped),
        "skipped": list(skipped.values()),
        "classes": list(job.cohort.classes),
        "run": str(job.run),
    }
    cases = job.cohort.of(split)
    positive = [score for score in scores if cases[score.slide_id].label == len(job.cohort.classes) - 1]
    if positive:
        clearest = max(positive, key=lambda score: score.probs[-1])
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
