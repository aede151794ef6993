"""The progress of a sweep on stderr: a bar over runs and one for each run at work; in a log a line now and then."""

import sys
import time

from rich.progress import TaskID

from tiler.progress import LOG_EVERY_S, progress_bar
from trainer.sweep.states import Ended


class Board:
    """Watches the runs (`running.Watch`).

    Args:
        total: runs in all.
        done: those that were done before.
    """

    def __init__(self, *, total: int, done: int) -> None:
        self._bar = progress_bar()
        self._is_live = not self._bar.disable
        self._tasks: dict[str, TaskID] = {}
        self._epochs: dict[str, int] = {}
        self._total, self._done, self._told = total, done, time.monotonic()
        self._bar.start()
        self._all = self._bar.add_task("runs", total=total, completed=done)
        if done:
            self.tell(f"{done} of {total} runs are done already")

    def close(self) -> None:
        """Takes the bars away."""
        self._bar.stop()

    def begin(self, name: str, epochs: int) -> None:
        """A run's process has started."""
        self._epochs[name] = epochs
        self._tasks[name] = self._bar.add_task(f"  {name}, epochs", total=epochs)
        if not self._is_live:
            self.tell(f"{name}: started")

    def look(self, epochs: dict[str, int]) -> None:
        """Epochs behind each run at work."""
        for name, done in epochs.items():
            self._bar.update(self._tasks[name], completed=done)
        if not self._is_live and time.monotonic() - self._told > LOG_EVERY_S:
            self._told = time.monotonic()
            at_work = ", ".join(f"{name} epoch {done} of {self._epochs[name]}" for name, done in epochs.items())
            self.tell(f"runs: {self._done}/{self._total}; {at_work}")

    def end(self, name: str, ended: Ended | None) -> None:
        """A run's process has ended; None: another process works at it, or has done it."""
        if name in self._tasks:
            self._bar.remove_task(self._tasks.pop(name))
        if ended is None:
            self.tell(f"{name}: left to the process that is at it")
            return
        if not ended.reason:
            self._done += 1
            self._bar.update(self._all, completed=self._done)
        how = {0: "done", 1: "done, without some slides", 75: "saved, to go on later", 130: "interrupted"}
        said = f"failed: {ended.reason}" if ended.has_failed else how[ended.code]
        self.tell(f"{name}: {said} ({self._done} of {self._total})")

    def tell(self, sentence: str) -> None:
        """What the user should know now."""
        if self._is_live:
            self._bar.console.print(sentence, highlight=False, markup=False)
        else:
            print(sentence, file=sys.stderr, flush=True)
