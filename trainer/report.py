"""`RUN/report.html`: what a run did and how good it is, as one file to open, print or send.

Computes nothing but the ROC and what `result.json` would say, and names what is missing. Files are read by `runlog`,
layout is in `report.html`, pictures are in `plots`. One thing to know before changing it: a report leaves the house.
It loads nothing from elsewhere, and holds slide ids but never a path.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from manifests.files import disk_name, write_text
from trainer import plots
from trainer.errors import TrainerError
from trainer.runlog import SPLITS, RunLog, Scores, read_log, read_result, read_scores, read_settings
from trainer.statistics import Interval, auc, bootstrap_auc, macro_auc, roc_band

_FEW_SLIDES = 20
"""Below this many slides of a class the report warns that the interval itself is uncertain."""
_MAX_PICTURE_PX = 1800


def write_report(run: Path) -> Path:
    """Writes `RUN/report.html` from what is in the run's folder; what is missing is named in the report.

    Args:
        run: the run's folder, with `metrics.jsonl` and, as far as they are there, `config.yaml`, `scores.parquet`,
            `result.json` and `heatmaps/*.png` (named by `manifests.files.disk_name`).

    Returns:
        The report's file.

    Raises:
        TrainerError: no run there, or a file of it that cannot be read.
    """
    if not (run / "metrics.jsonl").is_file():
        raise TrainerError(f"{run}: no run here (no metrics.jsonl); give the folder of `slidegrad train --out`")
    log, result, settings = read_log(run), read_result(run), read_settings(run)
    scores = read_scores(run, result)
    best = _best_epoch(log, result)
    context = {
        "run_id": run.resolve().name,
        "log": log,
        "settings": settings,
        "headline": _headline(result, scores),
        "no_headline": _no_headline(log, scores),
        "val": best,
        "cost": _cost(log),
        "charts": {name: Markup(svg) for name, svg in (_learning_charts(log, best["epoch"]) | _roc(scores)).items()},
        "scores": scores,
        "classes": _class_table(scores),
        "surprises": _surprises(scores),
        "heatmap": _heatmap(run / "heatmaps", scores),
        "skips": _skips(log, result),
        "notes": _notes(log, scores),
        "split_names": SPLITS,
    }
    layouts = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=layouts, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(duration=_duration, decimals=_decimals)
    out = run / "report.html"
    write_text(out, environment.get_template("report.html").render(context))
    return out


def _headline(result: Mapping[str, Any], scores: Scores | None) -> dict[str, Any] | None:
    """The AUC that counts: from `result.json`, else from the scores; None if there is none."""
    if _is_number(result.get("auc")):
        value, split, interval = result["auc"], result["split"], result.get("auc_ci")
    elif scores:
        value, split = macro_auc(scores.labels, scores.probs), scores.split
        interval = bootstrap_auc(scores.labels, scores.probs[:, 1]) if scores.is_binary else None
    else:
        return None
    if not _is_number(value):
        return None
    interval = Interval(*interval) if interval and all(map(_is_number, interval)) else None
    axis_low = 0.5 if interval and interval.low >= 0.5 else 0.0
    num_slides = result.get("num_slides", len(scores.labels) if scores else None)
    return {"auc": value, "interval": interval, "axis_low": axis_low, "split": split, "num_slides": num_slides}


def _no_headline(log: RunLog, scores: Scores | None) -> str:
    """Why there is no AUC."""
    if scores:
        return f"Not defined: the {len(scores.labels)} scored slides are of one class, or scores are not numbers."
    if log.run.get("num_slides", {}).get("test") == 0:
        return "This cohort has no test slides."
    return "Not scored yet; slidegrad evaluate does."


def _best_epoch(log: RunLog, result: Mapping[str, Any]) -> dict[str, Any]:
    """Epoch and validation AUC of the chosen checkpoint; of the best epoch so far while the run goes on."""
    lines = {line["epoch"]: line for line in log.epochs if _is_number(line["val_auc"])}
    best = result.get("best_epoch")
    if best is None and lines:  # As `Loop` chooses: AUC decides, the loss breaks ties.
        best = max(lines, key=lambda epoch: (lines[epoch]["val_auc"], -(lines[epoch]["val_loss"] or 0)))
    value = result.get("val_auc")
    return {"epoch": best, "auc": value if _is_number(value) else lines.get(best, {}).get("val_auc")}


def _cost(log: RunLog) -> dict[str, Any]:
    step_s, wait_s, num_tiles = (sum(s[key] for s in log.steps) for key in ("step_s", "data_wait_s", "num_tiles"))
    epoch_s = sum(line["seconds"] for line in log.epochs)
    return {
        # A resumed run's last line knows its last start alone.
        "wall_s": log.end["seconds"] if log.end and log.num_starts == 1 else epoch_s or step_s,
        "epoch_s": epoch_s / len(log.epochs) if log.epochs else None,
        "num_tiles": num_tiles,
        "tiles_per_s": num_tiles / step_s if step_s else None,
        "wait_share": min(wait_s / step_s, 1.0) if step_s else None,
    }


def _learning_charts(log: RunLog, best_epoch: int | None) -> dict[str, str]:
    charts = {}
    if log.epochs:
        epochs, train, val, val_auc = _columns(log.epochs, "epoch", "train_loss", "val_loss", "val_auc")
        charts["loss"] = plots.loss_curves(epochs, train, val, best_epoch=best_epoch)
        if np.isfinite(val_auc).any():
            charts["auc"] = plots.auc_curve(epochs, val_auc, best_epoch=best_epoch)
    if log.steps:
        steps, lr, tiles, step_s, wait_s = _columns(log.steps, "step", "lr", "num_tiles", "step_s", "data_wait_s")
        step_s = np.maximum(step_s, 1e-9)
        charts["lr"] = plots.learning_rate(steps, lr)
        charts["throughput"] = plots.throughput(steps, tiles / step_s, np.minimum(wait_s / step_s, 1))
    return charts


def _columns(lines: list[dict[str, Any]], *names: str) -> list[NDArray[np.float64]]:
    """One array for each name; null is NaN."""
    return [np.array([line[name] for line in lines], np.float64) for name in names]


def _roc(scores: Scores | None) -> dict[str, str]:
    if scores is None or not scores.is_binary or np.isnan(scores.probs).any():
        return {}
    case = scores.labels, scores.probs[:, 1]
    charts = {"scores": plots.score_distribution(*case, names=scores.classes)}
    if min(scores.counts):
        charts["roc"] = plots.roc(roc_band(*case), auc(*case), bootstrap_auc(*case))
    return charts


def _class_table(scores: Scores | None) -> list[dict[str, Any]]:
    """Each class against the rest, where there are more than two."""
    if scores is None or scores.is_binary:
        return []
    cases = [(scores.labels == c, scores.probs[:, c]) for c in range(len(scores.classes))]
    return [
        {"name": name, "num": num, "auc": auc(*case), "interval": bootstrap_auc(*case)}
        for name, num, case in zip(scores.classes, scores.counts, cases, strict=True)
    ]


def _surprises(scores: Scores | None, num: int = 5) -> dict[str, list[tuple[str, float]]]:
    """The slides to look at: the positives with the lowest scores, the negatives with the highest."""
    if scores is None or not scores.is_binary:
        return {}
    ranked = [(int(i), float(scores.probs[i, 1])) for i in np.argsort(scores.probs[:, 1], kind="stable")]
    return {
        title: [(scores.slide_ids[i], score) for i, score in order if scores.labels[i] == label][:num]
        for title, label, order in (
            (f"Lowest scores of {scores.classes[1]} slides", 1, ranked),
            (f"Highest scores of {scores.classes[0]} slides", 0, ranked[::-1]),
        )
    }


def _heatmap(folder: Path, scores: Scores | None) -> dict[str, Any] | None:
    """The heatmap of the slide of the last class with the highest score, else of any; None if there is none."""
    files = {file.stem: file for file in sorted(folder.glob("*.png"))}
    file, about = next(iter(files.values()), None), dict[str, Any]()
    if scores:
        wanted = np.lexsort((-scores.probs[:, -1], scores.labels != len(scores.classes) - 1))
        if (i := next((i for i in wanted if disk_name(scores.slide_ids[i]) in files), None)) is not None:
            file = files[disk_name(scores.slide_ids[i])]
            about = {"slide_id": scores.slide_ids[i], "label": scores.classes[scores.labels[i]]}
            about["score"] = float(scores.probs[i, -1])
    if file is None or (picture := cv2.imread(str(file))) is None:
        return None
    shrink = min(1.0, _MAX_PICTURE_PX / max(picture.shape[:2]))
    picture = cv2.resize(picture, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
    uri = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    return {"uri": uri, "slide_id": file.stem, "label": None, "score": None} | about


def _skips(log: RunLog, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Slides skipped in training, and the reasons of those skipped in scoring alone."""
    known = {line["reason"] for line in log.skips}
    scoring = [reason for reason in dict.fromkeys(result.get("skipped", [])) if reason not in known]
    return [*log.skips, *({"slide_id": "", "num": 1, "reason": reason} for reason in scoring)]


