"""Scores of slides: by all ranks together for validation, test and the ranking of tiles; and what they add up to."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from manifests.files import atomic_path, write_text
from manifests.parse import METADATA_KEY
from trainer.cohort import Cohort
from trainer.job import Job
from trainer.loading.quarantine import quarantined
from trainer.loading.shards import ShardLoader
from trainer.measures.merits import PREDICTED, find_merit, measure_all
from trainer.sampler import ALL, Eligible, StepPlan, plan_scoring, shards_of, steps_of
from trainer.step import Engine, SlideInput
from trainer.stopping import is_noted, stopped, wants_stop

Taken = TypeVar("Taken")


class Tick(Protocol):
    """Progress: one call for each slide done."""

    def __call__(self, *, doing: str, total: int, about: str = "", note: str = "") -> None:
        """Tells what is being done, to how many slides in all; `about` stands beside the bar, `note` in a line."""


@dataclass(frozen=True)
class Score:
    """One slide's predictions (C,), loss, and attention per row of its manifest that was scored."""

    slide_id: str
    predictions: NDArray[np.float64]
    """As `heads.Head.predict` has them."""
    loss: float
    attention: NDArray[np.float64]


@dataclass(frozen=True)
class Scored(Generic[Taken]):
    """What came of scoring slides: of all groups on the main rank, of its own group on other aggregators."""

    taken: dict[str, Taken]
    """slide_id to what was taken of its score; empty where no score is known."""
    skipped: dict[str, str]
    """slide_id to why it could not be read."""
    stops: bool
    """A signal to any rank ended it; the same on all ranks."""


def score_slides(
    engine: Engine,
    job: Job,
    num_tiles: Mapping[str, int],
    take: Callable[[StepPlan, Score], Taken],
    *,
    doing: str,
    tick: Tick,
    loader: ShardLoader | None = None,
    may_stop: bool = False,
    eligible: Eligible = ALL,
) -> Scored[Taken]:
    """Scores slides, one by one, and keeps of each score what `take` makes of it; called by all ranks together.

    Args:
        engine: the model.
        job: the run.
        num_tiles: slide_id to tiles, of the slides.
        take: called on aggregators with each score, which is as long as the slide has tiles: hold less of it.
        doing: for the progress.
        tick: progress.
        loader: whose memory to use; one of its own by default.
        may_stop: a signal to any rank ends it (`trainer.stopping`).
        eligible: the rows to score of slides that are not scored whole.
    """
    targets, comm = {case.slide_id: case.targets for case in job.cohort.cases}, engine.comm
    steps = steps_of(plan_scoring(num_tiles, tiles=job.config.tiles, eligible=eligible), comm.topology, comm.rank)
    engine.set_training(False)
    loader = loader or job.loader(comm, quarantined=quarantined(job.run))
    taken, skipped = dict[str, Taken](), dict[str, str]()
    with loader.read(shards_of(steps, comm.topology, comm.rank, job.config.seed)) as reading:
        for step in steps:
            outcome = engine.score(SlideInput(step, reading.slide(step).first(), targets[step.slide_id]))
            tick(doing=doing, total=len(steps))
            if outcome.error:
                skipped[step.slide_id] = outcome.error
            elif outcome.outputs_C is not None and outcome.attention_K is not None:
                predictions, attention = engine.head.predict(outcome.outputs_C), outcome.attention_K.double()
                score = Score(step.slide_id, predictions.cpu().numpy(), outcome.loss, attention.cpu().numpy())
                taken[step.slide_id] = take(step, score)
            if may_stop and comm.agree("stop" if is_noted() else "")[0]:
                break
    stops = may_stop and wants_stop(comm)
    if comm.topology.num_groups > 1:
        by_group = comm.to_main((taken, skipped)) or [(taken, skipped)]
        taken = dict(sorted((item for those, _ in by_group for item in those.items()), key=itemgetter(0)))
        skipped = dict(sorted((item for _, those in by_group for item in those.items()), key=itemgetter(0)))
    return Scored(taken, skipped, stops)


