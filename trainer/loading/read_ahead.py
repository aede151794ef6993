"""Reading ahead: one thread along the sequence of demands, beside the caller, who takes one shard after another.

A read that hangs is left alone at a deadline: its thread, which nobody can end, and its buffer are given up, the slide
is an error, and another thread goes on with the next.

One thing to know before changing it: a shard's pixels are the caller's until it asks for the next one; then the buffer
may be read into. On a GPU the caller has a copy, begun while the model works at the shard before.
"""

import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from trainer.loading.buffers import BufferPool, DeviceCopies
from trainer.loading.demands import Demands, Need, SlideNeeds, may_give_way
from trainer.loading.reading import ShardReader
from trainer.loading.shards import NO_CELLS, Reads, Shard
from trainer.sampler import ShardPlan, StepPlan

_CLOSE_S = 10.0
"""Seconds in which a thread that is told to stop may end its read; then it is left alone."""


class Reading:
    """Slides being read, in the order of their plans. Made by `TileLoader.read`.

    Args:
        demands: what will be asked for.
        pool: the memory.
        make_reader: makes a thread's reader, which calls what it is given to wait for so many seconds.
        tile_px: side of the tiles, px.
        deadline_s: how long a slide's tiles may be waited for in all.
        copies: to the caller's GPU, if it has one.
    """

    def __init__(
        self,
        demands: Demands,
        pool: BufferPool,
        make_reader: Callable[[Callable[[float], bool]], ShardReader],
        *,
        tile_px: int,
        deadline_s: float,
        copies: DeviceCopies | None,
    ) -> None:
        self._demands, self._pool, self._make_reader = demands, pool, make_reader
        self._tile_px, self._deadline_s, self._copies = tile_px, deadline_s, copies
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._held: set[Need] = set()
        """Read, and in memory."""
        self._in_hand: Need | None = None
        """What the caller uses: its memory gives way to nothing."""
        self._being_read: Need | None = None
        self._on_device: tuple[Need, Tensor, Any] | None = None
        """The next shard's copy on the GPU, and the event of its end."""
        self._fault: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def slide(self, step: StepPlan) -> "SlideTiles":
        """Goes on to the next slide, `step`'s; what was left of the slide before is dropped."""
        with self._changed:
            self._put_down()
            needs, dropped = self._demands.begin(step)
            if self._being_read in dropped:
                self._leave_thread()
            for need in dropped:
                self._release(need)
            if needs.first and self._thread is None:
                self._start_thread()
            self._changed.notify_all()
        return SlideTiles(self, needs)

    def close(self) -> None:
        """Ends the reading; its buffers are the next one's."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(_CLOSE_S)
        with self._changed:
            self._leave_thread()
            self._put_down()
            self._on_device = None
            for need in list(self._held):
                self._release(need)

    def deliver(self, needs: list[Need]) -> Iterator[Shard]:
        """The shards of a pass, each valid until the next is asked for."""
        for need in needs:
            yield self._take(need)
            with self._changed:
                self._put_down()

    def is_held(self, need: Need) -> bool:
        """Whether its pixels are in memory."""
        with self._changed:
            return need.tiles_NHWC is not None

    def _take(self, need: Need) -> Shard:
        """Waits for the demand at hand, until the slide's deadline."""
        slide = need.slide
        with self._changed:
            while need.is_missing:
                if self._fault is not None:
                    raise RuntimeError("the reading thread failed") from self._fault
                if slide.waited_s >= self._deadline_s:
                    self._give_up(slide)
                    break
                started = time.perf_counter()
                self._changed.wait(self._deadline_s - slide.waited_s)
                slide.waited_s += time.perf_counter() - started
            self._copy_next()
            taken = self._demands.pop()
            assert taken is need, "shards are asked for in the order of the demands"
            need.was_used = True
            if slide.error or need.tiles_NHWC is None:
                empty_NHWC = torch.zeros(0, 1, 1, 3, dtype=torch.uint8)
                return Shard(need.plan.virtual_rank, empty_NHWC, NO_CELLS, slide.error)
            self._in_hand = need
            tiles_NHWC = need.tiles_NHWC
            if self._on_device is not None:
                _, tiles_NHWC, copied = self._on_device
                self._on_device = None
                assert self._copies is not None, "it made the copy"
                self._copies.join(tiles_NHWC, copied)
                self._put_down()  # The caller has the copy.
                self._copy_next()
            return Shard(need.plan.virtual_rank, tiles_NHWC, need.cells_N2)

    def _copy_next(self) -> None:
        """Begins the copy of the demand at hand to the GPU, if it is read."""
        copies, need = self._copies, self._demands.at_hand
        if copies is None or need is None or need.tiles_NHWC is None or need.slide.error:
            return
        if self._on_device is None or self._on_device[0] is not need:
            assert need.buffer is not None, "what is read is in memory"
            copy_NHWC, need.buffer.copied = copies.start(need.tiles_NHWC)
            self._on_device = (need, copy_NHWC, need.buffer.copied)

    def _put_down(self) -> None:
        """The caller is done with what it has in hand."""
        need, self._in_hand = self._in_hand, None
        if need is not None:
            if not need.places or need.slide.error:
                self._release(need)
            self._changed.notify_all()

    def _release(self, need: Need) -> None:
        """Frees a need's memory, unless it is being read into."""
        if need in self._held:
            assert need.buffer is not None, "what is held is in memory"
            self._held.remove(need)
            self._pool.give_back(need.buffer)
            need.buffer = need.tiles_NHWC = None

    def _fail(self, slide: SlideNeeds, error: str) -> None:
        slide.error = error
        for need in slide.first:
            if need is not self._in_hand:
                self._release(need)
        self._changed.notify_all()

    def _give_up(self, slide: SlideNeeds) -> None:
        """At the deadline: the slide is an error, and whatever is being read is left to itself."""
        assert slide.step is not None
        self._leave_thread()
        self._fail(
            slide,
            f"slide {slide.step.slide_id}: its tiles were not read in {self._deadline_s:g} s "
            "(machine.read_deadline_s); look at the storage it lies on",
        )
        self._start_thread()

    def _leave_thread(self) -> None:
        """Parts with the reading thread. If it is in a read, it and the buffer are left to themselves."""
        self._thread = None
        need, self._being_read = self._being_read, None
        if need is not None and need.buffer is not None:
            self._pool.lose(need.buffer)
            need.buffer = None

    def _start_thread(self) -> None:
        # A daemon: a read that never ends must not keep the process from its end.
        self._thread = threading.Thread(target=self._work, name="read-ahead", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        """The reading thread."""
        try:
            if self._copies is not None:
                self._copies.enter_thread()
            reader = self._make_reader(lambda seconds: not self._closing.wait(seconds))
            while (need := self._next()) is not None:
                self._read(reader, need)
        except BaseException as error:  # noqa: BLE001 - a fault of ours, raised where somebody waits
            with self._changed:
                if self._is_mine():
                    self._fault = error
                    self._changed.notify_all()

    def _next(self) -> Need | None:
        """What the thread reads next, with a buffer for it; None if it is told to stop."""
        with self._changed:
            while self._is_mine() and not self._closing.is_set():
                need = self._demands.next_missing()
                if need is not None and self._make_room(need):
                    need.buffer = self._pool.take(self._count_bytes(need.plan))
                    self._being_read = need
                    return need
                self._changed.wait()
            return None

    def _is_mine(self) -> bool:
        return self._thread is threading.current_thread()

    def _make_room(self, need: Need) -> bool:
        """Frees memory that is needed later than by `need`; nothing if that is not enough."""
        size, freed, leaving = self._count_bytes(need.plan), 0, []
        for other in may_give_way((other for other in self._held if other is not self._in_hand), need):
            if self._pool.has_room(size, freed):
                break
            assert other.buffer is not None, "what is held is in memory"
            freed += other.buffer.num_bytes
            leaving.append(other)
        if not self._pool.has_room(size, freed):
            return False
        for other in leaving:
            self._release(other)
        self._note_size(need.plan)
        return True

    def _read(self, reader: ShardReader, need: Need) -> None:
        assert need.buffer is not None, "given by _next"
        pixels = need.buffer.memory[: self._count_bytes(need.plan)]
        tiles_NHWC = pixels.view(len(need.plan.rows), self._tile_px, self._tile_px, 3)
        reads, cells_N2, error = Reads(), NO_CELLS, ""
        try:
            reads, cells_N2 = reader.read(need.plan, tiles_NHWC.numpy())
        except Exception as failure:  # noqa: BLE001 - the per-slide boundary: the group is told, and skips the slide
            error = reader.tell(need.plan.step.slide_id, failure)
        with self._changed:
            if not self._is_mine():
                return
            self._being_read = None
            self._held.add(need)
            if error:
                self._fail(need.slide, error)
                return
            need.tiles_NHWC, need.cells_N2 = tiles_NHWC, cells_N2
            need.slide.reads += dataclasses.replace(reads, num_reread=reads.num_tiles) if need.was_used else reads
            self._copy_next()
            self._changed.notify_all()

    def _count_bytes(self, plan: ShardPlan) -> int:
        return len(plan.rows) * self._tile_px**2 * 3

    def _note_size(self, plan: ShardPlan) -> None:
        """Says, once, that a shard alone takes more than the budget."""
        size, budget = self._pool.round_up(self._count_bytes(plan)), self._pool.budget_bytes
        if size > budget and not self._pool.is_note_told:
            self._pool.is_note_told = True
            print(
                f"note: slide {plan.step.slide_id}: {len(plan.rows)} tiles of a virtual rank take {size / 1e9:.2g} GB, "
                f"machine.read_ahead_gb is {budget / 1e9:.2g}, so nothing is read while they are in use; give more "
                "--virtual-ranks, or a larger --machine.read-ahead-gb",
                file=sys.stderr,
            )


class SlideTiles:
    """One slide's shards on this rank, for a first pass and a second (`trainer.loading.shards.ShardSource`)."""

    def __init__(self, reading: Reading, needs: SlideNeeds) -> None:
        self._reading, self._needs = reading, needs

    @property
    def reads(self) -> Reads:
        """What reading took so far."""
        return self._needs.reads

    def first(self) -> Iterator[Shard]:
        """All shards, in order."""
        return self._reading.deliver(self._needs.first)

    def again(self) -> Iterator[Shard]:
        """Those whose graph is not kept, in reversed order, without empty ones."""
        return self._reading.deliver(self._needs.again)

    def will_reread(self) -> bool:
        """Whether the second pass has to wait for the file; asked after the first."""
        return not all(self._reading.is_held(need) for need in self._needs.again)
