"""`SWEEP/report.html`: a whole sweep on one page that a reviewer can read alone, and the files behind it.

Puts together what `summary`, `tables` and `plots` found; the layout is in `sweep.html`. One thing to know before
changing it: the page leaves the house. It loads nothing, holds no path of a slide, and links to the runs' own reports
by relative addresses alone.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from manifests.files import write_text
from trainer.config import RunConfig
from trainer.errors import TrainerError
from trainer.measures.merits import MERITS, Merit
from trainer.recipes import get_recipe
from trainer.reports.findings import Table, decimals
from trainer.reports.page import duration, render_page
from trainer.reports.runlog import flat_settings
from trainer.sweep.figures import draw_figures
from trainer.sweep.grid import END_TO_END
from trainer.sweep.plan import Plan, check_reference, recipe_of
from trainer.sweep.results import Row, read_rows, write_rows
from trainer.sweep.summary import Summary, by_setting, summarise
from trainer.sweep.tables import (
    MEASURES,
    comparison_table,
    main_csv,
    main_table,
    number,
    title_of,
    to_markdown,
    trend_sentences,
    trend_table,
)

_STATES = {"open": "not begun", "begun": "begun, not ended", "running": "at work", "failed": "failed", "done": "done"}
_OF_AXES = ("tiles.tiles", "tiles.k", "tiles.k_per_rank", "optim.precision", "recipe")


def collect(
    sweep: Path, plan: Plan, reference: str | None = None, advance: Callable[[], None] = lambda: None
) -> tuple[list[Row], Summary, Merit]:
    """Reads all runs and writes what a sweep leaves: results, curves, table 1, figures, the page.

    Args:
        sweep: the sweep's folder.
        plan: of it.
        reference: the method that others are compared with.
        advance: called for each run that was read.

    Raises:
        TrainerError: the sweep has no run of the reference.
    """
    merit = MERITS[plan.configs[END_TO_END].head.task]
    points = plan.points
    check_reference(plan, reference)
    rows, epoch_rows = read_rows(sweep, points, merit, advance)
    summary = summarise(rows, reference)
    write_rows(sweep, rows, epoch_rows, merit)
    tables = [
        table
        for table in (main_table(summary, merit), comparison_table(summary, merit), trend_table(summary, merit))
        if table is not None
    ]
    notes = _notes(plan, rows, summary, merit)
    write_text(sweep / "table1.md", to_markdown(tables, [*trend_sentences(summary, merit), *notes]))
    write_text(sweep / "table1.csv", main_csv(summary, merit))
    figures = draw_figures(sweep, rows, epoch_rows, summary, merit)
    context = {
        "recipe": plan.recipe,
        "sweep_id": sweep.resolve().name,
        "merit_name": MEASURES[merit],
        "counts": Counter(row.state for row in rows),
        "num_runs": len(rows),
        "num_splits": len({row.split for row in rows}),
        "plan": plan,
        "device_hours": sum(row.device_hours or 0 for row in rows),
        "seconds": sum(row.seconds or 0 for row in rows),
        "notes": notes,
        "tables": tables,
        "sentences": trend_sentences(summary, merit),
        "figures": figures,
        "unfinished": _unfinished(rows),
        "cost": _cost_table(rows, summary),
        "facts": _facts(plan, rows),
        "changes": _changes(plan),
        "settings": list(flat_settings("", plan.configs[END_TO_END].to_dict())),
        "runs": [_run_cells(sweep, row) for row in rows],
    }
    write_text(sweep / "report.html", render_page("sweep.html", context, Path(__file__).parent))
    return rows, summary, merit


def _notes(plan: Plan, rows: Sequence[Row], summary: Summary, merit: Merit) -> list[str]:
    """What a reader must know before trusting the table."""
    name, states = MEASURES[merit], Counter(row.state for row in rows)
    notes = []
    if missing := len(rows) - states["done"]:
        told = ", ".join(f"{num} {_STATES[state]}" for state, num in states.items() if state != "done")
        notes.append(f"{missing} of {len(rows)} runs are not done ({told}): the table is of those that are.")
    if skipped := [row for row in rows if row.num_skipped]:
        notes.append(f"{len(skipped)} runs could not read some slides; their own reports name them.")
    notes.append(
        f"The best validation {name} is the highest of all epochs, as the paper reports it; having been chosen, it is "
        f"higher than new slides would give. The test {name} is of slides that chose nothing."
    )
    num_splits = len({row.split for row in rows})
    if num_splits < 2:
        notes.append("One split: there is no spread over splits, and no interval of a difference.")
    elif plan.split_method == "kfold":
        notes.append(
            "k folds: training slides overlap, test slides do not. The corrected t (Nadeau and Bengio 2003) "
            "was derived for random splits; with folds its ratio of scored to training slides is customary, not proven."
        )
    else:
        notes.append(
            "Splits overlap, so runs are not independent: intervals of differences are Nadeau and Bengio's (2003) "
            "corrected resampled t. The bootstrap over splits beside it takes splits as independent and is too narrow."
        )
    for what, name_of in (("versions of Slidegrad", "version"), ("versions of torch", "torch"), ("devices", "device")):
        if len(several := sorted({value for row in rows if (value := getattr(row, name_of))})) > 1:
            notes.append(f"Runs come from several {what}: {', '.join(several)}.")
    nprocs = {row.nproc for row in rows}
    if len(nprocs) > 1 and plan.configs[END_TO_END].virtual_ranks is None:
        notes.append("virtual_ranks is not given, so runs on another number of processes are other runs by design.")
    if any(comparison.against.k != comparison.setting.k for comparison in summary.comparisons):
        notes.append("A method for which K is no axis is compared with the reference at its largest K.")
    return notes


def _unfinished(rows: Sequence[Row]) -> Table | None:
    """Runs that failed, each with its reason, and how many wait."""
    listed: list[tuple[str, ...]] = [
        (row.run, _STATES[row.state], row.reason or "–") for row in rows if row.state == "failed" or row.reason
    ]
    return Table("Runs that failed", ("Run", "State", "Reason"), listed) if listed else None


def _cost_table(rows: Sequence[Row], summary: Summary) -> Table:
    settings = by_setting(rows)
    header = ("Setting", "Processes", "Runs", "Time of a run", "Device-hours", "Tiles/s in training", "Peak memory, GB")
    cells: list[tuple[str, ...]] = []
    for line in summary.lines:
        of_setting = [row for row in settings[line.setting] if row.seconds]
        seconds = [row.seconds for row in of_setting if row.seconds]
        rates = [row.tiles_per_s for row in of_setting if row.tiles_per_s]
        peaks = [row.peak_rss_gb for row in of_setting if row.peak_rss_gb]
        series = line.setting.series
        cells.append(
            (
                f"{title_of(series.method)}, K {line.setting.k_text}, {series.precision}",
                str(series.nproc),
                str(len(of_setting)),
                duration(sum(seconds) / len(seconds)) if seconds else "–",
                decimals(sum(row.device_hours or 0 for row in of_setting), 2),
                decimals(sum(rates) / len(rates), 0) if rates else "–",
                decimals(max(peaks), 1) if peaks else "–",
            )
        )
    return Table("By setting", header, cells)


def _facts(plan: Plan, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What was run, and on what."""
    data, config = plan.data, plan.configs[END_TO_END]
    drawn = {"mccv": "Monte-Carlo cross-validation", "kfold": "k folds"}.get(plan.split_method or "", "given by files")
    splits = f"{len(plan.splits)}, {drawn}, by patient" if plan.splits else "one, from the labels file or the seed"
    facts = [
        ("Slides", f"{data.num_slides:,} of {data.num_patients:,} patients, tiles of {data.tiles}"),
        ("Labels", f"column {', '.join(config.head.columns)}; SHA-256 of the file {data.labels_sha256}"),
        ("Manifests", f"digest {data.manifests_digest}"),
        ("Splits", splits),
        ("Seed", ", ".join(map(str, sorted({row.seed for row in rows if row.seed is not None}))) or str(config.seed)),
        *_weights_facts(plan),
    ]
    for title, name in (("Slidegrad", "version"), ("torch", "torch"), ("Device", "device")):
        if values := sorted({value for row in rows if (value := getattr(row, name))}):
            facts.append((title, ", ".join(values)))
    return facts