def score_split(
    engine: Engine, job: Job, split: str, tick: Tick, loader: ShardLoader | None = None, *, may_stop: bool = False
) -> tuple[list[Score], list[tuple[str, str]]]:
    """Scores every slide of a split, whole; called by all ranks together.

    Args:
        engine: the model.
        job: the run.
        split: which slides.
        tick: progress.
        loader: what gives the shards; a tile loader of its own by default.
        may_stop: a signal to any rank ends it (`trainer.stopping`).

    Returns:
        Scores, and (slide_id, reason) of slides that could not be read: of all groups on the main rank, of its own
        group on other aggregators; without scores elsewhere.

    Raises:
        Stopped: a signal ended it.
    """
    scored = score_slides(
        engine,
        job,
        job.cohort.num_tiles(split),
        lambda _, score: score,
        doing=f"scoring {split}",
        tick=tick,
        loader=loader,
        may_stop=may_stop,
    )
    if scored.stops:
        raise stopped(engine.comm, f"while it scored {split} slides")
    return list(scored.taken.values()), list(scored.skipped.items())


def split_merit(scores: list[Score], cohort: Cohort) -> tuple[str, float]:
    """How good the scored slides are: a measure's name and its value, as `measures.find_merit`."""
    return find_merit(cohort.task, *_truth_and_found(scores, cohort))


def write_scores(
    run: Path, split: str, scores: list[Score], cohort: Cohort, *, epoch: int | None = None
) -> dict[str, Any]:
    """Puts a split's scores into `scores.parquet`, and returns the result: measures, 95 % intervals, counts.

    The file's metadata say under "slidegrad" which epoch's checkpoint each split was scored with.

    Columns: slide_id, patient_id, split; and by task
        classes     label (the class's position), probs (of each class)
        multilabel  targets (1, 0 or null for each column), probs (of a yes in each column)
        regression  targets (a number or null for each column), values (predicted, in the columns' units)
    """
    cases = {case.slide_id: case for case in cohort.cases}
    has_label, predicted = cohort.task == "classes", PREDICTED[cohort.task]
    rows = []
    for score in scores:
        case = cases[score.slide_id]
        known = [None if math.isnan(target) else target for target in case.targets]
        truth = {"label": case.label} if has_label else {"targets": known}
        row = {"slide_id": score.slide_id, "patient_id": case.patient_id, "split": split, **truth}
        rows.append({**row, predicted: score.predictions.tolist()})
    schema = pa.schema(
        [
            ("slide_id", pa.string()),
            ("patient_id", pa.string()),
            ("split", pa.string()),
            ("label", pa.int32()) if has_label else ("targets", pa.list_(pa.float64())),
            (predicted, pa.list_(pa.float64())),
        ]
    )
    file = run / "scores.parquet"
    others = [row for row in pq.read_table(file).to_pylist() if row["split"] != split] if file.exists() else []
    about = {METADATA_KEY: json.dumps({"epochs": {**scored_epochs(file), split: epoch}})}
    with atomic_path(file) as partial:
        pq.write_table(pa.Table.from_pylist([*others, *rows], schema=schema.with_metadata(about)), partial)
    patients = [cases[score.slide_id].patient_id for score in scores]
    measured = measure_all(cohort.task, cohort.outputs, *_truth_and_found(scores, cohort), patients)
    return {**measured, "num_slides": len(rows), "split": split}


def scored_epochs(file: Path) -> dict[str, int | None]:
    """Split to the epoch whose checkpoint gave its scores in `scores.parquet`; what is not told is not in it."""
    metadata = (pq.read_schema(file).metadata or {}) if file.exists() else {}
    epochs: dict[str, int | None] = json.loads(metadata.get(METADATA_KEY, b"{}")).get("epochs", {})
    return epochs


def write_result(run: Path, result: dict[str, Any]) -> None:
    """Writes what the run's commands print as their last line: `result.json`, of another split than test beside it."""
    name = "result.json" if result["split"] == "test" else f"result_{result['split']}.json"
    write_text(run / name, json.dumps(result, indent=1))


def _truth_and_found(scores: list[Score], cohort: Cohort) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Targets and predictions of the scored slides, (n, num_targets) and (n, C)."""
    targets = {case.slide_id: case.targets for case in cohort.cases}
    num_targets = 1 if cohort.task == "classes" else len(cohort.columns)
    truth = np.array([targets[score.slide_id] for score in scores], np.float64).reshape(-1, num_targets)
    found = np.array([score.predictions for score in scores], np.float64).reshape(-1, len(cohort.outputs))
    return truth, found
