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


def slide_writer(root: Path) -> WriteSlide:
    """Writes slides of `num_cols` x `num_rows` tiles, edge to edge from (0, 0), into a tree."""

    def write(slide_id: str, num_cols: int, num_rows: int, **fields: object) -> Manifest:
        row, col = np.divmod(np.arange(num_cols * num_rows, dtype=np.int32), max(1, num_cols))
        size = {"width_l0": num_cols * 448, "height_l0": num_rows * 448, "num_tiles": len(row)}
        record = dataclasses.replace(TILED, slide_id=slide_id, **{**size, **fields})  # type: ignore[arg-type]
        tissue = np.linspace(0, 1, len(row), dtype=np.float32)
        manifest = Manifest(record, (col * 448).astype(np.int32), (row * 448).astype(np.int32), tissue)
        write_manifest(tiles_path(root, slide_id), manifest)
        return manifest

    return write


def write_cohort(root: Path) -> Path:
    """Four ok slides, one empty, one failed; one id needs escaping in an address."""
    write = slide_writer(root)
    for slide_id, num_cols, num_rows in (("a_1", 10, 8), ("a_2", 1, 1), ("B_3", 40, 30), ("ö #5%", 3, 3)):
        write(slide_id, num_cols, num_rows)
    write("c_empty", 0, 0, status="empty")
    write("d_failed", 0, 0, status="failed", error="slide d_failed: cannot open /data/Jane Doe/x.svs: cut file")
    rebuild_catalog(root)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where the manifests lie."""
    return tmp_path / "manifests"


@pytest.fixture
def write_slide(root: Path) -> WriteSlide:
    """Writes a slide into the test's own tree."""
    return slide_writer(root)


@pytest.fixture
def cohort(root: Path) -> Path:
    """A cohort of the test's own, to change."""
    return write_cohort(root)


@pytest.fixture(scope="session")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same cohort, for tests that change nothing."""
    return write_cohort(tmp_path_factory.mktemp("settled") / "manifests")
