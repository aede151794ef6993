"""`RUN/report.html`: what a run did and how good it is, as one file to open, print or send.

Computes nothing but what `result.json` would say, and names what is missing. Files are read by `runlog`, what scores
show is found by `findings`, layout is in `report.html`, pictures are in `plots`. One thing to know before changing it:
a report leaves the house. It loads nothing from elsewhere, and holds slide ids but never a path.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manifests.files import write_text
from trainer.errors import TrainerError
from trainer.evaluation import tables
from trainer.measures.merits import MERITS, measure_all, rank_of
from trainer.measures.statistics import Interval
from trainer.reports import plots
from trainer.reports.findings import Findings, find_all
from trainer.reports.page import render_page
from trainer.reports.pictures import find_curves, find_heatmap
from trainer.reports.runlog import (
    SPLITS,
    RunLog,
    Scores,
    read_evaluation,
    read_log,
    read_result,
    read_scores,
    read_settings,
)
from trainer.targets import Task

_MEASURES = {"auc": "AUC", "r2": "R²", "loss": "loss"}
_FLOORS = {"auc": (0.5, "chance"), "r2": (0.0, "the mean")}
_DIGESTS = {"cohort": "slides, labels and splits", "manifests": "manifests", "weights": "the encoder's first weights"}


def write_report(run: Path) -> Path:
    """Writes `RUN/report.html` from what is in the run's folder; what is missing is named in the report.

    Args:
        run: the run's folder, with `metrics.jsonl` and, as far as they are there, `config.yaml`, `scores.parquet`,
            `result.json`, `evaluation/` and `heatmaps/*.png` (named by `manifests.files.disk_name`).

    Returns:
        The report's file.

    Raises:
        TrainerError: no run there, or a file of it that cannot be read.
    """
    if not (run / "metrics.jsonl").is_file():
        raise TrainerError(f"{run}: no run here (no metrics.jsonl); give the folder of `slidegrad train --out`")
    log, result, settings = read_log(run), read_result(run), read_settings(run)
    scores = read_scores(run, result)
    told = result.get("task") or settings.get("head.task")
    task: Task = scores.task if scores else next((known for known in MERITS if known == told), "classes")
    merit, findings = MERITS[task], find_all(scores, task)
    best = _best_epoch(log, result, merit)
    context = {
        "run_id": run.resolve().name,
        "log": log,
        "settings": settings,
        "merit": merit,
        "merit_name": _MEASURES[merit],
        "headline": _headline(result, scores, merit),
        "no_headline": _no_headline(log, scores),
        "val": best,
        "cost": _cost(log),
        "learning": _learning_charts(log, best["epoch"], merit),
        "scores": scores,
        "findings": findings,
        "evaluation": _evaluation(run, scores, result),
        "heatmap": find_heatmap(run / "heatmaps", scores),
        "skips": _skips(log, result),
        "notes": _notes(log, scores, findings),
        "split_names": SPLITS,
        "digest_names": _DIGESTS,
    }
    out = run / "report.html"
    write_text(out, render_page("report.html", context))
    return out


def _headline(result: Mapping[str, Any], scores: Scores | None, merit: str) -> dict[str, Any] | None:
    """The measure that counts: from `result.json`, else from the scores; None if there is none."""
    if not _is_number(result.get(merit)) and scores:
        names = tuple(scores.names)
        measured = measure_all(scores.task, names, scores.targets, scores.predictions, scores.patients)
        result = {"num_slides": len(scores.slide_ids), **result, **measured, "split": scores.split}
    if not _is_number(result.get(merit)):
        return None
    interval = result.get(f"{merit}_ci")
    interval = Interval(*interval) if interval and all(map(_is_number, interval)) else None
    # The scale: from what a model that knows nothing is worth, or from lower down if the interval reaches there.
    axis_low = _FLOORS[merit][0]
    if interval is None or interval.low < axis_low:
        axis_low = 0.0 if merit == "auc" else np.floor(interval.low) if interval else 0.0
    return {
        "value": result[merit],
        "interval": interval,
        "axis_low": axis_low,
        "floor": f"{axis_low:g} {_FLOORS[merit][1]}" if axis_low == _FLOORS[merit][0] else f"{axis_low:g}",
        "split": result["split"],
        "num_slides": result.get("num_slides"),
    }


def _no_headline(log: RunLog, scores: Scores | None) -> str:
    """Why there is no measure."""
    if scores:
        lack = "have one value only" if scores.task == "regression" else "are of one class"
        return f"Not defined: the {len(scores.slide_ids)} scored slides {lack}, or scores are not numbers."
    if log.run.get("num_slides", {}).get("test") == 0:
        return "This cohort has no test slides."
    return "Not scored yet; slidegrad evaluate does."


def _best_epoch(log: RunLog, result: Mapping[str, Any], merit: str) -> dict[str, Any]:
    """The chosen checkpoint's epoch, of the best one so far while the run goes on, and what it was chosen by."""
    lines = {
        line["epoch"]: (line.get(f"val_{merit}"), None if line["val_loss"] is None else -line["val_loss"])
        for line in log.epochs
    }
    best = result.get("best_epoch")
    if best is None and lines:  # As `Loop` chooses.
        best = max(lines, key=lambda epoch: rank_of(lines[epoch]))
        best = best if lines[best] != (None, None) else None
    value, minus_loss = lines.get(best, (None, None))
    if _is_number(result.get(f"val_{merit}")):
        value = result[f"val_{merit}"]
    if value is None and minus_loss is not None:
        return {"epoch": best, "measure": "loss", "value": -minus_loss}
    return {"epoch": best, "measure": _MEASURES[merit], "value": value}


