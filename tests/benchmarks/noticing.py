"""What notices damage to one compressed tile after a slide was tiled: the detection part of bench_damage.

A module of its own, because the tiles are read in another process, which may die of them.
"""

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from manifests import Manifest
from tests.tiler import damaged_slides as slides
from tests.tiler import readings
from tiler import ReadError, Slide, open_slide, plan_tiles, read_plan
from tiler.fingerprint import fingerprint
from tiler.guard import guarded, is_poisoned, noise
from tiler.integrity import bad_mark_rows, bad_rows
from tiler.tiff_tables import read_tables

NOTICED_BY = ("fingerprint", "raised", "printed", "unwritten", "printed_or_unwritten", "marks", "strict", "refused")


def detect(fmt: str, path: Path, manifest: Manifest, num_damaged: int) -> dict[str, object]:
    """What is noticed, by kind of damage.

    Args:
        fmt: one of `slides.FORMATS`.
        path: a sound slide of that format; a copy is made beside it.
        manifest: its tiles.
        num_damaged: tiles to damage, for each kind.
    """
    harmed = path.with_stem("damaged")
    found, pool = {}, None
    for kind in slides.KINDS:
        cases: list[dict[str, float]] = []
        for seed in range(num_damaged):
            pool = pool or ProcessPoolExecutor(1, get_context("spawn"))
            try:
                cases.append(pool.submit(try_damage, path, harmed, manifest, kind, seed).result())
            except BrokenProcessPool:
                cases.append({"died": 1})
                pool = None
        found[kind] = _sum_up(cases, is_jpeg=slides.FORMATS[fmt].is_jpeg)
    if pool is not None:
        pool.shutdown()
    table = read_tables(path)[0]
    return {
        "file_mb": round(path.stat().st_size / 1e6, 2),
        "num_file_tiles": int(table.offsets.size),
        "median_bytes": int(np.median(table.num_bytes)),
        "kinds": found,
    }


def try_damage(sound: Path, harmed: Path, manifest: Manifest, kind: str, seed: int) -> dict[str, float]:
    """Damages one compressed tile of a copy of a slide, and tells what notices it.

    Args:
        sound: the slide.
        harmed: where its copy is, or is made.
        manifest: its tiles.
        kind: one of `slides.KINDS`.
        seed: of which tile, and how.
    """
    shutil.copy(sound, harmed)
    rng, table = np.random.default_rng(seed), read_tables(sound)[0]
    sizes = table.num_bytes.ravel()
    index = int(rng.choice(np.flatnonzero(sizes >= np.median(sizes))))
    others = np.flatnonzero((sizes <= sizes[index]) & (sizes >= 0.8 * sizes[index]) & (np.arange(len(sizes)) != index))
    _replace(sound, harmed, index, int(rng.choice(others)) if len(others) else (index + 1) % len(sizes), kind, rng)
    rows = np.flatnonzero(slides.find_touching(manifest, table, [index]))
    slide, good = open_slide(harmed), open_slide(sound)
    truth = read_plan(good, manifest, plan_tiles(good, manifest, rows))
    case: dict[str, float] = {
        **_look(slide, good, manifest, rows),
        "fingerprint": fingerprint(harmed) != manifest.slide.fingerprint,
        "marks": bool(bad_mark_rows(slide, manifest, rows, look_through=True).any()),
        "strict": bool(bad_rows(slide, manifest, rows).any()),
    }
    with mock.patch.object(slide, "fingerprint", manifest.slide.fingerprint):
        for name, way in (("", "as planned"), ("_in_regions", "in regions")):
            try:
                tiles = read_plan(slide, manifest, readings.plan(slide, manifest, rows, way))
            except ReadError:
                case[f"refused{name}"] = 1
            else:
                num_wrong = int((tiles != truth).any(axis=3).sum())
                case[f"wrong_share{name}"] = num_wrong / (table.tile_w * table.tile_h)
    return case


def _replace(sound: Path, harmed: Path, index: int, other: int, kind: str, rng: np.random.Generator) -> None:
    table, content = read_tables(sound)[0], sound.read_bytes()
    places = list(zip(table.offsets.ravel().tolist(), table.num_bytes.ravel().tolist(), strict=True))
    tile, its = (content[at : at + n] for at, n in (places[index], places[other]))
    with harmed.open("r+b") as stream:
        stream.seek(places[index][0])
        stream.write(slides.harm(kind, tile, its, rng))


def _look(slide: Slide, good: Slide, manifest: Manifest, rows: NDArray[np.int64]) -> dict[str, float]:
    """What shows when cuCIM reads the tiles in regions, and whether a px is another one at all."""
    shown = {"raised": False, "printed": False, "unwritten": False, "changed": False}
    plan = plan_tiles(slide, manifest, rows, in_regions=True)
    level = slide.levels[manifest.slide.level]
    with guarded():
        for read in plan.reads:
            place = read.x_l0, read.y_l0, manifest.slide.level, read.width, read.height
            before = noise()
            try:
                region = slide.read(*place)
            except ReadError:
                shown |= {"raised": True, "changed": True}
                continue
            shown["printed"] |= noise() != before
            shown["unwritten"] |= is_poisoned(region, (read.x, read.y), (level.tile_w, level.tile_h))
            shown["changed"] |= not np.array_equal(region, good.read(*place))
    return {**shown, "printed_or_unwritten": shown["printed"] or shown["unwritten"]}


def _sum_up(cases: Sequence[Mapping[str, float]], *, is_jpeg: bool) -> dict[str, object]:
    """Shares of the damaged tiles whose px changed; how wrong those are that came back all the same."""
    changed = [case for case in cases if case.get("changed")]
    ways = ("", "_in_regions") if is_jpeg else ("",)
    columns = [*NOTICED_BY, *(["refused_in_regions"] if is_jpeg else [])]
    summary: dict[str, object] = {"num_changed": len(changed), "died": sum(case.get("died", 0) for case in cases)}
    for column in columns:
        share = float(np.mean([case.get(column, 0) for case in changed])) if changed else None
        summary[column] = share if share is None else round(share, 3)
    for way in ways:
        wrong = [case[f"wrong_share{way}"] for case in cases if case.get(f"wrong_share{way}")]
        quantiles = np.round(np.quantile(wrong, (0.5, 1)), 3).tolist() if wrong else None
        summary[f"wrong_share{way}_median_most"] = quantiles
    return summary
