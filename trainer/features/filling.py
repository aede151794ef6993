"""Filling the store: the slides whose features are not kept are spread over the encoder ranks, each a whole slide.

Slides are read by the tile loader and encoded as scoring encodes them; of a slide its features alone are held, and its
tiles a chunk at a time. A slide that cannot be read is left out, with the reason: training skips it later.

Runs that fill one store at once begin at different places of one order, and pass over what another seems to be at;
what is still missing at the end is computed, whoever is at it. So no run waits for another. The ranks of one run do
wait for each other, and meet every few minutes: in a collective that began with the first slide, an idle rank would
give up long before the last one.
"""

import contextlib
import hashlib
import itertools
import secrets
import sys
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from manifests import SlidegradError
from manifests.privacy import without_paths
from trainer.encode import WaitClock
from trainer.errors import TrainerError
from trainer.features.key import hash_read_plan
from trainer.features.store import FeatureStore
from trainer.job import Job
from trainer.loading.shards import ShardLoader, SlideInput
from trainer.sampler import ShardPlan, StepPlan
from trainer.scoring import Tick
from trainer.step import Engine
from trainer.stopping import is_noted, stopped, wants_stop

_CHUNK_TILES = 1024
"""Tiles read at once: 154 MB of 224-px tiles."""
_AT_ONCE = 4
"""Slides that a rank claims at once: the next ones are read while one is encoded."""
_DOING = "computing features"
_MEET_S = (30.0, 600.0)
"""Seconds until ranks first meet, doubled each time, and at most: there a rank waits for the slides others are at."""


@dataclass
class Share:
    """One rank's share of the slides."""

    plan_hashes: dict[str, str] = field(default_factory=dict)
    """Of the slides to compute, as their manifests are before any tile is read."""
    num_kept: int = 0
    num_stale: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    """slide_id to why there are no features of it."""


