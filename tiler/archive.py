"""A whole archive: one outcome for each slide; a second run does only what is missing.

What is to be done is decided in tiler/survey.py, where it runs in tiler/pool.py; here the two meet, and what was learnt
is written down.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from manifests.catalog import Place, read_known, read_places, rebuild_catalog, scan_catalog, write_paths
from manifests.source import is_set, local_path
from tiler.build import Done, Task
from tiler.config import TilerConfig
from tiler.discover import find_slides
from tiler.errors import TilerError
from tiler.outside import find_masks
from tiler.pool import Limits, run_here, run_in_processes, run_on_dask, share_memory
from tiler.pseudonym import is_pseudonym, pseudonym
from tiler.shards import Shard
from tiler.survey import Survey, Wanted, find_duplicates, survey

_SAVE_EVERY_S = 60.0
"""How often a long run writes down what it learnt of the files it has done."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """How an archive is worked through. Nothing here changes a manifest."""

    shard: Shard = field(default_factory=Shard)
    num_workers: int | None = None
    """Processes; None: all cores, 0: this process itself, without isolation."""
    time_s: float = 1_200.0
    """Seconds that one slide may take."""
    memory_bytes: int | None = None
    """Resident bytes that one slide's process may take; None: its share of the machine."""
    dask: str | None = None
    """Address of a Dask scheduler; its workers are used instead of processes here."""
    overwrite: bool = False
    rehash: bool = False
    key: bytes | None = None
    """Slide ids become keyed hashes."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would do. `wanted` holds this shard's slides; `notes` are sentences for the user."""

    wanted: Wanted
    survey: Survey
    num_in_archive: int
    num_unreadable: int
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Tiled:
    """What a run did.

    `catalog`: this shard's slides, in `CATALOG_SCHEMA`; `num_new` were tiled now, in `total_s` seconds of work, of
    which `check_s` went into looking for damage; `notes` are sentences for the user beside those of the plan.
    """

    catalog: pa.Table
    num_new: int
    num_unreadable: int
    total_s: float
    check_s: float
    notes: list[str]


def check_out(out: Path) -> None:
    """Refuses a place that no manifest can be added to.

    Raises:
        TilerError: an address elsewhere, or a compacted set.
    """
    if local_path(out) is None:
        raise TilerError(f"--out {out}: manifests are written to a folder of this machine; copy them from there")
    if is_set(out):
        raise TilerError(f"--out {out}: a compacted set takes no more slides; give the folder it was made from")


