"""The slides to measure, each with its tiles, and in one sentence why one cannot be.

The sentences name only what the user of `slidegrad bench read` can do: it has fewer flags than `slidegrad tile`.
"""

import re
from pathlib import Path

import pyarrow.compute as pc

from manifests.schema import Manifest
from manifests.source import ManifestSource
from tiler.build import build_manifest
from tiler.config import TilerConfig
from tiler.errors import DamageError, TilerError
from tiler.outcome import hide_paths
from tiler.slide import Slide, open_slide


def tile_here(path: Path, config: TilerConfig) -> tuple[Slide, Manifest]:
    """A slide with its tiles, found on the spot.

    Raises:
        SlidegradError: no such file, no slide, no scale, or no tiles.
    """
    slide = open_slide(path)
    if slide.mpp is None and config.default_mpp is None:
        tried = f"{slide.vendor or 'unknown vendor'}; {slide.scale.tried} tried"
        raise TilerError(f"no microns-per-pixel ({tried}); give --default-mpp")
    manifest = build_manifest(path, path.stem, config).manifest
    if not len(manifest) and manifest.slide.num_rejected:
        raise TilerError("no tiles to read; give --min-tissue 0 to take every tile")
    if not len(manifest):
        raise TilerError(f"no tile of {config.tile_px} px at {config.mpp:g} mpp fits in; give a smaller --tile-px")
    return slide, manifest


def look_up(path: Path, source: ManifestSource) -> tuple[Slide, Manifest]:
    """A slide with its tiles in `source`, found by the content of the file; opened as the tiler opened it.

    Raises:
        SlidegradError: no such file, no slide, not among the manifests, or no tiles.
    """
    slide, catalog = open_slide(path), source.catalog()
    rows = catalog.filter(pc.equal(catalog["fingerprint"], slide.fingerprint)).select(["slide_id", "num_tiles"])
    if not len(rows):
        raise TilerError("no slide of --manifests is this file; tile it, or leave --manifests out")
    # The same file may stand there under several ids, and have failed under some.
    manifest = source[max(rows.to_pylist(), key=lambda row: int(row["num_tiles"]))["slide_id"]]
    if not len(manifest):
        raise TilerError("its manifest has no tiles; tile it again, or leave --manifests out")
    return open_slide(path, manifest.slide.backend), manifest  # type: ignore[arg-type]


def tell(error: Exception, path: Path, *, is_tiled_here: bool) -> str:
    """Why a slide cannot be measured: one sentence that names its id, and no path.

    Args:
        error: what was raised.
        path: the slide file.
        is_tiled_here: its tiles were found on the spot, so that "tile it again" is no way out.
    """
    sentence = hide_paths(str(error), path.stem, path)
    if isinstance(error, DamageError) and is_tiled_here:
        sentence = f"{re.split('[,;]', sentence)[0]}; restore it from its source"
    return sentence if sentence.startswith("slide ") else f"slide {path.stem}: {sentence}"