def _cost(log: RunLog) -> dict[str, Any]:
    step_s, wait_s, num_tiles = (sum(s[key] for s in log.steps) for key in ("step_s", "data_wait_s", "num_tiles"))
    epoch_s = sum(line["seconds"] for line in log.epochs)
    hours, memory = ([line[key] for line in log.epochs if key in line] for key in ("device_hours", "memory_gb"))
    return {
        "device_hours": sum(hours) if hours else None,
        "memory_gb": max(memory, default=None),
        # A resumed run's last line knows its last start alone.
        "wall_s": log.end["seconds"] if log.end and log.num_starts == 1 else epoch_s or step_s,
        "epoch_s": epoch_s / len(log.epochs) if log.epochs else None,
        "num_tiles": num_tiles,
        "tiles_per_s": num_tiles / step_s if step_s else None,
        "wait_share": min(wait_s / step_s, 1.0) if step_s else None,
    }


def _learning_charts(log: RunLog, best_epoch: int | None, merit: str) -> dict[str, str]:
    charts = dict.fromkeys(("loss", "merit", "lr", "throughput"), "")
    if log.epochs:
        epochs, train, val, values = _columns(log.epochs, "epoch", "train_loss", "val_loss", f"val_{merit}")
        charts["loss"] = plots.loss_curves(epochs, train, val, best_epoch=best_epoch)
        if np.isfinite(values).any():
            name, floor = _MEASURES[merit], _FLOORS[merit]
            charts["merit"] = plots.merit_curve(epochs, values, measure=name, floor=floor, best_epoch=best_epoch)
    if log.steps:
        steps, lr, tiles, step_s, wait_s = _columns(log.steps, "step", "lr", "num_tiles", "step_s", "data_wait_s")
        step_s = np.maximum(step_s, 1e-9)
        charts["lr"] = plots.learning_rate(steps, lr)
        charts["throughput"] = plots.throughput(steps, tiles / step_s, np.minimum(wait_s / step_s, 1))
    return charts


def _columns(lines: list[dict[str, Any]], *names: str) -> list[NDArray[np.float64]]:
    """One array for each name; null is NaN."""
    return [np.array([line.get(name) for line in lines], np.float64) for name in names]


def _evaluation(run: Path, scores: Scores | None, result: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `slidegrad evaluate` found for these scores; None where it did not look at them yet."""
    found = read_evaluation(run, scores, result)
    if scores is None or found is None:
        return None
    return {
        "tables": tables.build_all(scores.task, found["levels"], found["subgroups"], found["against"]),
        "curves": find_curves(run / "evaluation", scores.split),
        "notes": tables.describe(found, found["levels"], ()) + tables.describe_subgroups(found["subgroups"]),
    }


def _skips(log: RunLog, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Slides skipped in training, and the reasons of those skipped in scoring alone."""
    known = {line["reason"] for line in log.skips}
    scoring = [reason for reason in dict.fromkeys(result.get("skipped", [])) if reason not in known]
    return [*log.skips, *({"slide_id": "", "num": 1, "reason": reason} for reason in scoring)]


def _notes(log: RunLog, scores: Scores | None, findings: Findings) -> list[str]:
    """What a reader must know before trusting the headline."""
    notes = []
    if log.end is None:
        notes.append("The run had not ended when this report was written; curves and checkpoint are those so far.")
    if log.num_starts > 1:
        notes.append(f"Started {log.num_starts} times, resumed in between; repeated steps are shown as last done.")
    if scores is None:
        return notes
    if scores.split != "test":
        notes.append(
            f"These are not test results: they come from the {SPLITS.get(scores.split, scores.split)} slides, which "
            "also took part in making the model. Expect less on new slides."
        )
    if np.isnan(scores.predictions).any():
        notes.append("Some scores are not numbers: the model diverged.")
    if (num_patients := len(set(scores.patients))) < len(scores.slide_ids):
        notes.append(
            f"{len(scores.slide_ids)} slides come from {num_patients} patients. Intervals are drawn by patients, as "
            "slides of one patient are alike; slidegrad evaluate tells what is found for patients."
        )
    return notes + findings.notes


def _is_number(value: float | None) -> bool:
    return value is not None and bool(np.isfinite(value))
