"""Sweeps whose runs were never trained: the files that runs leave, with numbers that are known."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import Encoder, RunConfig, Tiles
from trainer.recipes import get_recipe
from trainer.scoring import write_result
from trainer.sweep.grid import END_TO_END, Grid, Point
from trainer.sweep.plan import Data, Plan, write_plan
from trainer.sweep.states import Ended, run_folder, write_ended

DATA = Data(
    labels_sha256="ab" * 32, manifests_digest="cd" * 32, num_slides=120, num_patients=90, tiles="32 px at 2 mpp"
)
NUM_SLIDES = {"train": 80, "val": 16, "test": 24}


def made_up_plan(grid: Grid, recipe: str = "demo", **changes: Any) -> Plan:
    """A plan without a cohort behind it."""
    config = get_recipe(recipe)
    configs = {method: _config(config, method) for method in dict.fromkeys((END_TO_END, *grid.methods))}
    splits = {name: name * 16 for name in grid.splits if name}
    plan = Plan(
        recipe=recipe,
        data=DATA,
        configs=configs,
        weights=dict.fromkeys(configs),
        splits=splits,
        split_method="mccv" if splits else None,
        grids=(grid,),
    )
    return dataclasses.replace(plan, **changes)


def make_sweep(sweep: Path, plan: Plan, *, num_epochs: int = 3) -> None:
    """All runs of the plan, done."""
    write_plan(sweep, plan)
    for point in plan.points:
        make_run(sweep, point, plan.configs[point.method], num_epochs=num_epochs)


def make_run(sweep: Path, point: Point, config: RunConfig, *, num_epochs: int = 3, is_done: bool = True) -> None:
    """One run: settings, journal, result."""
    run = run_folder(sweep, point.name)
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dataclasses.replace(config, virtual_ranks=2).to_yaml())
    start = {
        "event": "run",
        "recipe": config.recipe,
        "versions": {"slidegrad": "0.1.0", "torch": "2.11.0"},
        "device": "cpu",
    }
    lines: list[dict[str, Any]] = [start | {"num_slides": NUM_SLIDES}]
    for epoch in range(num_epochs):
        lines.append({"event": "step", "step": epoch, "epoch": epoch, "slide_id": "a", "loss": 0.5})
        loss = loss_of(point) + 0.3 * (num_epochs - 1 - epoch) / num_epochs
        epoch_line = {"event": "epoch", "epoch": epoch, "train_loss": loss, "val_loss": 0.6, "val_auc": val_of(point)}
        lines.append(epoch_line | {"seconds": 100.0, "tiles_per_s": 50.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if is_done:
        auc = auc_of(point)
        result = {"auc": auc, "auc_ci": [auc - 0.1, auc + 0.1], "val_auc": val_of(point), "best_epoch": 1}
        write_result(run, result | {"num_skipped": 0, "split": "test", "num_slides": 24, "run": str(run)})
        (run / "report.html").write_text("<!doctype html>")
        write_ended(sweep, point.name, Ended(code=0, peak_rss_bytes=1_500_000_000))


def loss_of(point: Point) -> float:
    """0.25 + 0.5 exp(-K / 500), a little apart by split."""
    k = point.k if isinstance(point.k, int) else 5_000
    return 0.25 + 0.5 * math.exp(-k / 500) + 0.02 * _luck(point, "loss")


def auc_of(point: Point) -> float:
    """On the test slides: better for more tiles, and end to end."""
    k = point.k if isinstance(point.k, int) else 5_000
    worse = 0.0 if point.method == END_TO_END else 0.06
    of_split = np.random.default_rng(int(point.split[1:] or 0) if point.split else 0).normal()
    return round(0.72 - worse + 0.025 * math.log10(k / 50) + 0.03 * of_split + 0.01 * _luck(point, "auc"), 4)


def val_of(point: Point) -> float:
    """The best of validation."""
    return round(auc_of(point) + 0.03, 4)


def _luck(point: Point, what: str) -> float:
    return float(np.random.default_rng(sum(f"{point.name} {what}".encode())).normal())


def _config(config: RunConfig, method: str) -> RunConfig:
    if method == END_TO_END:
        return config
    encoder = Encoder(name=config.encoder.name, weights=config.encoder.weights, freeze="all")
    changed = dataclasses.replace(config, recipe=f"{config.recipe}+{method}", encoder=encoder)
    if method == "max_pool":  # Whatever a recipe calls tiles that a method chooses.
        tiles = Tiles()
        object.__setattr__(tiles, "tiles", "top")
        changed = dataclasses.replace(changed, tiles=tiles)
    return changed
