"""Processes that decode for the service: few, each with a limit of time and memory, started again when they die.

The process that answers HTTP loads no reader of slides and holds no slide open: a file that crashes or hangs its reader
costs one answer. The processes start with the first picture that is asked for.
"""

import contextlib
import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import TypeVar

from pebble import ProcessExpired, ProcessPool

from services import worker
from services.errors import BusyError, SlideFileError, TooSlowError, UnavailableError

_log = logging.getLogger(__name__)
T = TypeVar("T")
_WAITING = 4
"""Requests that may wait for a process; more are sent away, to come again."""
_TASKS_PER_PROCESS = 2_000
"""Then a fresh one takes over: readers leak."""


class Decoder:
    """Runs functions of `services.worker` in processes of their own; safe to call from many threads.

    Args:
        num_processes: at most so many at once.
        time_s: what one call may take.
        memory_bytes: resident bytes that one process may take.
    """

    def __init__(self, *, num_processes: int, time_s: float, memory_bytes: int) -> None:
        self._num_processes, self._time_s, self._memory_bytes = num_processes, time_s, memory_bytes
        self._room = threading.BoundedSemaphore(num_processes + _WAITING)
        self._lock = threading.Lock()
        self._pool: ProcessPool | None = None

    def run(self, slide_id: str, work: Callable[..., T], *arguments: object) -> T:
        """Does the work elsewhere, and waits for it.

        Raises:
            BusyError: too many are waiting.
            TooSlowError: it took too long.
            SlideFileError: the process died of it.
            UnavailableError: no process can be started.
            ServiceError: what the work itself raises.
        """
        if not self._room.acquire(blocking=False):
            raise BusyError("too many pictures are being read at this moment; ask again in a second")
        try:
            return self._wait(work, arguments)
        except TimeoutError:
            _log.warning("slide %s: a picture took longer than %g s; its process was ended", slide_id, self._time_s)
            raise TooSlowError(
                f"slide {slide_id}: reading took longer than {self._time_s:g} s and was given up; look whether its "
                "storage answers, or start the service with a larger SLIDEGRAD_DECODE_TIME_S"
            ) from None
        except ProcessExpired as expired:
            _log.warning("slide %s: a process that read it ended (exit code %s)", slide_id, expired.exitcode)
            raise SlideFileError(
                f"slide {slide_id}: reading it ended the reader's process (a crash, or more memory than "
                f"{self._memory_bytes / 1e9:g} GB); the file is likely damaged"
            ) from None
        except (CancelledError, RuntimeError) as error:
            _log.warning("no process that reads pictures could be used (%s)", type(error).__name__)
            self.close()  # The next request tries with a new pool.
            raise UnavailableError("pictures cannot be read now; ask again, and look into the service's log") from None
        finally:
            self._room.release()

    def close(self) -> None:
        """Ends the processes, and what they have in hand."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            pool.join()

    def _wait(self, work: Callable[..., T], arguments: tuple[object, ...]) -> T:
        with self._lock, _no_ctrl_c():
            if self._pool is None:
                self._pool = _make_pool(self._num_processes)
            limited = (self._memory_bytes, work, *arguments)
            future = self._pool.schedule(worker.run_limited, args=limited, timeout=self._time_s)
        result: T = future.result()
        return result


def _make_pool(num_processes: int) -> ProcessPool:
    # spawn, not fork: a copy of a process with threads may hang, and would hold its sockets.
    context = multiprocessing.get_context("spawn")
    return ProcessPool(num_processes, max_tasks=_TASKS_PER_PROCESS, initializer=worker.prepare, context=context)


@contextlib.contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """Ctrl-C is the service's to answer. Blocked here, it is so in all that is started from here, from its first moment
    on: the pool's threads begin with the first task, start their processes later, and hand it down."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
