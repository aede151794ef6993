"""Which slides get a picture, and drawing them: one slide, one file, one task.

A picture newer than its slide's manifest and mask is kept as it is. A slide that cannot be drawn is told, and the
others go on.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pyarrow as pa

from manifests.files import atomic_path, disk_name, mask_path, read_manifest, tiles_path
from tiler.errors import TilerError
from tiler.masks import read_mask
from tiler.preview.picture import draw_slide

State = Literal["drawn", "not drawn", "no mask", "unreadable", "failed"]
"""What became of a slide's picture; "failed": the slide itself has, there is nothing to draw."""

_MIN_FOR_PROCESSES = 24
"""Fewer slides are drawn sooner (0.1 to 0.3 s each) than processes have started."""


@dataclass(frozen=True)
class Album:
    """The state of every slide's picture, in the order of the catalogue, and the slides yet to draw."""

    state: Mapping[str, State]
    todo: Sequence[str]

    def after(self, unreadable: Mapping[str, str]) -> dict[str, State]:
        """The state once all but the unreadable of `todo` are drawn."""
        done: dict[str, State] = {s: "unreadable" if s in unreadable else "drawn" for s in self.todo}
        return {**self.state, **done}


def picture_path(folder: Path, slide_id: str) -> Path:
    """Where a slide's picture lies."""
    return folder / f"{disk_name(slide_id)}.jpg"


def plan_album(root: Path, folder: Path, catalog: pa.Table, slides: Sequence[str], max_slides: int) -> Album:
    """Looks at what is there.

    Args:
        root: the manifests root.
        folder: where pictures lie.
        catalog: the slides, in `CATALOG_SCHEMA`.
        slides: ids of slides to draw, all of them; none: `max_slides` of those that can be drawn, evenly spread.
        max_slides: see `slides`.

    Raises:
        TilerError: a slide id that the catalogue does not hold.
    """
    status = dict(zip(*(catalog.column(name).to_pylist() for name in ("slide_id", "status")), strict=True))
    if unknown := [slide_id for slide_id in slides if slide_id not in status]:
        raise TilerError(f"--slides {unknown[0]}: no such slide in these manifests; give ids as the catalogue has them")
    masks = set((root / "masks").glob("??/*.zarr.zip"))  # A few listings, where asking for each slide is one stat each.
    there = set(folder.glob("*.jpg"))
    state: dict[str, State] = {}
    for slide_id, outcome in status.items():
        if outcome == "failed":
            state[slide_id] = "failed"
        elif mask_path(root, slide_id) not in masks:
            state[slide_id] = "no mask"
        elif picture_path(folder, slide_id) in there and _is_fresh(root, folder, slide_id):
            state[slide_id] = "drawn"
        else:
            state[slide_id] = "not drawn"
    able = [slide_id for slide_id in (slides or status) if state[slide_id] in ("drawn", "not drawn")]
    wanted = dict.fromkeys(able if slides else spread(able, max_slides))
    return Album(state, [slide_id for slide_id in wanted if state[slide_id] == "not drawn"])


def spread(slide_ids: Sequence[str], num: int) -> list[str]:
    """At most `num` of them, evenly spread, the first and the last among them."""
    if len(slide_ids) <= num:
        return list(slide_ids)
    return [slide_ids[i] for i in np.linspace(0, len(slide_ids) - 1, num).round().astype(int)]


def _is_fresh(root: Path, folder: Path, slide_id: str) -> bool:
    """The picture was drawn from these very files: it bears the time of the younger one."""
    try:
        return picture_path(folder, slide_id).stat().st_mtime_ns == source_time(root, slide_id)
    except FileNotFoundError:
        return False


def source_time(root: Path, slide_id: str) -> int:
    """When the younger of a slide's manifest and mask was written, ns."""
    return max(file.stat().st_mtime_ns for file in (tiles_path(root, slide_id), mask_path(root, slide_id)))


def draw_album(
    root: Path, folder: Path, todo: Sequence[str], num_workers: int | None, on_done: Callable[[], None]
) -> dict[str, str]:
    """Draws and writes the pictures.

    Args:
        root: the manifests root.
        folder: where to.
        todo: slide ids.
        num_workers: processes; all cores by default, none for a few slides.
        on_done: called after each slide.

    Returns:
        slide_id to the reason, one sentence, for each slide that could not be drawn.

    Raises:
        TilerError: a worker process died.
    """
    workers = min(num_workers or len(os.sched_getaffinity(0)), len(todo))
    reasons: dict[str, str] = {}
    if workers <= 1 or len(todo) < _MIN_FOR_PROCESSES:
        for slide_id in todo:
            if reason := _draw(root, folder, slide_id):
                reasons[slide_id] = reason
            on_done()
        return reasons
    with ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare_worker
    ) as pool:
        futures = {pool.submit(_draw, root, folder, slide_id): slide_id for slide_id in todo}
        try:
            for future in as_completed(futures):
                if reason := future.result():
                    reasons[futures[future]] = reason
                on_done()
        except BrokenProcessPool:
            raise TilerError("a worker process died; run again with --workers 1 to see at which slide") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return dict(sorted(reasons.items()))


def _draw(root: Path, folder: Path, slide_id: str) -> str:
    """Draws one slide; "" or why it could not be. The per-slide boundary: one unreadable slide stops no other."""
    try:
        made_of = source_time(root, slide_id)
        picture = draw_slide(read_manifest(tiles_path(root, slide_id)), read_mask(mask_path(root, slide_id)))
    except Exception as error:  # noqa: BLE001 - told and counted; the text of such errors may hold paths, so not shown
        kind = type(error).__name__
        return f"slide {slide_id}: its manifest or tissue mask cannot be read ({kind}); tile again with --overwrite"
    # Chroma at full resolution: lines one px wide keep their colour.
    quality = [cv2.IMWRITE_JPEG_QUALITY, 82, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    quality += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    jpeg = cv2.imencode(".jpg", picture[..., ::-1], quality)[1].tobytes()
    with atomic_path(picture_path(folder, slide_id)) as partial:
        partial.write_bytes(jpeg)
        os.utime(partial, ns=(made_of, made_of))
    return ""


def _prepare_worker() -> None:
    cv2.setNumThreads(1)  # One slide, one core: the pool is what runs in parallel.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; workers finish their slide.
