"""Runs of a sweep as processes of their own: so many at once, each with its share of cores and GPUs, stopped together.

Each is `python -m trainer …` in a session of its own, so that Ctrl-C reaches this process alone, which then tells them
to save and waits. One thing to know before changing it: a run's process holds the run's lock too (`states`), and
whoever leaves here by an exception leaves no process behind.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol, TypeVar

import trainer
from manifests.errors import Stopped
from trainer.errors import TrainerError
from trainer.sweep.states import (
    Ended,
    epochs_done,
    has_begun,
    holding,
    last_sentence,
    log_file,
    read_ended,
    run_folder,
    write_ended,
)

T = TypeVar("T")
_POLL_S = 0.2
_LOOK_S = 2.0
"""Seconds between two looks at the runs' journals."""
_ALIKE = 5
"""So many runs that all fail with one sentence, before any has succeeded, and the others are not tried."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run to do."""

    name: str
    arguments: tuple[str, ...]
    """Of `slidegrad train`, without --resume."""
    nproc: int
    epochs: int


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one of several runs side by side may use of this machine."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...] | None
    """As CUDA_VISIBLE_DEVICES names them; None for all."""


class Watch(Protocol):
    """Who is told how it goes."""

    def begin(self, name: str, epochs: int) -> None:
        """A run's process has started."""

    def look(self, epochs: dict[str, int]) -> None:
        """Epochs behind each run at work."""

    def end(self, name: str, ended: Ended | None) -> None:
        """A run's process has ended; None: another process works at it."""

    def tell(self, sentence: str) -> None:
        """What the user should know now."""


@dataclass
class _Child:
    task: Task
    process: subprocess.Popen[bytes]
    log_start: int
    held: contextlib.ExitStack


@dataclass
class _Noted:
    """Signals that came."""

    numbers: list[int] = field(default_factory=list)
    num_passed: int = 0
    """Of these, those that were passed on to the runs."""

    def note(self, number: int, _: FrameType | None) -> None:
        self.numbers.append(number)


def divide(num_jobs: int, cores: Sequence[int], gpus: Sequence[str]) -> list[Share]:
    """Cores and GPUs of a machine for so many runs side by side: even shares, or one shared where there are too few.

    Args:
        num_jobs: runs.
        cores: that this process may use.
        gpus: likewise; one run alone gets them all.
    """
    if num_jobs == 1:
        return [Share(cores=tuple(cores), gpus=None)]
    by_job = range(num_jobs)
    return [Share(cores=_part(cores, i, num_jobs), gpus=_part(gpus, i, num_jobs) if gpus else None) for i in by_job]


def run_all(sweep: Path, tasks: Sequence[Task], shares: Sequence[Share], watch: Watch) -> None:
    """Does all runs, as many at once as there are shares. How each ended is kept beside its log.

    Args:
        sweep: the sweep's folder.
        tasks: the runs, in order.
        shares: of the machine, one for each run at once.
        watch: who is told.

    Raises:
        KeyboardInterrupt: Ctrl-C; all runs have saved and ended, or at a second one ended.
        Stopped: SIGTERM, SIGUSR1 or SIGHUP; likewise.
        TrainerError: the first runs all failed alike.
    """
    waiting, at_work = deque(tasks), dict[int, _Child]()
    ends: list[Ended] = []
    looked = time.monotonic()
    with _noting() as noted:
        try:
            while (waiting and not noted.numbers) or at_work:
                for slot, share in enumerate(shares):
                    while waiting and slot not in at_work and not noted.numbers and not _are_hopeless(ends):
                        task = waiting.popleft()
                        child = _start(sweep, task, share)
                        if child is None:
                            watch.end(task.name, None)
                        else:
                            at_work[slot] = child
                            watch.begin(task.name, task.epochs)
                if not at_work and _are_hopeless(ends):
                    break
                _pass_on(noted, at_work, watch)
                for slot, child in list(at_work.items()):
                    if (ended := _ended(sweep, child, is_stopping=bool(noted.num_passed))) is not None:
                        del at_work[slot]
                        ends.append(ended)
                        watch.end(child.task.name, ended)
                if time.monotonic() - looked > _LOOK_S:
                    looked = time.monotonic()
                    watch.look({c.task.name: epochs_done(run_folder(sweep, c.task.name)) for c in at_work.values()})
                time.sleep(_POLL_S if at_work else 0)
        finally:
            _end(sweep, at_work)
    if noted.numbers:
        _raise_stopped(noted.numbers[0])
    if waiting:
        raise TrainerError(
            f"the first {len(ends)} runs all failed alike, so the other {len(waiting)} were not tried: "
            f"{ends[-1].reason}; mend that, then run it again"
        )


