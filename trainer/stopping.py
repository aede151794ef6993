"""SIGTERM and SIGUSR1, as a cluster sends them before it ends a job: noted, and acted on where the run can be saved.

A handler only sets a flag. One rank's flag is enough: all agree to stop, at the end of a step.
"""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from manifests.errors import Stopped
from trainer.comm import Comm

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_noted: list[str] = []


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Meanwhile these signals are noted, not obeyed at once."""
    _noted.clear()
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(number: int, _: FrameType | None) -> None:
    _noted.append(signal.Signals(number).name)


def wants_stop(comm: Comm) -> bool:
    """Whether any rank was told to stop; called by all ranks together."""
    return any(comm.total(bool(_noted)))


def is_noted() -> bool:
    """Whether this rank was told to stop."""
    return bool(_noted)


def stopped(comm: Comm, where: str) -> Stopped:
    """The error that ends a run which was told to stop; its sentence is the main rank's.

    Args:
        comm: this rank's end of the group.
        where: what is saved.
    """
    by = _noted[0] if _noted else "a signal to another rank"
    return Stopped(f"stopped by {by}, {where}; run it again with --resume to go on" if comm.is_main else "")
