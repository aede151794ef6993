"""Serving: shards whose features come from the store, to who else would take them from the tile loader.

A slide's features are read by a thread of its own while the slide before is in use. As with tiles, what cannot be read
travels as a value, and all ranks skip the slide together; and a read that hangs is left alone at a deadline.
"""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Self

import torch

from manifests import ManifestSource, SlidegradError
from manifests.privacy import without_paths
from trainer.features.key import hash_read_plan
from trainer.features.store import FeatureStore
from trainer.loading.shards import NO_CELLS, NO_TILES, Reads, Shard
from trainer.sampler import ShardPlan, StepPlan

_AGAIN = "they are computed when the run begins again (a training with --resume)"


class FeatureLoader:
    """The features of shards, in the place of a `TileLoader`.

    Args:
        store: where they are kept.
        source: the manifests.
        failed: slide_id to the reason, of slides that have no features.
        deadline_s: how long a slide's features may be waited for.
    """

    def __init__(
        self, store: FeatureStore, source: ManifestSource, failed: Mapping[str, str], deadline_s: float
    ) -> None:
        self._store, self._source, self._failed, self._deadline_s = store, source, failed, deadline_s

    def read(self, plans: Iterable[ShardPlan], keep: int | None = None) -> "FeatureReading":  # noqa: ARG002
        """Reads as soon as the first slide is asked for; to be used as a context.

        Args:
            plans: the shards of this rank, those of a slide one after another.
            keep: without meaning: a frozen encoder has no second pass.
        """
        return FeatureReading(plans, self.load, self._deadline_s)

    def load(self, plans: list[ShardPlan]) -> tuple[list[Shard], Reads]:
        """One slide's shards, all with the same error where there is one."""
        started, step = time.perf_counter(), plans[0].step
        try:
            shards = self._load(step, plans)
        except Exception as error:  # noqa: BLE001 - the per-slide boundary: the group is told, and skips the slide
            return _failed(plans, _tell(step.slide_id, error)), Reads()
        given = [shard.features_ND for shard in shards if shard.features_ND is not None]
        num_bytes = sum(features_ND.nbytes for features_ND in given)
        num_tiles = sum(map(len, given))
        return shards, Reads(num_tiles=num_tiles, num_bytes=num_bytes, seconds=time.perf_counter() - started)

    def _load(self, step: StepPlan, plans: list[ShardPlan]) -> list[Shard]:
        slide_id = step.slide_id
        if slide_id in self._failed:
            return _failed(plans, self._failed[slide_id])
        manifest = self._source[slide_id]
        given = [plan.rows for plan in plans if len(plan.rows)]
        begin, end = (int(given[0][0]), int(given[-1][-1]) + 1) if given else (0, 0)
        try:
            found = self._store.read(slide_id, step.num_tiles, hash_read_plan(manifest), slice(begin, end))
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - codecs raise what they like
            self._store.discard(slide_id)
            reason = f"slide {slide_id}: its features were damaged ({type(error).__name__}) and are removed; {_AGAIN}"
            return _failed(plans, reason)
        if found is None:
            gone = "its features are not kept any more, or its manifest changed"
            return _failed(plans, f"slide {slide_id}: {gone}; {_AGAIN}")
        cells = manifest.cells
        return [
            Shard(
                plan.virtual_rank,
                NO_TILES,
                torch.from_numpy(cells[plan.rows]),
                features_ND=torch.from_numpy(found[plan.rows - begin]),
            )
            for plan in plans
        ]


class FeatureReading:
    """Slides' features being read, in the order of their plans. Made by `FeatureLoader.read`.

    Args:
        plans: of this rank, those of a slide one after another.
        load: reads one slide's.
        deadline_s: how long a slide's may be waited for.
    """

    def __init__(
        self,
        plans: Iterable[ShardPlan],
        load: Callable[[list[ShardPlan]], tuple[list[Shard], Reads]],
        deadline_s: float,
    ) -> None:
        self._slides = itertools.groupby(plans, key=lambda plan: plan.step)
        self._load, self._deadline_s = load, deadline_s
        self._next: SlideFeatures | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._next = None

    def slide(self, step: StepPlan) -> "SlideFeatures":
        """Goes on to the next slide, `step`'s; the one after it is begun."""
        at_hand = self._next or self._begin()
        assert not at_hand.plans or at_hand.plans[0].step == step, "slides are asked for in the order of the plans"
        self._next = self._begin()
        return at_hand

    def _begin(self) -> "SlideFeatures":
        """Begins to read the next slide; one without shards where there is none, or on a rank without any."""
        _, plans = next(self._slides, (None, ()))
        return SlideFeatures(list(plans), self._load, self._deadline_s)


class SlideFeatures:
    """One slide's shards on this rank (`trainer.loading.shards.ShardSource`), read on a thread from now on.

    Args:
        plans: its shards, none on a rank without any.
        load: reads them.
        deadline_s: how long they may be waited for.
    """

    def __init__(
        self,
        plans: list[ShardPlan],
        load: Callable[[list[ShardPlan]], tuple[list[Shard], Reads]],
        deadline_s: float,
    ) -> None:
        self.plans, self.reads, self._deadline_s = plans, Reads(), deadline_s
        box: queue.SimpleQueue[tuple[list[Shard], Reads]] = queue.SimpleQueue()
        self._box = box
        if plans:  # A daemon: a read that never ends must not keep the process from its end.
            threading.Thread(target=lambda: box.put(load(plans)), name="features", daemon=True).start()

    def first(self) -> Iterator[Shard]:
        """All shards, in order."""
        if not self.plans:
            return
        try:
            shards, self.reads = self._box.get(timeout=self._deadline_s)
        except queue.Empty:
            shards = _failed(
                self.plans,
                f"slide {self.plans[0].step.slide_id}: its features were not read in {self._deadline_s:g} s "
                "(machine.read_deadline_s); look at the storage they lie on",
            )
        yield from shards

    def again(self) -> Iterator[Shard]:
        """None: a frozen encoder has no second pass."""
        yield from ()

    def will_reread(self) -> bool:
        """Never."""
        return False


def _failed(plans: list[ShardPlan], reason: str) -> list[Shard]:
    return [Shard(plan.virtual_rank, NO_TILES, NO_CELLS, reason) for plan in plans]


def _tell(slide_id: str, error: Exception) -> str:
    """The error in one sentence that names the slide, and no folder."""
    if isinstance(error, OSError):
        reason = error.strerror or type(error).__name__
        return f"slide {slide_id}: its features cannot be read ({reason}); look whether machine.features can be reached"
    text = str(error) if isinstance(error, SlidegradError) else f"{type(error).__name__}: {error}"
    text = without_paths(text)
    return text if text.startswith("slide ") else f"slide {slide_id}: {text}"
