"""Runs that are made up: config, cohort and scores, without any slide."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.cohort import Case, Cohort
from trainer.config import Head, RunConfig
from trainer.splits.grouping import SPLITS
from trainer.targets import Task

NAMES = {"multilabel": ("er", "pr"), "regression": ("score", "ki67")}


def make_run(
    run: Path, *, task: Task = "classes", num_classes: int = 2, patients: int = 24, per_patient: int = 2, seed: int = 0
) -> Path:
    """A run whose test, val and train patients take turns; scores know the truth a little; `labels.csv` has sex, site.

    Every fourth patient has one slide of class 0 whatever the others are.
    """
    rng, truth = np.random.default_rng(seed), np.random.default_rng(99)  # Another seed is another model.
    cases, rows, cells = [], [], []
    for p in range(patients):
        label = p // 3 % num_classes
        for i in range(per_patient):
            slide_id = f"s{p:03d}_{i}"
            if task == "classes":
                target = 0 if i == 1 and p % 4 == 3 else label
                targets: tuple[float, ...] = (float(target),)
                odds = rng.normal(0, 2, size=num_classes) + 1.2 * np.eye(num_classes)[target]
                found = np.exp(odds) / np.exp(odds).sum()
            elif task == "multilabel":
                targets = tuple(math.nan if (p + c) % 7 == 0 else float((p // 3 + c * i) % 2) for c in range(2))
                found = 1 / (1 + np.exp(-rng.normal(2 * np.nan_to_num(targets) - 1)))
            else:
                targets = tuple(float(x) for x in truth.normal(50, 10, 2))
                found = np.array(targets) + rng.normal(0, 5, 2)
            split = SPLITS[2 - p % 3]
            ids = {"specimen_id": f"p{p}", "patient_id": f"p{p}"}
            cases.append(Case(slide_id=slide_id, targets=targets, split=split, num_tiles=5, **ids))
            known = [None if math.isnan(target) else target for target in targets]
            told = {"label": int(targets[0])} if task == "classes" else {"targets": known}
            rows.append({"slide_id": slide_id, "patient_id": f"p{p}", "split": split, "found": found.tolist(), **told})
            texts = ["" if math.isnan(t) else repr(t) if task == "regression" else f"{t:.0f}" for t in targets]
            cells.append([slide_id, *texts, "FM"[p // 6 % 2], ("A", "B", "")[p // 3 % 3]])
    columns = NAMES.get(task, ("label",))
    classes = tuple(map(str, range(num_classes))) if task == "classes" else ()
    run.mkdir(parents=True, exist_ok=True)
    Cohort(tuple(cases), classes, task=task, columns=columns).write(run / "cohort.csv")
    (run / "config.yaml").write_text(RunConfig(virtual_ranks=1, head=Head(task=task, columns=columns)).to_yaml())
    columns_kept = ("slide_id", "patient_id", "split", "label" if task == "classes" else "targets")
    table = {name: [row[name] for row in rows] for name in columns_kept}
    table["values" if task == "regression" else "probs"] = [row["found"] for row in rows]
    pq.write_table(pa.table(table), run / "scores.parquet")
    with (run / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["slide_id", *columns, "sex", "site"], *cells])
    return run


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Makes a run in a folder of this name."""

    def make_here(name: str = "run", **options: Any) -> Path:
        return make_run(tmp_path / name, **options)

    return make_here
