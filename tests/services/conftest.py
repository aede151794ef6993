"""A small manifests folder with one slide of each kind, written as the tiler writes it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from manifests import Manifest, SlideRecord, write_manifest
from manifests.catalog import rebuild_catalog
from manifests.files import tiles_path

WriteSlide = Callable[..., Manifest]
TILED = SlideRecord(
    slide_id="", status="ok", mpp_x=0.25, mpp_y=0.25, mpp_source="vendor", tile_px=224, tile_mpp=0.5, read_w=448
)
"""0.25 mpp read at 0.5: one tile covers 448 px at level 0."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where the manifests lie."""
    return tmp_path / "manifests"


@pytest.fixture
def write_slide(root: Path) -> WriteSlide:
    """Writes one slide of `num_cols` x `num_rows` tiles, edge to edge from (0, 0)."""

    def write(slide_id: str, num_cols: int, num_rows: int, **fields: object) -> Manifest:
        row, col = np.divmod(np.arange(num_cols * num_rows, dtype=np.int32), max(1, num_cols))
        size = {"width_l0": num_cols * 448, "height_l0": num_rows * 448, "num_tiles": len(row)}
        record = dataclasses.replace(TILED, slide_id=slide_id, **{**size, **fields})  # type: ignore[arg-type]
        tissue = np.linspace(0, 1, len(row), dtype=np.float32)
        manifest = Manifest(record, (col * 448).astype(np.int32), (row * 448).astype(np.int32), tissue)
        write_manifest(tiles_path(root, slide_id), manifest)
        return manifest

    return write


@pytest.fixture
def cohort(root: Path, write_slide: WriteSlide) -> Path:
    """Four ok slides, one empty, one failed; one id needs escaping in an address."""
    for slide_id, num_cols, num_rows in (("a_1", 10, 8), ("a_2", 1, 1), ("B_3", 40, 30), ("ö #5%", 3, 3)):
        write_slide(slide_id, num_cols, num_rows)
    write_slide("c_empty", 0, 0, status="empty")
    write_slide("d_failed", 0, 0, status="failed", error="slide d_failed: cannot open /data/Jane Doe/x.svs: cut file")
    rebuild_catalog(root)
    return root
