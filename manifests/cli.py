"""The manifests' commands: `slidegrad manifest inspect | validate | stats`."""

import dataclasses
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from manifests.catalog import read_catalog
from manifests.errors import ManifestError
from manifests.files import read_manifest, tiles_path
from manifests.schema import records_to_catalog


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show one slide's record and its first tiles."""

    manifests: tyro.conf.Positional[Path]
    """The manifests folder."""
    slide_id: tyro.conf.Positional[str]
    """The slide."""

    def run(self) -> tuple[dict[str, Any], int]:
        manifest = read_manifest(tiles_path(self.manifests, self.slide_id))
        for row in manifest.to_table().slice(0, 5).to_pylist():
            print(row, file=sys.stderr)
        return dataclasses.asdict(manifest.slide), 0


@dataclass(frozen=True, kw_only=True)
class Validate:
    """Read every manifest; list those that are torn, of another schema, or have tiles outside their slide."""

    manifests: tyro.conf.Positional[Path]
    """The manifests folder."""

    def run(self) -> tuple[dict[str, Any], int]:
        problems = []
        records = []
        for file in sorted((self.manifests / "tiles").glob("??/*.parquet")):
            try:
                manifest = read_manifest(file)
            except ManifestError as error:
                problems.append(str(error))
                continue
            slide, (width, height) = manifest.slide, manifest.footprint_l0
            records.append(slide)
            # One px of slack: the footprint is rounded to whole level-0 px.
            right, bottom = manifest.x_l0 + width - 1, manifest.y_l0 + height - 1
            outside = (manifest.x_l0 < 0) | (manifest.y_l0 < 0) | (right > slide.width_l0) | (bottom > slide.height_l0)
            if outside.any():
                problems.append(f"slide {slide.slide_id}: {int(outside.sum())} tiles lie outside the slide")
        if not problems and not read_catalog(self.manifests).equals(records_to_catalog(records)):
            problems.append("catalog.parquet disagrees with tiles/; delete it, it is made anew at the next use")
        for problem in problems:
            print(problem, file=sys.stderr)
        return {"num_slides": len(records), "problems": problems}, 1 if problems else 0


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Tiles per slide over all slides that are ok."""

    manifests: tyro.conf.Positional[Path]
    """The manifests folder."""

    def run(self) -> tuple[dict[str, Any], int]:
        catalog = read_catalog(self.manifests)
        status = Counter(catalog.column("status").to_pylist())
        tiles = catalog.column("num_tiles").to_numpy()
        tiles = tiles[tiles > 0] if (tiles > 0).any() else np.zeros(1, np.int64)
        return {
            "num_slides": len(catalog),
            **{name: status[name] for name in ("ok", "empty", "failed")},
            "num_tiles": int(tiles.sum()),
            "tiles_per_slide": {
                "median": float(np.median(tiles)),
                "p95": float(np.percentile(tiles, 95)),
                "p99": float(np.percentile(tiles, 99)),
                "max": int(tiles.max()),
            },
        }, 0


@dataclass(frozen=True)
class ManifestCommand:
    """Look into manifests."""

    command: (
        Annotated[Inspect, tyro.conf.subcommand("inspect", prefix_name=False)]
        | Annotated[Validate, tyro.conf.subcommand("validate", prefix_name=False)]
        | Annotated[Stats, tyro.conf.subcommand("stats", prefix_name=False)]
    )

    def run(self) -> tuple[dict[str, Any], int]:
        return self.command.run()