def make_out(out: Path) -> None:
    """Makes the folder, where it is not there yet.

    Raises:
        TilerError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TilerError(f"--out {out}: cannot make this folder ({error.strerror})") from None


def plan_archive(
    archive: str,
    out: Path,
    config: TilerConfig,
    job: Job,
    *,
    mpp: Mapping[str, tuple[float, float]] | None = None,
    masks: Path | None = None,
) -> Plan:
    """Looks at the archive and at what is in `out`; writes nothing.

    Args:
        archive: see `find_slides`.
        out: the manifests root.
        config: which tiles to keep.
        job: how.
        mpp: slide id, as the file name gives it, to microns per level-0 px (x, y) for slides that do not say.
        masks: a folder of tissue masks from outside, see tiler/outside.py.

    Raises:
        TilerError: no slides found, or a slide id that means another file by now.
    """
    if not archive.strip():
        raise TilerError("ARCHIVE is empty; give a folder, a slide, a glob or a list (. is the folder you stand in)")
    check_out(out)
    if config.tissue.mask_values and masks is None:
        raise TilerError("--mask-values says what the pictures of --masks mean; give --masks too")
    found = find_slides(archive)
    notes = []
    if found.joined:
        notes.append(
            f"{len(found.joined)} file names appear more than once: their slide ids hold folders or suffixes too, "
            f"first {_named(found.joined[0], job)}"
        )
    if found.unreadable:
        notes.append(f"{len(found.unreadable)} folders may not be read; slides in them are missing here")
    if found.num_unnamed:
        notes.append(f"{found.num_unnamed} files have names that are not UTF-8; rename them, they are missing here")
    if unmatched := sorted(set(mpp or ()) - set(found.slides)):
        notes.append(
            f"--mpp-csv: {len(unmatched)} of {len(mpp or ())} ids match no slide of this archive, first "
            f"{_named(unmatched[0], job)!r}; a slide id is the file name without its suffix"
        )
    slides = {_named(slide_id, job): path for slide_id, path in found.slides.items()}
    original = {_named(slide_id, job): slide_id for slide_id in found.slides}
    if len(slides) < len(found.slides):
        raise TilerError("two slides have one pseudonym; give another key")
    mine = {slide_id: path for slide_id, path in slides.items() if job.shard.holds(slide_id)}
    found_masks = find_masks(masks.absolute(), found.slides) if masks else {}
    if masks and not any(file.is_file() for file in found_masks.values()):
        raise TilerError(f"--masks {masks}: no file there is called as a slide here, SLIDE_ID.png or the like")
    wanted = Wanted(
        base=found.base,
        slides=mine,
        config=config,
        mpp={s: mpp[original[s]] for s in mine if original[s] in mpp} if mpp else {},
        masks={s: found_masks[original[s]] for s in mine} if masks else {},
        overwrite=job.overwrite,
        rehash=job.rehash,
    )
    known = read_places(out)
    if not job.overwrite:
        _refuse_other_files(out, found.base, mine, known)
    renamed = _find_renamed(found.base, slides, known)
    if renamed and job.key is not None:
        raise TilerError(f"--out {out}: holds {len(renamed)} of these slides under other ids; give another --out")
    if any(is_pseudonym(slide_id) for slide_id in renamed):
        raise TilerError(f"--out {out}: its slide ids are pseudonyms; give --pseudonymize KEYFILE, or another --out")
    if renamed:
        notes.append(
            f"{len(renamed)} slides had other ids before, first {renamed[0]!r}; their old manifests are still in {out}"
        )
    found_now = survey(wanted, scan_catalog(out, read_known(out)), known)
    if found_now.num_other_settings and not job.overwrite:
        notes.append(
            f"{found_now.num_other_settings} manifests here were made with other settings; they will be made anew "
            "(stop now and give another --out to keep them)"
        )
    return Plan(
        wanted=wanted,
        survey=found_now,
        num_in_archive=len(slides),
        num_unreadable=len(found.unreadable) + found.num_unnamed,
        notes=notes,
    )


def tile_archive(
    archive: str,
    out: Path,
    config: TilerConfig,
    job: Job | None = None,
    *,
    mpp: Mapping[str, tuple[float, float]] | None = None,
    masks: Path | None = None,
    on_start: Callable[[Plan], None] | None = None,
    on_done: Callable[[Done], None] | None = None,
) -> Tiled:
    """Builds a manifest for every slide of an archive.

    Args:
        archive: see `find_slides`.
        out: the manifests root.
        config: which tiles to keep.
        job: how; in processes on all cores by default.
        mpp, masks: see `plan_archive`.
        on_start: called once with what will be done.
        on_done: called after each slide.

    Raises:
        TilerError: no slides found, a slide id that means another file by now, or an `out` that cannot be made.
        OSError: `out` cannot be written to. What was finished is kept.
    """
    job = job or Job()
    plan = plan_archive(archive, out, config, job, mpp=mpp, masks=masks)
    out = out.absolute()  # Workers elsewhere stand in another folder.
    make_out(out)
    places = dict(plan.survey.places)
    writer = _writer(archive, job)
    write_paths(out, writer, places)
    if on_start:
        on_start(plan)
    total_s = check_s = 0.0
    saved = time.monotonic()
    try:
        for done in _run(plan.survey.todo, out, config, job):
            slide_id = done.record.slide_id
            places[slide_id] = places[slide_id]._replace(fingerprint=done.record.fingerprint)
            total_s, check_s = total_s + done.total_s, check_s + done.check_s
            if on_done:
                on_done(done)
            if time.monotonic() - saved > _SAVE_EVERY_S:
                write_paths(out, writer, places)
                saved = time.monotonic()
    finally:  # Also after Ctrl-C: lists and catalogue tell what is there.
        write_paths(out, writer, places)
        catalog = rebuild_catalog(out)
    mine = catalog.filter(pc.is_in(catalog.column("slide_id"), pa.array(list(plan.wanted.slides), pa.string())))
    if lost := len(plan.wanted.slides) - len(mine):
        raise TilerError(
            f"--out {out}: {lost} slides left no manifest here; do the workers see this folder under this path?"
        )
    notes = []
    if copies := find_duplicates(catalog):
        notes.append(
            f"{sum(map(len, copies))} slides are copies of one another in {len(copies)} groups, first "
            f"{' = '.join(copies[0][:3])}; keep each group on one side of a split"
        )
    return Tiled(
        catalog=mine,
        num_new=len(plan.survey.todo),
        num_unreadable=plan.num_unreadable,
        total_s=total_s,
        check_s=check_s,
        notes=notes,
    )


def _run(todo: list[Task], out: Path, config: TilerConfig, job: Job) -> Iterator[Done]:
    if not todo:
        return iter(())
    workers = len(os.sched_getaffinity(0)) if job.num_workers is None else job.num_workers
    workers = min(workers, len(todo))
    limits = Limits(time_s=job.time_s, memory_bytes=job.memory_bytes or share_memory(max(workers, 1)))
    if job.dask is not None:
        return run_on_dask(todo, out, config, job.dask, limits)
    if workers == 0:
        return run_here(todo, out, config)
    return run_in_processes(todo, out, config, workers, limits)


def _named(slide_id: str, job: Job) -> str:
    return slide_id if job.key is None else pseudonym(job.key, slide_id)


def _writer(archive: str, job: Job) -> str:
    """One name for each archive and shard, so that a second run replaces what the first one wrote."""
    work = hashlib.blake2b(f"{os.path.abspath(archive)}\0{job.shard}".encode(), digest_size=6).hexdigest()
    return f"tile-{work}"


def _refuse_other_files(out: Path, base: Path, slides: Mapping[str, str], known: Mapping[str, Place]) -> None:
    """A slide id of these manifests must not come to mean another slide that is still there."""
    other = [
        slide_id
        for slide_id, path in slides.items()
        if (place := known.get(slide_id)) is not None and _is_other(place.file, f"{base}/{path}")
    ]
    if other:
        raise TilerError(
            f"--out {out}: {len(other)} slide ids already mean other files, first {other[0]!r}; "
            "give another --out, or --overwrite to replace them"
        )


def _is_other(known: str, file: str) -> bool:
    """The known file is still there, and is another one: not the same archive mounted elsewhere."""
    try:
        return known != file and os.path.exists(known) and not os.path.samefile(known, file)
    except OSError:
        return True


def _find_renamed(base: Path, slides: Mapping[str, str], known: Mapping[str, Place]) -> list[str]:
    """Earlier ids of slides that have another id now: a second file of that name came up, or the key changed."""
    now = {f"{base}/{path}" for path in slides.values()}
    return sorted(s for s, place in known.items() if s not in slides and place.file in now)
