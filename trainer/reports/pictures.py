"""The pictures that other commands left in a run's folder, for its report: embedded, none too large to send."""

import base64
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from manifests.files import disk_name
from trainer.reports.findings import decimals, significant
from trainer.reports.runlog import Scores

_MAX_PX = 1800
_OF_SLIDE = {"": "attention", "_contribution": "contribution", "_tiles": "tiles"}
"""What a slide's heatmap may leave (`trainer.heatmaps.drawing`), by the end of the file's name."""
_OF_SCORES = {"pr": "Precision and recall", "calibration": "Calibration"}
"""Of `trainer.evaluation.pictures`, those that the report does not draw itself."""


class Heatmap(NamedTuple):
    """One slide's pictures, as addresses with the picture in them, by what they show."""

    slide_id: str
    about: str
    """What is true of the slide, and what was predicted."""
    uris: dict[str, str]
    """attention, contribution, tiles: those that are there, attention always."""


def find_heatmap(folder: Path, scores: Scores | None) -> Heatmap | None:
    """The heatmap of the slide with most of what is looked for, else of any; None if there is none.

    That is the highest score of the last class, in slides of that class if there are; or in the first column.

    Args:
        folder: `RUN/heatmaps`.
        scores: the run's.
    """
    names = {file.stem for file in folder.glob("*.png")}
    others = tuple(filter(None, _OF_SLIDE))
    name, slide_id, about = next((name for name in sorted(names) if not name.endswith(others)), None), None, ""
    if scores:
        column = -1 if scores.task == "classes" else 0
        is_other = scores.targets[:, 0] != len(scores.names) - 1 if scores.task == "classes" else 0
        wanted = np.lexsort((-scores.predictions[:, column], np.broadcast_to(is_other, len(scores.slide_ids))))
        if (i := next((i for i in wanted if disk_name(scores.slide_ids[i]) in names), None)) is not None:
            slide_id = scores.slide_ids[i]
            name, about = disk_name(slide_id), _describe(scores, i)
    if name is None:
        return None
    uris = {shown: _embed(folder / f"{name}{end}.png") for end, shown in _OF_SLIDE.items()}
    if not uris["attention"]:
        return None
    return Heatmap(slide_id or name, about, {shown: uri for shown, uri in uris.items() if uri})


def find_curves(folder: Path, split: str) -> list[dict[str, Any]]:
    """Title and picture of each curve that `slidegrad evaluate` drew of this split.

    Args:
        folder: `RUN/evaluation`.
        split: its name.
    """
    found = [{"title": title, "uri": _embed(folder / f"{split}_{kind}.png")} for kind, title in _OF_SCORES.items()]
    return [picture for picture in found if picture["uri"]]


def _embed(file: Path) -> str:
    """The picture in an address of its own; "" where there is none that can be read."""
    picture = cv2.imread(str(file)) if file.is_file() else None
    if picture is None:
        return ""
    shrink = min(1.0, _MAX_PX / max(picture.shape[:2]))
    picture = cv2.resize(picture, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _describe(scores: Scores, i: int) -> str:
    """What is true of slide number `i`, and what was predicted."""
    target, name = scores.targets[i, 0], scores.names[0]
    if scores.task == "classes":
        return f"label {scores.names[round(target)]}, score {decimals(scores.predictions[i, -1])}"
    true = "not known" if np.isnan(target) else significant(target)
    is_number = scores.task == "regression"
    found = significant(scores.predictions[i, 0]) if is_number else decimals(scores.predictions[i, 0])
    return f"{name} {true}, {'predicted' if is_number else 'score'} {found}"