class Filler:
    """Fills a store with slides; every rank of the run has one, and all call it together.

    Args:
        engine: the model, scoring.
        job: the run.
        store: the store; None on a rank that does not encode.
        loader: reads tiles.
        tick: progress.
        training: slides that train: where more than cohort.max_skipped of them cannot be read, the run ends.
    """

    def __init__(
        self,
        engine: Engine,
        job: Job,
        store: FeatureStore | None,
        loader: ShardLoader,
        tick: Tick,
        training: Collection[str] = (),
    ) -> None:
        self._engine, self._job, self._store, self._loader, self._tick = engine, job, store, loader, tick
        self._training = frozenset(training)

    def fill(self, slides: Mapping[str, int]) -> dict[str, str]:
        """Computes the features of those slides that have none.

        Args:
            slides: slide_id to its number of tiles.

        Returns:
            slide_id to the reason, of slides that cannot be read; the same on every rank.

        Raises:
            TrainerError: features cannot be written, or too many slides not be read.
            Stopped: a signal ended it; what was computed is kept.
        """
        comm, share, failure = self._engine.comm, Share(), ""
        if self._store is not None:
            mine = share_of(slides, comm.topology.encoder_ranks, comm.rank)
            try:
                share = self._look(self._store, {slide_id: slides[slide_id] for slide_id in mine})
                if share.plan_hashes:
                    self._store.begin()
            except OSError as error:
                failure = _sentence(self._store, error)
        counts = comm.total(len(share.plan_hashes), share.num_kept, share.num_stale)
        num_missing, num_kept, num_stale = map(round, counts)
        if failure := comm.any_error(failure):
            raise TrainerError(failure)
        if comm.is_main:
            print(f"note: {tell_counts(num_missing, num_kept, num_stale)}", file=sys.stderr)
        if num_missing:
            self._compute(share, slides, num_missing)
        failed: dict[str, str] = {}
        for theirs in comm.from_all(share.failed):
            failed |= theirs
        return failed

    def _look(self, store: FeatureStore, mine: Mapping[str, int]) -> Share:
        """What of this rank's slides is kept."""
        share = Share()
        for slide_id, num_tiles in mine.items():
            self._tick(doing="looking for features", total=len(mine))
            try:
                plan_hash = hash_read_plan(self._job.source[slide_id])
            except SlidegradError as error:
                share.failed[slide_id] = without_paths(f"slide {slide_id}: its manifest cannot be read ({error})")
                continue
            standing = store.look(slide_id, num_tiles, plan_hash)
            if standing == "kept":
                share.num_kept += 1
                continue
            share.num_stale += standing == "stale"
            share.plan_hashes[slide_id] = plan_hash
        return share

    def _compute(self, share: Share, slides: Mapping[str, int], num_missing: int) -> None:
        """Computes what is missing; ranks meet now and then, so that each knows how the others get on."""
        work = self._work(self._store, share, slides) if self._store is not None else _nothing()
        with contextlib.closing(work):
            for meeting in itertools.count():
                until = time.monotonic() + min(_MEET_S[1], _MEET_S[0] * 2**meeting)
                num_done, is_busy, failure = self._go_on(work, share, num_missing, until)
                if not self._meet(share, num_missing, num_done, is_busy, failure):
                    return

    def _go_on(self, work: Iterator[str], share: Share, num_missing: int, until: float) -> tuple[int, bool, str]:
        """Works until it is time to meet.

        Returns:
            Slides done, whether there may be more, and why features cannot be kept.
        """
        num_done = 0
        try:
            for slide_id in work:
                num_done += 1
                note = f"skipped: {share.failed[slide_id]}" if slide_id in share.failed else ""
                self._tick(doing=_DOING, total=num_missing, note=note)
                if time.monotonic() > until or is_noted():
                    return num_done, True, ""
        except OSError as error:
            assert self._store is not None, "others write nothing"
            return num_done, False, _sentence(self._store, error)
        return num_done, False, ""

    def _meet(self, share: Share, num_missing: int, num_done: int, is_busy: bool, failure: str) -> bool:
        """Tells the other ranks; returns whether any has work left, and raises as `fill`, on all of them."""
        comm, training = self._engine.comm, self._training
        num_failed = len(training & share.failed.keys())
        all_done, num_busy, all_failed = comm.total(num_done, is_busy, num_failed)
        if failure := comm.any_error(failure):
            raise TrainerError(failure)
        if wants_stop(comm):
            raise stopped(comm, "while it computed features; those of whole slides are kept")
        most = self._job.config.cohort.max_skipped
        if all_failed > max(1, most * len(training)):
            reasons = [reason for theirs in comm.from_all(share.failed) for reason in theirs.values()]
            raise TrainerError(
                f"{all_failed:.0f} of {len(training)} training slides could not be read, more than cohort.max_skipped="
                f"{most:g} of them; see to the archive, then give --resume. The last one: {reasons[-1]}"
            )
        for _ in range(round(all_done) - num_done):  # Other ranks'.
            self._tick(doing=_DOING, total=num_missing)
        return bool(num_busy)

    def _work(self, store: FeatureStore, share: Share, slides: Mapping[str, int]) -> Generator[str, None, None]:
        """Computes this rank's slides; yields each when it is done, has failed, or was done by another run.

        Raises:
            OSError: features cannot be written.
        """
        order = list(share.plan_hashes)
        begin = secrets.randbelow(len(order)) if order else 0
        order = order[begin:] + order[:begin]
        claimed: list[str] = []
        for is_last, those in ((False, order), (True, claimed)):
            for at in range(0, len(those), _AT_ONCE):
                todo = []
                for slide_id in those[at : at + _AT_ONCE]:
                    if store.look(slide_id, slides[slide_id], share.plan_hashes[slide_id]) == "kept":
                        yield slide_id
                    elif not is_last and store.is_claimed(slide_id):
                        claimed.append(slide_id)
                    else:
                        todo.append(slide_id)
                yield from self._compute_some(store, share, {slide_id: slides[slide_id] for slide_id in todo})

    def _compute_some(self, store: FeatureStore, share: Share, slides: Mapping[str, int]) -> Iterator[str]:
        """Computes a few slides one after another, the next being read meanwhile."""
        steps = [StepPlan(0, i, slide_id, n, n) for i, (slide_id, n) in enumerate(slides.items())]
        with contextlib.ExitStack() as stack:
            places = {slide_id: stack.enter_context(store.claim(slide_id)) for slide_id in slides}
            reading = stack.enter_context(self._loader.read(_chunks(steps)))
            for step in steps:
                slide = SlideInput(step, reading.slide(step).first(), ())
                passes, error = self._engine.side.score_pass(slide, 1, WaitClock())
                if error:
                    share.failed[step.slide_id] = error
                else:
                    features_ND, _ = self._engine.side.stack(passes)
                    plan_hash = share.plan_hashes[step.slide_id]
                    store.put(places[step.slide_id], step.slide_id, features_ND.cpu().numpy(), plan_hash)
                yield step.slide_id


def share_of(slide_ids: Iterable[str], ranks: Sequence[int], rank: int) -> list[str]:
    """One rank's share of the slides, in an order that is the same in every run: by a hash of their ids.

    Args:
        slide_ids: all of them, in any order.
        ranks: those that share them.
        rank: one of these.
    """

    def key(slide_id: str) -> bytes:
        return hashlib.blake2b(f"slidegrad-features-1\x00{slide_id}".encode()).digest()

    return sorted(slide_ids, key=key)[ranks.index(rank) :: len(ranks)]


def tell_counts(num_missing: int, num_kept: int, num_stale: int) -> str:
    """What is kept of some slides, and what is computed, in a sentence."""
    if not num_missing:
        return f"the features of all {num_kept} slides are kept"
    if not num_kept + num_stale:
        return f"computing features of {num_missing} slides: none are kept for these weights"
    stale = f", {num_stale} are of other manifests or damaged" if num_stale else ""
    return f"computing features of {num_missing} of {num_missing + num_kept} slides: {num_kept} are kept{stale}"


def _chunks(steps: Iterable[StepPlan]) -> Iterator[ShardPlan]:
    for step in steps:
        for part, begin in enumerate(range(0, step.num_tiles, _CHUNK_TILES)):
            yield ShardPlan(step, part, np.arange(begin, min(begin + _CHUNK_TILES, step.num_tiles)))


def _nothing() -> Generator[str, None, None]:
    yield from ()


def _sentence(store: FeatureStore, error: OSError) -> str:
    return (
        f"--machine.features {store.root}: features cannot be kept there ({error.strerror or error}); mend that "
        "(space? permissions?), then run it again, a training with --resume: what is whole there stays"
    )
