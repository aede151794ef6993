"""What a run left in its folder, read back for its report: log, scores, result, settings.

Reads and checks, decides nothing and shows nothing (`report` does). One thing to know before changing it: settings and
errors come out without paths (`without_paths`), because file names at hospitals often hold names of people and a
report leaves the house. Slide ids stay.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from manifests.privacy import without_paths
from trainer.errors import TrainerError
from trainer.journal import read_events
from trainer.measures.merits import PREDICTED
from trainer.targets import Task

SPLITS = {"test": "test", "val": "validation", "train": "training"}
"""In the order in which results are looked for, and as they are called in a sentence."""
_PATH_SETTINGS = frozenset({"machine.manifests", "machine.archive", "encoder.weights"})
"""Blanked whatever they look like: a folder `Doe` is no path to `without_paths`."""


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """What `metrics.jsonl` says, each step and each epoch once, in order."""

    run: dict[str, Any]
    """The latest start of the run; empty if none was logged."""
    num_starts: int
    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    skips: list[dict[str, Any]]
    """slide_id, the last `reason`, and `num`, how many epochs it was skipped in."""
    num_local: int
    """Manifests that an index did not give, and that came from the folder."""
    end: dict[str, Any] | None
    """None while the run goes on, or if it was stopped."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one split."""

    split: str
    slide_ids: list[str]
    patients: list[str]
    """Of each slide."""
    task: Task
    names: list[str]
    """Of the classes, or of the columns."""
    targets: NDArray[np.float64]
    """(n, 1) of classes, else (n, C) with NaN where they are not known."""
    predictions: NDArray[np.float64]
    """(n, C): probabilities, or numbers in the columns' units."""


def read_log(run: Path) -> RunLog:
    """Reads `metrics.jsonl`. A resumed run repeats steps and epochs: the last line for each wins."""
    starts, end = [], None
    steps: dict[int, dict[str, Any]] = {}
    epochs: dict[int, dict[str, Any]] = {}
    skipped: dict[str, dict[int, str]] = {}
    local: dict[int, int] = {}
    for line in read_events(run):
        match line["event"]:
            case "run":
                starts.append(line)
                end = None  # An earlier end was not the end: the run was resumed.
            case "step":
                steps[line["step"]] = line
            case "epoch":
                epochs[line["epoch"]] = line
            case "skip":
                skipped.setdefault(line["slide_id"], {})[line["epoch"]] = line["reason"]
            case "index":
                local[line["epoch"]] = line["num_local"]
            case "end":
                end = line
    return RunLog(
        run=starts[-1] if starts else {},
        num_starts=len(starts),
        steps=[steps[key] for key in sorted(steps)],
        epochs=[epochs[key] for key in sorted(epochs)],
        skips=[
            {"slide_id": slide_id, "num": len(reasons), "reason": without_paths(list(reasons.values())[-1])}
            for slide_id, reasons in sorted(skipped.items())
        ],
        num_local=sum(local.values()),
        end=end,
    )


def read_result(run: Path) -> dict[str, Any]:
    """`result.json` with no paths in the reasons of `skipped`; empty if there is none."""
    with _readable(run / "result.json") as file:
        if file is None:
            return {}
        result = dict(json.loads(file.read_text(encoding="utf-8")))
        return result | {"skipped": [without_paths(reason) for reason in result.get("skipped") or []]}


def read_scores(run: Path, result: Mapping[str, Any]) -> Scores | None:
    """The scores of the result's split, else of the first of test, val and train that has any; None without any."""
    with _readable(run / "scores.parquet") as file:
        rows = pq.read_table(file).to_pylist() if file else []
        split = next((s for s in (result.get("split"), *SPLITS) if any(row["split"] == s for row in rows)), None)
        if split is None:
            return None
        rows = [row for row in rows if row["split"] == split]
        # As `scoring.write_scores` has it.
        task: Task = "classes" if "label" in rows[0] else "regression" if "values" in rows[0] else "multilabel"
        predictions = np.array([row[PREDICTED[task]] for row in rows], np.float64)
        listed = result.get("classes" if task == "classes" else "columns", range(predictions.shape[1]))
        names = [str(name) for name in listed]
        return Scores(
            split=split,
            slide_ids=[row["slide_id"] for row in rows],
            patients=[row["patient_id"] for row in rows],
            task=task,
            names=["negative", "positive"] if task == "classes" and names == ["0", "1"] else names,
            targets=np.array([[row["label"]] if task == "classes" else row["targets"] for row in rows], np.float64),
            predictions=predictions,
        )


def read_evaluation(run: Path, scores: Scores | None, result: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `slidegrad evaluate` wrote of these scores; None if it did not, or of another checkpoint's."""
    if scores is None:
        return None
    with _readable(run / "evaluation" / f"{scores.split}.json") as file:
        if file is None:
            return None
        found = dict(json.loads(file.read_text(encoding="utf-8")))
        same = found["best_epoch"] == result.get("best_epoch") and found["num_slides"] == len(scores.slide_ids)
        return found if same else None


def read_settings(run: Path) -> dict[str, str]:
    """`config.yaml` as dotted key to value, without paths; empty if there is none."""
    with _readable(run / "config.yaml") as file:
        return dict(flat_settings("", yaml.safe_load(file.read_text(encoding="utf-8")))) if file else {}


def flat_settings(prefix: str, node: object) -> Iterator[tuple[str, str]]:
    """Settings as dotted keys with their values as text, without paths.

    Args:
        prefix: of the keys; empty for a whole config.
        node: nested values, as from YAML.
    """
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from flat_settings(f"{prefix}.{key}" if prefix else str(key), value)
    else:
        text = node if isinstance(node, str) else json.dumps(node, ensure_ascii=False, default=str)
        yield prefix, "[path]" if prefix in _PATH_SETTINGS and node not in (None, "pretrained") else without_paths(text)


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[Path | None]:
    """The file, None if there is none; whatever goes wrong with it inside is told with its name."""
    try:
        yield file if file.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, yaml.YAMLError) as error:
        raise TrainerError(f"{file}: not readable ({error}); move it away or make it again") from None
