"""After the last epoch: the test slides scored, a heatmap, the result and the report."""

from typing import Any

from manifests.errors import SlidegradError
from trainer.checkpoint import chosen_checkpoint, read_best_state
from trainer.cohort import Case, Cohort
from trainer.errors import TrainerError
from trainer.features.cache import serve_split
from trainer.heatmaps.drawing import draw_attention
from trainer.job import Job
from trainer.loop import Loop
from trainer.measures.merits import MERITS
from trainer.model import export_weights, load_alone
from trainer.reports.report import write_report
from trainer.scoring import Score, Tick, score_split, write_result, write_scores


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


def score_anew(job: Job, split: str, tick: Tick) -> dict[str, Any]:
    """Scores a split of a run in this process and writes scores and result, and for the test slides the report, anew.

    Raises:
        TrainerError: no checkpoint, no slides in the split, or none that could be scored.
    """
    return _write_all(job, split, *_score_some(job, split, tick))


def keep_scores(job: Job, split: str, tick: Tick) -> list[str]:
    """Scores a split into `scores.parquet` and writes nothing else; returns why slides were skipped.

    Raises:
        TrainerError: as `score_anew`.
    """
    scores, skipped = _score_some(job, split, tick)
    write_scores(job.run, split, scores, job.cohort, epoch=read_best_state(job.run).get("epoch"))
    return list(skipped.values())


def score_alone(job: Job, split: str, tick: Tick) -> tuple[list[Score], list[tuple[str, str]]]:
    """Scores a split in this process alone, with the run's chosen checkpoint; returns as `score_split`."""
    engine = load_alone(job, chosen_checkpoint(job.run))
    return score_split(engine, job, split, tick, serve_split(engine, job, split, tick))


def _score_some(job: Job, split: str, tick: Tick) -> tuple[list[Score], dict[str, str]]:
    if not job.cohort.of(split):
        raise TrainerError(f"{job.run}: no slides in the split {split!r}")
    scores, skipped = score_alone(job, split, tick)
    if not scores:  # What was there before is worth more.
        raise TrainerError(f"none of the {len(skipped)} slides of {split} could be scored, the first: {skipped[0][1]}")
    return scores, dict(skipped)


def _write_all(job: Job, split: str, scores: list[Score], skipped: dict[str, str]) -> dict[str, Any]:
    best, cohort = read_best_state(job.run), job.cohort
    result = write_scores(job.run, split, scores, cohort, epoch=best.get("epoch"))
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
            result["heatmap"] = str(draw_attention(job, cases[clearest.slide_id], clearest))
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
