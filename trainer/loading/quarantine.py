"""Slides that kill the process that reads them: seen by what the process leaves behind, and after two times not read.

A slide that makes a decoder crash takes its rank with it, and after a restart it is the next slide again. So every
reader writes down which slide it has in hand, in `RUN/in_hand/`, and Python's fault handler writes there too when the
process dies of its own fault (SIGSEGV, SIGBUS, SIGABRT, …). A process that is killed from outside leaves no such trace,
and accuses nobody.
"""

import faulthandler
import json
import os
import re
import socket
from pathlib import Path
from typing import Self

from manifests.files import write_text
from trainer.errors import TrainerError

_TIMES = 2
_WIDTH = 256
_FOLDER, _COUNTS = "in_hand", "crashes.json"
_READER = re.compile(r"/(tiler/|trainer/loading/reading\.py)")
"""In the trace of a thread that reads, or that helps one to."""


def collect_crashes(run: Path) -> frozenset[str]:
    """Counts the crashes since the last call, and says which slides are not to be read any more; before any reader.

    Args:
        run: the run's folder.
    """
    folder = run / _FOLDER
    crashed = set()
    for trace in folder.glob("*.fault"):
        slide = trace.with_suffix(".slide")
        if slide.exists() and _was_reading(trace.read_text(errors="replace")):
            crashed.add(slide.read_text().strip())
        trace.unlink(missing_ok=True)
        slide.unlink(missing_ok=True)
    counts = _counts(run)
    for slide_id in crashed - {""}:  # Once, in however many ranks.
        counts[slide_id] = counts.get(slide_id, 0) + 1
    if crashed:
        write_text(folder / _COUNTS, json.dumps(counts, indent=1))
    return quarantined(run)


def quarantined(run: Path) -> frozenset[str]:
    """Slides that are not to be read any more."""
    return frozenset(slide_id for slide_id, times in _counts(run).items() if times >= _TIMES)


def _counts(run: Path) -> dict[str, int]:
    file = run / _FOLDER / _COUNTS
    try:
        counts: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}
        return {str(slide_id): int(times) for slide_id, times in counts.items()}
    except (AttributeError, TypeError, ValueError):
        raise TrainerError(f"{file}: damaged; remove it: slides that crashed their reader are tried again") from None


def _was_reading(trace: str) -> bool:
    """The thread that crashed was reading a slide, and was no other's, such as a watchdog's."""
    _, _, after = trace.partition("Current thread")
    return bool(_READER.search(after.partition("\n\n")[0]))


class InHand:
    """The slide that this process reads, where it is found after a crash.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        folder = run / _FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / f"{socket.gethostname()}-{os.getpid()}"
        self._files = [stem.with_name(f"{stem.name}.{what}") for what in ("slide", "fault")]
        self._slide, self._fault = (file.open("wb", buffering=0) for file in self._files)
        faulthandler.enable(self._fault)

    def hold(self, slide_id: str) -> None:
        """A reader begins with a slide; "" once it is done."""
        os.pwrite(self._slide.fileno(), slide_id.encode().ljust(_WIDTH), 0)

    def close(self) -> None:
        """Leaves no trace."""
        faulthandler.disable()
        for stream, file in zip((self._slide, self._fault), self._files, strict=True):
            stream.close()
            file.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
