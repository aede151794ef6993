"""The tile reader: rows of a manifest in, one uint8 array out, each compressed tile decoded once, by threads.

JPEG tiles of a TIFF are decoded from their bytes (tiler/jpeg.py); all else is read in regions by the slide's reader.
A read that left a trace of damage (tiler/guard.py), or failed, is not the end of the tiles in it: the damage may lie
beside them. Their own bytes are decoded strictly, and if those are sound each tile is read again alone.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from manifests.geometry import l0_to_level
from manifests.schema import Manifest, SlideRecord
from tiler.backends import Level
from tiler.canvas import Canvas, count_parts
from tiler.errors import DamageError, ReadError, TilerError
from tiler.guard import guarded, is_poisoned, noise
from tiler.integrity import bad_mark_rows, bad_rows, lay
from tiler.jpeg import JpegTiles
from tiler.plan import BLOCK_PX, BlockRead, plan_reads
from tiler.slide import Slide

_NUM_TRIES = 3
"""How often a sound tile is read alone before it is given up: what was heard may have come from another thread."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TilePlan:
    """How the tiles of `rows` (n,) of a manifest are read.

    `unique` are the distinct rows, ascending; `landing` (n,) says which of them each row is. `reads`' tiles are places
    in `unique`. `num_decoded`: compressed tiles of the file that they decode, which take `num_file_bytes` there
    (0 where nobody knows). `jpeg_tiles`: what they are read by, the slide's reader if None.
    """

    record: SlideRecord
    unique: NDArray[np.int64]
    landing: NDArray[np.int64]
    reads: list[BlockRead]
    num_decoded: int
    num_file_bytes: int
    jpeg_tiles: JpegTiles | None


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
        out: where to, uint8 (n, tile_px, tile_px, 3); a new array by default. One that was used before is faster by
            half: the system gives out fresh memory slowly.
        num_threads: threads over the reads; all cores by default.

    Returns:
        uint8 (n, tile_px, tile_px, 3), RGB; [i] is tile rows[i], bit-equal to reading it alone.

    Raises:
        TilerError: the file is not the one the manifest was made from, a row is out of range, or `out` does not fit.
        DamageError: tiles whose compressed bytes are damaged.
        ReadError: pixels that could not be read for another reason.
        OSError: the disk does not give the bytes; another try may succeed.
    """
    return read_plan(slide, manifest, plan_tiles(slide, manifest, rows), out, num_threads)


def plan_tiles(slide: Slide, manifest: Manifest, rows: NDArray[np.int64], *, in_regions: bool = False) -> TilePlan:
    """Plans what `read_tiles` does.

    Args:
        slide, manifest, rows: as there.
        in_regions: leaves JPEG tiles to the slide's reader too.

    Raises:
        TilerError: a row is out of range, or no whole number.
    """
    record = manifest.slide
    rows = np.asarray(rows) if len(rows) else np.zeros(0, np.int64)
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise TilerError(
            f"slide {record.slide_id}: rows are {rows.dtype} {rows.shape}, expected whole numbers (n,); of a mask take "
            "np.flatnonzero"
        )
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(manifest):
        raise TilerError(f"slide {record.slide_id}: rows {rows.min()}..{rows.max()}, the manifest has {len(manifest)}")
    unique, landing = np.unique(rows, return_inverse=True)
    level = slide.levels[record.level]
    x_l0, y_l0 = manifest.x_l0[unique], manifest.y_l0[unique]
    under = lay(slide, manifest, unique) if len(unique) else None
    num_bytes = under[0].num_bytes[:, under[1].touched()] if under else np.zeros(0, np.int64)
    # The slide's reader knows what lies past the edge, and what is shown where a compressed tile was left out.
    is_whole = bool(num_bytes.all()) and _are_inside(x_l0, y_l0, record, level)
    jpeg_tiles = slide.jpeg_tiles(record.level) if is_whole and not in_regions else None
    reads, num_decoded = plan_reads(
        x_l0,
        y_l0,
        level.downsample,
        (record.read_w, record.read_h),
        (level.tile_w, level.tile_h),
        may_share=slide.is_exact(record.level),
        most_px=BLOCK_PX if jpeg_tiles is None else 0,
    )
    return TilePlan(
        record=record,
        unique=unique,
        landing=landing,
        reads=reads,
        num_decoded=num_decoded,
        num_file_bytes=int(num_bytes.sum()),
        jpeg_tiles=jpeg_tiles,
    )


def _are_inside(x_l0: NDArray[np.int32], y_l0: NDArray[np.int32], record: SlideRecord, level: Level) -> bool:
    """No tile reaches past the level's edge."""
    corners = ((x_l0, record.read_w, level.width), (y_l0, record.read_h, level.height))
    ranges = ((l0_to_level(at, level.downsample), read, size) for at, read, size in corners)
    return all(at.min(initial=0) >= 0 and at.max(initial=0) + read <= size for at, read, size in ranges)


