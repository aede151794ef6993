"""How fast a slide's bytes come from storage here: a sample of a few seconds, so a rough number.

It is read as the tile reader reads it: compressed tile by compressed tile, in the order of its plan, without decoding.
Cold means that this machine forgot the file first; what a file server or a disk keeps in its own memory cannot be
emptied from here, so that a slide that was read lately may look faster than others. So each cold pass has a part of the
file to itself.
"""

import contextlib
import itertools
import os
import re
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from manifests.geometry import l0_to_level
from manifests.schema import Manifest
from tiler.reader import plan_tiles
from tiler.slide import Slide
from tiler.tiff_tables import find_table, read_tables

_MOST_BYTES = 256_000_000
_COLD_S, _WARM_S = 2.0, 0.3
"""Longest time of one pass; a read that is under way is waited for."""
_ENOUGH_S = 0.2
"""Small slides are read again until so much time was measured."""
_BLOCK_BYTES = 65_536
_IN_MEMORY = ("tmpfs", "ramfs")
_REMOTE = ("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "9p", "afs")
"""Types of file systems that lie on servers; those in user space (fuse…) may."""

Group = list[tuple[int, int]]
"""What one read needs of a file: offset and length of each piece, bytes."""


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """What a reader takes from a file, read by read, in order.

    `bytes_per_tile`: bytes of the file for one tile of the manifest; None where that is not known.
    """

    path: Path
    kind: str
    groups: list[Group]
    bytes_per_tile: float | None


def measure_storage(slide: Slide, manifest: Manifest, num_threads: int) -> dict[str, Any] | None:
    """How fast the slide's bytes come from storage, at most 256 MB and 5 s of them.

    Args:
        slide: the open slide.
        manifest: its tiles.
        num_threads: threads of the second pass; the first has one.

    Returns:
        `file_system`, its type; `is_remote`: it may lie on a server; `kind` of the pieces, `num_bytes` of the sample;
        `bytes_per_tile`, from the file for one tile of the manifest, None where that is not known; `rates`: for each
        number of threads cold and warm bytes per second, cold None where the file cannot be forgotten. None where the
        slide is a folder, or empty.
    """
    pieces = find_pieces(slide, manifest)
    if pieces is None:
        return None
    sample = _bound(pieces.groups, _MOST_BYTES)
    counts = sorted({1, num_threads})
    file_system = find_file_system(pieces.path)
    half = len(sample) // 2
    shares = [sample[:half], sample[half:]] if len(counts) == 2 and half else [sample] * len(counts)
    rates = []
    descriptor = os.open(pieces.path, os.O_RDONLY)
    try:
        for threads, share in zip(counts, shares, strict=True):
            with ThreadPoolExecutor(threads) as pool:
                cold, num_read = _time_cold(descriptor, share, pool, threads)
                warm = _time_warm(descriptor, share[:num_read], pool, threads)
            can_forget = file_system not in _IN_MEMORY and _forget(descriptor, share)
            rates.append(
                {"threads": threads, "cold_bytes_per_s": cold if can_forget else None, "warm_bytes_per_s": warm}
            )
    finally:
        os.close(descriptor)
    return {
        "file_system": file_system,
        "is_remote": file_system in _REMOTE or file_system.startswith("fuse"),
        "kind": pieces.kind,
        "num_bytes": sum(size for group in sample for _, size in group),
        "bytes_per_tile": None if pieces.bytes_per_tile is None else round(pieces.bytes_per_tile),
        "rates": rates,
    }


def find_file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The type of the file system that a file lies on, as ext4 or nfs4; "unknown" where the system does not say."""
    real, best = os.path.realpath(path), ("", "unknown")
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return "unknown"
    for line in lines:
        _, place, kind, *_ = line.split(" ")
        place = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), place)  # A space is \040 there.
        # Of two mounts in one place the later hides the former.
        if len(place) >= len(best[0]) and (real == place or real.startswith(place.rstrip("/") + "/")):
            best = place, kind
    return best[1]


def find_pieces(slide: Slide, manifest: Manifest) -> Pieces | None:
    """Where the compressed tiles under a manifest's tiles lie, read by read; blocks of 64 KiB where no table tells."""
    if slide.path.is_dir():
        return None
    level = slide.levels[manifest.slide.level]
    table = find_table(read_tables(slide.path), level.width, level.height)
    if table is None:
        return _find_blocks(slide.path)
    groups = []
    for read in plan_tiles(slide, manifest, np.arange(len(manifest))).reads:
        x, y = (int(l0_to_level(np.array(at), level.downsample)) for at in (read.x_l0, read.y_l0))
        rows = slice(max(0, y // table.tile_h), (y + read.height - 1) // table.tile_h + 1)
        columns = slice(max(0, x // table.tile_w), (x + read.width - 1) // table.tile_w + 1)
        offsets, sizes = (numbers[:, rows, columns].ravel().tolist() for numbers in (table.offsets, table.num_bytes))
        groups.append([(offset, size) for offset, size in zip(offsets, sizes, strict=True) if size])
    num_bytes = sum(size for group in groups for _, size in group)
    if not num_bytes:
        return None
    return Pieces(
        path=slide.path, kind="compressed tiles", groups=groups, bytes_per_tile=num_bytes / max(1, len(manifest))
    )


def _find_blocks(path: Path) -> Pieces | None:
    """Every block of the largest file of a slide that is no TIFF: an MRXS's pixels lie in the folder beside it."""
    beside = path.with_suffix("")
    files = [path, *(beside.glob("*.dat") if path.suffix.lower() == ".mrxs" else ())]
    largest = max(files, key=lambda file: file.stat().st_size)
    size = largest.stat().st_size
    groups = [[(at, min(_BLOCK_BYTES, size - at))] for at in range(0, size, _BLOCK_BYTES)]
    return Pieces(path=largest, kind="blocks of 64 KiB", groups=groups, bytes_per_tile=None) if groups else None


def _bound(groups: list[Group], most_bytes: int) -> list[Group]:
    """Groups from the middle on, as many as together stay below `most_bytes`; at least one."""
    sizes = np.array([sum(size for _, size in group) for group in groups])
    spare = max(0, int(sizes.sum()) - most_bytes)
    before = np.cumsum(sizes) - sizes
    first = int(np.searchsorted(before, spare // 2, side="right")) - 1
    past = int(np.searchsorted(before + sizes, before[first] + most_bytes, side="right"))
    return groups[first : max(past, first + 1)]


def _forget(descriptor: int, groups: Sequence[Group]) -> bool:
    """Empties this machine's cache of a file; False if most of it stays, as where another process holds it mapped."""
    with contextlib.suppress(OSError):
        os.fsync(descriptor)  # What is not on disk yet is not forgotten.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    some = groups[:: max(1, len(groups) // 64)]
    num_left = sum(_is_cached(descriptor, *group[0]) for group in some if group)
    return 2 * num_left <= len(some)


def _is_cached(descriptor: int, offset: int, size: int) -> bool:
    """Whether bytes can be had without waiting for storage; False too where the file system cannot tell."""
    try:
        return os.preadv(descriptor, [bytearray(size)], offset, os.RWF_NOWAIT) == size
    except OSError:
        return False


def _time_cold(
    descriptor: int, groups: Sequence[Group], pool: ThreadPoolExecutor, num_threads: int
) -> tuple[float, int]:
    """Bytes per second of groups that this machine has forgotten, and how many were read.

    What is read at once is read a few times, each time forgotten before, for a truer number.
    """
    bytes_read, spent_s, num_groups = 0, 0.0, 0
    while spent_s < _ENOUGH_S:
        _forget(descriptor, groups)
        started = time.perf_counter()
        num_bytes, num_taken = _read(descriptor, groups, pool, num_threads, started + _COLD_S)
        spent_s += time.perf_counter() - started
        bytes_read += num_bytes
        num_groups = num_groups or num_taken
    return bytes_read / spent_s, num_groups


def _time_warm(descriptor: int, groups: Sequence[Group], pool: ThreadPoolExecutor, num_threads: int) -> float:
    """Bytes per second of groups that were just read, over and over."""
    started = time.perf_counter()
    num_bytes, _ = _read(descriptor, itertools.cycle(groups), pool, num_threads, started + _WARM_S)
    return num_bytes / (time.perf_counter() - started)


def _read(
    descriptor: int, groups: Iterable[Group], pool: ThreadPoolExecutor, num_threads: int, deadline: float
) -> tuple[int, int]:
    """Bytes and groups that were read until the clock (time.perf_counter) passed the deadline, or all were."""
    waiting, taking, taken = iter(groups), threading.Lock(), itertools.count()

    def take() -> Group | None:
        with taking:
            group = next(waiting, None) if time.perf_counter() < deadline else None
            if group is not None:
                next(taken)
            return group

    def read() -> int:
        buffer, num_bytes = memoryview(bytearray(_BLOCK_BYTES)), 0
        while (group := take()) is not None:
            for offset, size in group:
                if size > len(buffer):
                    buffer = memoryview(bytearray(size))
                num_bytes += os.preadv(descriptor, [buffer[:size]], offset)
        return num_bytes

    readers = [pool.submit(read) for _ in range(num_threads)]
    return sum(reader.result() for reader in readers), next(taken)
