"""The thumbnail and the tissue mask of a slide: read from the pyramid, kept as a small zarr store."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import zarr
from numpy.typing import NDArray

from manifests.files import atomic_path
from manifests.geometry import level_to_l0
from tiler.errors import TilerError
from tiler.slide import Slide

THUMBNAIL_MPP = 8.0
"""Finest scale of thumbnails and masks, microns per px: a 224-px tile at 0.5 mpp is 14 px wide."""
_MAX_SIDE_PX = 8192
_STRIP_BYTES = 64_000_000


@dataclass(frozen=True)
class MaskRecord:
    """`thumbnail` RGB (h, w, 3) and `tissue` (h, w), `mpp` microns per px of both."""

    thumbnail: NDArray[np.uint8]
    tissue: NDArray[np.bool_]
    mpp: float


def read_thumbnail(slide: Slide, mpp_l0: float) -> tuple[NDArray[np.uint8], float]:
    """A picture of the whole slide at about `THUMBNAIL_MPP`, from the coarsest level that is fine enough.

    Read in strips, so that a slide with one level only needs no more memory than one with many.

    Returns:
        RGB (h, w, 3), its last column and row reaching past the edge, and its microns per px.
    """
    fine = [i for i, lv in enumerate(slide.levels) if mpp_l0 * lv.downsample <= THUMBNAIL_MPP * 1.01]
    index = max(fine, default=0, key=lambda i: slide.levels[i].downsample)
    level = slide.levels[index]
    mpp = mpp_l0 * level.downsample
    factor = max(1, round(THUMBNAIL_MPP / mpp), -(-max(level.width, level.height) // _MAX_SIDE_PX))
    strip_h = max(1, _STRIP_BYTES // (3 * level.width * factor)) * factor
    strips: list[NDArray[np.uint8]] = []
    for top in range(0, level.height, strip_h):
        rows = min(strip_h, level.height - top)
        strip = slide.read(0, int(level_to_l0(np.array(top), level.downsample)), index, level.width, rows)
        # The last px of the thumbnail may cover less than a whole block: its own px are repeated, not white added.
        whole = np.pad(strip, ((0, -rows % factor), (0, -level.width % factor), (0, 0)), mode="edge")
        size = whole.shape[1] // factor, whole.shape[0] // factor
        strips.append(cv2.resize(whole, size, interpolation=cv2.INTER_AREA))
    return np.concatenate(strips), mpp * factor


def write_mask(file: Path, record: MaskRecord) -> None:
    """Writes thumbnail and mask as one zarr v3 zip store, atomically."""
    with atomic_path(file) as partial, zarr.storage.ZipStore(partial, mode="w") as store:
        group = zarr.create_group(store, attributes={"mpp": record.mpp})
        group.create_array("thumbnail", data=record.thumbnail, chunks=(512, 512, 3))
        group.create_array("tissue", data=record.tissue, chunks=(1024, 1024))


def read_mask(file: Path) -> MaskRecord:
    """Reads what `write_mask` wrote.

    Raises:
        TilerError: not there or not readable.
    """
    try:
        zipfile.ZipFile(file).close()  # If it cannot be opened, zarr's store fails at its closing, with another error.
        with zarr.storage.ZipStore(file, mode="r") as store:
            group = zarr.open_group(store, mode="r")
            thumbnail, tissue = np.asarray(group["thumbnail"]), np.asarray(group["tissue"])
            return MaskRecord(thumbnail, tissue, float(str(group.attrs["mpp"])))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise TilerError(f"{file.name}: no readable tissue mask ({error}); tile the slide again") from None
