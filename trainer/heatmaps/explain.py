"""From a run and slides to their values: by the model, or as an earlier call with the same model left them.

One thing to know before changing it: values are yielded slide by slide and not kept, so that a split of any size fits
into memory, and what was written before Ctrl-C is not computed again.
"""

import dataclasses
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifests import Manifest
from manifests.errors import SlidegradError
from manifests.files import read_hashed, tiles_path
from manifests.privacy import without_paths
from trainer.aggregators import contributions_of
from trainer.checkpoint import chosen_checkpoint
from trainer.cohort import Case
from trainer.errors import TrainerError
from trainer.heatmaps.goal import Goal
from trainer.heatmaps.values import Origin, SlideValues, finite, origin_of, read_values
from trainer.job import Job
from trainer.loading.quarantine import quarantined
from trainer.model import load_alone
from trainer.sampler import draw_rows, plan_scoring, shards_of
from trainer.step import Outcome, SlideInput

_AT_ONCE = 64
"""Slides that are looked up, and then read ahead, together."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What became of a slide: its manifest and values, or why there are none."""

    case: Case
    manifest: Manifest | None = None
    origin: Origin | None = None
    values: SlideValues | None = None
    is_new: bool = False
    """Computed now, and not read from an earlier call's file."""
    error: str = ""


class Explainer:
    """A run's chosen checkpoint, loaded once.

    Args:
        job: the run.
        output: the class or column that contributions go to; see `Goal.of`.

    Attributes:
        goal: what contributions add up to; None if the aggregator tells none.
        missing: then why, in one sentence; empty otherwise.

    Raises:
        TrainerError: no checkpoint, no such output, or an output that would have no effect.
    """

    def __init__(self, job: Job, output: str = "") -> None:
        self._job = job
        checkpoint = chosen_checkpoint(job.run)
        self._engine = load_alone(job, checkpoint)
        self._engine.set_training(False)
        goal, name = Goal.of(self._engine.head, job.cohort.outputs, output), job.config.aggregator.name
        self.goal = goal if self._tells_contributions() else None
        why = f"aggregator {name} gives no contributions: its outputs are no sum over tiles"
        self.missing = "" if self.goal else why
        if output and self.goal is None:
            raise TrainerError(f"--output {output} would have no effect: {self.missing}")
        self._origin = origin_of(checkpoint, goal.output if self.goal else "")

    def explain(self, cases: Sequence[Case], files: Mapping[str, Path]) -> Generator[Found, None, None]:
        """The slides' values, in order of slide_id, each as soon as it is known.

        Args:
            cases: the slides.
            files: slide_id to where an earlier call may have left its values.
        """
        ordered = sorted(cases, key=lambda case: case.slide_id)
        for start in range(0, len(ordered), _AT_ONCE):
            some = [self._look_up(case, files[case.slide_id]) for case in ordered[start : start + _AT_ONCE]]
            yield from self._score(some)

    def _look_up(self, case: Case, file: Path) -> Found:
        try:
            manifest, manifest_hash = read_hashed(tiles_path(self._job.root, case.slide_id))
        except SlidegradError as error:
            return Found(case=case, error=f"slide {case.slide_id}: {without_paths(str(error))}")
        origin = dataclasses.replace(self._origin, manifest_hash=manifest_hash)
        return Found(case=case, manifest=manifest, origin=origin, values=read_values(file, origin))

    def _score(self, some: list[Found]) -> Iterator[Found]:
        """Scores those of which nothing is known yet."""
        job, comm = self._job, self._engine.comm
        unknown = {found.case.slide_id: found.case.num_tiles for found in some if not (found.values or found.error)}
        steps = {step.slide_id: step for step in plan_scoring(unknown, tiles=job.config.tiles)}
        loader = job.loader(comm, quarantined=quarantined(job.run))
        with loader.read(shards_of(list(steps.values()), comm.topology, comm.rank, job.config.seed)) as reading:
            for found in some:
                if (step := steps.get(found.case.slide_id)) is None:
                    yield found
                    continue
                shards = reading.slide(step).first()
                outcome = self._engine.score(SlideInput(step, shards, found.case.targets), explain=True)
                yield self._value(found, draw_rows(step, job.config.seed), outcome)

    def _value(self, found: Found, rows: NDArray[np.int64], outcome: Outcome) -> Found:
        if outcome.error:
            return dataclasses.replace(found, error=outcome.error)
        outputs_C, attention_K, parts_KC = outcome.outputs_C, outcome.attention_K, outcome.contributions_KC
        assert outputs_C is not None, "alone, a rank aggregates"
        assert attention_K is not None, "likewise"
        assert found.manifest is not None, "or there is an error"
        assert found.origin is not None, "likewise"
        predictions = self._engine.head.predict(outputs_C).tolist()
        values = SlideValues(
            slide_id=found.case.slide_id,
            origin=found.origin,
            aggregator=self._job.config.aggregator.name,
            outputs=self._job.cohort.outputs,
            predictions=tuple(finite(prediction) for prediction in predictions),
            attention=_spread(rows, _numbers(attention_K), len(found.manifest)),
            contribution=np.full(len(found.manifest), np.nan, np.float32),
        )
        if self.goal is not None and parts_KC is not None:
            parts_K, total = self.goal.tiles(_numbers(parts_KC)), self.goal.total(_numbers(outputs_C))
            values = dataclasses.replace(
                values,
                what=self.goal.what,
                base=float(total - parts_K.sum()) if math.isfinite(total) else None,
                total=total if math.isfinite(total) else None,
                contribution=_spread(rows, parts_K, len(found.manifest)),
            )
        return dataclasses.replace(found, values=values, is_new=True)

    def _tells_contributions(self) -> bool:
        """Asks the aggregator, by a slide of one tile."""
        aggregator, side = self._engine.aggregator, self._engine.side
        assert aggregator is not None, "alone, a rank aggregates"
        feature_1D = torch.zeros(1, side.num_features, dtype=side.dtype, device=side.device)
        cell_12 = torch.zeros(1, 2, dtype=torch.int32, device=side.device)
        with torch.no_grad():
            return contributions_of(aggregator, feature_1D, cell_12) is not None


def _numbers(tensor: Tensor) -> NDArray[np.float64]:
    return np.asarray(tensor.detach().double().cpu().numpy())


def _spread(rows: NDArray[np.int64], values_K: NDArray[np.float64], num_tiles: int) -> NDArray[np.float32]:
    """Values of the rows that were seen as those of all tiles, NaN for the others."""
    values = np.full(num_tiles, np.nan, np.float32)
    values[rows] = values_K
    return values
