"""Coordinates to and from other tools: the commands `slidegrad manifest export` and `slidegrad manifest import`.

The formats are in manifests/exchange/. Export opens no slide; import opens each, so that what is written is a true
manifest: the slide's own size, scale and fingerprint. Its bytes are not checked (`check` is "none").
"""

import hashlib
import json
import os
import sys
import unicodedata
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from manifests.catalog import Place, rebuild_catalog, write_paths
from manifests.checks import check_record
from manifests.errors import ManifestError, SlidegradError
from manifests.exchange import (
    EXPORTERS,
    OUTLINED,
    Fitted,
    Format,
    LevelSize,
    Outline,
    TileSet,
    fit_tiles,
    read_outline,
    read_tile_sets,
)
from manifests.files import mask_path, read_manifest, tiles_path, write_manifest
from manifests.schema import Manifest, SlideRecord
from manifests.source import LocalManifests, ManifestSource, open_manifests
from manifests.writing import told_as
from tiler.archive import check_out, make_out
from tiler.discover import find_slides
from tiler.errors import TilerError
from tiler.outcome import failed_record, hide_paths, slide_record
from tiler.scale import read_mpp_csv, resolve_mpp
from tiler.slide import open_slide

_MAX_LISTED = 20
_Kind = Annotated[tyro.conf.Positional[Format], tyro.conf.arg(metavar="FORMAT")]


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write tile coordinates as other tools read them: CLAM, TRIDENT, QuPath's GeoJSON, the reference trainer, CSV."""

    kind: _Kind
    """clam and trident: HDF5; geojson: QuPath; eagle: slide_data.csv and tile_data.csv; csv: one plain table."""
    manifests: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MANIFESTS")]
    """The manifests folder."""
    out: Path
    """Where to; files of the same names are replaced."""
    slides: tuple[str, ...] = ()
    """Only these slide ids."""
    max_tiles: int = 10_000
    """Most tiles of a slide in a GeoJSON, evenly spread; the other formats have them all."""

    def run(self) -> tuple[dict[str, Any], int]:
        if self.max_tiles < 1:
            raise TilerError(f"--max-tiles {self.max_tiles}: expected at least 1")
        source = open_manifests(self.manifests)
        catalog = source.catalog()
        status = dict(zip(*(catalog.column(name).to_pylist() for name in ("slide_id", "status")), strict=True))
        if unknown := [slide_id for slide_id in self.slides if slide_id not in status]:
            raise TilerError(f"--slides: {len(unknown)} ids are not in the manifests, first {unknown[0]!r}")
        wanted = sorted(set(self.slides)) or list(status)
        todo = [slide_id for slide_id in wanted if status[slide_id] != "failed"]
        make_out(self.out)
        notes: Counter[str] = Counter({"failed when they were tiled, left out": len(wanted) - len(todo)})
        failed, num_tiles = [] if self.slides else _name_unusable(source), 0
        num_slides = len(todo) + len(failed)
        with told_as(TilerError, self.out), EXPORTERS[self.kind](self.out, self.max_tiles) as add:
            for slide_id in todo:
                try:
                    manifest = _complete(source[slide_id])
                    outline = self._outline(slide_id, notes)
                except ManifestError as error:
                    failed.append(str(error))
                    continue
                notes.update(add(manifest, outline))
                num_tiles += len(manifest)
        _tell(failed, +notes)
        result = {"format": self.kind, "num_slides": num_slides - len(failed), "num_tiles": num_tiles}
        return {**result, "failed": len(failed), "notes": dict(+notes), "out": str(self.out)}, 1 if failed else 0

    def _outline(self, slide_id: str, notes: Counter[str]) -> Outline:
        if self.kind not in OUTLINED:
            return []
        outline = read_outline(mask_path(Path(self.manifests), slide_id))
        if outline is None:
            notes["no tissue mask in the manifests folder, hence no outline"] += 1
        return outline or []


def _complete(manifest: Manifest) -> Manifest:
    """The manifest, if it says how its tiles are read; ours do, an empty one of other writers may not."""
    record = manifest.slide
    for problem in check_record(record):
        raise ManifestError(problem.text)
    scales = record.mpp_x, record.mpp_y, record.tile_mpp
    if min(record.tile_px, record.read_w, record.read_h) < 1 or not all(0 < mpp < float("inf") for mpp in scales):
        raise ManifestError(f"slide {record.slide_id}: its manifest has no read size or no scale; tile it again")
    return manifest


