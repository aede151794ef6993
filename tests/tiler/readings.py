"""Readings of damaged slides, set beside the truth. Run by worker processes, which cuCIM may end: so no test module."""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from manifests import Manifest
from tiler import ReadError, Slide, TilePlan, TilerError, open_slide, plan_tiles, read_plan
from tiler.guard import guarded
from tiler.reader import _read_surely

Rows = NDArray[np.int64]


class Tally(NamedTuple):
    """How readings ended: tiles that were right and wrong, readings that were refused, and those that ought not."""

    right: int
    wrong: int
    refused: int
    refused_without_damage: int


def plan(slide: Slide, manifest: Manifest, rows: Rows, way: str) -> TilePlan:
    """A plan of reading rows in one of two ways: "as planned", or all "in regions", by the slide's reader."""
    return plan_tiles(slide, manifest, rows, in_regions=way == "in regions")


def read_at_random(
    path: Path, manifest: Manifest, truth: Path, touching: NDArray[np.bool_], way: str, num_readings: int, seed: int = 0
) -> Tally:
    """Reads rows at random, single ones and blocks of neighbours, on one and two threads.

    Args:
        path: the slide.
        manifest: its tiles.
        truth: a file of what they look like, uint8 (n, tile_px, tile_px, 3).
        touching: those of them that touch damage, (n,); every second reading leaves them out.
        way: see `plan`.
        num_readings: how many.
        seed: of what is read.
    """
    rng, slide, expected = np.random.default_rng(seed), open_slide(path), np.load(truth, mmap_mode="r")
    right = wrong = refused = without_damage = 0
    for i in range(num_readings):
        choice = np.arange(len(manifest)) if i % 2 else np.flatnonzero(~touching)
        rows = _draw_rows(rng, choice)
        try:
            tiles = read_plan(slide, manifest, plan(slide, manifest, rows, way), num_threads=int(rng.integers(1, 3)))
        except ReadError:
            refused += 1
            without_damage += not touching[rows].any()
        else:
            is_right = (tiles == expected[rows]).all(axis=(1, 2, 3))
            right, wrong = right + int(is_right.sum()), wrong + int((~is_right).sum())
    return Tally(right, wrong, refused, without_damage)


def _draw_rows(rng: np.random.Generator, choice: Rows) -> Rows:
    """A single row, a run of neighbours in manifest order, or any, with repeats."""
    size, how = int(rng.integers(2, 40)), rng.integers(3)
    if how == 0:
        return rng.choice(choice, 1)
    if how == 1:
        first = int(rng.integers(len(choice)))
        return choice[first : first + size]
    return rng.choice(choice, size)


GUARDS: Mapping[str, Callable[..., Any]] = {
    "noise": lambda: 0,
    "is_poisoned": lambda *_: False,
    "bad_mark_rows": lambda slide, manifest, rows, **_: np.zeros(len(rows), bool),  # noqa: ARG005
}
"""What notices damage that cuCIM does not raise, and what stands for it when it is to see nothing."""


def read_with(guards: Sequence[str], *arguments: Any) -> Tally:
    """As `read_at_random`, with some of the `GUARDS` alone."""
    with pytest.MonkeyPatch.context() as patch:
        for name in GUARDS.keys() - set(guards):
            patch.setattr(f"tiler.reader.{name}", GUARDS[name])
        return read_at_random(*arguments)


def read_while_others_open(other: Path, *arguments: Any) -> Tally:
    """As `read_at_random`, while another thread opens another slide over and over."""
    is_over = threading.Event()

    def open_on() -> None:
        while not is_over.is_set():
            open_slide(other)

    thread = threading.Thread(target=open_on)
    thread.start()
    try:
        return read_at_random(*arguments)
    finally:
        is_over.set()
        thread.join()


def read_after_cut(path: Path, manifest: Manifest, truth: Path, size: int, way: str) -> Tally:
    """Opens a slide, cuts its file to `size` bytes, and reads all tiles, one by one."""
    slide, expected = open_slide(path), np.load(truth)
    plans = [plan(slide, manifest, np.array([row]), way) for row in range(len(manifest))]
    os.truncate(path, size)
    right = wrong = refused = 0
    for row, alone in enumerate(plans):
        try:
            tile = read_plan(slide, manifest, alone)
        except (TilerError, OSError):
            refused += 1
        else:
            is_right = np.array_equal(tile[0], expected[row])
            right, wrong = right + is_right, wrong + (not is_right)
    return Tally(right, wrong, refused, 0)


def write_truth(path: Path, manifest: Manifest, truth: Path) -> float:
    """Keeps what each tile looks like, read alone by the slide's reader; the mean difference to OpenSlide's reading."""
    record = manifest.slide
    corners = list(zip(manifest.x_l0.tolist(), manifest.y_l0.tolist(), strict=True))
    theirs, ours = (
        np.stack([slide.read(x, y, record.level, record.read_w, record.read_h) for x, y in corners])
        for slide in (open_slide(path, "openslide"), open_slide(path))
    )
    np.save(truth, ours)
    return float(np.abs(ours.astype(np.int16) - theirs).mean())


def count_suspicions(path: Path, manifest: Manifest, way: str, num_readings: int = 1) -> tuple[int, int]:
    """How many regions are read, and how many of them come under suspicion: all tiles, then rows at random."""
    slide, rng, rows = open_slide(path), np.random.default_rng(0), np.arange(len(manifest))
    num_reads = num_doubtful = 0
    for i in range(num_readings):
        some = plan(slide, manifest, rows if i == 0 else _draw_rows(rng, rows), way)
        with guarded():
            num_doubtful += sum(_read_surely(slide, some, read) is None for read in some.reads)
        num_reads += len(some.reads)
    return num_reads, num_doubtful
