"""What a rank will ask its loader for, in order, and what follows for memory. No threads, no pixels.

A rank's demands are known beforehand: a slide's shards in order; then, in reversed order, those whose graph is not
kept, once more; then the next slide's. Reading ahead in that sequence follows the four rules of Cao, Felten, Karlin and
Li, *A study of integrated prefetching and caching strategies*, 1995: read what is missed next; put it in the place of
what is needed last; never in the place of what is needed sooner; begin as soon as there is a place. So the second pass
finds the bytes that the first left as far as memory goes, last ones first, and only the rest is read again.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from trainer.loading.buffers import Buffer
from trainer.loading.shards import NO_CELLS, Reads
from trainer.sampler import ShardPlan, StepPlan

_MOST_AHEAD = 64
"""Demands after which no further slide is planned: where shards are small, memory would hold hours of them."""


@dataclass(eq=False)
class Need:
    """One shard that is needed once or twice; `places` in the sequence of demands where it still is, ascending."""

    plan: ShardPlan
    slide: "SlideNeeds"
    places: list[int]
    was_used: bool = False
    buffer: Buffer | None = None
    """Its memory, from the moment that reading begins until nobody needs it or another takes its place."""
    tiles_NHWC: Tensor | None = None
    """Its pixels in that memory, once read."""
    cells_N2: Tensor = NO_CELLS
    """Where its tiles lie, once read."""

    @property
    def is_missing(self) -> bool:
        """It has to be read before it can be used."""
        return self.tiles_NHWC is None and len(self.plan.rows) > 0 and not self.slide.error


@dataclass(eq=False)
class SlideNeeds:
    """A slide's shards on this rank: all of them in order, and those needed again, in that order."""

    first: list[Need] = field(default_factory=list)
    again: list[Need] = field(default_factory=list)
    step: StepPlan | None = None
    error: str = ""
    """Why its tiles cannot be had; then nothing of it is read any more."""
    waited_s: float = 0.0
    """Seconds that the caller waited for its tiles."""
    reads: Reads = field(default_factory=Reads)
    """What reading it took so far."""


class Demands:
    """The sequence of demands from the one at hand on.

    Args:
        plans: the shards of this rank, those of a slide one after another.
        keep: of each slide, the last so many are needed once, those before them twice; all once if None.
    """

    def __init__(self, plans: Iterable[ShardPlan], keep: int | None) -> None:
        self._slides = itertools.groupby(plans, key=lambda plan: plan.step)
        self._keep = keep
        self._sequence: list[Need] = []
        self._num_planned = 0
        self._slide: SlideNeeds | None = None

    @property
    def at_hand(self) -> Need | None:
        """What is asked for next, as far as it is planned."""
        return self._sequence[0] if self._sequence else None

    def begin(self, step: StepPlan) -> tuple[SlideNeeds, list[Need]]:
        """Goes on to the next slide, which is `step`'s.

        Returns:
            The slide's needs, none on a rank without shards; and what is needed no more, of the slide before it.
        """
        dropped = []
        while self._sequence and self._sequence[0].slide is self._slide:
            dropped.append(self.pop())
        if not self._sequence and not self._plan_slide():
            return SlideNeeds(), dropped
        self._slide = self._sequence[0].slide
        assert self._slide.step == step, "slides are asked for in the order of the plans"
        return self._slide, dropped

    def pop(self) -> Need:
        """Takes the demand at hand off the sequence."""
        need = self._sequence.pop(0)
        need.places.pop(0)
        return need

    def next_missing(self) -> Need | None:
        """What has to be read next; None if that much is planned and read."""
        at = 0
        while at < len(self._sequence) or (at < _MOST_AHEAD and self._plan_slide()):
            if self._sequence[at].is_missing:
                return self._sequence[at]
            at += 1
        return None

    def _plan_slide(self) -> bool:
        """Adds the next slide's demands; False if there is no slide any more."""
        step, plans = next(self._slides, (None, ()))
        if step is None:
            return False
        slide = SlideNeeds(step=step)
        slide.first = [Need(plan, slide, []) for plan in plans]
        num_again = 0 if self._keep is None else max(0, len(slide.first) - self._keep)
        slide.again = [need for need in reversed(slide.first[:num_again]) if len(need.plan.rows)]
        for need in (*slide.first, *slide.again):
            need.places.append(self._num_planned)
            self._num_planned += 1
            self._sequence.append(need)
        return True


def may_give_way(held: Iterable[Need], to: Need) -> Iterator[Need]:
    """What of `held` may give its memory to the need `to`: all that is needed later, the last first."""
    later = [need for need in held if need.places[0] > to.places[0]]
    yield from sorted(later, key=lambda need: need.places[0], reverse=True)
