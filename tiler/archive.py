"""A whole archive: which files are slides, what they are called, and one outcome for each."""

import csv
import glob
import multiprocessing
import os
import signal
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import cv2

from manifests.catalog import read_paths, rebuild_catalog, write_paths
from manifests.errors import ManifestError
from manifests.files import read_record, tiles_path
from manifests.schema import SlideRecord
from tiler.build import tile_slide
from tiler.config import TilerConfig
from tiler.errors import TilerError
from tiler.slide import fingerprint

SLIDE_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm")


def find_slides(archive: str) -> tuple[Path, dict[str, str]]:
    """The slides of an archive.

    Args:
        archive: a folder, one slide, a glob, or a CSV/text file with one path (or a column `path`) a line.

    Returns:
        The folder that the paths are relative to, and slide_id to path under it, sorted.

    Raises:
        TilerError: nothing found.
    """
    given = Path(archive).expanduser()
    named: set[Path] = set()  # What the user named is tried whatever its suffix.
    if given.is_dir():
        base, files = given, _walk(given)
    elif given.is_file() and given.suffix.lower() in (".csv", ".txt"):
        base, files = given.parent, _listed(given)
        named = set(files)
    elif given.is_file():
        base, files = given.parent, [given]
        named = {given}
    else:
        files = [Path(name) for name in glob.glob(archive, recursive=True)]
        base = Path(os.path.commonpath([f.parent for f in files])) if files else given
    slides = sorted({_under(base, f) for f in files if f.suffix.lower() in SLIDE_SUFFIXES or f in named})
    if not slides:
        raise TilerError(f"{archive}: no slides found (looked for {' '.join(SLIDE_SUFFIXES)})")
    for slide in slides:
        if slide != Path(os.fsencode(slide).decode(errors="replace")):
            raise TilerError(f"{archive}: file name {os.fsencode(slide)!r} is not UTF-8; rename it")
    return base.resolve(), name_slides(slides)


def _under(base: Path, file: Path) -> Path:
    """`file` as seen from the real `base`; a link in the way to `base` itself does not show in it."""
    given, absolute = Path(os.path.abspath(base)), Path(os.path.abspath(file))
    return (
        absolute.relative_to(given) if absolute.is_relative_to(given) else Path(os.path.relpath(file, base.resolve()))
    )


def name_slides(paths: list[Path]) -> dict[str, str]:
    """slide_id to path: the file's stem, NFC; a stem that several folders hold gets its folders before it."""

    def stem(path: Path) -> str:
        name = path.name
        suffix = next((s for s in SLIDE_SUFFIXES if name.lower().endswith(s)), "")
        return unicodedata.normalize("NFC", name[: len(name) - len(suffix)])

    stems = Counter(stem(path) for path in paths)
    named: dict[str, str] = {}
    for path in paths:
        slide_id = stem(path)
        if stems[slide_id] > 1:
            slide_id = "__".join([*(p for p in path.parent.parts if p != ".."), slide_id])
        while slide_id in named:  # a.svs beside a.tif: the suffix tells them apart.
            slide_id = f"{slide_id}__{path.suffix[1:].lower()}"
        named[slide_id] = str(path)
    return named


def tile_archive(
    archive: str,
    out: Path,
    config: TilerConfig,
    *,
    csv_mpp: Mapping[str, float] | None = None,
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
    todo: Mapping[str, Path], out: Path, config: TilerConfig, csv_mpp: Mapping[str, float], num_workers: int | None
) -> Iterator[SlideRecord]:
    workers = min(num_workers or len(os.sched_getaffinity(0)), len(todo))
    if workers <= 1:
        for slide_id, path in todo.items():
            yield tile_slide(path, slide_id, out, config, csv_mpp=csv_mpp.get(slide_id))
        return
    # spawn, not fork: the readers hold threads and handles that do not survive a fork.
    with ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare_worker
    ) as pool:
        futures = [
            pool.submit(tile_slide, path, slide_id, out, config, csv_mpp=csv_mpp.get(slide_id))
            for slide_id, path in todo.items()
        ]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise TilerError("a worker process died; run again with --workers 1 to see at which slide") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _prepare_worker() -> None:
    cv2.setNumThreads(1)  # One slide, one core: the pool is what runs in parallel.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; workers finish their slide.


def _still_valid(
    out: Path, slide_id: str, path: Path, config: TilerConfig, csv_mpp: Mapping[str, float]
) -> SlideRecord | None:
    """The record already there, if it was made with this config from this very file, and did not fail."""
    try:
        record = read_record(tiles_path(out, slide_id))
        same = record.status != "failed" and record.config_hash == config.hash
        if record.mpp_source in ("csv", "default"):  # The user's table is not in the config's hash.
            same = same and record.mpp_x == csv_mpp.get(slide_id, config.default_mpp)
        return record if same and record.fingerprint == fingerprint(path) else None
    except (ManifestError, OSError):
        return None


def _walk(root: Path) -> list[Path]:
    """Files below `root`, each real folder once, so that a loop of links ends; not in an MRXS's data folder."""
    found: list[Path] = []
    seen: set[str] = set()
    for folder, names, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        mrxs = {file[:-5] for file in files if file.lower().endswith(".mrxs")}
        names[:] = sorted(n for n in names if n not in mrxs and not n.startswith("."))
        found.extend(Path(folder, file) for file in files if not file.startswith("."))
    return found


def _listed(file: Path) -> list[Path]:
    """Paths named in a CSV (column `path`, or the first) or a text file, relative ones from the file's folder."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = [row for row in csv.reader(stream) if any(cell.strip() for cell in row)]
    except UnicodeDecodeError:
        raise TilerError(f"{file}: this list is not UTF-8; save it as UTF-8") from None
    column = rows[0].index("path") if rows and "path" in rows[0] else 0
    if short := sum(len(row) <= column or not row[column].strip() for row in rows):
        raise TilerError(f"{file}: {short} of {len(rows)} lines have no path in column {column + 1}")
    names = [row[column].strip() for row in rows if row[column].strip() != "path"]
    missing = [name for name in names if not (file.parent / name).exists()]
    if missing:
        raise TilerError(f"{file}: {len(missing)} of {len(names)} listed slides are not there, first {missing[0]}")
    return [file.parent / name for name in names]
