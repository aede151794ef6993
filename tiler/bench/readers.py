"""The readers that a benchmark sets beside `read_tiles`, each the way its users call it; all deliver the same tiles.

Every reader writes RGB tiles, resampled where the manifest says so, into one array that was used before: fresh memory
would cost all of them the same page faults. What another reader cannot do is no error: it is left out, with the reason.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import cv2
import numpy as np
import openslide
from numpy.typing import NDArray

from manifests.schema import Manifest
from tiler.backends.cucim_reader import open_cucim
from tiler.bench.limit import ALIGNED, FASTEST, find_needed, make_limit
from tiler.errors import TilerError
from tiler.outcome import hide_paths
from tiler.reader import read_tiles
from tiler.slide import Slide, open_slide

_BATCH = 64
"""Tiles in one batch of cuCIM's."""
_OPENSLIDE_CACHE_BYTES = 32 << 20
"""OpenSlide's default: https://github.com/openslide/openslide/blob/main/src/openslide-private.h."""
_FAILURES = (TilerError, RuntimeError, ValueError, TypeError, OSError, ImportError, openslide.OpenSlideError)
"""What a reader raises at a slide that it does not read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """Tiles to deliver: `rows` (n,) of a manifest, into `out`, uint8 (n, tile_px, tile_px, 3)."""

    slide: Slide
    manifest: Manifest
    rows: NDArray[np.int64]
    out: NDArray[np.uint8]

    @property
    def corners_l0(self) -> list[tuple[int, int]]:
        """Top-left corners (x, y) in level-0 px."""
        x, y = self.manifest.x_l0[self.rows], self.manifest.y_l0[self.rows]
        return list(zip(x.tolist(), y.tolist(), strict=True))

    @property
    def read_size(self) -> tuple[int, int]:
        """(width, height) of a tile in px of its read level."""
        return self.manifest.slide.read_w, self.manifest.slide.read_h

    def deliver(self, i: int, region: NDArray[np.uint8]) -> None:
        """Puts tile i in its place, resampled if it must be."""
        if region.shape == self.out.shape[1:]:
            self.out[i] = region
        else:
            size = self.out.shape[2], self.out.shape[1]
            cv2.resize(np.ascontiguousarray(region), size, self.out[i], interpolation=cv2.INTER_AREA)


@dataclass(frozen=True, eq=False)
class Readers:
    """What can be run, by name, and why the others cannot."""

    ready: dict[str, Callable[[], object]] = field(default_factory=dict)
    why_not: dict[str, str] = field(default_factory=dict)


Reader = Callable[[Work], Callable[[], object]]
"""Makes a reader ready for some work: what is opened once for a slide is opened here."""


def list_readers(threads: tuple[int, ...], more: Mapping[str, Reader] | None = None) -> dict[str, Reader]:
    """All readers by name.

    Args:
        threads: numbers of threads of `read_tiles`, and of workers of cuCIM's batches.
        more: further ones.
    """
    return {
        **{f"read_tiles_{n}": partial(_ours, num_threads=n) for n in threads},
        **(more or {}),
        "cucim_per_tile": _cucim_per_tile,
        **{f"cucim_batch_{n}": partial(_cucim_batch, num_workers=n) for n in threads},
        "openslide_per_tile": _openslide_per_tile,
        "limit": partial(_limit, place=FASTEST),
        "limit_aligned": partial(_limit, place=ALIGNED),
    }


def get_ready(work: Work, readers: Mapping[str, Reader]) -> Readers:
    """Makes readers ready; those that cannot open the slide are left out."""
    made = Readers()
    for name, reader in readers.items():
        with _leaving_out(made, name, work):
            made.ready[name] = reader(work)
    return made


def try_readers(work: Work, readers: Mapping[str, Reader]) -> tuple[dict[str, str], dict[str, float]]:
    """Runs every reader once.

    Returns:
        Why some cannot deliver these tiles; and of the others that deliver pixels the mean absolute difference to the
        first one's, grey levels.
    """
    made, pixels, differences = get_ready(work, readers), None, {}
    for name, run in made.ready.items():
        work.out.fill(0)
        with _leaving_out(made, name, work):
            run()
            if pixels is None:
                pixels = work.out.astype(np.int16)
            elif not name.startswith("limit"):
                differences[name] = round(float(np.abs(work.out - pixels).mean()), 3)
    return made.why_not, differences


@contextmanager
def _leaving_out(made: Readers, name: str, work: Work) -> Iterator[None]:
    """A reader that fails is left out; ours is what is measured, so that its errors are the command's."""
    try:
        yield
    except _FAILURES as error:
        if name.startswith("read_tiles"):
            raise
        made.why_not[name] = hide_paths(str(error), work.slide.path.stem, work.slide.path)


def _ours(work: Work, num_threads: int) -> Callable[[], object]:
    return partial(read_tiles, work.slide, work.manifest, work.rows, work.out, num_threads)


def _cucim_per_tile(work: Work) -> Callable[[], object]:
    slide, corners, level = _cucim(work), work.corners_l0, work.manifest.slide.level

    def run() -> None:
        for i, corner in enumerate(corners):
            work.deliver(i, np.asarray(slide.read_region(corner, work.read_size, level)))

    return run


def _cucim_batch(work: Work, num_workers: int) -> Callable[[], object]:
    """Its loader's own threads decode ahead; a batch's memory is used again, so that each is copied out at once."""
    slide, corners, level = _cucim(work), work.corners_l0, work.manifest.slide.level

    def run() -> None:
        batches = slide.read_region(corners, work.read_size, level, num_workers=num_workers, batch_size=_BATCH)
        done = 0
        for batch in batches:
            regions = np.asarray(batch)
            for region in regions.reshape(-1, *regions.shape[-3:]):
                work.deliver(done, region)
                done += 1
        if done != len(corners):
            raise RuntimeError(f"{done} of {len(corners)} tiles came back")

    return run


def _cucim(work: Work) -> Any:
    """cuCIM's own handle, where its pixels are right."""
    levels = open_slide(work.slide.path, "cucim").levels
    _check_level(work, [(level.width, level.height) for level in levels])
    return open_cucim(work.slide.path, quiet=True)


def _openslide_per_tile(work: Work) -> Callable[[], object]:
    slide, corners, level = openslide.OpenSlide(work.slide.path), work.corners_l0, work.manifest.slide.level
    _check_level(work, slide.level_dimensions)

    def run() -> None:
        slide.set_cache(openslide.OpenSlideCache(_OPENSLIDE_CACHE_BYTES))  # Empty: not the tiles of the last round.
        for i, corner in enumerate(corners):
            work.deliver(i, np.asarray(slide.read_region(corner, level, work.read_size))[..., :3])

    return run


def _check_level(work: Work, seen: Sequence[tuple[int, int]]) -> None:
    """Raises if a reader's levels, (width, height), are not those that the manifest speaks of."""
    index = work.manifest.slide.level
    level = work.slide.levels[index]
    if (level.width, level.height) not in seen[index : index + 1]:
        raise TilerError(f"it sees levels {list(seen)}, level {index} is {level.width}x{level.height}")


def _limit(work: Work, place: int) -> Callable[[], object]:
    needed = find_needed(work.slide, work.manifest, work.rows)
    if place == ALIGNED and not needed.is_jpeg:
        raise TilerError("where the buffer begins matters for JPEG alone")
    return make_limit(work.slide.path, needed, work.manifest, len(work.rows), place)
