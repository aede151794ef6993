"""What an archive needs done: which of its slides have a manifest that still holds, and which are to be tiled.

A slide is settled if its manifest did not fail, was made with these settings, and from this very file. The file is the
same if it looks as it did (size, time of change) when its fingerprint was computed; else the fingerprint is computed
anew, and decides. So a second run over an archive lists folders and asks for file states, and opens no slide but those
of several files, whose state is not that of one.
"""

import contextlib
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from manifests.catalog import Place
from tiler.build import Task, settings_hash
from tiler.config import TilerConfig
from tiler.slide import fingerprint

_OF_SEVERAL_FILES = (".mrxs", ".vms", ".vmu", ".dcm", ".zarr")
_BATCH = 1_024
_FAR_S = 1e-4
"""A file state takes longer over a network, and a tenth of it on a local disk."""
_THREADS = 16
"""File states asked for, and fingerprints computed, at a time: on network file systems the wait is latency."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """`todo`: slides to tile; `places`: every slide's place, with its fingerprint where it is known to hold."""

    todo: list[Task]
    places: dict[str, Place]
    num_changed: int
    """Slides to tile whose manifest was made from another state of the file."""
    num_other_settings: int
    """Slides to tile whose manifest is good, but was made with other settings."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the user asks for: the slides and what is said of each."""

    base: Path
    slides: Mapping[str, str]
    """slide_id to path under `base`."""
    config: TilerConfig
    mpp: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    masks: Mapping[str, Path] = field(default_factory=dict)
    overwrite: bool = False
    rehash: bool = False


def survey(wanted: Wanted, catalog: pa.Table, known: Mapping[str, Place]) -> Survey:
    """Compares what is wanted with what is there.

    Args:
        wanted: slides and settings.
        catalog: the manifests that are there.
        known: where slides lay at the last run, see `manifests.catalog.read_places`.
    """
    ids = sorted(wanted.slides)
    files = [f"{wanted.base}/{wanted.slides[slide_id]}" for slide_id in ids]
    marks = dict(zip(catalog.column("slide_id").to_pylist(), catalog.column("fingerprint").to_pylist(), strict=True))
    with ThreadPoolExecutor(_THREADS) as pool:
        made_with = dict(zip(wanted.masks, pool.map(partial(_hash, wanted.config), wanted.masks.values()), strict=True))
        settled_by_settings = set() if wanted.overwrite else _match_settings(wanted, catalog, made_with)
        started = time.perf_counter()
        states = _states(files[:_BATCH])
        is_far = time.perf_counter() - started > _FAR_S * len(states)
        batches = [files[start : start + _BATCH] for start in range(_BATCH, len(files), _BATCH)]
        # On a local disk threads would only wait for one another.
        states += [state for batch in (pool.map if is_far else map)(_states, batches) for state in batch]
        base = str(wanted.base)
        places = {
            slide_id: Place(base, wanted.slides[slide_id], *state) for slide_id, state in zip(ids, states, strict=True)
        }
        unsure: list[str] = []
        settled: set[str] = set()
        for slide_id in ids:
            place, before = places[slide_id], known.get(slide_id)
            if slide_id not in settled_by_settings:
                continue
            looks_the_same = (
                before is not None
                and not wanted.rehash
                and place.size >= 0
                and (before.size, before.mtime_ns, before.fingerprint) == (place.size, place.mtime_ns, marks[slide_id])
            )
            (settled.add if looks_the_same else unsure.append)(slide_id)
        for slide_id, mark in zip(unsure, pool.map(_fingerprint, (places[s].file for s in unsure)), strict=True):
            if mark == marks[slide_id]:
                settled.add(slide_id)
    is_good = pc.and_(
        pc.not_equal(catalog.column("status"), "failed"),
        pc.is_in(catalog.column("slide_id"), pa.array(ids, pa.string())),
    )
    num_good = 0 if wanted.overwrite else pc.sum(is_good).as_py() or 0
    todo = [
        Task(
            slide_id=slide_id,
            path=Path(places[slide_id].file),
            mpp=wanted.mpp.get(slide_id),
            mask=wanted.masks.get(slide_id),
        )
        for slide_id in ids
        if slide_id not in settled
    ]
    sure = {s: place._replace(fingerprint=marks[s]) if s in settled else place for s, place in places.items()}
    return Survey(
        todo=todo,
        places=sure,
        num_changed=sum(slide_id not in settled for slide_id in unsure),
        num_other_settings=num_good - len(settled_by_settings),
    )


def _match_settings(wanted: Wanted, catalog: pa.Table, with_masks: Mapping[str, str]) -> set[str]:
    """Slides whose manifest did not fail and was made with these settings, the user's own mpp and mask included.

    Args:
        wanted: slides and settings.
        catalog: the manifests that are there.
        with_masks: slide_id to the hash of its settings, for slides with a mask.
    """
    names = ("slide_id", "status", "config_hash", "mpp_source", "mpp_x", "mpp_y")
    default = wanted.config.default_mpp, wanted.config.default_mpp
    plain = wanted.config.hash
    found = set()
    for slide_id, status, made_with, source, *mpp in zip(*(catalog.column(n).to_pylist() for n in names), strict=True):
        if status == "failed" or slide_id not in wanted.slides:
            continue
        if made_with != with_masks.get(slide_id, plain):
            continue
        if source in ("csv", "default") and tuple(mpp) != wanted.mpp.get(slide_id, default):
            continue  # The user's table is not in the config's hash.
        found.add(slide_id)
    return found


def _hash(config: TilerConfig, mask: Path) -> str:
    try:
        return settings_hash(config, mask)
    except OSError:
        return ""


def _states(files: list[str]) -> list[tuple[int, int]]:
    """(size, mtime_ns) of each, or (-1, -1) where there is no such file, or more than one."""
    found = []
    for file in files:
        state = (-1, -1)
        if not file.lower().endswith(_OF_SEVERAL_FILES):
            with contextlib.suppress(OSError):
                stat = os.stat(file)
                state = stat.st_size, stat.st_mtime_ns
        found.append(state)
    return found


def _fingerprint(file: str) -> str:
    try:
        return fingerprint(Path(file))
    except OSError:
        return ""


def find_duplicates(catalog: pa.Table) -> list[list[str]]:
    """Groups of slide ids whose files have one fingerprint: copies, which must not lie on two sides of a split."""
    good = catalog.filter(pc.not_equal(catalog.column("status"), "failed"))
    counted = good.group_by("fingerprint").aggregate([("slide_id", "list"), ("slide_id", "count")])
    copies = counted.filter(pc.greater(counted.column("slide_id_count"), 1)).column("slide_id_list").to_pylist()
    return sorted(sorted(group) for group in copies)
