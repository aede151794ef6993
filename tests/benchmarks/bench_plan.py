"""Seconds and memory of planning: an epoch of the method's breast cohort, and one step of its slides.

`cohort` is what a rank does before its first step and once an epoch, with half of 13,050 slides drawn: the catalogue
opened, the labels joined with it (`load_cohort`), the run's slides and their files listed (`Job.open`), the epoch's
steps planned and the rows of each step drawn and split for one rank of twelve (one aggregator, eleven encoders). Each
size runs in a process of its own; memory is what its peak grew by after all imports. Slides of 100 and of 45,000 tiles
stand beside those of 10,000: planning reads no slide's manifest, so they must cost the same.

`step` is what is done anew for every slide, in milliseconds: its manifest read from disk, its rows drawn and split, the
reads of a rank's tiles planned on a slide that is open: for a slide of the cohort's 10,000 tiles and for one of the
most, with all of them and with half of them drawn.

Beside both, `flat_table`: the published loader of the method keeps the tiles of all slides in one table in every
process, and takes a slide's tiles out of it by comparing each row's slide. Timed on 3 million rows and scaled to the
cohort's, with slides as numbers, the cheapest way, and as names.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manifests import Manifest, open_manifests, read_manifest, write_manifest
from manifests.catalog import Place, write_paths
from manifests.files import tiles_key
from manifests.schema import CATALOG_SCHEMA, SlideRecord, records_to_catalog
from tests.benchmarks.big_slides import write_big_slide
from tests.benchmarks.in_memory import draw_rows, resident_mb
from tiler import Slide, TilerConfig, build_manifest, open_slide, plan_tiles
from trainer.cohort import Cohort, load_cohort
from trainer.config import Cohort as CohortConfig
from trainer.config import RunConfig
from trainer.job import Job
from trainer.recipes import get_recipe
from trainer.sampler import SlideSampler, StepPlan, shards_of
from trainer.topology import Topology

NUM_SLIDES = 13_050
NUM_TILES = (100, 10_000, 45_000)
NUM_PROCESSES, RANK = 12, 1
MOST_TILES = 45_056
MOST_TILES_PX = 213 * 224
"""Side of a slide with a few more."""
_TABLE_ROWS = 3_000_000
_TABLE_ROW_BYTES = 51
"""Of the published loader's table in memory: 6.7 GB for the cohort."""


