"""The decode-once reader: a tile's pixels are those of reading it alone, whatever was read with it, and by whatever."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from manifests import Manifest
from manifests.geometry import l0_to_level
from tiler import (
    DamageError,
    Slide,
    TilerConfig,
    TilerError,
    build_manifest,
    open_slide,
    plan_tiles,
    read_plan,
    read_tiles,
)
from tiler.slide import Backend

Opened = tuple[Slide, Manifest]
BACKENDS: tuple[Backend, ...] = ("cucim", "openslide")

SETTINGS = {
    "native at level 0": TilerConfig(tile_px=64, mpp=0.5, min_tissue=0.1),
    "native at level 1": TilerConfig(tile_px=16, mpp=2.0),
    "resampled from level 0": TilerConfig(tile_px=50, mpp=0.7),
    "resampled from level 1": TilerConfig(tile_px=16, mpp=2.6),
    "overlapping": TilerConfig(tile_px=64, mpp=0.5, overlap=24, min_tissue=0.4),
}
REAL = {
    "JPEG, native": ("CMU-1-Small-Region.svs", TilerConfig(tile_px=224)),
    "JPEG, resampled": ("CMU-1-Small-Region.svs", TilerConfig(tile_px=224, mpp=0.8)),
    # Level 1 is 2.0005 times smaller than level 0.
    "JPEG 2000, fractional level": ("TCGA-CR-7395-01A-01-TS1.svs", TilerConfig(default_mpp=0.25)),
    "JPEG 2000, fractional level, resampled": (
        "TCGA-CR-7395-01A-01-TS1.svs",
        TilerConfig(default_mpp=0.25, mpp=0.66),
    ),
}


def _open(path: Path, config: TilerConfig, backend: Backend) -> Opened:
    config = dataclasses.replace(config, backend=backend)
    return open_slide(path, backend), build_manifest(path, path.stem, config).manifest


@pytest.fixture(scope="module")
def opened(small_cohort: Path) -> Callable[[str, Backend], Opened]:
    known: dict[tuple[str, Backend], Opened] = {}

    def find(name: str, backend: Backend) -> Opened:
        if (name, backend) not in known:
            known[name, backend] = _open(small_cohort / "slides" / "synth_0000.svs", SETTINGS[name], backend)
        return known[name, backend]

    return find


def _read(slide: Slide, manifest: Manifest, rows: NDArray[np.int64], *, in_regions: bool) -> NDArray[np.uint8]:
    return read_plan(slide, manifest, plan_tiles(slide, manifest, rows, in_regions=in_regions), num_threads=1)


def _alone(slide: Slide, manifest: Manifest, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.concatenate([read_tiles(slide, manifest, rows[i : i + 1], num_threads=1) for i in range(len(rows))])


def _assert_bit_equal(slide: Slide, manifest: Manifest, rows: NDArray[np.int64], seed: int = 0) -> None:
    """All of `rows`, then subsets, in any order, with repeats, on one and two threads: each as if read alone."""
    rng = np.random.default_rng(seed)
    alone = _alone(slide, manifest, rows)
    assert len(np.unique(alone.reshape(len(alone), -1), axis=0)) == len(rows), "tiles too alike to tell a mix-up"
    picks = [np.arange(len(rows)), rng.permutation(len(rows)), np.sort(rng.integers(0, len(rows), 2 * len(rows)))]
    picks += [rng.integers(0, len(rows), rng.integers(1, len(rows))) for _ in range(4)]
    for pick in picks:
        for num_threads in (1, 2):
            assert np.array_equal(read_tiles(slide, manifest, rows[pick], num_threads=num_threads), alone[pick])
        # By the slide's reader where JPEG tiles are decoded from their bytes above.
        assert np.array_equal(_read(slide, manifest, rows[pick], in_regions=True), alone[pick])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_tile_never_depends_on_what_was_read_with_it(
    name: str, backend: Backend, opened: Callable[[str, Backend], Opened]
) -> None:
    slide, manifest = opened(name, backend)
    assert slide.backend == backend
    assert len(manifest) >= 12
    _assert_bit_equal(slide, manifest, np.arange(len(manifest)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REAL)
def test_nor_on_real_slides(name: str, backend: Backend, real_slides: Path) -> None:
    file, config = REAL[name]
    slide, manifest = _open(real_slides / file, config, backend)
    assert manifest.slide.level == (1 if "level" in name else 0)
    assert manifest.slide.read_w == config.tile_px or "resampled" in name
    # A run of neighbours, which share reads, and one far tile.
    rows = np.array([*range(3, 9), len(manifest) - 1])
    _assert_bit_equal(slide, manifest, rows)


@settings(max_examples=40)
@given(data=st.data())
def test_nor_for_any_choice_of_rows(data: st.DataObject, opened: Callable[[str, Backend], Opened]) -> None:
    slide, manifest = opened(data.draw(st.sampled_from(sorted(SETTINGS))), data.draw(st.sampled_from(BACKENDS)))
    chosen = data.draw(st.lists(st.integers(0, len(manifest) - 1), min_size=1, max_size=20))
    rows = np.array(chosen, np.int64)
    tiles = read_tiles(slide, manifest, rows, num_threads=data.draw(st.sampled_from([None, 1, 3])))
    assert np.array_equal(tiles, _alone(slide, manifest, rows))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_tile_is_the_crop_of_its_level_at_its_coordinates(
    name: str, backend: Backend, opened: Callable[[str, Backend], Opened]
) -> None:
    slide, manifest = opened(name, backend)
    record, level = manifest.slide, slide.levels[manifest.slide.level]
    whole = slide.read(0, 0, record.level, level.width, level.height)
    tiles = read_tiles(slide, manifest, np.arange(len(manifest)))
    assert tiles.shape == (len(manifest), record.tile_px, record.tile_px, 3)
    xs, ys = (l0_to_level(at, level.downsample) for at in (manifest.x_l0, manifest.y_l0))
    for tile, x, y in zip(tiles, xs, ys, strict=True):
        crop = np.ascontiguousarray(whole[y : y + record.read_h, x : x + record.read_w])
        if "resampled" in name:
            assert crop.shape != tile.shape
            crop = cv2.resize(crop, (record.tile_px, record.tile_px), interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
        assert np.array_equal(tile, crop)


def test_both_backends_read_almost_the_same(opened: Callable[[str, Backend], Opened]) -> None:
    a, b = (read_tiles(*opened("native at level 0", backend), np.arange(12)).astype(int) for backend in BACKENDS)
    assert np.abs(a - b).mean() < 1.5


def test_jpeg_tiles_are_decoded_from_their_bytes(opened: Callable[[str, Backend], Opened], real_slides: Path) -> None:
    for backend in BACKENDS:
        slide, manifest = opened("native at level 0", backend)
        assert plan_tiles(slide, manifest, np.arange(4)).jpeg_tiles is not None
        assert plan_tiles(slide, manifest, np.arange(4), in_regions=True).jpeg_tiles is None
    assert open_slide(real_slides / "CMU-1-Small-Region.svs").jpeg_tiles(0) is not None
    assert open_slide(real_slides / "TCGA-CR-7395-01A-01-TS1.svs").jpeg_tiles(0) is None  # JPEG 2000.


def test_jpeg_tiles_that_show_something_else_than_the_reader_are_left_to_it(
    opened: Callable[[str, Backend], Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    slide, _ = opened("native at level 0", "cucim")
    anew = open_slide(slide.path)
    # As if its RGB were taken for YCbCr.
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **b: decode(*a, **b)[..., ::-1])
    assert anew.jpeg_tiles(0) is None


def test_tiles_go_straight_into_a_given_buffer(opened: Callable[[str, Backend], Opened]) -> None:
    for name in ("native at level 0", "resampled from level 0"):
        slide, manifest = opened(name, "cucim")
        rows = np.array([5, 2, 5, 9])
        expected = read_tiles(slide, manifest, rows)
        batch = np.full((8, *expected.shape[1:]), 7, np.uint8)
        given_out = batch[2:6]
        assert read_tiles(slide, manifest, rows, given_out) is given_out
        assert np.array_equal(batch[2:6], expected)
        assert (batch[:2] == 7).all()
        assert (batch[6:] == 7).all()


def test_a_buffer_that_does_not_fit_is_refused(opened: Callable[[str, Backend], Opened]) -> None:
    slide, manifest = opened("native at level 0", "cucim")
    for out in (np.empty((2, 64, 64, 3), np.uint8), np.empty((1, 64, 64, 3), np.float32)):
        with pytest.raises(TilerError, match=r"expected uint8 \(1, 64, 64, 3\)"):
            read_tiles(slide, manifest, np.array([0]), out)


@pytest.mark.parametrize("rows", [np.array([True, False]), np.array([0.0, 1.0]), np.array([[0, 1]])])
def test_rows_that_are_no_rows_are_refused(rows: NDArray[np.int64], opened: Callable[[str, Backend], Opened]) -> None:
    with pytest.raises(TilerError, match=r"slide synth_0000: rows are .*expected whole numbers"):
        read_tiles(*opened("native at level 0", "cucim"), rows)


def test_a_buffer_in_pieces_or_of_others_is_refused(opened: Callable[[str, Backend], Opened]) -> None:
    slide, manifest = opened("resampled from level 0", "cucim")
    locked = np.zeros((1, 50, 50, 3), np.uint8)
    locked.flags.writeable = False
    for out in (locked, np.zeros((1, 50, 50, 4), np.uint8)[..., :3]):
        with pytest.raises(TilerError, match="read-only or not in one piece"):
            read_tiles(slide, manifest, np.array([0]), out)


def test_no_rows_are_no_tiles(opened: Callable[[str, Backend], Opened]) -> None:
    for rows in (np.zeros(0, np.int64), []):
        assert read_tiles(*opened("native at level 0", "cucim"), rows).shape == (0, 64, 64, 3)


def test_tiles_past_the_edge_are_white_there(opened: Callable[[str, Backend], Opened]) -> None:
    slide, manifest = opened("native at level 0", "cucim")
    width, height = slide.size_l0
    x, y = np.array([width - 40, -30, 64], np.int32), np.array([height - 40, 64, 64], np.int32)
    moved = Manifest(dataclasses.replace(manifest.slide, num_tiles=3), x, y, manifest.tissue[:3])
    corner, left, inside = read_tiles(slide, moved, np.arange(3))
    assert (corner[40:] == 255).all()
    assert (corner[:, 40:] == 255).all()
    assert np.array_equal(corner[:40, :40], slide.read(width - 40, height - 40, 0, 40, 40))
    assert (left[:, :30] == 255).all()
    assert np.array_equal(left[:, 30:], slide.read(0, 64, 0, 34, 64))
    assert np.array_equal(inside, read_tiles(slide, moved, np.array([2]))[0])


@pytest.mark.parametrize("row", [-1, 10_000])
def test_a_row_that_is_not_there_is_refused(row: int, opened: Callable[[str, Backend], Opened]) -> None:
    with pytest.raises(TilerError, match=r"slide synth_0000: rows .*the manifest has"):
        read_tiles(*opened("native at level 0", "cucim"), np.array([0, row]))


def test_a_file_that_changed_is_refused(small_cohort: Path, tmp_path: Path) -> None:
    path = tmp_path / "case.svs"
    shutil.copy(small_cohort / "slides" / "synth_0000.svs", path)
    _, manifest = _open(path, SETTINGS["native at level 0"], "cucim")
    with path.open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(
        TilerError, match="slide case: the file changed since it was tiled, or is another slide's; tile it again"
    ):
        read_tiles(open_slide(path), manifest, np.array([0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_that_cannot_be_read_are_an_error(backend: Backend, small_cohort: Path, tmp_path: Path) -> None:
    path = tmp_path / "case.svs"
    shutil.copy(small_cohort / "slides" / "synth_0000.svs", path)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    with path.open("r+b") as stream:
        for offset, num_bytes in places:
            stream.seek(offset)
            stream.write(bytes(num_bytes))
    slide, manifest = _open(path, dataclasses.replace(SETTINGS["native at level 0"], check="none"), backend)
    with pytest.raises(DamageError, match=r"slide case: damaged under 4 of its tiles"):
        read_tiles(slide, manifest, np.arange(4))


def test_a_jpeg_tile_of_another_size_is_damage(small_cohort: Path, tmp_path: Path) -> None:
    path = tmp_path / "case.svs"
    shutil.copy(small_cohort / "slides" / "synth_0000.svs", path)
    slide, manifest = _open(path, SETTINGS["native at level 0"], "cucim")
    table = slide.table(0)
    assert table is not None
    row, column = int(manifest.y_l0[0]) // table.tile_h, int(manifest.x_l0[0]) // table.tile_w
    _, other = cv2.imencode(".jpg", np.full((64, 2 * table.tile_w, 3), 200, np.uint8))
    with path.open("r+b") as stream:
        stream.seek(int(table.offsets[0, row, column]))
        stream.write(other.tobytes().ljust(int(table.num_bytes[0, row, column]), b"\0"))
    damaged = open_slide(path)  # As of a larger file, of whose ends alone the fingerprint is made.
    record = dataclasses.replace(manifest.slide, fingerprint=damaged.fingerprint)
    with pytest.raises(DamageError, match="slide case: damaged under"):
        read_tiles(damaged, dataclasses.replace(manifest, slide=record), np.arange(len(manifest)))


def test_a_jpeg_tile_that_the_scanner_left_out_is_what_the_reader_makes_of_it(
    small_cohort: Path, tmp_path: Path
) -> None:
    path = tmp_path / "case.svs"
    shutil.copy(small_cohort / "slides" / "synth_0000.svs", path)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        counts = list(tiff.pages[0].databytecounts)
        tiff.pages[0].tags["TileByteCounts"].overwrite([0, *counts[1:]])
    slide, found = _open(path, dataclasses.replace(SETTINGS["native at level 0"], check="none"), "cucim")
    manifest = Manifest(
        dataclasses.replace(found.slide, num_tiles=2),
        np.array([0, 64], np.int32),
        np.zeros(2, np.int32),
        np.ones(2, "f4"),
    )
    assert plan_tiles(slide, manifest, np.arange(2)).jpeg_tiles is None
    with pytest.raises(DamageError, match="slide case: damaged under 2 of its tiles"):  # Aperio leaves out nothing.
        read_tiles(slide, manifest, np.arange(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_region_may_be_one_px(backend: Backend, small_cohort: Path) -> None:
    slide = open_slide(small_cohort / "slides" / "synth_0000.svs", backend)
    assert np.array_equal(slide.read(300, 200, 0, 1, 1), slide.read(290, 190, 0, 20, 20)[10:11, 10:11])


@pytest.fixture
def generic_tiff(tmp_path: Path) -> Path:
    """A dark TIFF of no vendor, of which cuCIM shows black past the edge."""
    dark = np.full((300, 400, 3), 40, np.uint8)
    tifffile.imwrite(tmp_path / "dark.tif", dark, tile=(128, 128), photometric="rgb")
    return tmp_path / "dark.tif"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["Aperio", "generic TIFF"])
def test_all_is_white_past_the_edge(kind: str, backend: Backend, small_cohort: Path, generic_tiff: Path) -> None:
    path = generic_tiff if kind == "generic TIFF" else small_cohort / "slides" / "synth_0000.svs"
    slide = open_slide(path, backend)
    width, height = slide.size_l0
    corner = slide.read(width - 10, height - 20, 0, 30, 30)
    assert (corner[20:] == 255).all()
    assert (corner[:, 10:] == 255).all()
    assert np.array_equal(corner[:20, :10], slide.read(width - 10, height - 20, 0, 10, 20))
    assert (slide.read(-5, -5, 0, 5, 30) == 255).all()
