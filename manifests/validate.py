"""Does what is on disk hold together? Every file is read whole; nothing is written.

Made for half a million manifests: a few hundred records are held at a time and compared with the catalogue as they
come. Knows no slide: whoever wants slides looked at too gives the function that fingerprints one.
"""

import hashlib
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from manifests.checks import CatalogRows, Problem, SlideFiles, about_slide, check_manifest, check_record
from manifests.compact import LEFTOVER_S
from manifests.errors import ManifestError
from manifests.files import tiles_path
from manifests.parse import Parsed, parse_manifest, parse_table
from manifests.schema import SlideRecord
from manifests.sets import CompactedManifests, complete_catalog
from manifests.source import local_path, open_stored

_MAX_KEPT = 1_000
_BATCH = 256
_THREADS = 8
_PIECE_BYTES = 16 * 2**20


@dataclass(kw_only=True)
class Report:
    """What was found; grows as manifests are looked at."""

    num_slides: int = 0
    """Manifests that could be read."""
    num_by_kind: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    """The first 1,000."""

    def add(self, problems: Iterable[Problem]) -> None:
        """Counts problems, and keeps the first."""
        for problem in problems:
            self.num_by_kind[problem.kind] += 1
            if len(self.problems) < _MAX_KEPT:
                self.problems.append(problem)


class _Candidate(NamedTuple):
    """A manifest to look at."""

    name: str
    """Its file's stem, or its slide id where files are not seen."""
    read: Callable[[], Parsed]
    file: Path | None = None
    """Where it was found."""


class _Looked(NamedTuple):
    """What is left of a manifest once it was looked at: its tiles are let go."""

    problems: list[Problem]
    record: SlideRecord | None = None
    """None if it cannot be read."""


@dataclass(frozen=True, kw_only=True)
class _Round:
    """What one call of `validate` looks with."""

    report: Report
    root: Path | None
    """The folder, if it is one of this machine."""
    rows: CatalogRows | None
    """What to compare records with."""
    slides: SlideFiles | None
    progress: Callable[[int], None] | None

    def look_at(self, candidates: Iterable[_Candidate], total: int) -> set[str]:
        """Reads manifests, many at a time, into the report; returns the names of those that cannot be read."""
        unreadable = set()
        candidates = iter(candidates)
        with ThreadPoolExecutor(_THREADS) as pool:
            while batch := list(itertools.islice(candidates, _BATCH)):
                records = []
                for candidate, looked in zip(batch, pool.map(self._look, batch), strict=True):
                    self.report.add(looked.problems)
                    if looked.record is None:
                        unreadable.add(candidate.name)
                    else:
                        records.append(looked.record)
                    if self.progress is not None:
                        self.progress(total)
                self.report.num_slides += len(records)
                if self.rows is not None:
                    self.report.add(self.rows.compare(records))
        return unreadable

    def _look(self, candidate: _Candidate) -> _Looked:
        try:
            parsed = candidate.read()
        except (ManifestError, OSError) as error:
            return _Looked([Problem(kind="unreadable", slide_id=candidate.name, text=str(error))])
        record = parsed.manifest.slide
        if wrong := list(check_record(record)):
            return _Looked(wrong)
        problems = list(check_manifest(parsed.manifest))
        if candidate.file is not None and self.root is not None:
            place = tiles_path(self.root, record.slide_id)
            if candidate.file != place:
                text = f"its manifest lies in {candidate.file}; its place is {place}"
                problems.append(about_slide("place", record.slide_id, text))
        if self.slides is not None:
            problems += self.slides.check(record)
        return _Looked(problems, record)


def validate(
    root: str | Path, *, slides: SlideFiles | None = None, progress: Callable[[int], None] | None = None
) -> Report:
    """Looks at everything under a manifests root, or in a set.

    Args:
        root: a folder or an address. Behind an address only what the catalogue lists can be seen.
        slides: look at the slide files too.
        progress: called after each manifest with the number of manifests in all.

    Raises:
        ManifestError: nothing there, or a set whose catalogue cannot be read.
    """
    report, path = Report(), local_path(root)
    if path is not None and os.path.isdir(path / "tiles"):
        rows = _open_rows(path, report)
        _look_at_tree(path, _Round(report=report, root=path, rows=rows, slides=slides, progress=progress))
    else:
        source = open_stored(root)
        lost: set[str] = set()
        rows = None
        if isinstance(source, CompactedManifests):  # Its records are the catalogue's rows.
            lost = _check_shards(source, path, report)
        else:
            rows = CatalogRows(source.catalog())
        ids = [slide_id for slide_id in source if slide_id not in lost]
        candidates = (_Candidate(slide_id, partial(source.read, slide_id)) for slide_id in ids)
        round_ = _Round(report=report, root=path, rows=rows, slides=slides, progress=progress)
        round_.look_at(candidates, len(ids))
    if path is not None:
        report.add(_find_leftovers(path))
    return report


