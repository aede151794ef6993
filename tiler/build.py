"""One slide in, one outcome out: the manifest of a slide, or the reason why there is none."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

import manifests.geometry as geometry
from manifests.errors import SlidegradError
from manifests.files import mask_path, tiles_path, write_manifest
from manifests.schema import Manifest, SlideRecord
from tiler.config import TilerConfig
from tiler.grid import make_grid
from tiler.integrity import check_whole
from tiler.masks import MaskRecord, read_thumbnail, write_mask
from tiler.scale import resolve_mpp
from tiler.slide import fingerprint, open_slide
from tiler.tissue import otsu
from tiler.version import VERSION


@dataclass(frozen=True)
class Outcome:
    """A manifest (ok or empty) and the mask it was made from."""

    manifest: Manifest
    mask: MaskRecord


def build_manifest(path: str | Path, slide_id: str, config: TilerConfig, *, csv_mpp: float | None = None) -> Outcome:
    """Finds a slide's tissue and its tiles; writes nothing.

    Args:
        path: the slide file.
        slide_id: its id.
        config: which tiles to keep.
        csv_mpp: microns per level-0 px from the user's table, used where the slide does not say.

    Raises:
        SlidegradError: the slide cannot be used; one sentence.
    """
    path = Path(path)
    slide = open_slide(path, config.backend)
    check_whole(path)
    mpp, mpp_source = resolve_mpp(slide_id, slide.vendor, slide.scale, csv_mpp, config.default_mpp)
    downsamples = tuple(level.downsample for level in slide.levels)
    read = geometry.choose_read(downsamples, mpp, config.tile_px, config.mpp)
    level = slide.levels[read.level]
    thumbnail, thumbnail_mpp = read_thumbnail(slide, max(mpp))
    tissue = otsu(thumbnail, thumbnail_mpp, reject_pen=config.reject_pen)
    px_per_mask_px = thumbnail_mpp / max(mpp) / level.downsample
    grid = make_grid(
        tissue,
        (tissue.shape[1] * px_per_mask_px, tissue.shape[0] * px_per_mask_px),
        (level.width, level.height),
        level.downsample,
        read,
        overlap_share=config.overlap / config.tile_px,
        min_tissue=config.min_tissue,
    )
    width, height = slide.size_l0
    record = SlideRecord(
        slide_id=slide_id,
        status="ok" if len(grid.x_l0) else "empty",
        num_tiles=len(grid.x_l0),
        num_rejected=grid.num_rejected,
        width_l0=width,
        height_l0=height,
        mpp_x=mpp[0],
        mpp_y=mpp[1],
        mpp_source=mpp_source,
        mpp_conflict=slide.scale.conflict,
        backend=slide.backend,
        vendor=slide.vendor,
        fingerprint=slide.fingerprint,
        check="whole",
        tile_px=config.tile_px,
        tile_mpp=config.mpp,
        overlap=config.overlap,
        level=read.level,
        read_w=read.read_w,
        read_h=read.read_h,
        tissue_mm2=float(tissue.sum()) * thumbnail_mpp**2 / 1e6,
        config_hash=config.hash,
        version=VERSION,
    )
    return Outcome(Manifest(record, grid.x_l0, grid.y_l0, grid.tissue), MaskRecord(thumbnail, tissue, thumbnail_mpp))


def tile_slide(
    path: Path, slide_id: str, out: Path, config: TilerConfig, *, csv_mpp: float | None = None
) -> SlideRecord:
    """Builds and writes one slide's manifest; a slide that cannot be used gets a manifest that says why.

    This is the per-slide boundary: no error of a single slide leaves it, except Ctrl-C and a full disk.
    """
    try:
        outcome = build_manifest(path, slide_id, config, csv_mpp=csv_mpp)
    except SlidegradError as error:
        manifest = _failed(path, slide_id, config, str(error))
    except Exception as error:  # noqa: BLE001 - the per-slide boundary: the outcome is recorded, the archive goes on
        manifest = _failed(path, slide_id, config, f"slide {slide_id}: {type(error).__name__}: {error}")
    else:
        manifest = outcome.manifest
        write_mask(mask_path(out, slide_id), outcome.mask)
    write_manifest(tiles_path(out, slide_id), manifest, config.to_json())
    return manifest.slide


def _failed(path: Path, slide_id: str, config: TilerConfig, error: str) -> Manifest:
    try:
        mark = fingerprint(path)
    except OSError:
        mark = ""
    # Only the slide id may be told: errors of readers like to repeat the path.
    sentence = error.replace(str(path), slide_id).replace(path.name, slide_id)
    record = SlideRecord(
        slide_id=slide_id,
        status="failed",
        error=sentence if sentence.startswith("slide ") else f"slide {sentence}",
        fingerprint=mark,
        config_hash=config.hash,
        version=VERSION,
    )
    none = np.zeros(0, np.int32)
    return Manifest(record, none, none, none.astype(np.float32))
