"""`slidegrad doctor`: what this machine and a slide can and cannot do, and how long an epoch of a recipe would take.

The command must answer on an installation without torch, so nothing that needs it is imported before a recipe is asked
for; and its help must be quick, so neither is the tiler. The looking is in tiler/doctor, the projection's formula in
trainer/projection.py; here is in which order things are looked at and told.
"""

import importlib.util
import os
import stat
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import tyro

if TYPE_CHECKING:
    from manifests.schema import Manifest
    from manifests.source import ManifestSource
    from tiler.config import TilerConfig
    from trainer.config import RunConfig
    from trainer.projection import ReadingRate

_NUM_SLIDES, _NUM_TILES = 1_000, 10_000
"""The cohort that is assumed where no manifests are given: slides, and tiles of each."""
_MOST_TRIED = 10


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Tell what this machine, and a slide, can and cannot do; with --recipe, how long an epoch would take.

    All readers' pixels of the slide are compared, and it is read for some seconds, to see how fast that is here.
    """

    slide: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[SLIDE]")] = None
    """A slide to look at."""
    default_mpp: float | None = None
    """Microns per level-0 px, if the slide does not say."""
    tile_px: int | None = None
    """Tile side, output px; by default that of --manifests, else 224."""
    mpp: float | None = None
    """Microns per output px; by default that of --manifests, else 0.5."""
    threads: int | None = None
    """Threads that read; all cores by default."""
    recipe: str | None = None
    """Measure this recipe's encoder here, and project the time of an epoch."""
    manifests: Path | None = None
    """The cohort's manifests, for its numbers of tiles; one of its slides is looked at if none is given."""
    nproc: int | None = None
    """Project for so many processes too, the aggregator included."""

    def run(self) -> tuple[dict[str, Any], int]:
        from tiler.doctor import examine_machine
        from tiler.doctor.words import tell

        tiling = self._check()
        config = _open_recipe(self.recipe) if self.recipe is not None else None
        cohort = _Cohort.open(self.manifests) if self.manifests is not None else None
        if cohort is not None and self.slide is not None:
            tiling = replace(tiling, tile_px=cohort.tile_px, mpp=cohort.tile_mpp)
        findings = examine_machine()
        tell({name: value for name, value in findings.items() if name != "problems"})
        problems = list(findings["problems"])
        path, manifest, why_not = (self.slide, None, "") if self.slide or cohort is None else cohort.choose()
        if why_not:
            problems.append(why_not)
        slide, has_tiles = self._examine(path, manifest) if path is not None else ({}, False)
        if (has_tiles or config) and findings["load"] > (os.cpu_count() or 1) / 2:
            busy = f"other work is going on (load {findings['load']:g})"
            tell({"note": f"{busy}: what is measured now is slower than it would be alone"})
        if path is not None:
            if has_tiles:
                self._read(path, manifest, tiling, slide)
            findings["slide"] = slide
            problems += slide["problems"]
        if config is not None:
            findings["projection"] = self._project(config, cohort, tiling, findings)
            problems += findings["projection"]["problems"]
        findings["problems"] = problems
        for problem in problems:
            print(f"problem: {problem}", file=sys.stderr)
        return findings, 1 if problems else 0

    def _check(self) -> "TilerConfig":
        """The tiles that the settings ask for.

        Raises:
            SlidegradError: settings that would have no effect, or make no sense; a SLIDE that is none or not there.
        """
        from tiler.config import TilerConfig
        from trainer.errors import TrainerError

        has_slide, has_manifests = self.slide is not None, self.manifests is not None
        for flag, value, has_effect, needed in (
            ("--default-mpp", self.default_mpp, has_slide, "a SLIDE"),
            ("--mpp", self.mpp, has_slide and not has_manifests, "a SLIDE, and no --manifests, which say it"),
            ("--tile-px", self.tile_px, not has_manifests, "no --manifests, which say it"),
            ("--tile-px", self.tile_px, has_slide or self.recipe, "a SLIDE or --recipe"),
            ("--threads", self.threads, has_slide or has_manifests, "a SLIDE or --manifests"),
            ("--nproc", self.nproc, self.recipe, "--recipe"),
        ):
            if value is not None and not has_effect:
                raise TrainerError(f"{flag} {value:g} would have no effect: it needs {needed}")
        for flag, number in (("--threads", self.threads), ("--nproc", self.nproc)):
            if number is not None and number < 1:
                raise TrainerError(f"{flag} {number}: expected at least 1")
        asked: dict[str, Any] = {"tile_px": self.tile_px, "mpp": self.mpp, "default_mpp": self.default_mpp}
        tiling = TilerConfig(**{name: value for name, value in asked.items() if value is not None})
        if self.slide is not None:
            _check_slide(self.slide)
        return tiling

    def _examine(self, path: Path, manifest: "Manifest | None") -> tuple[dict[str, Any], bool]:
        """What the readers see in a slide, and whether tiles of it can be read: it opens, and its scale is known."""
        from manifests.errors import SlidegradError
        from tiler.doctor import examine_slide
        from tiler.doctor.words import tell
        from tiler.outcome import hide_paths

        slide_id = manifest.slide.slide_id if manifest is not None else path.stem
        unread = {"slide_id": slide_id, "storage": None, "decoding": None}
        print(f"\nslide {slide_id}", file=sys.stderr)
        try:
            found = examine_slide(path, self.default_mpp if manifest is None else manifest.slide.mpp_x)
        except SlidegradError as error:
            tell({"reading": "not measured: the slide cannot be opened"})
            return {"problems": [f"slide {slide_id}: {hide_paths(str(error), slide_id, path)}"]} | unread, False
        no_news = ("problems", "mpp_other") if found["mpp_other"] is None else ("problems",)
        tell({name: value for name, value in found.items() if name not in no_news})
        has_scale = found["mpp"] is not None or manifest is not None or self.default_mpp is not None
        if not has_scale:
            tell({"reading": "not measured: without a scale there are no tiles"})
        return found | unread, has_scale

    def _read(self, path: Path, manifest: "Manifest | None", tiling: "TilerConfig", found: dict[str, Any]) -> None:
        """Adds to the findings on a slide how fast it is read; why not, where it cannot be."""
        from manifests.errors import SlidegradError
        from tiler.doctor import build_sample, measure_decoding, measure_storage
        from tiler.doctor.words import decoding_in_words, storage_in_words, tell
        from tiler.outcome import hide_paths
        from tiler.slide import open_slide

        num_threads = self.threads or len(os.sched_getaffinity(0))
        try:
            tell({"reading": "looking for tiles, then reading for some seconds …"})
            manifest = manifest or build_sample(path, tiling)
            slide = open_slide(path, manifest.slide.backend)  # type: ignore[arg-type]
            found["storage"] = storage = measure_storage(slide, manifest, num_threads)
            for line in storage_in_words(storage) if storage is not None else ():
                tell({"storage": line})
            found["decoding"] = measure_decoding(slide, manifest, num_threads)
            tell({"decoding": decoding_in_words(found["decoding"])})
        except SlidegradError as error:
            found["problems"].append(hide_paths(str(error), found["slide_id"], path))

    def _project(
        self, config: "RunConfig", cohort: "_Cohort | None", tiling: "TilerConfig", findings: dict[str, Any]
    ) -> dict[str, Any]:
        """The recipe's epoch on 1 and on --nproc processes."""
        import torch

        from tiler.doctor.words import count, tell
        from trainer.projection import count_epoch, in_words, measure_encoding, project, shard_size
        from trainer.topology import Topology

        num_cores, num_gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
        name = torch.cuda.get_device_name(0) if num_gpus else f"CPU, {count(num_cores, 'core')}"
        tile_px = cohort.tile_px if cohort else tiling.tile_px
        print(f"\nrecipe {config.recipe}", file=sys.stderr)
        tell({"encoder": f"{config.encoder.name}, tiles of {tile_px} px, {config.optim.precision}, on {name} …"})
        num_tiles = cohort.num_tiles if cohort else [_NUM_TILES] * _NUM_SLIDES
        topologies = [
            Topology.make(n, config.machine.aggregator if n > 1 else "auto", config.virtual_ranks)
            for n in sorted({1, self.nproc or 1})
        ]
        most_tiles = shard_size(num_tiles, config, topologies[-1].num_virtual)
        device = torch.device("cuda" if num_gpus else "cpu")
        encoding = measure_encoding(config, tile_px, most_tiles, device, num_cores)
        tiles, reading = count_epoch(num_tiles, config), _reading_rate(findings.get("slide", {}))
        epochs = [project(tiles, reading, encoding, topology, config.machine.keep) for topology in topologies]
        assumed = "" if cohort else f" of {_NUM_TILES:,} tiles, assumed for want of --manifests"
        tell({"cohort": f"{count(len(num_tiles), 'slide')}{assumed}"} | in_words(tiles, encoding, epochs))
        if 0 < num_gpus < (self.nproc or 1):
            here = f"{count(num_gpus, 'GPU')} here, and {self.nproc} processes"
            tell({"note": f"{here}: projected as if each had a GPU like it"})
        return {
            "recipe": config.recipe,
            "device": name,
            "tile_px": tile_px,
            "num_slides": len(num_tiles),
            "is_cohort_assumed": cohort is None,
            "tiles": asdict(tiles),
            "encoding": asdict(encoding),
            "reading": asdict(reading) if reading else None,
            "epochs": [asdict(epoch) for epoch in epochs],
            "problems": _hidden_gpus(len(findings["gpus"]), num_gpus),
        }