def _look_at_tree(root: Path, round_: _Round) -> None:
    """All manifests, wherever below tiles/ they lie, and the rows of the catalogue that have none."""
    files = _walk(root / "tiles", ".parquet")
    candidates = (_Candidate(file.stem, partial(_read_file, file), file) for file in files)
    total = sum(1 for _ in _walk(root / "tiles", ".parquet"))
    unreadable = round_.look_at(candidates, total)
    if round_.rows is None:
        return
    for slide_id in round_.rows.unseen():
        place = tiles_path(root, slide_id)
        if place.stem not in unreadable:
            text = (
                "has several rows in catalog.parquet" if place.exists() else "has a row in catalog.parquet, no manifest"
            )
            round_.report.add([about_slide("catalogue", slide_id, text)])


def _read_file(file: Path) -> Parsed:
    return parse_manifest(file.read_bytes(), str(file))


def _open_rows(root: Path, report: Report) -> CatalogRows | None:
    """The catalogue as it is, not made anew. That there is none is no problem: it is a cache."""
    try:
        table = parse_table((root / "catalog.parquet").read_bytes(), "catalog.parquet")
        return CatalogRows(complete_catalog(table, "catalog.parquet"))
    except FileNotFoundError:
        return None
    except (ManifestError, OSError) as error:
        report.add([Problem(kind="catalogue", slide_id="", text=str(error))])
        return None


def _check_shards(source: CompactedManifests, path: Path | None, report: Report) -> set[str]:
    """Compares each shard's bytes with its name; returns the slides that lie in a broken one."""
    lost: set[str] = set()
    for number, shard in enumerate(source.contents.shards):
        if text := _check_shard(source, number):
            slides = source.slides_of(number)
            lost.update(slides)
            text = f"{shard.file}: {text}; {len(slides)} slides lie in it"
            report.add([Problem(kind="shard", slide_id="", text=text)])
    if path is not None:
        known = {Path(shard.file).name for shard in source.contents.shards}
        for file in _walk(path / "shards", ".parquet"):
            if file.name not in known and _is_old(file):
                text = f"shards/{file.name}: no shard of this set; it can go"
                report.add([Problem(kind="leftover", slide_id="", text=text)])
    return lost


def _check_shard(source: CompactedManifests, number: int) -> str:
    """What is wrong with a shard's bytes."""
    shard = source.contents.shards[number]
    digest, num_bytes = hashlib.blake2b(digest_size=16), 0
    try:
        while num_bytes < shard.num_bytes and (
            piece := source.folder.read_range(shard.file, num_bytes, num_bytes + _PIECE_BYTES)
        ):
            digest.update(piece)
            num_bytes += len(piece)
    except FileNotFoundError:
        return "missing"
    except (ManifestError, OSError) as error:
        return f"not readable ({error})"
    if num_bytes != shard.num_bytes:
        return f"{num_bytes} bytes, expected {shard.num_bytes}"
    return "" if digest.hexdigest() == shard.name else "damaged (its content does not give its name)"


def _find_leftovers(root: Path) -> Iterator[Problem]:
    """What killed writers left, older than a day: nobody writes it any more."""
    for file in _walk(root, ".tmp"):
        if _is_old(file):
            text = f"{file.relative_to(root)}: left by a writer that was killed; it can go"
            yield Problem(kind="leftover", slide_id="", text=text)


def _is_old(file: Path) -> bool:
    """Whether a file that nothing names is nobody's any more."""
    try:
        return time.time() - file.stat().st_mtime > LEFTOVER_S
    except OSError:  # Gone meanwhile.
        return False


def _walk(folder: Path, suffix: str) -> Iterator[Path]:
    """Files below `folder`, and folders that writers build in, whose name ends so; one folder at a time, in order."""
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files + folders):
            if name.endswith(suffix):
                yield Path(parent, name)
