"""`slidegrad bench …`: what this machine does with your slides. Measured in measure.py."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from manifests.errors import SlidegradError
from tiler.config import TilerConfig
from tiler.errors import TilerError
from tiler.progress import Counter

if TYPE_CHECKING:
    from manifests.schema import Manifest
    from tiler.slide import Slide

_Number = TypeVar("_Number", int, float)


def _shows(default: float) -> Any:
    """A flag whose default, in the help, is not None: None tells whether it was given."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {default})")


@dataclass(frozen=True, kw_only=True)
class Read:
    """Measure tiles per second by reader, beside the limit: each compressed tile decoded once, and nothing else."""

    slides: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="SLIDE")]
    """Slides to read."""
    manifests: str | None = None
    """Manifests to take their tiles from; by default they are tiled on the spot, with the four settings below."""
    tile_px: Annotated[int | None, _shows(TilerConfig.tile_px)] = None
    """Output tile side, px."""
    mpp: Annotated[float | None, _shows(TilerConfig.mpp)] = None
    """Microns per output px."""
    min_tissue: Annotated[float | None, _shows(TilerConfig.min_tissue)] = None
    """Least share of a tile that must be tissue, 0 to 1; 0 keeps every tile inside the slide."""
    default_mpp: float | None = None
    """Microns per level-0 px for slides that do not say."""
    most_tiles: int = 8192
    """Tiles of a slide to measure at most, the first of its manifest, which lie together; all are in memory at once:
    8,192 of 224 px take 1.2 GB."""
    share: str = "1.0"
    """Shares of these tiles to read, drawn at random as in training: 1.0,0.4,0.05."""
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
        if self.most_tiles < 1:
            raise TilerError(f"--most-tiles {self.most_tiles}: expected 1 or more")
        open_tiles = self._choose_tiles()
        from tiler.bench.measure import bench_slide
        from tiler.bench.slides import tell
        from tiler.bench.table import show

        results: list[dict[str, Any]] = []
        failed: list[dict[str, str]] = []
        for i, path in enumerate(self.slides, 1):
            try:
                slide, manifest = open_tiles(path)
                with Counter(f"slide {i} of {len(self.slides)}, rounds") as counter:
                    counter.start(len(shares) * self.rounds)
                    result = bench_slide(
                        slide,
                        manifest,
                        shares=shares,
                        threads=threads,
                        num_rounds=self.rounds,
                        seed=self.seed,
                        most_tiles=self.most_tiles,
                        on_round=counter.advance,
                    )
            except (SlidegradError, OSError) as error:
                sentence = tell(error, path, is_tiled_here=self.manifests is None)
                if len(self.slides) == 1:
                    raise TilerError(sentence) from error
                failed.append({"slide": path.stem, "error": sentence})
                print(sentence, file=sys.stderr)
            else:
                show(result)
                results.append(result)
        found = {"num_rounds": self.rounds, "seed": self.seed, "slides": results, "failed": failed}
        return found, 1 if failed else 0

    def _choose_tiles(self) -> "Callable[[Path], tuple[Slide, Manifest]]":
        """Opens a slide with its tiles: those of --manifests, or else tiled on the spot.

        Raises:
            SlidegradError: settings that are wrong, or have no effect; no manifests there.
        """
        settings = {
            "tile_px": self.tile_px,
            "mpp": self.mpp,
            "min_tissue": self.min_tissue,
            "default_mpp": self.default_mpp,
        }
        given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
        if self.manifests is not None and given:
            raise TilerError("--manifests says which tiles; leave --tile-px, --mpp, --min-tissue and --default-mpp out")
        config = TilerConfig(**given)
        from manifests import open_manifests
        from tiler.bench.slides import look_up, tile_here

        if self.manifests is None:
            return partial(tile_here, config=config)
        return partial(look_up, source=open_manifests(self.manifests))


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
