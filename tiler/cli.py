"""The tiler's commands: tile, synth, doctor."""

import logging
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from manifests.schema import SlideRecord
from tiler.archive import tile_archive
from tiler.config import TilerConfig
from tiler.doctor import examine_machine, examine_slide
from tiler.errors import TilerError
from tiler.scale import read_mpp_csv

_MAX_LISTED = 20


def progress_bar() -> Progress:
    """The bar that every long command shows on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, *times, console=Console(file=sys.stderr))


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Build a manifest of tissue tiles for every slide under ARCHIVE; run again to go on where it stopped."""

    archive: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ARCHIVE")]
    """A folder, one slide, a glob, or a CSV/text list of slides."""
    out: Path
    """The manifests folder."""
    config: Annotated[TilerConfig, tyro.conf.arg(name="")] = field(default_factory=TilerConfig)
    mpp_csv: Path | None = None
    """CSV with slide_id, mpp for slides that do not say their scale."""
    workers: int | None = None
    """Processes; all cores by default."""
    overwrite: bool = False
    """Build manifests again that are there already."""

    def run(self) -> tuple[dict[str, Any], int]:
        if self.workers is not None and self.workers < 1:
            raise TilerError(f"--workers {self.workers}: expected at least 1")
        counts: Counter[str] = Counter()
        with progress_bar() as bar:
            task = bar.add_task("tiling", total=None, visible=False)

            def on_outcome(record: SlideRecord, total: int) -> None:
                counts[record.status] += 1
                about = f"tiling ({counts['failed']} failed)"
                bar.update(task, total=total, advance=1, description=about, visible=True)

            records = tile_archive(
                self.archive,
                self.out,
                self.config,
                csv_mpp=read_mpp_csv(self.mpp_csv) if self.mpp_csv else None,
                num_workers=self.workers,
                overwrite=self.overwrite,
                on_outcome=on_outcome,
            )
        failed = [record for record in records if record.status == "failed"]
        for record in failed[:_MAX_LISTED]:
            print(f"failed: {record.error}", file=sys.stderr)
        if len(failed) > _MAX_LISTED:
            print(f"… and {len(failed) - _MAX_LISTED} more; all are in {self.out}/catalog.parquet", file=sys.stderr)
        result = {
            "num_slides": len(records),
            **{status: counts[status] for status in ("ok", "empty", "failed")},
            "num_tiles": sum(record.num_tiles for record in records),
            "manifests": str(self.out),
        }
        return result, 1 if failed else 0


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


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Tell what this machine, and a slide, can and cannot do."""

    slide: tyro.conf.Positional[Path | None] = None
    """A slide to look at."""

    def run(self) -> tuple[dict[str, Any], int]:
        findings = examine_machine()
        if self.slide is not None:
            findings["slide"] = examine_slide(self.slide)
        for name, value in findings.items():
            print(f"{name:<18} {value}", file=sys.stderr)
        return findings, 1 if findings["problems"] else 0
