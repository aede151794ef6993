"""What a sweep is of, `SWEEP/sweep.yaml`: its cohort, settings and grids, so that a later call goes on with the same.

Nothing here starts a run. One thing to know before changing it: whatever changes a run's result must be in
`Plan.differences`, or one table would mix runs of two kinds; how many jobs, which machine and which share must not.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from manifests import open_manifests
from manifests.files import write_text
from tiler.discover import SLIDE_SUFFIXES
from trainer.config import Encoder, Head, RunConfig
from trainer.encoders.blueprint import find_weights
from trainer.errors import TrainerError
from trainer.provenance import digest_file
from trainer.sweep.grid import END_TO_END, Grid, Point, all_points, with_grid
from trainer.targets import few, read_labels

_VERSION = 1
_FILE = "sweep.yaml"
_OF_POINTS = ("tiles.tiles", "tiles.k", "tiles.k_per_rank", "optim.precision")
"""Settings that the axes give."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The cohort that all runs share, by digests of its content: files may move."""

    labels_sha256: str
    """Of the labels file, as sha256sum tells it."""
    manifests_digest: str
    """Of the labelled slides' manifests: their tiles, how they were tiled, and the slides' fingerprints."""
    num_slides: int
    num_patients: int
    tiles: str
    """As "224 px at 0.5 mpp"."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a sweep's runs have in common, and which they are."""

    recipe: str
    data: Data
    configs: dict[str, RunConfig]
    """By method, before the axes; that of end_to_end is always there."""
    weights: dict[str, str | None]
    """By method: SHA-256 of the file that the encoder starts from; None for random weights."""
    splits: dict[str, str] = field(default_factory=dict)
    """s003 to the file's SHA-256."""
    split_method: str | None = None
    """As splits.json says: mccv or kfold."""
    grids: tuple[Grid, ...] = ()

    @property
    def choosing(self) -> set[str]:
        """Methods that choose a slide's tiles themselves."""
        return {method for method, config in self.configs.items() if str(config.tiles.tiles) not in ("fixed", "all")}

    @property
    def points(self) -> list[Point]:
        """Every run of the sweep."""
        return all_points(self.grids, self.choosing)

    def differences(self, other: Self) -> list[str]:
        """What makes another sweep of it; more values on an axis, and how machines do the work, do not."""
        found = ["the recipe"] if self.recipe != other.recipe else []
        if self.data.labels_sha256 != other.data.labels_sha256:
            found.append("the labels")
        if self.data.manifests_digest != other.data.manifests_digest:
            found.append("the manifests")
        both = self.splits.keys() & other.splits.keys()
        if changed := [name for name in both if self.splits[name] != other.splits[name]]:
            found.append(f"the files of {len(changed)} splits, first {min(changed)}")
        if self.splits and other.splits and self.split_method != other.split_method:
            found.append("how the splits were drawn")
        if bool(self.splits) != bool(other.splits):
            found.append("whether there are --splits")
        common = [method for method in self.configs if method in other.configs]
        settings = (self.configs[method].differences(other.configs[method]) for method in common)
        found += sorted({name for names in settings for name in names if name not in _OF_POINTS and name != "recipe"})
        if any(self.weights.get(method) != other.weights.get(method) for method in common):
            found.append("the content of encoder.weights")
        return found

    def extended(self, other: Self) -> Self:
        """This plan with the runs of another one of the same sweep."""
        both = dataclasses.replace(self, configs={**self.configs, **other.configs})
        grids = self.grids
        for grid in other.grids:
            grids = with_grid(grids, grid, both.choosing)
        return dataclasses.replace(
            both,
            grids=grids,
            weights={**self.weights, **other.weights},
            splits={**self.splits, **other.splits},
            split_method=self.split_method or other.split_method,
        )

    def to_yaml(self) -> str:
        """The file `sweep.yaml`."""
        values = {
            "sweep": _VERSION,
            "recipe": self.recipe,
            "data": dataclasses.asdict(self.data),
            "grids": [grid.to_dict() for grid in self.grids],
            "split_method": self.split_method,
            "splits": self.splits,
            "weights": self.weights,
            "configs": {method: config.to_dict() for method, config in self.configs.items()},
        }
        return yaml.safe_dump(values, sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str, where: str) -> Self:
        """Parses `sweep.yaml`.

        Raises:
            TrainerError: not a plan, or one of another version.
        """
        try:
            values: dict[str, Any] = yaml.safe_load(text)
            if values["sweep"] != _VERSION:
                raise TrainerError(f"{where}: of version {values['sweep']}, expected {_VERSION}; give another --out")
            configs = {
                method: RunConfig.from_yaml(yaml.safe_dump(config), f"{where}: {method}")
                for method, config in values["configs"].items()
            }
            return cls(
                recipe=values["recipe"],
                data=Data(**values["data"]),
                configs=configs,
                weights=values["weights"],
                splits=values["splits"],
                split_method=values["split_method"],
                grids=tuple(Grid.from_dict(grid) for grid in values["grids"]),
            )
        except (TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
            raise TrainerError(f"{where}: not a sweep's plan ({error!r}); give another --out") from None


def read_plan(sweep: Path) -> Plan | None:
    """The plan of a sweep; None if the folder is not there, or empty.

    Raises:
        TrainerError: the folder holds something else.
    """
    file = sweep / _FILE
    if file.is_file():
        return Plan.from_yaml(file.read_text(encoding="utf-8"), str(file))
    if sweep.exists() and (not sweep.is_dir() or any(sweep.iterdir())):
        raise TrainerError(f"{sweep}: holds something else than a sweep (no {_FILE}); give a new folder as --out")
    return None


def settle_plan(sweep: Path, asked: Plan) -> Plan:
    """The plan to go on with: what is asked for, with the runs that the sweep has already.

    Raises:
        TrainerError: the folder holds another sweep, or something else.
    """
    kept = read_plan(sweep)
    if kept is None:
        return asked
    if changed := kept.differences(asked):
        raise TrainerError(
            f"--out {sweep} holds another sweep: {', '.join(changed)} {'differ' if len(changed) > 1 else 'differs'}; "
            "give another --out, or what it was begun with"
        )
    return kept.extended(asked)


def check_reference(plan: Plan, reference: str | None) -> None:
    """Raises a TrainerError if no run of the sweep is of this method."""
    methods = list(dict.fromkeys(point.method for point in plan.points))
    if reference is not None and reference not in methods:
        raise TrainerError(f"--reference {reference}: expected a method of the sweep, one of {', '.join(methods)}")


def write_plan(sweep: Path, plan: Plan) -> None:
    """Writes `SWEEP/sweep.yaml`.

    Raises:
        TrainerError: cannot be written there.
    """
    try:
        write_text(sweep / _FILE, plan.to_yaml())
    except OSError as error:
        raise TrainerError(f"--out {sweep}: cannot write there ({error.strerror})") from None


def describe_data(labels: Path, manifests: Path, head: Head, *, are_split: bool) -> Data:
    """Reads the labels and the catalogue once, for what all runs will read.

    Args:
        labels: the file.
        manifests: the folder.
        head: which columns are predicted.
        are_split: by files of splits.

    Raises:
        SlidegradError: not readable, slides without a manifest, or splits from two sides.
    """
    rows = read_labels(labels, head)
    if are_split and any(row.get("split") for row in rows):
        raise TrainerError(f"{labels} has a column split, and there are --splits: give one of them")
    catalog = {row["slide_id"]: row for row in open_manifests(manifests).catalog().to_pylist()}
    found = {row["slide_id"]: _named(row["slide_id"], catalog) for row in rows}
    if missing := [name for name, slide in found.items() if slide is None]:
        raise TrainerError(f"{labels}: {len(missing)} of {len(rows)} slides have no manifest: {few(missing)}")
    slides = {slide["slide_id"]: slide for slide in found.values() if slide is not None}
    of_manifests = hashlib.sha256()
    for slide_id in sorted(slides):
        told = [slides[slide_id][name] for name in ("slide_id", "status", "num_tiles", "config_hash", "fingerprint")]
        of_manifests.update(json.dumps(told, ensure_ascii=False).encode())
    kinds = {(slide["tile_px"], slide["tile_mpp"]) for slide in slides.values() if slide["num_tiles"]}
    patients = {row.get("patient_id") or row.get("specimen_id") or row["slide_id"] for row in rows}
    return Data(
        labels_sha256=digest_file(labels),
        manifests_digest=of_manifests.hexdigest(),
        num_slides=len(slides),
        num_patients=len(patients),
        tiles=", ".join(f"{px} px at {mpp:g} mpp" for px, mpp in sorted(kinds)) or "none",
    )


def read_split_method(folder: Path) -> str | None:
    """How the splits were drawn, as splits.json says; None if it does not."""
    try:
        values = json.loads((folder / "splits.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    method = values.get("method") if isinstance(values, dict) else None
    return str(method) if method else None


def digest_weights(encoder: Encoder) -> str | None:
    """SHA-256 of the file that the encoder starts from; None for random weights.

    Raises:
        TrainerError: the weights are not here.
    """
    file = find_weights(encoder)
    return None if file is None else digest_file(file)


def recipe_of(recipe: str, method: str) -> str:
    """What `slidegrad train` calls a recipe with a method."""
    return recipe if method == END_TO_END else f"{recipe}+{method}"


def _named(name: str, catalog: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The slide that the labels name, by id or by file name."""
    stems = (name[: -len(suffix)] for suffix in SLIDE_SUFFIXES if name.lower().endswith(suffix))
    return next((catalog[each] for each in (name, *stems) if each in catalog), None)
