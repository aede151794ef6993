"""The results of `slidegrad verify` for people: a table, a sentence around it, and the numbers for the last line."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from trainer.verify.cases import Case
from trainer.verify.errors import LIMITS, WHAT, Result, What

_COUNTED = ("aggregator", "groups", "ranks", "virtual ranks", "kept", "shared")


def describe_cases(case: Case) -> str:
    """What is compared, as far as it is the same for all cases."""
    batchnorm = "frozen" if case.batchnorm == "frozen" else "by virtual rank, in the single process too"
    tiles = " and ".join(filter(None, (", ".join(map(str, case.num_tiles[:-1])), str(case.num_tiles[-1]))))
    return (
        f"P, in parallel (H: in half precision), against S, a single process: {case.num_steps} AdamW steps on slides "
        f"of {tiles} tiles; dropout off; BatchNorm {batchnorm}"
    )


def build_table(results: Sequence[Result]) -> Table:
    """One row a case; of what was varied the columns that differ, of the errors all that were found."""
    about = [_about(result) for result in results]
    varied = [name for name in _COUNTED if len({row[name] for row in about}) > 1]
    found = [what for what in WHAT if any(what in result.errors for result in results)]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("encoder", "as", *varied):
        table.add_column(name, no_wrap=name in ("encoder", "as"))
    for what in found:
        table.add_column(what.replace("_", " "), justify="right")
    table.add_column("holds")
    for result, row in zip(results, about, strict=True):
        names = [row[name] for name in ("encoder", "as", *varied)]
        table.add_row(*names, *(_cell(result, what) for what in found), _verdict(result))
    return table


def describe_limits(results: Sequence[Result]) -> list[str]:
    """What the numbers of the table were held against."""
    lines = []
    for dtype in dict.fromkeys(result.case.dtype for result in results):
        usual = LIMITS[dtype]["gradients"]
        others = [f"{what.replace('_', ' ')} {x:.0e}" for what, x in LIMITS[dtype].items() if x != usual]
        lines.append(f"{dtype} {usual:.0e}" + (f" ({', '.join(others)})" if others else ""))
    moved = [result.moved for result in results]
    return [
        f"relative L1 errors; limits: {'; '.join(lines)}",
        f"the steps moved the parameters by {min(moved):.0%} to {max(moved):.0%} of their size",
    ]


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    """Whether all hold, and the largest errors."""
    largest: dict[str, dict[str, float | None]] = {}
    for dtype in dict.fromkeys(result.case.dtype for result in results):
        alike = [result.errors for result in results if result.case.dtype == dtype]
        largest[dtype] = {what: _largest(e[what] for e in alike if what in e) for what in WHAT if what in alike[0]}
    return {
        "holds": all(result.holds for result in results),
        "num_cases": len(results),
        "max_error": largest,
        "fault": results[0].case.fault,
    }


def _about(result: Result) -> dict[str, str]:
    case = result.case
    return {
        "encoder": case.encoder,
        "as": f"{'H' if case.dtype == 'bf16' else 'P'} {case.dtype}",
        "aggregator": case.aggregator,
        "groups": str(case.num_groups),
        "ranks": str(case.num_ranks),
        "virtual ranks": str(case.num_virtual),
        "kept": "all" if case.keep is None else str(case.keep),
        "shared": "yes" if case.is_shared else "no",
    }


def _cell(result: Result, what: What) -> Text:
    if what not in result.errors:
        return Text("-")
    return Text(f"{result.errors[what]:.1e}", style="bold red" if what in result.exceeded else "")


def _verdict(result: Result) -> Text:
    return Text("yes") if result.holds else Text("NO", style="bold red")


def _largest(errors: Iterable[float]) -> float | None:
    """None if one is not a number, which JSON does not know."""
    values = list(errors)
    return max(values) if all(map(math.isfinite, values)) else None
