"""The loader's memory: buffers that are used again and again, within a budget of bytes, and copies from them to a GPU.

Memory fresh from the system is zeroed page by page when it is first written: reading into it reaches 60 % of the speed
of reading into a buffer that was used before. Sizes are rounded up, so that the shards of slides of many sizes share a
few buffers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LEAST_BYTES = 4096
_STEPS_PER_DOUBLING = 8
"""Sizes of buffers between one power of two and the next: an eighth of a buffer is wasted at most."""


@dataclass(eq=False)
class Buffer:
    """A flat uint8 piece of memory."""

    memory: Tensor
    copied: Any = None
    """The event after which a copy to the GPU has left it; None without any."""

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return len(self.memory)


class BufferPool:
    """Buffers within a budget; not safe for threads.

    Args:
        budget_bytes: what all buffers may take together; a single one may take more.
        pinned: page-locked memory, which a GPU copies while others go on.

    Attributes:
        used_bytes: size of the buffers in use.
        peak_bytes: the most that all buffers, idle ones included, ever took.
        num_made: buffers that were made anew.
        is_note_told: the user knows that the budget is too small for one buffer.
    """

    def __init__(self, budget_bytes: int, *, pinned: bool) -> None:
        self.budget_bytes, self._pinned = budget_bytes, pinned
        self.used_bytes = self.peak_bytes = self.num_made = 0
        self.is_note_told = False
        self._idle: list[Buffer] = []

    def has_room(self, num_bytes: int, freed_bytes: int = 0) -> bool:
        """Whether a buffer of that size is within the budget, once `freed_bytes` of those in use came back.

        Where none is in use there is room for any: work goes on, however small the budget.
        """
        used = self.used_bytes - freed_bytes
        return used == 0 or used + self.round_up(num_bytes) <= self.budget_bytes

    def take(self, num_bytes: int) -> Buffer:
        """A buffer of at least that size; `has_room` was asked before."""
        size = self.round_up(num_bytes)
        # One twice as large would keep others from their place.
        fitting = [b for b in self._idle if size <= b.num_bytes < 2 * size and self.has_room(b.num_bytes)]
        if fitting:
            buffer = min(fitting, key=lambda b: b.num_bytes)
            self._idle.remove(buffer)
            if buffer.copied is not None:
                buffer.copied.synchronize()
                buffer.copied = None
        else:
            while self._idle and self._held_bytes + size > self.budget_bytes:
                self._idle.pop(0)
            buffer = Buffer(torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned))
            self.num_made += 1
        self.used_bytes += buffer.num_bytes
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)
        return buffer

    def give_back(self, buffer: Buffer) -> None:
        """Takes a buffer back; it is given out again once copies from it are done."""
        self.used_bytes -= buffer.num_bytes
        self._idle.append(buffer)

    def lose(self, buffer: Buffer) -> None:
        """Forgets a buffer that a thread may still write to."""
        self.used_bytes -= buffer.num_bytes

    def round_up(self, num_bytes: int) -> int:
        """The size of the buffer for so many bytes."""
        power = 1 << (max(num_bytes, _LEAST_BYTES) - 1).bit_length()
        if self._pinned:  # torch rounds page-locked memory up to a power of two itself.
            return power
        step = power // (2 * _STEPS_PER_DOUBLING)
        return -(-max(num_bytes, _LEAST_BYTES) // step) * step

    @property
    def _held_bytes(self) -> int:
        return self.used_bytes + sum(buffer.num_bytes for buffer in self._idle)


class DeviceCopies:
    """Copies to a GPU on a stream of their own, beside the model's work.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def enter_thread(self) -> None:
        """Makes the GPU a thread's own: threads begin at GPU 0, and would take some of its memory."""
        torch.cuda.set_device(self._device)

    def start(self, tiles_NHWC: Tensor) -> tuple[Tensor, Any]:
        """Begins a copy; returns it, and the event of its end."""
        with torch.cuda.stream(self._stream):
            copy_NHWC = tiles_NHWC.to(self._device, non_blocking=True)
            return copy_NHWC, self._stream.record_event()

    def join(self, copy_NHWC: Tensor, copied: Any) -> None:
        """Lets the model's stream wait for a copy, and the copy's memory for the model's use of it."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)
        copy_NHWC.record_stream(stream)