def _notes(log: RunLog, scores: Scores | None) -> list[str]:
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
    if np.isnan(scores.probs).any():
        notes.append("Some scores are not numbers: the model diverged.")
    if 0 < min(scores.counts) < _FEW_SLIDES:
        fewest = min(scores.counts)
        notes.append(f"The smallest class has {fewest} slides; with so few the interval itself is uncertain.")
    if scores.num_patients < len(scores.labels):
        notes.append(
            f"{len(scores.labels)} slides come from {scores.num_patients} patients. The interval takes slides as "
            "independent, so it may be too narrow."
        )
    if scores.is_binary and auc(scores.labels, scores.probs[:, 1]) == 1:
        notes.append("The scores separate the classes wholly: the interval is a point, on new slides it would not be.")
    return notes


def _is_number(value: float | None) -> bool:
    return value is not None and bool(np.isfinite(value))


def _decimals(value: float | None, digits: int = 3) -> str:
    return f"{value:,.{digits}f}" if value is not None and np.isfinite(value) else "–"


def _duration(seconds: float) -> str:
    """As 2 d 3 h, 3 h 20 min, 4 min 10 s or 12.3 s."""
    for size, name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{seconds // size:.0f} {name} {seconds % size // small:.0f} {small_name}"
    return f"{seconds:.1f} s"
