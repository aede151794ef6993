"""The end of every call of `slidegrad sweep`: all written, table 1 on the terminal, the result and the exit code."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from tiler.progress import Counter
from trainer.sweep.page import collect
from trainer.sweep.plan import Plan
from trainer.sweep.results import Row
from trainer.sweep.tables import comparison_table, main_table, print_table, to_result, trend_sentences

_WIDTH = 160
"""Of tables in a log."""
_MOST_TOLD = 20


def put_together(sweep: Path, plan: Plan, reference: str | None, names: set[str]) -> tuple[dict[str, Any], int]:
    """Writes what a sweep leaves, prints table 1, and returns the result and the exit code.

    Args:
        sweep: the sweep's folder.
        plan: of it.
        reference: the method that others are compared with.
        names: of runs whose failure is told by the exit code.
    """
    with Counter("reading runs") as counter:
        counter.start(len(plan.points))
        rows, summary, merit = collect(sweep, plan, reference, counter.advance)
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        console = Console(file=sys.stderr, width=_WIDTH)
    for table in (main_table(summary, merit), comparison_table(summary, merit)):
        if table is not None:
            console.print(print_table(table))
    for sentence in trend_sentences(summary, merit):
        console.print(sentence, highlight=False)
    failed = [row for row in rows if row.state == "failed"]
    for row in failed[:_MOST_TOLD]:
        console.print(f"failed: {row.run}: {row.reason} (logs/{row.run}.log)", highlight=False, markup=False)
    if len(failed) > _MOST_TOLD:
        console.print(f"and {len(failed) - _MOST_TOLD} more failed, all in report.html", highlight=False)
    result = {
        "sweep": str(sweep),
        "num_runs": len(rows),
        "num_done": sum(row.state == "done" for row in rows),
        "num_failed": len(failed),
        "failed": {row.run: row.reason for row in failed},
        **to_result(summary, merit),
        "table": str(sweep / "table1.md"),
        "report": str(sweep / "report.html"),
    }
    return result, int(any(_went_wrong(row) for row in rows if row.run in names))


def _went_wrong(row: Row) -> bool:
    return row.state == "failed" or bool(row.num_skipped)
