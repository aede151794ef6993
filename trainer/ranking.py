"""Max-pool MIL's first half: the model, as it is, ranks all tiles of an epoch's slides, and the highest are trained on.

Source: Campanella et al., Clinical-grade computational pathology using weakly supervised deep learning on whole slide
images, Nature Medicine 2019. One thing to know before changing it: all ranks must come to the same rows, so what the
main rank knows of all groups is told to all; and of each slide the k highest rows alone are held, never its ranking.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.job import Job
from trainer.loading.shards import ShardLoader
from trainer.sampler import Eligible, StepPlan, draw_rows
from trainer.scoring import Score, Tick, score_slides
from trainer.step import Engine


@dataclass(frozen=True)
class Ranked:
    """What ranking found, the same on all ranks."""

    rows: dict[str, NDArray[np.int64]]
    """slide_id to its highest rows, ascending; none of a slide that could not be read."""
    skipped: dict[str, str]
    """slide_id to why it could not be read."""
    stops: bool
    """A signal ended it: some slides are in neither."""


def rank_slides(
    engine: Engine,
    job: Job,
    num_tiles: Mapping[str, int],
    eligible: Eligible,
    *,
    epoch: int,
    loader: ShardLoader,
    tick: Tick,
) -> Ranked:
    """Ranks the tiles of training slides by their attention, as scoring has it; called by all ranks together.

    Args:
        engine: the model.
        job: the run.
        num_tiles: slide_id to tiles, of the slides to rank.
        eligible: slide_id to the rows that may be chosen; all of a slide that is not in it.
        epoch: for which they are ranked, from 0; for the progress.
        loader: whose memory to use.
        tick: progress.
    """
    k = job.config.tiles.k
    assert k is not None, "a run's config is resolved"

    def take(step: StepPlan, score: Score) -> NDArray[np.int64]:
        return highest(draw_rows(step, job.config.seed), score.attention, k)

    scored = score_slides(
        engine,
        job,
        num_tiles,
        take,
        eligible=eligible,
        doing=f"ranking tiles for epoch {epoch + 1}",
        loader=loader,
        tick=tick,
        may_stop=True,
    )
    rows, skipped = engine.comm.from_main((scored.taken, scored.skipped))
    return Ranked({**rows, **{slide_id: np.zeros(0, np.int64) for slide_id in skipped}}, skipped, scored.stops)


def highest(rows: NDArray[np.int64], weights: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """The `k` rows of most weight, ascending; of equal ones the lower rows.

    Args:
        rows: ascending.
        weights: one for each.
        k: how many; all if there are fewer.
    """
    return np.sort(rows[np.argsort(-weights, kind="stable")[:k]])
