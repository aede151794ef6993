"""The progress of long work on stderr: a bar on a terminal, a line now and then in a log."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LOG_EVERY_S = 30.0
"""Seconds from one line to the next in a log."""


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2g}/s" if task.speed else "")


def progress_bar() -> Progress:
    """The bar that every long command shows on stderr, if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    return Progress(*columns, *times, console=console, disable=not console.is_terminal)


class Counter:
    """Counts `total` things of one kind with speed and time left, on a terminal and in a cluster's log alike.

    A bar in a log would be one endless line; there a line is printed every 30 seconds.
    """

    def __init__(self, what: str) -> None:
        self._what, self._bar = what, progress_bar()
        self._is_live = self._bar.console.is_terminal
        self._done = self._total = 0
        self._started = self._told = time.monotonic()

    def __enter__(self) -> Self:
        if self._is_live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_live:
            self._bar.stop()

    def start(self, total: int) -> None:
        """Says how many there are; the clock starts here."""
        self._total, self._started = total, time.monotonic()
        self._told = self._started
        if self._is_live and total:
            self._task = self._bar.add_task(self._what, total=total)

    def advance(self, note: str = "") -> None:
        """One more is done; `note` is shown behind it."""
        self._done += 1
        if self._is_live:
            self._bar.update(self._task, advance=1, description=f"{self._what}{note}")
        elif time.monotonic() - self._told > LOG_EVERY_S:
            self._told = time.monotonic()
            rate = self._done / (self._told - self._started)
            left_min = (self._total - self._done) / rate / 60
            line = f"{self._what}{note}: {self._done}/{self._total}, {rate:.2g}/s, {left_min:.0f} min left"
            print(line, file=sys.stderr, flush=True)
