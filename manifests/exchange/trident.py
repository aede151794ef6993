"""TRIDENT's job folder: …/patches/SLIDE_patches.h5 for the tiles, contours_geojson/SLIDE.geojson for the tissue.

Source: TRIDENT's `coords_to_h5`, `mask_to_gdf` (writers) and `WSIPatcher` (reader),
https://github.com/mahmoodlab/TRIDENT. The reader computes `patch_size * level0_magnification / target_magnification`
level-0 px, picks the level itself and resizes to `patch_size`. Magnifications stand for 10 / mpp.

What TRIDENT cannot say:
- true scales: its own files hold whole magnifications (0.47 mpp becomes 20). Here they are 10 / mpp as they are, so
  that a tile's extent is right to the pixel; its reader takes fractions;
- scales that differ in x and y: both magnifications are those of x;
- the level: its reader may choose another one than the manifest has, and treats fractional downsamples as whole.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from manifests.errors import ManifestError
from manifests.exchange.hdf5 import CoordsFile, read_coords, write_coords
from manifests.exchange.tiles import Add, Outline, TileSet, file_stem
from manifests.files import disk_name, write_text
from manifests.schema import Manifest

SQUARE = "scale differs in x and y; TRIDENT knows one magnification, so only the width of a tile is told"
_PLANE = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::3857"}}
"""TRIDENT's contours name a flat frame, so that no reader takes px for degrees."""


@contextlib.contextmanager
def export_trident(out: Path, max_tiles: int) -> Iterator[Add]:
    """Yields the function that writes one slide's patch file and contours."""
    del max_tiles

    def add(manifest: Manifest, outline: Outline) -> list[str]:
        record = manifest.slide
        target = _tidy(10 / record.tile_mpp)
        folder = f"{target:g}x_{record.tile_px}px_{record.overlap}px_overlap"
        stem = file_stem(record.slide_id, disk_name(record.slide_id))
        attributes = {
            "patch_size": record.tile_px,
            "patch_size_level0": manifest.footprint_l0[0],
            "level0_magnification": _tidy(10 / record.mpp_x),
            "target_magnification": target,
            "overlap": record.overlap,
            "name": record.slide_id,
            "savetodir": folder,
            "level0_width": record.width_l0,
            "level0_height": record.height_l0,
        }
        write_coords(out / folder / "patches" / f"{stem}_patches.h5", manifest, attributes)
        if outline:
            write_text(out / "contours_geojson" / f"{stem}.geojson", json.dumps(draw_contours(outline)))
        return [SQUARE] if record.mpp_x != record.mpp_y else []

    yield add


def draw_contours(outline: Outline) -> dict[str, Any]:
    """The tissue outline as TRIDENT's contours: a feature for each piece, its holes as inner rings."""
    features = [
        {
            "type": "Feature",
            "properties": {"tissue_id": tissue_id, "num_holes": len(polygon) - 1},
            "geometry": {"type": "Polygon", "coordinates": polygon},
        }
        for tissue_id, polygon in enumerate(outline)
    ]
    return {"type": "FeatureCollection", "crs": _PLANE, "features": features}


def _tidy(magnification: float) -> float | int:
    """Whole magnifications as int, as TRIDENT's own."""
    whole = round(magnification)
    return whole if whole and abs(magnification / whole - 1) < 1e-9 else magnification


def read_trident(file: Path) -> TileSet:
    """Reads one patch file (or a file of features with its coordinates).

    Raises:
        ManifestError: not such a file.
    """
    content = read_coords(file)
    if planned := content.planned(file):
        return planned
    patch_px = content.number("patch_size")
    side = _side_l0(content, patch_px)
    if patch_px is None or side is None:
        raise ManifestError(
            f"{file.name}: coords has no attributes patch_size, level0_magnification and target_magnification; "
            "give TRIDENT's patches/*_patches.h5 (CLAM's files: import clam)"
        )
    width, height = content.number("level0_width"), content.number("level0_height")
    return TileSet(
        names=content.names(file),
        x_l0=content.coords[:, 0],
        y_l0=content.coords[:, 1],
        tile_px=round(patch_px),
        overlap=round(content.number("overlap") or 0),
        footprint_l0=(side, side),
        level_sizes={0: (round(width), round(height))} if width and height else {},
    )


def _side_l0(content: CoordsFile, patch_px: float | None) -> float | None:
    """Side of a patch in level-0 px, rounded as TRIDENT's reader does; its `patch_size_level0` is rounded down."""
    level0, target = content.number("level0_magnification"), content.number("target_magnification")
    if patch_px and level0 and target:
        return round(patch_px * level0 / target)
    return content.number("patch_size_level0")
