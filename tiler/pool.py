"""Slides in processes that may die: a reader that crashes, hangs or eats the memory costs its slide, never the run.

Each slide is one task. A task whose process died is tried once more, in a fresh process; then its outcome is written
here, as failed. Locally the processes are ours; with Dask they are the cluster's workers, each slide watched from
within.
"""

import contextlib
import itertools
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
from pebble import ProcessExpired, ProcessPool

from tiler.build import Done, Task, tile_slide, write_failure
from tiler.config import TilerConfig
from tiler.errors import TilerError

Work = Callable[[Task, Path, TilerConfig], Done]
T = TypeVar("T")
_ATTEMPTS = 2
_SLIDES_PER_PROCESS = 200
"""Then a fresh one takes over: readers leak. Starting one takes a second or two."""
_QUEUED_PER_PROCESS = 2
_EXIT_MEMORY, _EXIT_TIME = 86, 87
_WATCH_S = 0.2
_LEAST_BYTES = 1_500_000_000
_OF_MEMORY = 0.85


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one slide may take: seconds, and resident bytes of its process."""

    time_s: float
    memory_bytes: int


def share_memory(num_workers: int) -> int:
    """Bytes for each of so many processes: 85 % of what this machine, or this job's control group, has."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(_LEAST_BYTES, int(min([total, *_group_limits()]) * _OF_MEMORY) // num_workers)


