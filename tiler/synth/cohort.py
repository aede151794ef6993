"""A labelled cohort of synthetic slides on disk: which slides, in which processes, with which labels and truth.

Slide i depends on (seed, i, config) alone, never on how many slides or processes there are. Every file appears whole
or not at all; labels.csv comes last.
"""

import csv
import io
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np

from manifests.errors import SlidegradError
from manifests.files import atomic_path, write_text
from tiler.synth.config import MPP, CohortConfig
from tiler.synth.layout import Layout, draw_layout
from tiler.synth.plan import SlidePlan, pair_rng, plan_slide, texture_rng
from tiler.synth.stain import draw_stain
from tiler.synth.svs import TILE_PX, Level, encode_jpeg, encode_level, write_svs
from tiler.synth.texture import Pixels, Texture, draw_texture, empty_block, render_block

_APP_MAG = 20
_STEP = 4
"""Each level is this many times smaller than the one before."""
_SMALLEST_SIDE_PX = 1024
"""Levels are added until the larger side is at most this."""
_THUMBNAIL_PX = 512
"""Larger side of the thumbnail."""


def make_cohort(
    out: Path,
    num_slides: int,
    seed: int,
    *,
    config: CohortConfig | None = None,
    num_workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Makes `out/slides/*.svs`, `out/truth/*.png` (8 microns per px) and `out/labels.csv`.

    Args:
        out: Folder of the cohort; made if missing. Slides that are there already are made anew, byte for byte the same.
        num_slides: How many slides. Two by two they are matched pairs, so an even number balances the labels.
        seed: Two cohorts of the same seed and config agree slide by slide, whatever their sizes.
        config: The look of the cohort; None takes the defaults.
        num_workers: Processes; None takes one per core, 1 works in this process.
        progress: Called after each slide with the number of slides done.

    Returns:
        The slides' paths, in the cohort's order.

    Raises:
        SlidegradError: `num_slides`, `seed` or `num_workers` is out of range, or `out` is not a folder.
    """
    config = config or CohortConfig()
    num_workers = min(num_slides, (os.cpu_count() or 1) if num_workers is None else num_workers)
    if num_slides < 1 or seed < 0 or num_workers < 1:
        raise SlidegradError(
            "synth: wants at least one slide, a seed of 0 or more and at least one worker, "
            f"got slides={num_slides}, seed={seed}, workers={num_workers}"
        )
    if out.exists() and not out.is_dir():
        raise SlidegradError(f"synth: the output must be a folder, got the file {out}")
    for folder in ("slides", "truth"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for num_done, _ in enumerate(_each_slide(out, num_slides, seed, config, num_workers), start=1):
        if progress is not None:
            progress(num_done)
    plans = [plan_slide(seed, index, config) for index in range(num_slides)]
    _write_labels(out / "labels.csv", plans)
    return [_slide_path(out, plan) for plan in plans]


def make_slide(out: Path, seed: int, index: int, config: CohortConfig) -> None:
    """Makes slide `index` and its truth map under `out`, whose folders exist."""
    plan = plan_slide(seed, index, config)
    layout, texture = _draw(plan, seed, config)
    levels, thumbnail = _encode(texture, config.jpeg_quality)
    write_svs(_slide_path(out, plan), levels, thumbnail, mpp=MPP, app_mag=_APP_MAG, quality=config.jpeg_quality)
    ok, png = cv2.imencode(".png", layout.truth)
    assert ok
    with atomic_path(out / "truth" / f"{plan.slide_id}.png") as partial:
        partial.write_bytes(bytes(png))


def _each_slide(out: Path, num_slides: int, seed: int, config: CohortConfig, num_workers: int) -> Iterator[None]:
    """Makes all slides, yielding after each, in any order."""
    if num_workers == 1:
        for index in range(num_slides):
            make_slide(out, seed, index, config)
            yield
        return
    pool = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=_start_worker)
    running: set[Future[None]] = set()
    try:
        for index in range(num_slides):
            # No queue: after Ctrl-C nothing but the slides in hand is waited for.
            running.add(pool.submit(make_slide, out, seed, index, config))
            if len(running) == num_workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for slide in done:
                    slide.result()
                    yield
        for slide in as_completed(running):
            slide.result()
            yield
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """One thread per process, and Ctrl-C is the parent's to handle: workers finish the slide in hand and end."""
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _draw(plan: SlidePlan, seed: int, config: CohortConfig) -> tuple[Layout, Texture]:
    shared = pair_rng(seed, plan.pair)
    stain = draw_stain(shared, config.stain_variation)
    layout = draw_layout(
        shared, config, is_scant=plan.is_scant, has_pen=plan.has_pen, label=plan.label, mirror=plan.mirror
    )
    return layout, draw_texture(texture_rng(seed, plan.index), layout, stain)


def _encode(texture: Texture, quality: int) -> tuple[list[Level], Pixels]:
    """Renders level 0 tile by tile and makes all smaller levels from it: (levels, thumbnail)."""
    width, height = texture.layout.size_px
    empty = empty_block(texture.stain, TILE_PX)
    empty_jpeg = encode_jpeg(empty, quality)
    side = TILE_PX // _STEP
    rows, columns = -(-height // TILE_PX), -(-width // TILE_PX)
    small = np.tile(_reduced(empty), (rows, columns, 1))
    jpegs = []
    for row in range(rows):
        for column in range(columns):
            block = render_block(texture, column * TILE_PX, row * TILE_PX, TILE_PX)
            jpegs.append(empty_jpeg if block is None else encode_jpeg(block, quality))
            if block is not None:
                small[row * side : (row + 1) * side, column * side : (column + 1) * side] = _reduced(block)
    levels = [Level(width_px=width, height_px=height, jpegs=jpegs)]
    small = small[: height // _STEP, : width // _STEP]
    scale = _THUMBNAIL_PX / max(small.shape)
    thumbnail: Pixels = cv2.resize(small, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    levels.append(encode_level(small, quality))
    while max(small.shape) > _SMALLEST_SIDE_PX:
        small = _reduced(small)
        levels.append(encode_level(small, quality))
    return levels, thumbnail


def _reduced(pixels: Pixels) -> Pixels:
    """A picture 4 times smaller, each pixel the mean of 16."""
    size = (pixels.shape[1] // _STEP, pixels.shape[0] // _STEP)
    reduced: Pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return reduced


def _slide_path(out: Path, plan: SlidePlan) -> Path:
    return out / "slides" / f"{plan.slide_id}.svs"


def _write_labels(path: Path, plans: Sequence[SlidePlan]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("slide_id", "label", "specimen_id", "patient_id"))
    writer.writerows((plan.slide_id, plan.label, plan.specimen_id, plan.patient_id) for plan in plans)
    write_text(path, text.getvalue())