def _part(things: Sequence[T], i: int, num_parts: int) -> tuple[T, ...]:
    size = len(things) // num_parts
    return tuple(things[i * size : (i + 1) * size]) if size else (things[i % len(things)],)


def _start(sweep: Path, task: Task, share: Share) -> _Child | None:
    """The run's process; None if another process has the run, or has done it meanwhile."""
    run, log = run_folder(sweep, task.name), log_file(sweep, task.name)
    with contextlib.ExitStack() as held:
        lock = held.enter_context(holding(sweep, task.name))
        if lock is None or (run / "result.json").is_file():
            return None
        again = ("--resume",) if has_begun(run) else ()
        stream = held.enter_context(log.open("ab"))
        log_start = stream.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer", *task.arguments, *again],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stream,
            env=_environment(task, share),
            start_new_session=True,
            pass_fds=(lock,),
        )
        with contextlib.suppress(OSError):  # Before it has a second thread; gone already, it needs none.
            os.sched_setaffinity(process.pid, share.cores)
        return _Child(task, process, log_start, held.pop_all())


def _environment(task: Task, share: Share) -> dict[str, str]:
    # The packages of this process, wherever it was started; no width, which would break sentences in the log.
    search = [str(Path(trainer.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = max(1, len(share.cores) // task.nproc)
    mine = {"PYTHONPATH": os.pathsep.join(search), "OMP_NUM_THREADS": str(threads), "NO_COLOR": "1", "COLUMNS": "400"}
    if share.gpus is not None:
        mine["CUDA_VISIBLE_DEVICES"] = ",".join(share.gpus)
    return {**os.environ, **mine}


def _ended(sweep: Path, child: _Child, *, is_stopping: bool) -> Ended | None:
    """How a process ended, kept beside its log; None while it is at work.

    Args:
        sweep: the sweep's folder.
        child: the process.
        is_stopping: it was told to end.
    """
    pid, status, usage = os.wait4(child.process.pid, os.WNOHANG)
    if not pid:
        return None
    child.process.returncode = code = os.waitstatus_to_exitcode(status)
    child.held.close()
    if is_stopping and -code in (signal.SIGTERM, signal.SIGINT):  # It had not begun to listen.
        code = 75
    name = child.task.name
    is_done = code in (0, 1) and (run_folder(sweep, name) / "result.json").is_file()
    reason = "" if is_done else _reason(log_file(sweep, name), child.log_start, code)
    before = read_ended(sweep, name)
    peak = max(usage.ru_maxrss * 1024, before.peak_rss_bytes if before else 0)  # Linux counts KiB.
    ended = Ended(code=code, reason=reason, peak_rss_bytes=peak)
    write_ended(sweep, name, ended)
    return ended


def _reason(log: Path, start: int, code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; look for it in the system's log (memory?)"
    return last_sentence(log, start)


def _pass_on(noted: _Noted, at_work: dict[int, _Child], watch: Watch) -> None:
    """At the first signal all runs are told to save and end, at a second Ctrl-C to end."""
    new, is_first = noted.numbers[noted.num_passed :], not noted.num_passed
    if not new or not at_work:
        return
    noted.num_passed += len(new)
    if is_first:
        watch.tell(f"stopping: {len(at_work)} runs end a step and save; Ctrl-C again ends them without")
        _signal(at_work, signal.SIGTERM)
    elif signal.SIGINT in new:
        watch.tell(f"ending {len(at_work)} runs")
        _signal(at_work, signal.SIGINT)


def _signal(at_work: dict[int, _Child], number: int) -> None:
    """To each run's own process, which passes it on to its ranks."""
    for child in at_work.values():
        if child.process.returncode is None:
            child.process.send_signal(number)


def _end(sweep: Path, at_work: dict[int, _Child]) -> None:
    """Ends what an exception left at work."""
    _signal(at_work, signal.SIGTERM)
    for child in at_work.values():
        while _ended(sweep, child, is_stopping=True) is None:
            time.sleep(_POLL_S)


def _are_hopeless(ends: Sequence[Ended]) -> bool:
    return len(ends) >= _ALIKE and all(e.has_failed for e in ends) and len({e.reason for e in ends}) == 1


@contextlib.contextmanager
def _noting() -> Iterator[_Noted]:
    """Meanwhile signals are noted, not obeyed at once."""
    noted = _Noted()
    # What is ignored, as a hangup under nohup, stays so.
    heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, noted.note) for number in heard}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_stopped(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(f"stopped by {signal.Signals(number).name}; what was finished is kept, run it again to go on")
