"""`slidegrad manifest …`: the manifests' commands.

Here and not in `manifests`, because `validate --slides` fingerprints slides and `import` opens them.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from manifests.catalog import read_paths
from manifests.checks import SlideFiles
from manifests.compact import compact
from manifests.errors import ManifestError
from manifests.source import local_path, open_manifests, open_stored
from manifests.stats import PAPER_K, CatalogStats, Histogram, summarise_catalog
from manifests.validate import validate
from tiler.exchange import Export, Import
from tiler.progress import Counter

_MAX_LISTED = 20
_BAR_CHARS = 50

Root = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MANIFESTS")]


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show one slide's record and its first tiles."""

    manifests: Root
    """A manifests folder, a compacted set, or the address of one (s3://…, https://…)."""
    slide_id: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SLIDE_ID")]
    """The slide."""

    def run(self) -> tuple[dict[str, Any], int]:
        manifest = open_manifests(self.manifests)[self.slide_id]
        for row in manifest.to_table().slice(0, 5).to_pylist():
            print(row, file=sys.stderr)
        return dataclasses.asdict(manifest.slide), 0


@dataclass(frozen=True, kw_only=True)
class Validate:
    """Read every manifest, and tell what does not hold together; exit code 1 if anything does not."""

    manifests: Root
    """A manifests folder, a compacted set, or the address of one (s3://…, https://…)."""
    slides: bool = False
    """Look at the slides too: is each still there, and the file that was tiled?"""
    archive: Path | None = None
    """Where the archive is mounted now, if not where it was when it was tiled."""

    def run(self) -> tuple[dict[str, Any], int]:
        with Counter("validating") as counter:
            report = validate(self.manifests, slides=self._slide_files(), progress=_ticking(counter))
        for problem in report.problems[:_MAX_LISTED]:
            print(problem.text, file=sys.stderr)
        num_problems = report.num_by_kind.total()
        if num_problems > _MAX_LISTED:
            print(f"… and {num_problems - _MAX_LISTED} more", file=sys.stderr)
        if report.num_by_kind["catalogue"]:
            print("catalog.parquet is a cache: delete it, it is made anew at the next use", file=sys.stderr)
        result = {
            "num_slides": report.num_slides,
            "num_problems": num_problems,
            "num_by_kind": dict(sorted(report.num_by_kind.items())),
            "problems": [dataclasses.asdict(problem) for problem in report.problems],
        }
        return result, 1 if num_problems else 0

    def _slide_files(self) -> SlideFiles | None:
        if not self.slides:
            if self.archive is not None:
                raise ManifestError("--archive says where slides lie; give --slides too")
            return None
        root = local_path(self.manifests)
        paths = {} if root is None else read_paths(root, self.archive)
        if not paths:
            raise ManifestError(f"--slides: no paths/ in {self.manifests}; give the folder that `slidegrad tile` wrote")
        from tiler.slide import fingerprint

        return SlideFiles(paths=paths, fingerprint=fingerprint)


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Count slides and tiles, and the devices that the largest slides need."""

    manifests: Root
    """A manifests folder, a compacted set, or the address of one (s3://…, https://…)."""
    k: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """Tiles that one device holds; may be given several times. By default the paper's, for an 80 GB H100."""

    def run(self) -> tuple[dict[str, Any], int]:
        stats = summarise_catalog(open_manifests(self.manifests).catalog(), self.k or PAPER_K)
        for line in _describe(stats):
            print(line, file=sys.stderr)
        slides = {name: count.slides for name, count in stats.status.items()}
        return {**dataclasses.asdict(stats), **slides}, 0


@dataclass(frozen=True, kw_only=True)
class Compact:
    """Put many manifests into few files: one per thousand slides, and the catalogue."""

    manifests: Root
    """A manifests folder, a compacted set, or the address of one (s3://…, https://…)."""
    out: Path
    """The set's folder; a set that is there is replaced once the new one is whole."""

    def run(self) -> tuple[dict[str, Any], int]:
        with Counter("compacting") as counter:
            done = compact(open_stored(self.manifests), self.out, progress=_ticking(counter))
        return {**dataclasses.asdict(done), "set": str(self.out)}, 0


def _ticking(counter: Counter) -> Callable[[int], None]:
    """Turns "one more is done of so many" into the counter's two calls."""
    is_started = False

    def tick(total: int) -> None:
        nonlocal is_started
        if not is_started:
            counter.start(total)
            is_started = True
        counter.advance()

    return tick


def _describe(stats: CatalogStats) -> Iterator[str]:
    """The numbers as a page of text."""
    slides = ", ".join(f"{count.slides:,} {name}" for name, count in stats.status.items())
    yield f"{stats.num_slides:,} slides ({slides}), {stats.num_tiles:,} tiles"
    for about in ("mpp_source", "vendor", "backend"):
        counts = getattr(stats, about).items()
        yield f"{about}: " + ", ".join(f"{name} {count.slides:,} ({count.tiles:,} tiles)" for name, count in counts)
    yield "rejected: " + ", ".join(f"{reason} {count:,}" for reason, count in stats.rejected.items())
    spread = stats.tiles_per_slide
    quantiles = f"median {spread.median:,.0f}, 95 % {spread.p95:,.0f}, 99 % {spread.p99:,.0f}, max {spread.max:,}"
    yield f"tiles per ok slide: {quantiles}"
    yield from _draw(stats.histogram)
    yield "devices for a slide, each holding K tiles:"
    yield f"{'K':>8}  {'median':>7} {'95 %':>7} {'99 %':>7} {'max':>7}"
    for d in stats.devices:
        yield f"{d.k:>8,}  {d.median:>7,} {d.p95:>7,} {d.p99:>7,} {d.max:>7,}  {d.name}".rstrip()


def _draw(histogram: Histogram) -> Iterator[str]:
    width, highest = len(f"{histogram.edges[-1]:,}"), max(1, *histogram.counts)
    for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        bar = "#" * -(-count * _BAR_CHARS // highest)  # Rounded up: one slide among thousands is seen.
        yield f"{low:>{width},} to {high - 1:>{width},} {bar} {count:,}"


@dataclass(frozen=True)
class ManifestCommand:
    """Look into manifests."""

    command: Annotated[
        Annotated[Inspect, tyro.conf.subcommand("inspect", prefix_name=False)]
        | Annotated[Validate, tyro.conf.subcommand("validate", prefix_name=False)]
        | Annotated[Stats, tyro.conf.subcommand("stats", prefix_name=False)]
        | Annotated[Compact, tyro.conf.subcommand("compact", prefix_name=False)]
        | Annotated[Export, tyro.conf.subcommand("export", prefix_name=False)]
        | Annotated[Import, tyro.conf.subcommand("import", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> tuple[dict[str, Any], int]:
        return self.command.run()
