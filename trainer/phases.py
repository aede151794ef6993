"""The progress of a run by its phases (an epoch, a validation, the scoring of a split), on stderr."""

import sys
import time

from rich.progress import Progress, TaskID

from tiler.progress import LOG_EVERY_S


class Phases:
    """A bar for each phase, or in a log a line now and then."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._tasks: dict[str, TaskID] = {}
        self._num_done, self._told = 0, time.monotonic()

    def __call__(self, *, doing: str, total: int, about: str = "", note: str = "") -> None:
        """One more is done, as `scoring.Tick` has it."""
        if note:
            print(note, file=sys.stderr) if self._bar.disable else self._bar.console.print(note)
        if doing not in self._tasks:
            for task in self._tasks.values():
                self._bar.remove_task(task)
            self._tasks, self._num_done = {doing: self._bar.add_task(doing, total=total)}, 0
        self._num_done += 1
        self._bar.update(self._tasks[doing], advance=1, description=f"{doing} {about}".strip())
        is_due = time.monotonic() - self._told > LOG_EVERY_S or self._num_done == total
        if self._bar.disable and is_due:
            self._told = time.monotonic()
            print(f"{doing}: {self._num_done}/{total} {about}".rstrip(), file=sys.stderr, flush=True)


def silent(*, doing: str, total: int, about: str = "", note: str = "") -> None:
    """The progress of ranks that do not speak."""
