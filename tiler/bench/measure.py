"""Tiles per second by reader, beside the limit that decoding sets; for one slide, and random shares of its tiles.

Two rates each: tiles per second by the wall clock, and tiles per core-second, by the processor time of all threads of
the process, which changes little with what else the machine does or with the number of threads. Every round runs all
readers one after another, so that ratios are between readers in one state of the machine; a ratio is the median of the
rounds' ratios. The file is in the page cache: before the first round all that is needed of it was read once. What a
reader opens once for a slide is open before its clock starts.
"""

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manifests.sampling import sample_tiles
from manifests.schema import Manifest
from tiler.bench.limit import count_touched, find_needed
from tiler.bench.readers import Reader, Work, get_ready, list_readers, try_readers
from tiler.errors import TilerError
from tiler.reader import plan_tiles, read_tiles
from tiler.slide import Slide
from tiler.tiff import read_tiff

_NUM_TRIED = 64
"""Tiles that every reader delivers once before the clock starts, spread over those measured."""
_PROC = Path("/proc/self")


def bench_slide(
    slide: Slide,
    manifest: Manifest,
    *,
    shares: Sequence[float] = (1.0,),
    threads: tuple[int, ...] = (1, 2),
    num_rounds: int = 5,
    seed: int = 0,
    most_tiles: int | None = None,
    more: Mapping[str, Reader] | None = None,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measures all readers on one slide.

    Args:
        slide: the open slide.
        manifest: its tiles.
        shares: shares of the first `most_tiles` to read, in (0, 1], drawn as the sampler draws them; 1 is each of
            them, in order.
        threads: numbers of threads to run `read_tiles` with, and of workers for cuCIM's batches.
        num_rounds: how often.
        seed: of the draws.
        most_tiles: tiles to measure at most, the first, which lie together on the slide; None measures all. They are
            in memory at once.
        more: further readers to set beside them.
        on_round: called after each round.

    Returns:
        What was read (`num_tiles` of the slide, `num_measured` of them the first), and for each share: `readers`, each
        with its rates and their spread, (max - min) / median, or None, and the reason in `why_not`; `ratio_per_core_s`,
        tiles per core-second of `read_tiles` with the first number of threads to that of the others; `ratio_threads`,
        tiles per second with each number of threads to those with the first; `decoded_per_tile`, compressed tiles
        decoded for each tile delivered (`per_tile` is cuCIM's; what OpenSlide's cache saves of it is not known);
        `needed_mb`, their size in the file; `peak_mb`, memory that `read_tiles` took beside its output, with most
        threads.

    Raises:
        TilerError: `read_tiles` cannot read the slide.
    """
    if not len(manifest):
        raise TilerError(f"slide {manifest.slide.slide_id}: no tiles to read")
    readers = list_readers(threads, more)
    num_measured = min(len(manifest), most_tiles or len(manifest))
    few = np.unique(np.linspace(0, num_measured - 1, min(_NUM_TRIED, num_measured)).astype(np.int64))
    why_not, differences = try_readers(_work(slide, manifest, few), readers)
    able = {name: reader for name, reader in readers.items() if name not in why_not}
    measured = [
        _bench_rows(_work(slide, manifest, rows), able, threads, num_rounds, on_round)
        for rows in (_draw(manifest, num_measured, share, seed) for share in shares)
    ]
    record = manifest.slide
    level, tiff = slide.levels[record.level], read_tiff(slide.path)
    page = tiff.find_page((level.width, level.height)) if tiff is not None else None
    return {
        "slide": slide.path.stem,
        "backend": slide.backend,
        "compression": page.compression_name if page is not None else None,
        "file_tile": (level.tile_w, level.tile_h),
        "level": record.level,
        "read_size": (record.read_w, record.read_h),
        "tile_px": record.tile_px,
        "num_tiles": len(manifest),
        "num_measured": num_measured,
        "difference": differences,
        "why_not": why_not,
        "shares": [
            {"share": share, **found, "readers": {name: found["readers"].get(name) for name in readers}}
            for share, found in zip(shares, measured, strict=True)
        ],
    }


def measure_peak(slide: Slide, manifest: Manifest, rows: NDArray[np.int64], num_threads: int | None) -> float | None:
    """MB of memory that `read_tiles` takes at most beside its output; None where the system does not tell.

    Resident memory: what the allocator still held from before is given back first.
    """
    return _peak_mb(_work(slide, manifest, rows), num_threads)


def _work(slide: Slide, manifest: Manifest, rows: NDArray[np.int64]) -> Work:
    """The rows with an array to read them into, whose memory is there already, as that of the loader is."""
    tile_px = manifest.slide.tile_px
    out = np.empty((len(rows), tile_px, tile_px, 3), np.uint8)
    out.fill(0)
    return Work(slide=slide, manifest=manifest, rows=rows, out=out)


def _draw(manifest: Manifest, num_tiles: int, share: float, seed: int) -> NDArray[np.int64]:
    """Rows of a share of the first `num_tiles`, ascending."""
    k = max(1, round(share * num_tiles))
    if k == num_tiles:
        return np.arange(k)
    return sample_tiles(num_tiles, k=k, seed=seed, epoch=0, slide_id=manifest.slide.slide_id)


def _bench_rows(
    work: Work, readers: Mapping[str, Reader], threads: tuple[int, ...], num_rounds: int, on_round: Callable[[], None]
) -> dict[str, Any]:
    peak_mb = _peak_mb(work, max(threads))  # And with it the bytes are in the page cache.
    ready = get_ready(work, readers).ready
    wall_s: dict[str, list[float]] = {name: [] for name in ready}
    core_s: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(num_rounds):
        for name, run in ready.items():
            started, core_started = time.perf_counter(), time.process_time()
            run()
            core_s[name].append(time.process_time() - core_started)
            wall_s[name].append(time.perf_counter() - started)
        on_round()
    num_tiles = len(work.rows)
    ours = [f"read_tiles_{n}" for n in threads]
    return {
        "num_tiles": num_tiles,
        "readers": {name: _rates(num_tiles, wall_s[name], core_s[name]) for name in ready},
        "ratio_per_core_s": {name: _ratio(core_s[name], core_s[ours[0]]) for name in ready if name != ours[0]},
        "ratio_threads": {name: _ratio(wall_s[ours[0]], wall_s[name]) for name in ours[1:]},
        **_count(work),
        "peak_mb": peak_mb,
    }


def _rates(num_tiles: int, wall_s: Sequence[float], core_s: Sequence[float]) -> dict[str, float]:
    return {
        "tiles_per_s": round(num_tiles / statistics.median(wall_s), 1),
        "spread": _spread(wall_s),
        "tiles_per_core_s": round(num_tiles / statistics.median(core_s), 1),
        "core_spread": _spread(core_s),
    }


def _spread(seconds: Sequence[float]) -> float:
    return round((max(seconds) - min(seconds)) / statistics.median(seconds), 3)


def _ratio(theirs_s: Sequence[float], ours_s: Sequence[float]) -> float:
    """How many times as fast ours is: the median of the rounds."""
    return round(statistics.median(a / b for a, b in zip(theirs_s, ours_s, strict=True)), 3)


def _count(work: Work) -> dict[str, Any]:
    """Compressed tiles decoded for each tile delivered, and MB of the file that hold those that are needed."""
    num_tiles = len(work.rows)
    per_tile = {
        "read_tiles": plan_tiles(work.slide, work.manifest, work.rows).num_decoded / num_tiles,
        "per_tile": count_touched(work.slide, work.manifest, work.rows) / num_tiles,
    }
    needed_mb = None
    with contextlib.suppress(TilerError):
        needed = find_needed(work.slide, work.manifest, work.rows)
        per_tile["limit"] = len(needed.index) / num_tiles
        needed_mb = round(needed.num_bytes / 1e6, 3)
    return {"decoded_per_tile": {name: round(n, 3) for name, n in per_tile.items()}, "needed_mb": needed_mb}


def _peak_mb(work: Work, num_threads: int | None) -> float | None:
    with contextlib.suppress(AttributeError):  # Of glibc alone.
        ctypes.CDLL(None).malloc_trim(0)
    try:
        (_PROC / "clear_refs").write_text(
            "5"
        )  # Forgets the peak: https://man7.org/linux/man-pages/man5/proc_pid_clear_refs.5.html
        before = _resident_mb("VmRSS")
    except OSError:
        before = None
    read_tiles(work.slide, work.manifest, work.rows, work.out, num_threads)
    return None if before is None else round(_resident_mb("VmHWM") - before, 1)


def _resident_mb(field: str) -> float:
    """A field of the process's status: VmRSS is its resident memory, VmHWM the peak of it."""
    lines = (_PROC / "status").read_text().splitlines()
    (kb,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kb) / 1e3