def _weights_facts(plan: Plan) -> list[tuple[str, str]]:
    """What the encoder starts from, and whether all methods share it."""
    told = {method: _weights_text(config, plan.weights.get(method)) for method, config in plan.configs.items()}
    used = {point.method for point in plan.points}
    told = {method: text for method, text in told.items() if method in used} or told
    if len(set(told.values())) == 1:
        shared = f"; the same for {'both' if len(told) == 2 else 'all'} methods" if len(told) > 1 else ""
        return [("Encoder starts from", next(iter(told.values())) + shared)]
    return [(f"Encoder of {title_of(method)} starts from", text) for method, text in told.items()]


def _weights_text(config: RunConfig, sha256: str | None) -> str:
    name = config.encoder.name
    if sha256 is None:
        return f"{name}, random weights drawn from seed {config.seed}"
    given = "its own weights (pretrained)" if config.encoder.weights in (None, "pretrained") else "a file of weights"
    return f"{name}, {given}, SHA-256 of the file {sha256}"


def _changes(plan: Plan) -> list[Table]:
    """Settings that are not the recipe's, and what methods change."""
    base = dict(flat_settings("", plan.configs[END_TO_END].to_dict()))
    tables = []
    try:
        recipe = dict(flat_settings("", get_recipe(plan.recipe).to_dict()))
    except TrainerError:  # A recipe that this version no longer has.
        recipe = base
    header = ("Setting", "Recipe", "Here")
    if changed := _changed(recipe, base):
        tables.append(Table("Settings changed from the recipe", header, changed))
    for method, config in plan.configs.items():
        changed = _changed(base, dict(flat_settings("", config.to_dict())))
        if method != END_TO_END and changed:
            title = f"What {recipe_of(plan.recipe, method)} changes"
            tables.append(Table(title, ("Setting", title_of(END_TO_END), title_of(method)), changed))
    return tables


def _changed(before: dict[str, str], after: dict[str, str]) -> list[tuple[str, ...]]:
    return [
        (name, before.get(name, "–"), value)
        for name, value in after.items()
        if before.get(name) != value and name not in _OF_AXES and not name.startswith("machine.")
    ]


def _run_cells(sweep: Path, row: Row) -> dict[str, Any]:
    report = f"runs/{row.run}/report.html"
    return {
        "run": row.run,
        "href": report if (sweep / report).is_file() else "",
        "state": _STATES[row.state],
        "test": number(math.nan if row.test is None else row.test),
        "val": number(math.nan if row.val_best is None else row.val_best),
        "loss": number(math.nan if row.final_train_loss is None else row.final_train_loss),
        "epochs": str(row.num_epochs),
        "digest": row.config_digest,
    }
