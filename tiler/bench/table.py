"""What `measure.bench_slide` found of a slide, for people."""

import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def show(result: dict[str, Any]) -> None:
    """Prints a slide's table on stderr, the memory that reading took, and who is left out and why."""
    Console(file=sys.stderr).print(draw_table(result))
    for found in result["shares"]:
        if found["peak_mb"] is not None:
            took = f"{found['num_tiles']:,} tiles: read_tiles took {found['peak_mb']:,.0f} MB beside its output"
            print(took, file=sys.stderr)
    for name, why in result["why_not"].items():
        print(f"{name}: left out, {why}", file=sys.stderr)


def draw_table(result: dict[str, Any]) -> Table:
    """Its readers' rates, one row each, by share of the tiles."""
    wide, high = result["file_tile"]
    kind = f"{result['compression'] or result['backend']}, compressed tiles of {wide}x{high} px"
    table = Table(
        title=f"{result['slide']}: {kind}{_tell_cut(result)}",
        caption="ratio: first reader's tiles/core-s to this one's; decodes: compressed tiles for each tile",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("tiles", justify="right")
    table.add_column("reader", min_width=len("openslide_per_tile"))
    for name in ("tiles/s", "spread", "/core-s", "spread", "ratio", "decodes"):
        table.add_column(name, justify="right")
    for found in result["shares"]:
        measured = {name: rates for name, rates in found["readers"].items() if rates is not None}
        for i, (name, rates) in enumerate(measured.items()):
            ratio, decodes = found["ratio_per_core_s"].get(name), _decodes(name, found["decoded_per_tile"])
            table.add_row(
                "" if i else f"{found['num_tiles']:,}",
                name,
                f"{rates['tiles_per_s']:,.0f}",
                f"{rates['spread']:.0%}",
                f"{rates['tiles_per_core_s']:,.0f}",
                f"{rates['core_spread']:.0%}",
                "" if ratio is None else f"{ratio:.2f}",
                "" if decodes is None else f"{decodes:.2f}",
            )
        table.add_section()
    return table


def _decodes(reader: str, decoded_per_tile: dict[str, float]) -> float | None:
    kinds = {"read_tiles": "read_tiles", "cucim": "per_tile", "limit": "limit"}
    return next((decoded_per_tile.get(kind) for start, kind in kinds.items() if reader.startswith(start)), None)


def _tell_cut(result: dict[str, Any]) -> str:
    """Says where not all tiles of the slide were measured."""
    num_measured, num_tiles = result["num_measured"], result["num_tiles"]
    return "" if num_measured == num_tiles else f"; the first {num_measured:,} of {num_tiles:,} tiles (--most-tiles)"