def main(num_slides: int = NUM_SLIDES, side_px: int = MOST_TILES_PX, num_rounds: int = 20) -> dict[str, Any]:
    """Measures both.

    Args:
        num_slides: of the cohort.
        side_px: of the slide that one step is planned on.
        num_rounds: how often a step is planned; medians are given.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cohort = {num_tiles: _run_apart(folder, num_slides, num_tiles) for num_tiles in NUM_TILES}
        step = measure_step(folder, side_px, num_rounds)
    flat = measure_flat_table(num_rows=min(_TABLE_ROWS, 1_000 * num_slides), num_all=10_000 * num_slides)
    return {"num_slides": num_slides, "cohort": cohort, "step": step, "flat_table": flat}


def _run_apart(folder: Path, num_slides: int, num_tiles: int) -> dict[str, Any]:
    """`measure_cohort` in a process of its own."""
    root = folder / f"cohort-{num_tiles}"
    make_cohort_files(root, num_slides, num_tiles)
    command = [sys.executable, "-m", "tests.benchmarks.bench_plan", "--cohort", str(root)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def make_cohort_files(root: Path, num_slides: int, num_tiles: int) -> None:
    """Catalogue, path list and labels of a tiled cohort; its manifests are empty files, for nobody opens them."""
    ids = [f"case_{i:06d}" for i in range(num_slides)]
    keys = [tiles_key(slide_id) for slide_id in ids]
    for shard in {key[:2] for key in keys}:
        (root / "tiles" / shard).mkdir(parents=True)
    for key in keys:
        os.close(os.open(root / "tiles" / f"{key}.parquet", os.O_CREAT))
    write_paths(root, "bench", {s: Place(str(root / "archive"), f"{s[:8]}/{s}.svs", 10**9, 1) for s in ids})
    like = SlideRecord(slide_id="", status="ok", backend="cucim", tile_px=224, tile_mpp=0.5, num_tiles=num_tiles)
    (row,) = records_to_catalog([like]).to_pylist()
    columns = {name: pa.array([value] * num_slides, CATALOG_SCHEMA.field(name).type) for name, value in row.items()}
    columns |= {"slide_id": pa.array(ids), "fingerprint": pa.array([f"{i:032x}" for i in range(num_slides)])}
    # The listing that the catalogue stands for began well after the manifests appeared.
    mark = {"slidegrad": json.dumps({"scanned_at_ns": time.time_ns() + 3_600 * 10**9})}
    pq.write_table(pa.table(columns, CATALOG_SCHEMA).replace_schema_metadata(mark), root / "catalog.parquet")
    # Two slides a patient, as in a cohort of specimens.
    lines = [f"{slide_id},{i % 2},p{i // 2:06d}" for i, slide_id in enumerate(ids)]
    (root / "labels.csv").write_text("\n".join(["slide_id,label,patient_id", *lines]) + "\n")


def measure_cohort(root: Path) -> dict[str, Any]:
    """Seconds of each part of a rank's planning, and the memory by which all of it made this process grow, MB."""
    recipe = get_recipe("breast_full_slide")
    machine = dataclasses.replace(recipe.machine, manifests=root)
    # All slides train; the recipe draws half of them.
    whole = CohortConfig(fraction_per_epoch=recipe.cohort.fraction_per_epoch, val_fraction=0, test_fraction=0)
    config = dataclasses.replace(recipe, machine=machine, cohort=whole).resolved(NUM_PROCESSES - 1)
    seconds: dict[str, float] = {}
    before_mb = resident_mb("VmRSS", reset_peak=True)

    def timed(name: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        seconds[name] = round(time.perf_counter() - start, 3)
        return result

    source = timed("open_manifests", lambda: open_manifests(root))
    cohort = timed("load_cohort", lambda: load_cohort(root / "labels.csv", source, config.cohort, config.seed))
    job = timed("open_job", lambda: Job.open(root / "run", config, cohort))
    sampler = make_sampler(job.cohort, config)
    steps = timed("plan_epoch", sampler.steps)
    num_shards, num_rows = timed("draw_all_rows", lambda: _exhaust(sampler))
    peak_mb = resident_mb("VmHWM")
    return {
        "num_steps": len(steps),
        "num_shards": num_shards,
        "num_rows": num_rows,
        "seconds": seconds,
        "total_s": round(sum(seconds.values()), 2),
        "growth_mb": round(peak_mb - before_mb, 1),
        "imports_mb": round(before_mb, 1),
    }


def make_sampler(cohort: Cohort, config: RunConfig) -> SlideSampler:
    """The sampler of one encoder rank of twelve processes."""
    topology = Topology.make(NUM_PROCESSES, config.machine.aggregator, config.virtual_ranks)
    return SlideSampler(
        cohort.num_tiles("train"),
        topology,
        RANK,
        seed=config.seed,
        fraction=config.cohort.fraction_per_epoch,
        tiles=config.tiles,
    )


def _exhaust(sampler: SlideSampler) -> tuple[int, int]:
    """Draws every step's rows, one after another as the loader does, and holds none; returns shards and rows."""
    num_shards = num_rows = 0
    for plan in sampler:
        num_shards, num_rows = num_shards + 1, num_rows + len(plan.rows)
    return num_shards, num_rows


def measure_step(folder: Path, side_px: int, num_rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of each part of planning one slide's step: medians, and the largest of the sums."""
    path, file = folder / "most_tiles.svs", folder / "most_tiles.parquet"
    write_big_slide(path, side_px, share_bytes=True)
    whole = build_manifest(path, "most_tiles", TilerConfig(min_tissue=0)).manifest
    slide = open_slide(path)
    sizes = [min(len(whole), most) for most in (10_000, MOST_TILES)]
    found = []
    for num_tiles, num_rows in [(size, drawn) for size in sizes for drawn in (size, size // 2)]:
        record = dataclasses.replace(whole.slide, num_tiles=num_tiles)
        first = (column[:num_tiles] for column in (whole.x_l0, whole.y_l0, whole.tissue))
        write_manifest(file, Manifest(record, *first))
        steps = [StepPlan(epoch, 0, "most_tiles", num_tiles, num_rows) for epoch in range(num_rounds)]
        _plan_step(file, slide, steps[0])  # The first of a process imports, and does not count.
        rounds = [_plan_step(file, slide, step) for step in steps]
        parts = {f"{name}_ms": round(statistics.median(r[name] for r in rounds), 2) for name in rounds[0]}
        totals = [sum(r.values()) for r in rounds]
        whole_ms = {"total_ms": round(statistics.median(totals), 2), "worst_ms": round(max(totals), 2)}
        found.append({"num_tiles": num_tiles, "num_rows": num_rows, **parts, **whole_ms})
    return found


def _plan_step(file: Path, slide: Slide, step: StepPlan) -> dict[str, float]:
    """Milliseconds of the parts of one planning."""
    topology = Topology.make(NUM_PROCESSES, "dedicated", NUM_PROCESSES - 1)
    times = [time.perf_counter()]
    manifest = read_manifest(file)
    times.append(time.perf_counter())
    _ = manifest.cells
    times.append(time.perf_counter())
    (plan,) = shards_of([step], topology, RANK, seed=0)
    times.append(time.perf_counter())
    plan_tiles(slide, manifest, plan.rows)
    times.append(time.perf_counter())
    names = ("read_manifest", "cells", "draw_and_shard", "plan_tiles")
    return {name: 1e3 * (end - begin) for name, begin, end in zip(names, times, times[1:], strict=False)}


def measure_flat_table(num_rows: int, num_all: int, num_rounds: int = 5) -> dict[str, Any]:
    """Seconds to take a slide's rows out of a flat table, hours for half the slides, scaled to `num_all` rows."""
    numbers = np.repeat(np.arange(max(1, num_rows // 10_000), dtype=np.int64), 10_000)[:num_rows]
    names = np.char.add("case_", np.char.zfill(numbers.astype("U6"), 6))
    found: dict[str, Any] = {"num_rows": num_rows, "scaled_to": num_all, "table_gb": num_all * _TABLE_ROW_BYTES / 1e9}
    for kind, column in {"numbers": numbers, "names": names}.items():
        wanted, rounds = column[num_rows // 2], []
        for _ in range(num_rounds):
            start = time.perf_counter()
            np.flatnonzero(column == wanted)
            rounds.append(time.perf_counter() - start)
        slide_s = statistics.median(rounds) * num_all / num_rows
        found[f"slide_s_by_{kind}"] = round(slide_s, 3)
        found[f"epoch_h_by_{kind}"] = round(slide_s * num_all / 10_000 / 2 / 3600, 3)
    return found


def draw(result: dict[str, Any]) -> str:
    """The report's tables."""
    cohorts = [{"tiles a slide": n, **c["seconds"], **c} for n, c in result["cohort"].items()]
    parts = ("open_manifests", "load_cohort", "open_job", "plan_epoch", "draw_all_rows")
    of_step = ("read_manifest_ms", "cells_ms", "draw_and_shard_ms", "plan_tiles_ms", "total_ms", "worst_ms")
    flat = [{"published loader, by": by, **_flat(result["flat_table"], by)} for by in ("numbers", "names")]
    return "\n".join(
        (
            draw_rows(("tiles a slide", *parts, "total_s", "growth_mb"), cohorts),
            draw_rows(("num_tiles", "num_rows", *of_step), result["step"]),
            draw_rows(("published loader, by", "ms a slide", "h an epoch"), flat),
        )
    )


def _flat(found: dict[str, Any], by: str) -> dict[str, float]:
    return {"ms a slide": round(1e3 * found[f"slide_s_by_{by}"]), "h an epoch": found[f"epoch_h_by_{by}"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cohort", type=Path, help="measure a cohort that was made before, in this process")
    given = parser.parse_args().cohort
    if given is not None:
        print(json.dumps(measure_cohort(given)))
    else:
        found = main()
        print(draw(found), file=sys.stderr)
        print(json.dumps(found))