def read_plan(
    slide: Slide,
    manifest: Manifest,
    plan: TilePlan,
    out: NDArray[np.uint8] | None = None,
    num_threads: int | None = None,
) -> NDArray[np.uint8]:
    """Reads what was planned; see `read_tiles`."""
    record = plan.record
    if slide.fingerprint != record.fingerprint:
        raise TilerError(
            f"slide {record.slide_id}: the file changed since it was tiled, or is another slide's; tile it again, or "
            "open the right one"
        )
    shape = (len(plan.landing), record.tile_px, record.tile_px, 3)
    if out is None:
        out = np.empty(shape, np.uint8)
    elif out.shape != shape or out.dtype != np.uint8 or not (out.flags.c_contiguous and out.flags.writeable):
        layout = "" if out.flags.c_contiguous and out.flags.writeable else " that is read-only or not in one piece"
        raise TilerError(f"out is {out.dtype} {out.shape}{layout}, expected uint8 {shape}")
    # Where each distinct tile lands in `out`: its first place; repeats are copied from there afterwards.
    first = np.full(len(plan.unique), -1, np.int64)
    first[plan.landing[::-1]] = np.arange(len(plan.landing))[::-1]
    canvas = Canvas(out, first, (record.read_h, record.read_w), count_parts(plan.reads, len(plan.unique)))
    doubtful: list[BlockRead] = []

    def run(read: BlockRead) -> None:
        region = _read_surely(slide, plan, read)
        if region is None:
            doubtful.append(read)
        else:
            canvas.put(read, region)

    if plan.jpeg_tiles is None and slide.table(record.level) is not None:
        # What no reader raises: OpenJPEG takes half a tile for all of it, OpenSlide and tifffile pass over what libjpeg
        # and libdeflate complain of, and nothing of that can be heard.
        find = partial(bad_mark_rows, look_through=True) if slide.backend == "cucim" else bad_rows
        _refuse_damage(record, find(slide, manifest, plan.unique))
    if num_threads is not None and num_threads < 1:
        raise TilerError(f"num_threads is {num_threads}, expected at least 1")
    with guarded() if plan.jpeg_tiles is None else contextlib.nullcontext():
        num_threads = min(num_threads or len(os.sched_getaffinity(0)), len(plan.reads))
        _in_threads(run, plan.reads, num_threads)
        if doubtful:
            again = np.unique(np.concatenate([read.parts[:, 0] for read in doubtful]))
            _read_again(slide, manifest, plan, again, out, first[again])
    repeats = np.flatnonzero(first[plan.landing] != np.arange(len(plan.landing)))
    out[repeats] = out[first[plan.landing[repeats]]]
    return out


def _read_surely(slide: Slide, plan: TilePlan, read: BlockRead) -> NDArray[np.uint8] | None:
    """A region, or None if it could not be read or something speaks against its pixels."""
    try:
        if plan.jpeg_tiles is not None:
            return plan.jpeg_tiles.read(read.x, read.y, read.width, read.height)
        before = noise()
        region = slide.read(read.x_l0, read.y_l0, plan.record.level, read.width, read.height)
    except ReadError:
        return None
    if slide.backend != "cucim":  # Its bytes were decoded strictly before.
        return region
    level = slide.levels[plan.record.level]
    # Past the slide's edge it is white, whatever was written.
    inside = region[: max(0, level.height - read.y), : max(0, level.width - read.x)]
    is_doubtful = noise() != before or is_poisoned(inside, (read.x, read.y), (level.tile_w, level.tile_h))
    return None if is_doubtful else region


def _read_again(
    slide: Slide,
    manifest: Manifest,
    plan: TilePlan,
    again: NDArray[np.int64],
    out: NDArray[np.uint8],
    places: NDArray[np.int64],
) -> None:
    """Reads some tiles of a plan one by one, whose bytes decode strictly.

    Raises:
        DamageError: they do not.
        ReadError: they do, but their pixels still cannot be had.
    """
    record, rows = plan.record, plan.unique[again]
    _refuse_damage(record, bad_rows(slide, manifest, rows))
    slide.reopen()  # After one error an OpenSlide handle gives nothing but errors.
    for row, place in zip(rows, places, strict=True):
        alone = plan_tiles(slide, manifest, np.array([row]), in_regions=plan.jpeg_tiles is None)
        canvas = Canvas(out, np.array([place]), (record.read_h, record.read_w), count_parts(alone.reads, 1))
        for read in alone.reads:
            tries = (_read_surely(slide, alone, read) for _ in range(_NUM_TRIES))
            region = next((region for region in tries if region is not None), None)
            if region is None:
                raise ReadError(
                    f"slide {record.slide_id}: tile {row} cannot be read by {slide.backend}, though its bytes are "
                    "sound; run it again, or tile it again with another --backend"
                )
            canvas.put(read, region)


def _refuse_damage(record: SlideRecord, is_bad: NDArray[np.bool_]) -> None:
    if num_bad := int(is_bad.sum()):
        raise DamageError(
            f"slide {record.slide_id}: damaged under {num_bad} of its tiles, which was not so, or not looked for, when "
            "it was tiled; restore the file from its source, or tile it again with --check decode"
        )


def _in_threads(function: Callable[[BlockRead], None], reads: Iterable[BlockRead], num_threads: int) -> None:
    """Calls `function` on all reads; after an error no more are begun, and the first is raised.

    Daemon threads: one that a dead file system never lets go does not keep the process from its end.
    """
    waiting, taking = iter(reads), threading.Lock()
    errors: list[BaseException] = []

    def next_read() -> BlockRead | None:
        with taking:
            return None if errors else next(waiting, None)

    def work() -> None:
        try:
            while (read := next_read()) is not None:
                function(read)
        except BaseException as error:  # noqa: BLE001 - carried to the caller
            errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(num_threads - 1)]
    try:
        for thread in threads:
            thread.start()
        work()
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C while it waits: the others stop after the read in hand.
        errors.append(error)
        raise
    if errors:
        raise errors[0]
