"""How far a run of a sweep is, from what lies in its folder and beside its log: nothing is kept in a process alone.

One thing to know before changing it: the lock of a run is a `flock` that the run's own process inherits. It ends with
the last process that holds it, so a sweep that was killed leaves no lock behind, and one whose run lives on does.
"""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from manifests.files import write_text
from manifests.privacy import without_paths

State = Literal["open", "running", "begun", "failed", "done"]
_POINTING_UP = re.compile(r"\(above\)|message is above")
"""In sentences that say where the reason stands."""
_TAIL_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run's process ended, the last time."""

    code: int
    """Its exit code; below 0 the signal that killed it."""
    reason: str = ""
    """Its last sentence, without paths; empty if it did what it should."""
    peak_rss_bytes: int = 0
    """The most memory that one of its processes held, in all times that it ran."""

    @property
    def has_failed(self) -> bool:
        """It has not done what it should, and was not told to stop."""
        return bool(self.reason) and self.code not in (75, 130)


def run_folder(sweep: Path, name: str) -> Path:
    """Where a run lies."""
    return sweep / "runs" / name


def log_file(sweep: Path, name: str) -> Path:
    """What a run said on stderr."""
    return sweep / "logs" / f"{name}.log"


def find_state(sweep: Path, name: str) -> State:
    """How far a run is; failed ones begin again, or go on, in the next call."""
    run = run_folder(sweep, name)
    if (run / "result.json").is_file():
        return "done"
    if is_held(sweep, name):
        return "running"
    ended = read_ended(sweep, name)
    if ended is not None and ended.has_failed:
        return "failed"
    return "begun" if has_begun(run) else "open"


def has_begun(run: Path) -> bool:
    """There is a run to go on with."""
    return (run / "config.yaml").is_file()


def read_ended(sweep: Path, name: str) -> Ended | None:
    """How a run's process ended, the last time; None if it never has."""
    try:
        return Ended(**json.loads(_ended_file(sweep, name).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_ended(sweep: Path, name: str, ended: Ended) -> None:
    """Keeps how a run's process ended."""
    write_text(_ended_file(sweep, name), json.dumps(vars(ended), ensure_ascii=False))


def last_sentence(log: Path, start: int = 0) -> str:
    """The reason that a run gave last: of lines that only point up, the one above; without paths.

    Args:
        log: what it said.
        start: where its part begins, bytes.
    """
    with log.open("rb") as stream:
        stream.seek(max(start, log.stat().st_size - _TAIL_BYTES))
        lines = stream.read().decode(errors="replace").splitlines()
    told = [line.strip() for line in lines if line.strip()]
    clear = [line for line in told if not _POINTING_UP.search(line)]
    of_ours = [line for line in clear if line.startswith("slidegrad: ")]
    # Behind a traceback, the line before the sentence that points to it.
    is_traceback = bool(told) and "unexpected error (above)" in told[-1]
    chosen = clear if is_traceback or not of_ours else of_ours
    return without_paths(chosen[-1].removeprefix("slidegrad: ")) if chosen else "it said nothing"


def epochs_done(run: Path) -> int:
    """Whole epochs behind a run, from the end of its journal."""
    with contextlib.suppress(OSError), (run / "metrics.jsonl").open("rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL_BYTES))
        for line in reversed(stream.read().splitlines()):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                event = json.loads(line)
                return int(event["epoch"]) + int(event["event"] == "epoch")
    return 0


@contextlib.contextmanager
def holding(sweep: Path, name: str) -> Iterator[int | None]:
    """Holds a run for this process and those that inherit the descriptor; None if another one has it."""
    file = _lock_file(sweep, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield descriptor if _try_lock(descriptor) else None
    finally:
        os.close(descriptor)


def is_held(sweep: Path, name: str) -> bool:
    """A process works at the run now."""
    try:
        descriptor = os.open(_lock_file(sweep, name), os.O_RDWR)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _ended_file(sweep: Path, name: str) -> Path:
    return sweep / "logs" / f"{name}.ended.json"


def _lock_file(sweep: Path, name: str) -> Path:
    return sweep / "logs" / f"{name}.lock"
