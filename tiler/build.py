"""One slide in, one outcome out: the manifest of a slide, or the reason why there is none."""

import dataclasses
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from manifests.errors import SlidegradError
from manifests.files import mask_path, tiles_path, write_manifest
from manifests.geometry import choose_read
from manifests.schema import Manifest, SlideRecord
from tiler.artefacts import find_artefacts
from tiler.config import TilerConfig
from tiler.errors import TilerError
from tiler.grid import lay_lattice, make_grid
from tiler.integrity import check_whole, find_damage
from tiler.masks import MaskRecord, Overview, label_areas, read_overview, trace_outline, write_mask
from tiler.outcome import failed_record, hide_paths, slide_record
from tiler.outside import SUFFIXES, read_outside
from tiler.scale import resolve_mpp
from tiler.slide import Slide, fingerprint, open_slide
from tiler.tissue import find_tissue


@dataclass(frozen=True, kw_only=True)
class Task:
    """One slide to tile: see `build_manifest`."""

    slide_id: str
    path: Path
    mpp: tuple[float, float] | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """A manifest (ok or empty), the mask it was made from, and the seconds that looking for damage took."""

    manifest: Manifest
    mask: MaskRecord
    check_s: float


@dataclass(frozen=True)
class Done:
    """What is told of a finished slide: its record, and seconds spent, on the whole and on looking for damage."""

    record: SlideRecord
    total_s: float
    check_s: float


def settings_hash(config: TilerConfig, mask: Path | None) -> str:
    """The config's hash, with the content of the slide's mask from outside where there is one."""
    if mask is None:
        return config.hash
    return hashlib.blake2b(config.hash.encode() + mask.read_bytes(), digest_size=8).hexdigest()


def build_manifest(
    path: str | Path,
    slide_id: str,
    config: TilerConfig,
    *,
    mpp: tuple[float, float] | None = None,
    mask: Path | None = None,
) -> Outcome:
    """Finds a slide's tissue and its tiles; writes nothing.

    Args:
        path: the slide file.
        slide_id: its id.
        config: which tiles to keep.
        mpp: microns per level-0 px (x, y) from the user's table, used where the slide does not say.
        mask: a tissue mask from outside (see tiler/outside.py), used instead of looking for tissue.

    Raises:
        SlidegradError: the slide cannot be used; one sentence.
    """
    path = Path(path)
    slide = open_slide(path, config.backend)
    check_whole(path)
    mpp, mpp_source = resolve_mpp(slide_id, slide.vendor, slide.scale, mpp, config.default_mpp)
    read = choose_read(tuple(level.downsample for level in slide.levels), mpp, config.tile_px, config.mpp)
    level = slide.levels[read.level]
    overview = read_overview(slide, max(mpp))
    tissue, artefacts = _find_areas(slide, overview, mask, config)
    lattice = lay_lattice(
        (level.width, level.height),
        read,
        overlap_share=config.overlap / config.tile_px,
        offset_share=(config.offset[0] / config.tile_px, config.offset[1] / config.tile_px),
        align_to=(level.tile_w, level.tile_h) if config.align else None,
    )
    px_per_mask_px = overview.px_l0 / level.downsample
    covers = tissue.shape[1] * px_per_mask_px, tissue.shape[0] * px_per_mask_px
    grid = make_grid(lattice, read, level.downsample, tissue, artefacts, covers, min_tissue=config.min_tissue)
    areas = label_areas(tissue, artefacts)
    record = dataclasses.replace(
        slide_record(slide, slide_id, mpp, mpp_source),
        status="ok" if len(grid.x_l0) else "empty",
        num_tiles=len(grid.x_l0),
        num_rejected=sum(grid.rejected.values()),
        **{f"rejected_{reason}": count for reason, count in grid.rejected.items()},  # type: ignore[arg-type]
        check=config.check,
        tile_px=config.tile_px,
        tile_mpp=config.mpp,
        overlap=config.overlap,
        level=read.level,
        read_w=read.read_w,
        read_h=read.read_h,
        tissue_mm2=float((areas == 1).sum()) * overview.px_l0**2 * mpp[0] * mpp[1] / 1e6,
        config_hash=settings_hash(config, mask),
    )
    kept = MaskRecord(overview, areas, trace_outline(areas == 1, overview.px_l0))
    started = time.perf_counter()
    manifest = _leave_out_damage(slide, Manifest(record, grid.x_l0, grid.y_l0, grid.tissue), config)
    return Outcome(manifest, kept, time.perf_counter() - started)


