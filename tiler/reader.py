"""The tile reader: rows of a manifest in, one uint8 array out, each part of the file decoded about once, by threads."""

import os
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from numpy.typing import NDArray

from manifests.geometry import l0_to_level
from manifests.schema import Manifest
from tiler.errors import TilerError
from tiler.plan import BlockRead, plan_reads
from tiler.slide import Slide


def read_tiles(
    slide: Slide,
    manifest: Manifest,
    rows: NDArray[np.int64],
    out: NDArray[np.uint8] | None = None,
    num_threads: int | None = None,
) -> NDArray[np.uint8]:
    """Reads tiles of a slide.

    Args:
        slide: the open slide that the manifest was made from.
        manifest: its manifest.
        rows: which tiles, (n,), in any order, repeats allowed (read once).
        out: where to, uint8 (n, tile_px, tile_px, 3); a new array by default.
        num_threads: threads over the block reads; all cores by default.

    Returns:
        uint8 (n, tile_px, tile_px, 3), RGB; [i] is tile rows[i], bit-equal to reading it alone.

    Raises:
        TilerError: the file is not the one the manifest was made from, a row is out of range, or `out` does not fit.
        ReadError: pixels that could not be read.
    """
    record = manifest.slide
    if slide.fingerprint != record.fingerprint:
        raise TilerError(f"slide {record.slide_id}: the file changed since it was tiled; tile it again")
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(manifest):
        raise TilerError(f"slide {record.slide_id}: rows {rows.min()}..{rows.max()}, the manifest has {len(manifest)}")
    shape = (len(rows), record.tile_px, record.tile_px, 3)
    if out is None:
        out = np.empty(shape, np.uint8)
    elif out.shape != shape or out.dtype != np.uint8:
        raise TilerError(f"out is {out.dtype} {out.shape}, expected uint8 {shape}")
    unique, landing = np.unique(rows, return_inverse=True)
    if len(unique) == 0:
        return out
    # Where each distinct tile lands in `out`: its first place; repeats are copied from there afterwards.
    first = np.full(len(unique), -1, np.int64)
    first[landing[::-1]] = np.arange(len(rows))[::-1]
    reads = _plan(slide, manifest, unique)

    def run(read: BlockRead) -> None:
        region = slide.read(read.x_l0, read.y_l0, record.level, read.width, read.height)
        for member, left, top in zip(read.members, read.left, read.top, strict=True):
            tile = region[top : top + record.read_h, left : left + record.read_w]
            if tile.shape[:2] == shape[1:3]:
                out[first[member]] = tile
            else:  # Cropped first, then resampled: the pixels cannot depend on the block.
                cv2.resize(np.ascontiguousarray(tile), shape[1:3], out[first[member]], interpolation=cv2.INTER_AREA)

    threads = min(num_threads or len(os.sched_getaffinity(0)), len(reads))
    if threads == 1:
        for read in reads:
            run(read)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, reads))
    repeats = np.flatnonzero(first[landing] != np.arange(len(rows)))
    out[repeats] = out[first[landing[repeats]]]
    return out


def _plan(slide: Slide, manifest: Manifest, rows: NDArray[np.int64]) -> list[BlockRead]:
    record = manifest.slide
    level = slide.levels[record.level]
    x_l0, y_l0 = manifest.x_l0[rows], manifest.y_l0[rows]
    return plan_reads(
        x_l0,
        y_l0,
        l0_to_level(x_l0, level.downsample),
        l0_to_level(y_l0, level.downsample),
        (record.read_w, record.read_h),
        (level.tile_w, level.tile_h),
        may_share=slide.is_exact(record.level),
    )