@dataclass(frozen=True, kw_only=True)
class _Cohort:
    """What a cohort's manifests say: tiles of each slide that has some, and the kind of tile that most have."""

    source: "ManifestSource"
    slide_ids: list[str]
    num_tiles: list[int]
    tile_px: int
    tile_mpp: float

    @classmethod
    def open(cls, root: Path) -> Self:
        """Reads the catalogue.

        Raises:
            SlidegradError: no manifests there, or none with tiles.
        """
        from manifests import open_manifests
        from trainer.errors import TrainerError

        source = open_manifests(root)
        rows = [row for row in source.catalog().to_pylist() if row["num_tiles"]]
        kinds = Counter((row["tile_px"], row["tile_mpp"]) for row in rows)
        if not kinds:
            raise TrainerError(f"--manifests {root}: no slide with tiles; see `slidegrad manifest stats`")
        kind = kinds.most_common(1)[0][0]
        rows = [row for row in rows if (row["tile_px"], row["tile_mpp"]) == kind]
        return cls(
            source=source,
            slide_ids=[row["slide_id"] for row in rows],
            num_tiles=[row["num_tiles"] for row in rows],
            tile_px=kind[0],
            tile_mpp=kind[1],
        )

    def choose(self) -> "tuple[Path | None, Manifest | None, str]":
        """A slide of middling size that is there, and its manifest; or why there is none."""
        from manifests import LocalManifests, ManifestError
        from manifests.catalog import read_paths

        try:
            paths = read_paths(self.source.root) if isinstance(self.source, LocalManifests) else {}
        except ManifestError as error:
            return None, None, str(error)
        middle = sorted(self.num_tiles)[len(self.num_tiles) // 2]
        nearest = sorted(zip(self.slide_ids, self.num_tiles, strict=True), key=lambda pair: abs(pair[1] - middle))
        for slide_id, _ in nearest[:_MOST_TRIED]:
            # Unlike pathlib's, it stands a folder that may not be looked into.
            if slide_id in paths and os.path.exists(paths[slide_id]):
                return paths[slide_id], self.source[slide_id], ""
        return None, None, "none of the manifests' slides is to be found from here; give a SLIDE, to measure reading"


def _check_slide(path: Path) -> None:
    """Raises TrainerError where there is nothing, or a folder that is no OME-Zarr: a slip, not a finding on a slide."""
    from trainer.errors import TrainerError

    name = path.name or str(path)  # "." and "/" have no name.
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise TrainerError(f"{name}: no such file") from None
    except OSError as error:
        raise TrainerError(f"{name}: cannot be looked at ({error.strerror})") from None
    if not is_folder or name.lower().endswith(".zarr"):
        return
    if os.path.isdir(path / "tiles") or os.path.isfile(path / "catalog.parquet"):
        raise TrainerError(f"{name} is a folder of manifests; give it as --manifests")
    raise TrainerError(f"{name} is a folder; name a slide in it")


def _open_recipe(name: str) -> "RunConfig":
    """A recipe's config; what its encoder needs is installed.

    Raises:
        TrainerError: no such recipe, or no torch.
    """
    from trainer.errors import TrainerError

    try:
        from trainer.recipes import get_recipe
    except ModuleNotFoundError as error:
        missing = [error.name]
    else:
        config = get_recipe(name)
        missing = [package for package in ("torch", "timm") if importlib.util.find_spec(package) is None]
    if missing:
        raise TrainerError(f"--recipe needs {missing[0]}; pip install 'slidegrad[train]'")
    return config


def _hidden_gpus(num_listed: int, num_usable: int) -> list[str]:
    if not num_listed or num_usable:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [
        f"the driver lists {num_listed} GPU, torch can use none (CUDA_VISIBLE_DEVICES is "
        f"{'not set' if visible is None else repr(visible)}); see what nvidia-smi says"
    ]


def _reading_rate(slide: dict[str, Any]) -> "ReadingRate | None":
    """Tiles per second with all threads, as `measure_storage` and `measure_decoding` found them."""
    from trainer.projection import ReadingRate

    storage, decoding = slide.get("storage"), slide.get("decoding")
    if decoding is None:
        return None
    cold = storage["rates"][-1]["cold_bytes_per_s"] if storage else None
    bytes_per_tile = storage["bytes_per_tile"] if storage else None
    return ReadingRate(
        decode=decoding["rates"][-1]["tiles_per_s"],
        storage=cold / bytes_per_tile if cold and bytes_per_tile else None,
    )
