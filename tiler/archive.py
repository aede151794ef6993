"""A whole archive: one outcome for each slide."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import cv2

from manifests.catalog import read_paths, rebuild_catalog, write_paths
from manifests.errors import ManifestError
from manifests.files import read_record, tiles_path
from manifests.schema import SlideRecord
from tiler.build import Task, tile_slide
from tiler.config import TilerConfig
from tiler.discover import find_slides
from tiler.errors import TilerError
from tiler.slide import fingerprint


def tile_archive(
    archive: str,
    out: Path,
    config: TilerConfig,
    *,
    csv_mpp: Mapping[str, tuple[float, float]] | None = None,
    num_workers: int | None = None,
    overwrite: bool = False,
    on_outcome: Callable[[SlideRecord, int], None] | None = None,
) -> list[SlideRecord]:
    """Builds a manifest for every slide of an archive; a second run does only what is missing.

    Args:
        archive: see `find_slides`.
        out: the manifests root.
        config: which tiles to keep.
        csv_mpp: slide_id to mpp, for slides that do not say.
        num_workers: processes; all cores by default. Each slide is one task.
        overwrite: build again what is there already.
        on_outcome: called after each slide with its record and the number of slides in all.

    Returns:
        Every slide's record, sorted by slide_id.

    Raises:
        TilerError: no slides found, a slide id that means another file by now, or a worker process died.
    """
    base, slides = find_slides(archive)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TilerError(f"--out {out}: cannot make this folder ({error.strerror})") from None
    if not overwrite:
        _refuse_other_files(out, base, slides)
    write_paths(out, base, slides)
    csv_mpp = csv_mpp or {}
    done: dict[str, SlideRecord] = {}
    todo: dict[str, Path] = {}
    for slide_id, relative in slides.items():
        record = None if overwrite else _still_valid(out, slide_id, base / relative, config, csv_mpp)
        if record is None:
            todo[slide_id] = base / relative
        else:
            done[slide_id] = record
    for record in list(done.values()):
        if on_outcome:
            on_outcome(record, len(slides))
    try:
        for record in _run(todo, out, config, csv_mpp, num_workers):
            done[record.slide_id] = record
            if on_outcome:
                on_outcome(record, len(slides))
    finally:  # Also after Ctrl-C: the catalogue tells what is there.
        rebuild_catalog(out)
    return [done[slide_id] for slide_id in sorted(done)]


def _refuse_other_files(out: Path, base: Path, slides: Mapping[str, str]) -> None:
    """A slide id of these manifests must not come to mean another slide that is still there."""
    known = read_paths(out)
    other = [s for s, path in slides.items() if s in known and known[s] != base / path and known[s].exists()]
    if other:
        raise TilerError(
            f"--out {out}: {len(other)} slide ids already mean other files, first {other[0]!r}; "
            "give another --out, or --overwrite to replace them"
        )


def _run(
    todo: Mapping[str, Path],
    out: Path,
    config: TilerConfig,
    csv_mpp: Mapping[str, tuple[float, float]],
    num_workers: int | None,
) -> Iterator[SlideRecord]:
    workers = min(num_workers or len(os.sched_getaffinity(0)), len(todo))
    if workers <= 1:
        for slide_id, path in todo.items():
            yield tile_slide(Task(slide_id=slide_id, path=path, mpp=csv_mpp.get(slide_id)), out, config).record
        return
    # spawn, not fork: the readers hold threads and handles that do not survive a fork.
    with ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare_worker
    ) as pool:
        futures = [
            pool.submit(tile_slide, Task(slide_id=slide_id, path=path, mpp=csv_mpp.get(slide_id)), out, config)
            for slide_id, path in todo.items()
        ]
        try:
            for future in as_completed(futures):
                yield future.result().record
        except BrokenProcessPool:
            raise TilerError("a worker process died; run again with --workers 1 to see at which slide") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _prepare_worker() -> None:
    cv2.setNumThreads(1)  # One slide, one core: the pool is what runs in parallel.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; workers finish their slide.


def _still_valid(
    out: Path, slide_id: str, path: Path, config: TilerConfig, csv_mpp: Mapping[str, tuple[float, float]]
) -> SlideRecord | None:
    """The record already there, if it was made with this config from this very file, and did not fail."""
    try:
        record = read_record(tiles_path(out, slide_id))
        same = record.status != "failed" and record.config_hash == config.hash
        if record.mpp_source in ("csv", "default"):  # The user's table is not in the config's hash.
            given = csv_mpp.get(slide_id) or (config.default_mpp, config.default_mpp)
            same = same and (record.mpp_x, record.mpp_y) == given
        return record if same and record.fingerprint == fingerprint(path) else None
    except (ManifestError, OSError):
        return None
