"""The tiler's commands: tile, synth."""

import logging
import os
import signal
import sys
import time
from collections import Counter as Statuses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pyarrow.compute as pc
import tyro

from tiler.archive import Job, Plan, Tiled, plan_archive, tile_archive
from tiler.build import Done
from tiler.config import TilerConfig
from tiler.errors import TilerError
from tiler.progress import Counter, progress_bar
from tiler.pseudonym import read_key
from tiler.scale import read_mpp_csv
from tiler.shards import parse_shard

_MAX_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Build a manifest of tissue tiles for every slide under ARCHIVE; run again to go on where it stopped."""

    archive: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ARCHIVE")]
    """A folder, one slide, a glob, or a CSV/text list of slides."""
    out: Path
    """The manifests folder."""
    config: Annotated[TilerConfig, tyro.conf.arg(name="")] = field(default_factory=TilerConfig)
    mpp_csv: Path | None = None
    """CSV with slide_id, mpp (or mpp_x, mpp_y) for slides that do not say their scale."""
    masks: Path | None = None
    """Folder of tissue masks from elsewhere, SLIDE_ID.png, .tif or .geojson, used instead of looking for tissue."""
    workers: int | None = None
    """Processes; all cores by default; 0 works in this one: no limits, and a reader that crashes ends the run."""
    timeout_s: float = 1_200.0
    """Seconds after which a slide is given up; tried twice."""
    memory_gb: float | None = None
    """Memory of one process, GB, beyond which its slide is given up; by default its share of the machine."""
    shard: str | None = None
    """I/N: only part I of N (I from 0), by a hash of the slide id; auto: the part of a SLURM or LSF array job."""
    dask: str | None = None
    """Address of a Dask scheduler whose workers do the work, host:port."""
    overwrite: bool = False
    """Build manifests again that are there already."""
    rehash: bool = False
    """Compute every fingerprint again, even where size and time of change are as they were."""
    dry_run: bool = False
    """Say what would be done, and do nothing."""
    pseudonymize: Path | None = None
    """File with a key: slide ids become keyed hashes everywhere but in the list of paths."""

    def run(self) -> tuple[dict[str, Any], int]:
        job = self._job()
        mpp = read_mpp_csv(self.mpp_csv) if self.mpp_csv else None
        if job.shard.count > 1:
            print(f"shard {job.shard}{f' ({job.shard.source})' if job.shard.source else ''}", file=sys.stderr)
        if self.dry_run:
            return self._tell(plan_archive(self.archive, self.out, self.config, job, mpp=mpp, masks=self.masks), job)
        signal.signal(signal.SIGTERM, _interrupt)  # How schedulers end a job: what is done is to be written down.
        started, num_failed = time.monotonic(), 0
        with Counter("tiling") as counter:

            def on_start(plan: Plan) -> None:
                _print_notes(plan.notes)
                todo, settled = len(plan.survey.todo), len(plan.wanted.slides) - len(plan.survey.todo)
                print(f"{todo} slides to tile, {settled} settled already", file=sys.stderr)
                counter.start(todo)

            def on_done(done: Done) -> None:
                nonlocal num_failed
                num_failed += done.record.status == "failed"
                counter.advance(f" ({num_failed} failed)" if num_failed else "")

            tiled = tile_archive(
                self.archive,
                self.out,
                self.config,
                job,
                mpp=mpp,
                masks=self.masks,
                on_start=on_start,
                on_done=on_done,
            )
        return self._sum_up(tiled, time.monotonic() - started)

    def _job(self) -> Job:
        if self.workers is not None and self.workers < 0:
            raise TilerError(f"--workers {self.workers}: expected 0 or more")
        if not self.timeout_s > 0:
            raise TilerError(f"--timeout-s {self.timeout_s:g}: expected more than 0 s")
        if self.memory_gb is not None and not 0.5 <= self.memory_gb < 1e6:
            raise TilerError(f"--memory-gb {self.memory_gb:g}: expected 0.5 GB or more")
        if self.dask is not None and self.workers is not None:
            raise TilerError("--dask works on the cluster's workers; leave --workers out")
        return Job(
            shard=parse_shard(self.shard, os.environ),
            num_workers=self.workers,
            time_s=self.timeout_s,
            memory_bytes=None if self.memory_gb is None else round(self.memory_gb * 1e9),
            dask=self.dask,
            overwrite=self.overwrite,
            rehash=self.rehash,
            key=read_key(self.pseudonymize) if self.pseudonymize else None,
        )

    def _tell(self, plan: Plan, job: Job) -> tuple[dict[str, Any], int]:
        _print_notes(plan.notes)
        for task in plan.survey.todo[:_MAX_LISTED]:
            print(f"would tile {task.slide_id}", file=sys.stderr)
        if len(plan.survey.todo) > _MAX_LISTED:
            print(f"… and {len(plan.survey.todo) - _MAX_LISTED} more", file=sys.stderr)
        num_slides, todo = len(plan.wanted.slides), len(plan.survey.todo)
        return {
            "num_slides": num_slides,
            "num_in_archive": plan.num_in_archive,
            "settled": num_slides - todo,
            "changed": plan.survey.num_changed,
            "other_settings": plan.survey.num_other_settings,
            "to_tile": todo,
            "shard": str(job.shard) if job.shard.count > 1 else None,
            "dry_run": True,
        }, 1 if plan.num_unreadable else 0

    def _sum_up(self, tiled: Tiled, wall_s: float) -> tuple[dict[str, Any], int]:
        catalog = tiled.catalog
        status = Statuses(catalog.column("status").to_pylist())
        errors = catalog.filter(pc.equal(catalog.column("status"), "failed")).column("error").to_pylist()
        for error in errors[:_MAX_LISTED]:
            print(f"failed: {error}", file=sys.stderr)
        if len(errors) > _MAX_LISTED:
            print(
                f"… and {len(errors) - _MAX_LISTED} more; see all with `slidegrad preview {self.out} --out DIR`",
                file=sys.stderr,
            )
        _print_notes(tiled.notes)
        if tiled.total_s:
            print(
                f"{tiled.num_new} slides in {wall_s:.1f} s; looking for damage ({self.config.check}) took "
                f"{100 * tiled.check_s / tiled.total_s:.1f} % of the work",
                file=sys.stderr,
            )
        counted = ", ".join(f"{status[name]} {name}" for name in ("ok", "empty", "failed"))
        print(f"{len(catalog)} slides: {counted}", file=sys.stderr)
        num_bad = pc.sum(catalog.column("num_bad_tiles")).as_py() or 0
        if num_bad:
            print(f"{num_bad} damaged tiles were left out", file=sys.stderr)
        result = {
            "num_slides": len(catalog),
            **{name: status[name] for name in ("ok", "empty", "failed")},
            "num_tiles": pc.sum(catalog.column("num_tiles")).as_py() or 0,
            "num_bad_tiles": num_bad,
            "num_new": tiled.num_new,
            "manifests": str(self.out),
        }
        return result, 1 if errors or tiled.num_unreadable else 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        print(note, file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class Synth:
    """Make a labelled synthetic cohort: pyramidal, JPEG-tiled, H&E-like slides with `labels.csv`."""

    out: Path
    """Where to; slides/, truth/ and labels.csv appear there."""
    slides: int
    """How many slides."""
    seed: int = 0
    """The same seed gives the same files."""
    workers: int | None = None
    """Processes; all cores by default."""

    def run(self) -> tuple[dict[str, Any], int]:
        from tiler.synth import make_cohort

        logging.getLogger("tifffile").setLevel(logging.ERROR)
        with progress_bar() as bar:
            task = bar.add_task("drawing slides", total=self.slides)
            files = make_cohort(
                self.out,
                self.slides,
                self.seed,
                num_workers=self.workers,
                progress=lambda done: bar.update(task, completed=done),
            )
        labels = self.out / "labels.csv"
        return {"num_slides": len(files), "slides": str(self.out / "slides"), "labels": str(labels)}, 0