def _find_areas(
    slide: Slide, overview: Overview, mask: Path | None, config: TilerConfig
) -> tuple[NDArray[np.bool_], Mapping[str, NDArray[np.bool_]]]:
    """Tissue and the artefacts in it. A mask from outside stands for both; nothing is rejected where all is kept."""
    if mask is not None:
        if not mask.is_file():
            raise TilerError(f"no mask of that name in --masks ({' '.join(SUFFIXES)} looked for)")
        height, width = overview.thumbnail.shape[:2]
        covers = width * overview.px_l0, height * overview.px_l0
        return read_outside(mask, (height, width), covers, config.tissue.mask_values), {}
    tissue = find_tissue(overview.thumbnail, overview.mpp, config.tissue)
    return tissue, find_artefacts(slide, overview, tissue, config.tissue) if config.min_tissue > 0 else {}


def _leave_out_damage(slide: Slide, manifest: Manifest, config: TilerConfig) -> Manifest:
    """The manifest without its damaged tiles.

    Raises:
        TilerError: too large a share of them is damaged.
    """
    bad = find_damage(slide, manifest, config.check).bad
    num_bad = int(bad.sum())
    if not num_bad:
        return manifest
    record, good = manifest.slide, ~bad
    if num_bad > config.max_bad * len(manifest):
        raise TilerError(
            f"slide {record.slide_id}: {num_bad} of {len(manifest)} tiles are damaged, more than --max-bad "
            f"{config.max_bad:g}; restore the file from its source"
        )
    num_tiles = len(manifest) - num_bad
    record = dataclasses.replace(
        record, num_tiles=num_tiles, num_bad_tiles=num_bad, status="ok" if num_tiles else "empty"
    )
    return Manifest(record, manifest.x_l0[good], manifest.y_l0[good], manifest.tissue[good])


def tile_slide(task: Task, out: Path, config: TilerConfig) -> Done:
    """Builds and writes one slide's manifest; a slide that cannot be used gets a manifest that says why.

    This is the per-slide boundary: no error of a single slide leaves it, except Ctrl-C and a full disk.
    """
    started, check_s = time.perf_counter(), 0.0
    try:
        outcome = build_manifest(task.path, task.slide_id, config, mpp=task.mpp, mask=task.mask)
    except SlidegradError as error:
        record = _fail(task, out, config, str(error))
    except Exception as error:  # noqa: BLE001 - the per-slide boundary: the outcome is recorded, the archive goes on
        record = _fail(task, out, config, f"{type(error).__name__}: {error}")
    else:
        record, check_s = outcome.manifest.slide, outcome.check_s
        write_mask(mask_path(out, task.slide_id), outcome.mask)
        write_manifest(tiles_path(out, task.slide_id), outcome.manifest, config.to_json())
    return Done(record, time.perf_counter() - started, check_s)


def _fail(task: Task, out: Path, config: TilerConfig, error: str) -> SlideRecord:
    try:
        mark = fingerprint(task.path) if task.path.is_file() or task.path.is_dir() else ""
    except (OSError, SlidegradError):
        mark = ""
    files = [file for file in (task.path, task.mask) if file is not None]
    return write_failure(task, out, config, hide_paths(error, task.slide_id, *files), mark)


def write_failure(task: Task, out: Path, config: TilerConfig, sentence: str, mark: str = "") -> SlideRecord:
    """Writes the manifest of a slide that cannot be used: zero tiles, and why. Does not touch the slide itself.

    Args:
        task, out, config: as for `tile_slide`.
        sentence: why; names no file.
        mark: the slide's fingerprint, "" where it could not be computed.
    """
    record = failed_record(task.slide_id, sentence, mark, config.hash)
    mask_path(out, task.slide_id).unlink(missing_ok=True)  # Of an earlier success.
    none = np.zeros(0, np.int32)
    manifest = Manifest(record, none, none, none.astype(np.float32))
    write_manifest(tiles_path(out, task.slide_id), manifest, config.to_json())
    return record