def _group_limits() -> Iterator[int]:
    """Memory limits of this process's control groups, version 1 or 2: any group above may be the one that has it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kind, own = line.split(":", 2)
            root, name = ("", "memory.max") if not kind else ("memory", "memory.limit_in_bytes")
            if kind not in ("", "memory"):
                continue
            group = Path("/sys/fs/cgroup", root, own.strip("/"))
            for folder in (group, *group.parents):
                with contextlib.suppress(OSError, ValueError):
                    yield int((folder / name).read_text())


def run_here(tasks: Iterable[Task], out: Path, config: TilerConfig) -> Iterator[Done]:
    """One slide after the other in this process, without isolation."""
    for task in tasks:
        yield tile_slide(task, out, config)


def run_in_processes(
    tasks: Iterable[Task], out: Path, config: TilerConfig, num_workers: int, limits: Limits, work: Work = tile_slide
) -> Iterator[Done]:
    """Slides in processes of this machine, in the order they are done.

    Args:
        tasks: the slides.
        out: the manifests root.
        config: which tiles to keep.
        num_workers: processes.
        limits: what one slide may take.
        work: what is done with each.
    """
    # spawn, not fork: the readers hold threads and handles that do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPool(num_workers, max_tasks=_SLIDES_PER_PROCESS, initializer=prepare_process, context=context)
    finished = False
    try:

        def submit(task: Task) -> Future[Done]:
            # The process watches itself; the pool's own clock ends one that cannot even do that.
            arguments = [limits, work, task, out, config]
            future: Future[Done] = pool.schedule(run_guarded, args=arguments, timeout=1.25 * limits.time_s + 1)
            return future

        with _no_ctrl_c():  # Processes that start now inherit it; while they import, Ctrl-C is the parent's alone.
            pool.schedule(os.getpid)
        yield from _collect(submit, tasks, out, config, limits, num_workers * _QUEUED_PER_PROCESS)
        finished = True
    finally:
        if finished:
            pool.close()
        else:  # Ctrl-C or a full disk: what is in hand is let go; files appear whole or not at all.
            pool.stop()
        pool.join()


@contextlib.contextmanager
def _no_ctrl_c() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_on_dask(
    tasks: Iterable[Task], out: Path, config: TilerConfig, address: str, limits: Limits, work: Work = tile_slide
) -> Iterator[Done]:
    """Slides on the workers of a Dask cluster, which see the archive and `out` under the same paths.

    A worker process that dies is the cluster's to start again, and the scheduler's to give the slide to another; after
    its own number of attempts (allowed-failures) it gives up, and the slide's outcome is written here.

    Raises:
        TilerError: no Dask here, or no scheduler at `address`.
    """
    if not re.fullmatch(r"(\w+://)?\[?[\w.:-]+\]?:\d+", address):
        raise TilerError(f"--dask {address}: expected the scheduler's host:port, as 10.0.0.1:8786")
    try:
        from distributed import Client
    except ImportError:
        raise TilerError("--dask needs Dask; pip install 'slidegrad[dask]'") from None
    try:
        client = Client(address, timeout=10, set_as_default=False)
    except (OSError, ValueError) as error:
        raise TilerError(f"--dask {address}: no scheduler answers there ({type(error).__name__})") from None
    with client:
        threads = client.nthreads().values()
        if not threads:
            raise TilerError(f"--dask {address}: the scheduler has no workers; start some and run again")
        if max(threads) > 1:  # A slide that ends its process would take its neighbours along.
            raise TilerError(f"--dask {address}: its workers have several threads; start them with --nthreads 1")
        executor: Executor = client.get_executor(pure=False)

        def submit(task: Task) -> Future[Done]:
            return executor.submit(run_guarded, limits, work, task, out, config)

        yield from _collect(submit, tasks, out, config, limits, len(threads) * _QUEUED_PER_PROCESS, attempts=1)


def _collect(
    submit: Callable[[Task], Future[Done]],
    tasks: Iterable[Task],
    out: Path,
    config: TilerConfig,
    limits: Limits,
    most_at_once: int,
    attempts: int = _ATTEMPTS,
) -> Iterator[Done]:
    """Keeps a few slides under way; tries again what died; writes the outcome of what died again."""
    queue = iter(tasks)
    running: dict[Future[Done], tuple[Task, int]] = {}
    while True:
        for task in itertools.islice(queue, most_at_once - len(running)):
            running[submit(task)] = task, 1
        if not running:
            return
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            task, attempt = running.pop(future)
            try:
                error = future.exception()
            except CancelledError:
                raise TilerError("--dask: the scheduler is gone; start it again and run the same command") from None
            if error is None:
                yield future.result()
            elif not (isinstance(error, ProcessExpired | TimeoutError) or type(error).__name__ == "KilledWorker"):
                # Not the slide's fault: a full disk is full for all, a worker without Slidegrad reads none.
                if isinstance(error, OSError):
                    raise error
                about = f"{type(error).__name__}: {error}".splitlines()[0]
                raise TilerError(f"a worker cannot work ({about}); is this version of Slidegrad installed there?")
            elif attempt < attempts:
                running[submit(task)] = task, attempt + 1
            else:
                yield Done(write_failure(task, out, config, _why(error, limits)), 0.0, 0.0)


def _why(error: BaseException, limits: Limits) -> str:
    """What ended the process, in words."""
    code = getattr(error, "exitcode", None)
    if isinstance(error, TimeoutError) or code == _EXIT_TIME:
        return f"took longer than {limits.time_s:g} s, twice; look at the file, or give a larger --timeout-s"
    if code == _EXIT_MEMORY:
        return f"needed more than {limits.memory_bytes / 1e9:.1f} GB, twice; look at the file, or give --memory-gb"
    if isinstance(error, ProcessExpired):
        name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return f"its reader ended the process ({name}), twice; the file is likely damaged"
    return f"its process died again and again ({type(error).__name__}); the file is likely damaged"


def run_guarded(limits: Limits, work: Callable[..., T], *arguments: Any) -> T:
    """Does the work in a process that ends itself when the slide takes too long or too much memory."""
    over = threading.Event()
    threading.Thread(target=_watch, args=(over, limits), daemon=True).start()
    try:
        return work(*arguments)
    finally:
        over.set()


def _watch(over: threading.Event, limits: Limits) -> None:
    deadline = time.monotonic() + limits.time_s
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    while not over.wait(_WATCH_S):
        if int(Path("/proc/self/statm").read_text().split()[1]) * page_bytes > limits.memory_bytes:
            os._exit(_EXIT_MEMORY)
        if time.monotonic() > deadline:
            os._exit(_EXIT_TIME)


def prepare_process() -> None:
    """What each process that reads slides does first."""
    cv2.setNumThreads(1)  # One slide, one core: the pool is what runs in parallel.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer.
