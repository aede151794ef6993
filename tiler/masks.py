"""The thumbnail and the tissue mask of a slide: read from the pyramid, kept as a small zarr store."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import zarr
from numpy.typing import NDArray

from manifests.files import atomic_path
from manifests.geometry import level_to_l0
from manifests.schema import REASONS
from tiler.errors import TilerError
from tiler.slide import Slide

THUMBNAIL_MPP = 8.0
"""Finest scale of thumbnails and masks, microns per px: a 224-px tile at 0.5 mpp is 14 px wide."""
_MAX_SIDE_PX = 8192
_STRIP_BYTES = 64_000_000


@dataclass(frozen=True)
class Overview:
    """A picture of the whole slide.

    `thumbnail` RGB (h, w, 3); `mpp` microns per px of it (by the coarser of the slide's two axes); `px_l0` level-0 px
    per px. Its last column and row may reach past the slide's edge.
    """

    thumbnail: NDArray[np.uint8]
    mpp: float
    px_l0: float


@dataclass(frozen=True)
class MaskRecord:
    """What is kept of a slide's areas, all in the frame of the thumbnail.

    `areas` uint8 (h, w): 0 no tissue, 1 tissue, i + 1 left out for `manifests.schema.REASONS[i]`; `outline`: the
    tissue's polygons in level-0 px, each a list of rings (outer first, then holes) of [x, y], closed.
    """

    overview: Overview
    areas: NDArray[np.uint8]
    outline: list[list[list[list[int]]]]

    @property
    def tissue(self) -> NDArray[np.bool_]:
        """Mask, (h, w)."""
        return np.asarray(self.areas == 1)


def label_areas(tissue: NDArray[np.bool_], artefacts: Mapping[str, NDArray[np.bool_]]) -> NDArray[np.uint8]:
    """`MaskRecord.areas` from the tissue found and the artefacts in it; the first reason wins."""
    areas = tissue.astype(np.uint8)
    for reason, mask in artefacts.items():
        areas[(areas == 1) & mask] = REASONS.index(reason) + 1
    return areas


def trace_outline(tissue: NDArray[np.bool_], px_l0: float) -> list[list[list[list[int]]]]:
    """Polygons round the tissue, in level-0 px: see `MaskRecord.outline`."""
    del tissue, px_l0
    return []


def read_overview(slide: Slide, mpp_l0: float) -> Overview:
    """A picture of the whole slide at about `THUMBNAIL_MPP`, from the coarsest level that is fine enough.

    Read in strips, so that a slide with one level only needs no more memory than one with many.

    Args:
        slide: the open slide.
        mpp_l0: microns per level-0 px, the coarser of the two axes.
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
    return Overview(np.concatenate(strips), mpp * factor, level.downsample * factor)


def write_mask(file: Path, record: MaskRecord) -> None:
    """Writes thumbnail and mask as one zarr v3 zip store, atomically."""
    overview = record.overview
    attributes = {"mpp": overview.mpp, "px_l0": overview.px_l0, "outline": record.outline}
    with atomic_path(file) as partial, zarr.storage.ZipStore(partial, mode="w") as store:
        group = zarr.create_group(store, attributes=attributes)
        group.create_array("thumbnail", data=overview.thumbnail, chunks=(512, 512, 3))
        group.create_array("areas", data=record.areas, chunks=(1024, 1024))


def read_mask(file: Path) -> MaskRecord:
    """Reads what `write_mask` wrote.

    Raises:
        TilerError: not there or not readable.
    """
    try:
        zipfile.ZipFile(file).close()  # If it cannot be opened, zarr's store fails at its closing, with another error.
        with zarr.storage.ZipStore(file, mode="r") as store:
            group = zarr.open_group(store, mode="r")
            kept: dict[str, Any] = dict(group.attrs)
            overview = Overview(np.asarray(group["thumbnail"]), kept["mpp"], kept["px_l0"])
            return MaskRecord(overview, np.asarray(group["areas"]), kept["outline"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise TilerError(f"{file.name}: no readable tissue mask ({error}); tile the slide again") from None
