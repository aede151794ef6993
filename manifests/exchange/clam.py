"""CLAM's patch files: OUT/patches/SLIDE.h5, and the list that its feature extraction works through.

Source: CLAM's `WholeSlideImage.process_contour` (writer), `Whole_Slide_Bag_FP` and `extract_features_fp.py` (readers),
https://github.com/mahmoodlab/CLAM. The readers call `read_region(coord, patch_level, (patch_size, patch_size))` and
leave any resize to the encoder's transforms (`--target_patch_size`, 224 by default; older versions
`--custom_downsample`). So `patch_size` is the read size in px of `patch_level`, and `coords` are level-0 px.

What CLAM cannot say:
- the output size: `--target_patch_size` must be given as the manifest's `tile_px`;
- a read size that differs in x and y, which slides with differing scales have: `patch_size` is the width, and a reader
  that knows no more sees tiles a little too high or too low;
- its `downsample`, `level_dim` and `downsampled_level_dim` are not in a manifest. They are derived from the read size,
  hence true to 1 % (whole downsamples exactly); no reader of coordinate files uses them;
- a slide without tiles: CLAM writes no file for it and fails at an empty one, so that it is not in the list.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from manifests.errors import ManifestError
from manifests.exchange.hdf5 import read_coords, write_coords
from manifests.exchange.tables import csv_line
from manifests.exchange.tiles import Add, Outline, TileSet, file_stem
from manifests.files import atomic_path, disk_name
from manifests.schema import Manifest, SlideRecord

_WHOLE_TOLERANCE = 0.015
SQUARE = "scale differs in x and y; CLAM reads square px, so only the width of a tile is told"


@contextlib.contextmanager
def export_clam(out: Path, max_tiles: int) -> Iterator[Add]:
    """Yields the function that writes one slide's patch file."""
    del max_tiles
    with (
        atomic_path(out / "process_list_autogen.csv") as partial,
        partial.open("w", newline="", encoding="utf-8") as to,
    ):
        to.write(csv_line("slide_id"))

        def add(manifest: Manifest, outline: Outline) -> list[str]:
            del outline
            record = manifest.slide
            downsample = derive_downsample(record)
            level_dim = np.array([round(record.width_l0 / downsample), round(record.height_l0 / downsample)])
            stem = file_stem(record.slide_id, disk_name(record.slide_id))
            attributes = {
                "patch_size": record.read_w,
                "patch_level": record.level,
                "downsample": np.array([downsample, downsample]),
                "downsampled_level_dim": level_dim,
                "level_dim": level_dim,
                "name": record.slide_id,
                "save_path": "patches",
            }
            write_coords(out / "patches" / f"{stem}.h5", manifest, attributes)
            if len(manifest):
                to.write(csv_line(stem))
            return [SQUARE] if record.read_w != record.read_h else []

        yield add


def derive_downsample(record: SlideRecord) -> float:
    """Level-0 px per px of the read level, from a tile's extent: true to 1 %, exact where it is whole."""
    downsample = record.tile_px * record.tile_mpp / (record.mpp_x * record.read_w)
    whole = max(1, round(downsample))
    return float(whole) if abs(downsample / whole - 1) <= _WHOLE_TOLERANCE else downsample


def read_clam(file: Path) -> TileSet:
    """Reads one patch file.

    Raises:
        ManifestError: not such a file.
    """
    content = read_coords(file)
    if planned := content.planned(file):
        return planned
    patch_px = content.number("patch_size")
    if patch_px is None or "patch_level" not in content.attributes:
        raise ManifestError(
            f"{file.name}: coords has no attributes patch_size and patch_level; "
            "give CLAM's patches/*.h5, not its features (TRIDENT's files: import trident)"
        )
    level = next(iter(content.whole("patch_level", file)), 0)
    dim = content.whole("level_dim", file) if "level_dim" in content.attributes else ()
    return TileSet(
        names=content.names(file),
        x_l0=content.coords[:, 0],
        y_l0=content.coords[:, 1],
        # Older forks write how much smaller than the patch the encoder's input is.
        tile_px=round(patch_px / (content.number("custom_downsample") or 1)),
        level=level,
        read_size=(round(patch_px), round(patch_px)),
        level_sizes={level: (dim[0], dim[1])} if len(dim) == 2 else {},
    )
