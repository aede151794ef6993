"""The tables of the method's reference trainer: slide_data.csv and tile_data.csv.

Source: the documented columns of the authors' public code, https://github.com/fuchs-lab-public/OPAL
(SSL_benchmarks/code/feature_extraction/README.md). tile_data.csv has slide, x, y (level-0 px), level, mult: the trainer
reads a square of round(tilesize * mult) px of `level` and, where mult is not 1, resizes it to tilesize (`--tilesize`).

What it cannot say: a read size that differs in x and y; `mult` is that of x. What an export does not know: where the
slides lie (file names stay in the manifests' `paths/`), targets and splits; join the trainer's `slide_path` or `path`,
target and split to slide_data.csv by `slide`. The further columns of slide_data.csv are the read plan, which the
trainer passes over; a pair without them is read with `--tile-px`.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc

from manifests.errors import ManifestError
from manifests.exchange.plain import only_value
from manifests.exchange.tables import csv_columns, csv_line, read_groups, readable
from manifests.exchange.tiles import MAX_PX, Add, Outline, ReadPlan, TileSet, whole_numbers
from manifests.files import atomic_path
from manifests.schema import Manifest

SQUARE = "scale differs in x and y; the reference trainer reads square px, so that mult is that of x"
_TILE_COLUMNS = {"x": pa.float64(), "y": pa.float64(), "level": pa.int64(), "mult": pa.float64()}
_PLAN_COLUMNS = [f.name for f in dataclasses.fields(ReadPlan) if f.name != "slide_id"]


@contextlib.contextmanager
def export_eagle(out: Path, max_tiles: int) -> Iterator[Add]:
    """Yields the function that adds one slide to both tables."""
    del max_tiles
    with contextlib.ExitStack() as stack:
        slides, tiles = (
            stack.enter_context(stack.enter_context(atomic_path(out / name)).open("w", newline="", encoding="utf-8"))
            for name in ("slide_data.csv", "tile_data.csv")
        )
        slides.write(csv_line("slide", "num_tiles", *_PLAN_COLUMNS))
        tiles.write(csv_line("slide", *_TILE_COLUMNS))

        def add(manifest: Manifest, outline: Outline) -> list[str]:
            del outline
            record, plan = manifest.slide, dataclasses.asdict(ReadPlan.of(manifest.slide))
            slides.write(csv_line(record.slide_id, len(manifest), *(plan[name] for name in _PLAN_COLUMNS)))
            slide_id = csv_line(record.slide_id).removesuffix("\n")
            read = csv_line(record.level, record.read_w / record.tile_px)
            corners = zip(manifest.x_l0.tolist(), manifest.y_l0.tolist(), strict=True)
            tiles.writelines(f"{slide_id},{x},{y},{read}" for x, y in corners)
            return [SQUARE] if record.read_w != record.read_h else []

        yield add


def find_tables(files: list[Path]) -> tuple[Path, Path | None]:
    """Which of the given files is tile_data.csv and which slide_data.csv, by their columns; the latter may be missing.

    Raises:
        ManifestError: none, or more than one, of a kind.
    """
    tiles = [file for file in files if "mult" in csv_columns(file)]
    slides = [file for file in files if file not in tiles]
    if len(tiles) != 1 or len(slides) > 1:
        raise ManifestError(
            f"{len(tiles)} files with a column mult among {len(files)}; give tile_data.csv slide_data.csv"
        )
    return tiles[0], slides[0] if slides else None


def read_eagle(tile_data: Path, slide_data: Path | None, tile_px: int) -> Iterator[TileSet | ManifestError]:
    """Reads the pair slide by slide; a slide whose rows disagree comes as the error that says so.

    A slide that only slide_data.csv knows has no tiles.

    Args:
        tile_data: the tiles.
        slide_data: the slides, with the read plan if Slidegrad wrote it.
        tile_px: the trainer's tile size, for slides without a plan.

    Raises:
        ManifestError: not such files.
    """
    slides = _read_slides(slide_data) if slide_data else {}
    for slide_id, rows in read_groups(tile_data, "slide", _TILE_COLUMNS):
        try:
            yield _tile_set(slide_id, rows, slides.pop(slide_id, None), tile_px)
        except ManifestError as error:
            yield error
    none = np.zeros(0, np.int64)
    for slide_id, plan in slides.items():
        if plan is None:
            yield TileSet(names=(slide_id,), x_l0=none, y_l0=none, tile_px=tile_px)
        else:
            yield TileSet.planned(plan, none, none)


def _tile_set(slide_id: str, rows: pa.Table, plan: ReadPlan | None, tile_px: int) -> TileSet:
    where = f"slide {slide_id}"
    x_l0, y_l0 = (whole_numbers(rows.column(name).to_numpy(), where) for name in ("x", "y"))
    level = int(only_value(rows, "level", where))
    mult = only_value(rows, "mult", where)
    if not 0 < tile_px * mult < MAX_PX:
        raise ManifestError(f"{where}: mult {mult:g} in tile_data.csv, expected the size read per {tile_px} px")
    read_px = round(tile_px * mult)
    if plan is None:
        return TileSet(
            names=(slide_id,), x_l0=x_l0, y_l0=y_l0, tile_px=tile_px, level=level, read_size=(read_px, read_px)
        )
    if level != plan.level:
        raise ManifestError(
            f"{where}: level {level} in tile_data.csv, {plan.level} in slide_data.csv; export both again"
        )
    return TileSet.planned(plan, x_l0, y_l0)


def _read_slides(file: Path) -> dict[str, ReadPlan | None]:
    if "slide" not in csv_columns(file):
        raise ManifestError(f"{file.name}: no column slide")
    options = pc.ConvertOptions(column_types={"slide": pa.string()})
    with readable(file):
        table = pc.read_csv(file, parse_options=pc.ParseOptions(newlines_in_values=True), convert_options=options)
    if not set(_PLAN_COLUMNS) <= set(table.column_names):
        return dict.fromkeys(table.column("slide").to_pylist())
    rows: list[dict[str, Any]] = table.select(["slide", *_PLAN_COLUMNS]).to_pylist()
    return {row["slide"]: ReadPlan.parse({**row, "slide_id": row["slide"]}, file.name) for row in rows}
