"""What is kept in memory, and work that is done once however many ask for it. Safe to use from many threads."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Executor, Future
from typing import Generic, Protocol, TypeVar

V = TypeVar("V")


class Meter(Protocol):
    """Who counts what a cache does."""

    def hit(self) -> None:
        """Something asked for was there."""

    def load(self) -> None:
        """Something asked for had to be made."""

    def hold(self, num_bytes: int) -> None:
        """So much is held now."""


class NoMeter:
    """Counts nothing."""

    def hit(self) -> None: ...

    def load(self) -> None: ...

    def hold(self, num_bytes: int) -> None: ...


class ByteCache(Generic[V]):
    """The values used last, as many as `max_bytes` hold. What is larger than that alone is not kept."""

    def __init__(self, max_bytes: int, meter: Meter | None = None) -> None:
        self._max_bytes = max_bytes
        self._meter = meter or NoMeter()
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self.num_bytes = 0

    def get(self, key: Hashable, is_good: Callable[[V], bool] = lambda _: True) -> V | None:
        """What is kept under `key`, if it is still good."""
        with self._lock:
            found = self._kept.get(key)
            if found is None or not is_good(found[0]):
                return None
            self._kept.move_to_end(key)
        self._meter.hit()
        return found[0]

    def put(self, key: Hashable, value: V, num_bytes: int) -> None:
        """Keeps a value that was made because it was asked for, in the place of an earlier one."""
        with self._lock:
            self.num_bytes -= self._kept.pop(key, (None, 0))[1]
            if num_bytes <= self._max_bytes:
                self._kept[key] = (value, num_bytes)
                self.num_bytes += num_bytes
            while self.num_bytes > self._max_bytes:
                _, (_, freed) = self._kept.popitem(last=False)
                self.num_bytes -= freed
        self._meter.load()
        self._meter.hold(self.num_bytes)


class Flights(Generic[V]):
    """Work in hand by name: whoever asks for it meanwhile gets the same future.

    Args:
        pool: where the work is done.
    """

    def __init__(self, pool: Executor) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._in_hand: dict[Hashable, Future[V]] = {}

    def begin(self, key: Hashable, work: Callable[[], V]) -> Future[V]:
        """The future of `work`, begun if nobody is at it."""
        with self._lock:
            future = self._in_hand.get(key)
            if future is None:
                future = self._in_hand[key] = self._pool.submit(self._do, key, work)
        return future

    def _do(self, key: Hashable, work: Callable[[], V]) -> V:
        try:
            return work()
        finally:
            with self._lock:  # Not by a callback: `begin` holds the lock that one would wait for.
                self._in_hand.pop(key, None)