def _name_unusable(source: ManifestSource) -> list[str]:
    """One sentence for each manifest that the catalogue leaves out."""
    told = []
    for file in source.unlisted() if isinstance(source, LocalManifests) else ():
        try:
            read_manifest(file)
            told.append(f"{file}: not a manifest of its place; `slidegrad manifest validate` tells more")
        except ManifestError as error:
            told.append(str(error))
    return told


@dataclass(frozen=True, kw_only=True)
class Import:
    """Make manifests from tile coordinates of CLAM, TRIDENT, QuPath's GeoJSON, the reference trainer, or CSV.

    Rows come into block order, in which reading is fast: connect by coordinates, not by row number.
    """

    kind: _Kind
    """Of which tool: clam | trident | geojson | eagle | csv."""
    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILES")]
    """Files, or folders to look in."""
    slides: Annotated[str, tyro.conf.arg(metavar="ARCHIVE")]
    """The slides: a folder, one slide, a glob, or a CSV/text list of slides."""
    out: Path
    """The manifests folder; manifests of the same slides are replaced, unless the import of a slide fails."""
    tile_px: int | None = None
    """Output tile side, px; by default what the files say, else 224."""
    default_mpp: float | None = None
    """Microns per level-0 px for slides that do not say."""
    mpp_csv: Path | None = None
    """CSV with slide_id, mpp for slides that do not say their scale."""
    workers: int | None = None
    """Slides opened at a time; as many as there are cores by default."""

    def __post_init__(self) -> None:
        for name, value, least in (("tile-px", self.tile_px, 1), ("workers", self.workers, 1)):
            if value is not None and value < least:
                raise TilerError(f"--{name} {value}: expected at least {least}")
        if self.default_mpp is not None and not 0 < self.default_mpp <= 100:
            raise TilerError(f"--default-mpp {self.default_mpp}: expected microns per px in (0, 100]")

    def run(self) -> tuple[dict[str, Any], int]:
        check_out(self.out)
        found = find_slides(self.slides)
        mpp = read_mpp_csv(self.mpp_csv) if self.mpp_csv else {}
        make_out(self.out)
        counts: Counter[str] = Counter()
        notes: Counter[str] = Counter()
        failed: list[str] = []
        places: dict[str, Place] = {}
        with told_as(TilerError, self.out):
            try:
                for done in self._import_all(Archive(found.base, found.slides), mpp):
                    if done.record is not None:
                        counts["num_tiles"] += done.record.num_tiles
                        places |= {done.record.slide_id: done.place} if done.place else {}
                    counts[done.record.status if done.record is not None else "failed"] += 1
                    failed += [done.error] if done.error else []
                    notes.update(done.notes)
            finally:  # Also after Ctrl-C: the catalogue tells what is there.
                self._record(found.base, places)
        _tell(sorted(failed), notes)
        statuses = {status: counts[status] for status in ("ok", "empty", "failed")}
        result = {"format": self.kind, "num_slides": sum(statuses.values()), **statuses}
        told = {"num_tiles": counts["num_tiles"], "notes": dict(notes), "manifests": str(self.out)}
        return {**result, **told}, 1 if failed else 0

    def _import_all(self, archive: "Archive", mpp: Mapping[str, tuple[float, float]]) -> Iterator["Done"]:
        """One outcome per slide; a few slides at a time are in memory."""
        workers = self.workers or len(os.sched_getaffinity(0))
        given: set[str] = set()
        running: deque[Future[Done]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            for tiles in read_tile_sets(self.kind, list(self.files), self.tile_px):
                if isinstance(tiles, ManifestError):
                    yield Done(error=str(tiles))
                    continue
                slide_id = archive.match(tiles.names)
                if slide_id is None or slide_id in given:
                    why = "tiles given twice" if slide_id else "no slide of that name under --slides, or several"
                    yield Done(error=f"slide {slide_id or tiles.names[0]}: {why}")
                    continue
                given.add(slide_id)
                running.append(pool.submit(self._import_slide, tiles, slide_id, archive, mpp.get(slide_id)))
                if len(running) > 2 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()

    def _import_slide(
        self, tiles: TileSet, slide_id: str, archive: "Archive", mpp: tuple[float, float] | None
    ) -> "Done":
        """Writes one slide's manifest. The per-slide boundary: no error of a single slide leaves it but a full disk."""
        path = archive.base / archive.slides[slide_id]
        place, notes = tiles_path(self.out, slide_id), list[str]()
        try:
            fitted = self._fit(tiles, slide_id, path, mpp)
            manifest, notes = fitted.manifest, _remark(fitted, tiles)
        except SlidegradError as error:
            manifest = _failure(slide_id, path, str(error))
        except Exception as error:  # noqa: BLE001 - the outcome is recorded, the others go on
            manifest = _failure(slide_id, path, f"{type(error).__name__}: {error}")
        if manifest.slide.status == "failed" and _is_good(place):
            return Done(error=f"{manifest.slide.error}; the manifest that is there stays")
        # The config has no hash in the record, so that `slidegrad tile` does not take the manifest for its own.
        write_manifest(place, manifest, json.dumps({"imported_from": self.kind}))
        located = _locate(archive, slide_id, manifest.slide.fingerprint)
        return Done(record=manifest.slide, place=located, error=manifest.slide.error, notes=tuple(notes))

    def _fit(self, tiles: TileSet, slide_id: str, path: Path, csv_mpp: tuple[float, float] | None) -> Fitted:
        slide = open_slide(path)
        mpp, mpp_source = resolve_mpp(slide_id, slide.vendor, slide.scale, csv_mpp, self.default_mpp)
        record = slide_record(slide, slide_id, mpp, mpp_source)
        levels = tuple(LevelSize(level.width, level.height, level.downsample) for level in slide.levels)
        return fit_tiles(tiles, record, levels, self.tile_px)

    def _record(self, base: Path, places: Mapping[str, Place]) -> None:
        """Where the slides lie, and the catalogue."""
        if places:
            work = "\0".join([str(base), self.kind, *map(os.path.abspath, self.files)])
            writer = f"import-{hashlib.blake2b(work.encode(), digest_size=6).hexdigest()}"
            write_paths(self.out, writer, places)
        rebuild_catalog(self.out)


@dataclass(frozen=True, kw_only=True)
class Done:
    """One slide's outcome: its record, unless none was written for it; sentences on what was odd in its tiles."""

    record: SlideRecord | None = None
    place: Place | None = None
    error: str = ""
    notes: tuple[str, ...] = ()


class Archive:
    """The slides of an archive by what other tools call them: slide id, file name, or the stem where it is unique."""

    def __init__(self, base: Path, slides: Mapping[str, str]) -> None:
        self.base, self.slides = base, slides
        names = [(Path(path).name, slide_id) for slide_id, path in slides.items()]
        names += [(Path(path).stem, slide_id) for slide_id, path in slides.items()]
        uses = Counter(_normal(name) for name, _ in names)
        self._by_name = {_normal(name): slide_id for name, slide_id in names if uses[_normal(name)] == 1}

    def match(self, names: tuple[str, ...]) -> str | None:
        """The slide id for the first name that means a slide."""
        for name in map(_normal, names):
            if name in self.slides:
                return name
            if name in self._by_name:
                return self._by_name[name]
        return None


def _locate(archive: Archive, slide_id: str, fingerprint: str) -> Place | None:
    """Where a slide lies and how its file looks; None for one that is gone."""
    relative = archive.slides[slide_id]
    try:
        state = (archive.base / relative).stat()
    except OSError:
        return None
    return Place(str(archive.base), relative, state.st_size, state.st_mtime_ns, fingerprint)


def _is_good(file: Path) -> bool:
    """Whether a manifest is there that did not fail: what an import cannot replace it does not take away."""
    try:
        return read_manifest(file).slide.status != "failed"
    except ManifestError:
        return False


def _failure(slide_id: str, path: Path, error: str) -> Manifest:
    """The manifest of a slide that tiles could not be imported for; of the file only the slide id is told."""
    # First the prefix: where ids begin with folders the file's stem is a part of its id.
    sentence = hide_paths(error.removeprefix(f"slide {slide_id}: "), slide_id, path)
    none = np.zeros(0, np.int32)
    record = failed_record(slide_id, sentence, mark="", config_hash="")
    return Manifest(record, none, none, none.astype(np.float32))


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _remark(fitted: Fitted, tiles: TileSet) -> list[str]:
    """What the user should know of a slide's tiles, without numbers of its own, so that slides can be counted."""
    remarks = {
        "some tiles reach past the slide's edge; they are kept, white there": fitted.num_past_edge,
        "some tiles came more than once and are kept once": fitted.num_doubled,
        "the file holds only a part of the tiles (--max-tiles at its export)": tiles.num_left_out,
        "the file tells no tissue shares; they are set to 1": tiles.tissue is None and len(tiles.x_l0),
    }
    return [sentence for sentence, holds in remarks.items() if holds]


def _tell(failed: list[str], notes: Mapping[str, int]) -> None:
    for sentence, count in notes.items():
        print(f"{count} slides: {sentence}", file=sys.stderr)
    for error in failed[:_MAX_LISTED]:
        print(f"failed: {error}", file=sys.stderr)
    if len(failed) > _MAX_LISTED:
        print(f"… and {len(failed) - _MAX_LISTED} more", file=sys.stderr)
