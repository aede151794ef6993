"""The thumbnail and the tissue mask of a slide: read from the pyramid, kept as a small zarr store."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from manifests.files import atomic_path
from manifests.geometry import level_to_l0
from manifests.schema import REASONS
from tiler.errors import TilerError
from tiler.slide import Slide

THUMBNAIL_MPP = 8.0
"""Finest scale of thumbnails and masks, microns per px: a 224-px tile at 0.5 mpp is 14 px wide."""
_MAX_SIDE_PX = 8192
_BLOCK_BYTES = 64_000_000
"""Most bytes of pixels in one read."""
_OUTLINE_TOLERANCE = (0.75, 0.015)
"""Farthest that the simplified outline leaves the mask's: px of the mask, but not more than a share of the piece's
side. From 0.71 px on, the steps of a slanting outline become one line."""
_CHUNK_PX = 1024
"""Longest side of a chunk of the store."""
_ZSTD_LEVEL = 1
"""Fastest: zstd's usual level costs a third more time and saves no room on thumbnails."""


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
    """Polygons round the tissue, along the edges of its px and simplified to less than one of them.

    Args:
        tissue: mask, (h, w).
        px_l0: level-0 px per px of it.

    Returns:
        See `MaskRecord.outline`: the coordinates of a GeoJSON MultiPolygon. Like the mask, it may reach past the slide
        by less than one px of the mask. Pieces that touch at a corner or lie one px apart are one polygon.

    Source: Suzuki and Abe, Topological structural analysis of digitized binary images by border following, 1985, and
    Douglas and Peucker, Algorithms for the reduction of the number of points, 1973, both as in OpenCV.
    """
    # OpenCV's contours run through the middles of px. On the lattice of the px' corners they run along their edges.
    corners = cv2.dilate(np.pad(tissue.view(np.uint8), ((0, 1), (0, 1))), np.ones((2, 2), np.uint8))
    contours, hierarchy = cv2.findContours(corners, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    parents = [] if hierarchy is None else hierarchy[0, :, 3].tolist()
    polygons: dict[int, list[list[list[int]]]] = {}
    for index in sorted(
        range(len(contours)), key=lambda i: parents[i] >= 0
    ):  # Outer rings, which have no parent, first.
        ring = _simplified(_squared(contours[index][:, 0], corners), px_l0)
        if ring and parents[index] < 0:
            polygons[index] = [ring]
        elif ring and parents[index] in polygons:
            polygons[parents[index]].append(ring)
    return list(polygons.values())


def _squared(contour_N2: NDArray[np.int32], corners: NDArray[np.uint8]) -> NDArray[np.int32]:
    """A contour with the corners put back that its diagonal steps cut off: those of two that are tissue."""
    after_N2 = np.roll(contour_N2, -1, axis=0)
    between_N2 = contour_N2.copy()
    is_diagonal = (contour_N2 != after_N2).all(axis=1)
    for x, y in ((contour_N2[:, 0], after_N2[:, 1]), (after_N2[:, 0], contour_N2[:, 1])):
        cut = is_diagonal & (corners[y, x] > 0)
        between_N2[cut] = np.stack((x, y), axis=1)[cut]
    return np.stack((contour_N2, between_N2), axis=1).reshape(-1, 2)


def _simplified(contour_N2: NDArray[np.int32], px_l0: float) -> list[list[int]]:
    """A closed ring in level-0 px; empty if less than a triangle is left."""
    most_px, share = _OUTLINE_TOLERANCE
    tolerance = min(most_px, share * cv2.contourArea(contour_N2) ** 0.5)
    points = cv2.approxPolyDP(contour_N2, tolerance, closed=True)[:, 0]
    if len(points) < 3:
        return []
    ring: list[list[int]] = np.rint(points * px_l0).astype(np.int64).tolist()
    return [*ring, ring[0]]


def overview_level(slide: Slide, mpp_l0: float) -> int:
    """The coarsest level that is fine enough for the thumbnail; `mpp_l0` as for `read_overview`."""
    fine = [i for i, level in enumerate(slide.levels) if mpp_l0 * level.downsample <= THUMBNAIL_MPP * 1.01]
    return max(fine, default=0, key=lambda i: slide.levels[i].downsample)


def read_overview(slide: Slide, mpp_l0: float) -> Overview:
    """A picture of the whole slide at about `THUMBNAIL_MPP`, from the coarsest level that is fine enough.

    Read in blocks, so that a slide with one level only needs no more memory than one with many.

    Args:
        slide: the open slide.
        mpp_l0: microns per level-0 px, the coarser of the two axes.
    """
    index = overview_level(slide, mpp_l0)
    level = slide.levels[index]
    mpp = mpp_l0 * level.downsample
    factor = max(1, round(THUMBNAIL_MPP / mpp), -(-max(level.width, level.height) // _MAX_SIDE_PX))
    # Square blocks: few of the file's own tiles lie across their borders and are decoded twice.
    side = max(1, int((_BLOCK_BYTES / 3) ** 0.5) // factor) * factor
    width, height = -(-level.width // factor), -(-level.height // factor)
    thumbnail = np.empty((height, width, 3), np.uint8)
    for top in range(0, level.height, side):
        for left in range(0, level.width, side):
            columns, rows = min(side, level.width - left), min(side, level.height - top)
            x_l0, y_l0 = level_to_l0(np.array([left, top]), level.downsample).tolist()
            block = slide.read(x_l0, y_l0, index, columns, rows)
            if columns % factor or rows % factor:
                # The last px of the thumbnail may cover less: the slide's own px are repeated, not white added.
                block = np.pad(block, ((0, -rows % factor), (0, -columns % factor), (0, 0)), mode="edge")
            size = block.shape[1] // factor, block.shape[0] // factor
            x, y = left // factor, top // factor
            thumbnail[y : y + size[1], x : x + size[0]] = cv2.resize(block, size, interpolation=cv2.INTER_AREA)
    return Overview(thumbnail, mpp * factor, level.downsample * factor)


def write_mask(file: Path, record: MaskRecord) -> None:
    """Writes thumbnail and mask as one zarr v3 zip store, atomically.

    The attributes of its root are `mpp`, `px_l0` and `outline`. The zip's member `zarr.json` is JSON with them under
    `attributes`: the outline can be read with zipfile and json alone, without zarr or the pixels.
    """
    overview = record.overview
    attributes = {"mpp": overview.mpp, "px_l0": overview.px_l0, "outline": record.outline}
    root = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    with atomic_path(file) as partial:
        # By ourselves: with a long outline zarr takes longer over these attributes than over all pixels.
        with zipfile.ZipFile(partial, "w") as archive:
            archive.writestr("zarr.json", json.dumps(root, separators=(",", ":")))
        with zarr.storage.ZipStore(partial, mode="a") as store:
            for name, data in (("thumbnail", overview.thumbnail), ("areas", record.areas)):
                # Chunks of even size: zarr fills the last one up to a whole chunk.
                chunks = tuple(-(-side // -(-side // _CHUNK_PX)) for side in data.shape)
                zarr.create_array(store, name=name, data=data, chunks=chunks, compressors=ZstdCodec(level=_ZSTD_LEVEL))


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
        raise TilerError(f"{file.name}: no readable tissue mask ({error}); tile again with --overwrite") from None
