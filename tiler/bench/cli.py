"""`slidegrad bench …`: what this machine does with your slides. Measured in measure.py."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from tiler.config import TilerConfig
from tiler.errors import TilerError
from tiler.progress import Counter

if TYPE_CHECKING:
    from rich.table import Table

    from manifests.schema import Manifest
    from tiler.slide import Slide

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Read:
    """Measure tiles per second by reader, beside the limit: each compressed tile decoded once, and nothing else."""

    slides: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="SLIDE")]
    """Slides to read."""
    manifests: str | None = None
    """Manifests to take their tiles from; by default they are tiled on the spot, with the four settings below."""
    tile_px: int = TilerConfig.tile_px
    """Output tile side, px."""
    mpp: float = TilerConfig.mpp
    """Microns per output px."""
    min_tissue: float = TilerConfig.min_tissue
    """Least share of a tile that must be tissue, 0 to 1; 0 keeps every tile inside the slide."""
    default_mpp: float | None = None
    """Microns per level-0 px for slides that do not say."""
    share: str = "1.0"
    """Shares of the tiles to read, drawn at random as in training: 1.0,0.4,0.05."""
    threads: str = "1,2"
    """Numbers of threads to read with: 1,2."""
    rounds: int = 5
    """How often each reader reads the same tiles."""
    seed: int = 0
    """Of the draws."""

    def run(self) -> tuple[dict[str, Any], int]:
        shares = _numbers(self.share, "--share", float, "shares in (0, 1], as in 1.0,0.4", lambda n: 0 < n <= 1)
        threads = _numbers(self.threads, "--threads", int, "1 to 1024 threads, as in 1,2", lambda n: 1 <= n <= 1024)
        if not self.slides:
            raise TilerError("bench read: no SLIDE; name one or more")
        if self.rounds < 1:
            raise TilerError(f"--rounds {self.rounds}: expected 1 or more")
        if self.manifests is not None and self._config() != TilerConfig():
            raise TilerError("--manifests says which tiles; leave --tile-px, --mpp, --min-tissue and --default-mpp out")
        from tiler.bench.measure import bench_slide

        opened = self._open()
        with Counter("measuring, rounds") as counter:
            counter.start(len(opened) * len(shares) * self.rounds)
            results = [
                bench_slide(
                    slide,
                    manifest,
                    shares=shares,
                    threads=threads,
                    num_rounds=self.rounds,
                    seed=self.seed,
                    on_round=counter.advance,
                )
                for slide, manifest in opened
            ]
        from rich.console import Console

        console = Console(file=sys.stderr)
        for result in results:
            console.print(draw_table(result))
            for found in result["shares"]:
                if found["peak_mb"] is not None:
                    took = f"{found['num_tiles']:,} tiles: read_tiles took {found['peak_mb']:,.0f} MB beside its output"
                    print(took, file=sys.stderr)
            for name, why in result["why_not"].items():
                print(f"{name}: left out, {why}", file=sys.stderr)
        return {"num_rounds": self.rounds, "seed": self.seed, "slides": results}, 0

    def _config(self) -> TilerConfig:
        return TilerConfig(tile_px=self.tile_px, mpp=self.mpp, min_tissue=self.min_tissue, default_mpp=self.default_mpp)

    def _open(self) -> list[tuple["Slide", "Manifest"]]:
        """Every slide with its tiles; all are looked at before the first is measured.

        Raises:
            SlidegradError: no such file, no slide, no tiles, or not in --manifests.
        """
        from manifests import open_manifests
        from tiler.build import build_manifest
        from tiler.slide import open_slide

        source = open_manifests(self.manifests) if self.manifests is not None else None
        known = source.catalog().select(["fingerprint", "slide_id"]).to_pylist() if source is not None else []
        ids = {row["fingerprint"]: row["slide_id"] for row in known}
        opened = []
        for path in self.slides:
            slide = open_slide(path)
            if source is None:
                manifest = build_manifest(path, path.stem, self._config()).manifest
            elif slide.fingerprint in ids:
                manifest = source[ids[slide.fingerprint]]
                slide = open_slide(path, manifest.slide.backend)  # type: ignore[arg-type]
            else:
                raise TilerError(
                    f"{path.name}: no slide of --manifests is this file; tile it, or leave --manifests out"
                )
            if not len(manifest):
                raise TilerError(f"{path.name}: no tiles to read; give --min-tissue 0 to take every tile")
            opened.append((slide, manifest))
        return opened


def _numbers(
    text: str, flag: str, kind: Callable[[str], _Number], expected: str, fits: Callable[[_Number], bool]
) -> tuple[_Number, ...]:
    """Comma-separated numbers, each once."""
    try:
        numbers = tuple(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or not all(map(fits, numbers)):
        raise TilerError(f"{flag} {text}: expected {expected}")
    return numbers


def draw_table(result: dict[str, Any]) -> "Table":
    """What `measure.bench_slide` found, for people."""
    from rich import box
    from rich.table import Table

    wide, high = result["file_tile"]
    table = Table(
        title=f"{result['slide']}: {result['compression'] or result['backend']}, compressed tiles of {wide}x{high} px",
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


@dataclass(frozen=True)
class Bench:
    """Measure what this machine does with your slides."""

    command: Read

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> "Bench":
        """The command of the first word; there is one so far."""
        known: dict[str, Callable[..., Read]] = {"read": Read}
        return cls(tyro.extras.subcommand_cli_from_dict(known, args=list(arguments), prog="slidegrad bench"))

    def run(self) -> tuple[dict[str, Any], int]:
        return self.command.run()
