"""Damage under tiles: every tile that comes back is right, whatever lies in the file, or the read raises.

Reading is done in a process of its own, which cuCIM may end.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from manifests import Manifest
from tests.tiler import damaged_slides as slides
from tests.tiler import readings
from tests.tiler.damaged_slides import CERTAIN, FORMATS, MARKED
from tiler import DamageError, TilerConfig, TilerError, build_manifest, open_slide, plan_tiles, read_plan, read_tiles
from tiler.integrity import bad_rows
from tiler.tiff_tables import TileTable, read_tables

CONFIG = TilerConfig(tile_px=96, mpp=slides.MPP, check="decode", max_bad=1.0)
WAYS = [
    (name, way)
    for name in FORMATS
    for way in ("as planned", "in regions")
    if FORMATS[name].is_jpeg or way != "as planned"
]
"""JPEG is read by a decoder of our own, and in regions by cuCIM where a tile reaches past the slide; all else by it."""
Run = Callable[..., Any]


class Sound(NamedTuple):
    """A slide without damage, its tiles, a file of what they look like, and how far OpenSlide's reading is from it."""

    path: Path
    manifest: Manifest
    truth: Path
    difference: float

    @property
    def table(self) -> TileTable:
        return read_tables(self.path)[0]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Calls a function in another process, always the same while it lives."""
    pools: list[ProcessPoolExecutor] = []

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        if not pools:
            pools.append(ProcessPoolExecutor(1, get_context("spawn")))
        try:
            return pools[0].submit(function, *arguments).result()
        except BrokenProcessPool:
            pools.clear()
            pytest.fail("reading ended its process")

    yield call
    for pool in pools:
        pool.shutdown()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Callable[[str], Sound]:
    known: dict[str, Sound] = {}
    folder, picture = tmp_path_factory.mktemp("sound"), slides.draw(1280, 1024)

    def find(name: str) -> Sound:
        if name not in known:
            path = slides.write(folder / f"{name}{FORMATS[name].suffix}", name, picture)
            manifest, truth = _tile(path), folder / f"{name}.npy"
            known[name] = Sound(path, manifest, truth, run(readings.write_truth, path, manifest, truth))
        return known[name]

    return find


def _tile(path: Path, **settings: Any) -> Manifest:
    return build_manifest(path, "case", dataclasses.replace(CONFIG, **{"min_tissue": 0, **settings})).manifest


def _retold(manifest: Manifest, path: Path) -> Manifest:
    """The manifest as if it had been made from the file as it is now."""
    record = dataclasses.replace(manifest.slide, fingerprint=open_slide(path).fingerprint)
    return dataclasses.replace(manifest, slide=record)


def _copy(good: Sound, folder: Path) -> Path:
    return Path(shutil.copy(good.path, folder / f"case{good.path.suffix}"))


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_sound_slides_are_read_without_suspicion(name: str, way: str, sound: Callable[[str], Sound], run: Run) -> None:
    good = sound(name)
    assert open_slide(good.path).backend == "cucim"
    # OpenSlide rounds JPEG 2000's last bit another way, here and there.
    assert good.difference <= (1e-5 if "2000" in name else 0)
    none = np.zeros(len(good.manifest), bool)
    found = run(readings.read_at_random, good.path, good.manifest, good.truth, none, way, 10)
    assert found.right > 0
    assert found[1:] == (0, 0, 0)
    num_reads, num_doubtful = run(readings.count_suspicions, good.path, good.manifest, way)
    assert num_reads > 0
    assert num_doubtful == 0


@pytest.mark.slow
@pytest.mark.parametrize("way", ["as planned", "in regions"])
def test_nor_are_the_real_ones_under_suspicion(way: str, real_slides: Path, run: Run) -> None:
    for file in sorted(real_slides.glob("*.svs")):
        manifest = _tile(file, tile_px=224, default_mpp=0.5)
        num_reads, num_doubtful = run(readings.count_suspicions, file, manifest, way)
        assert num_reads > 10
        assert num_doubtful == 0


@pytest.mark.torture
@pytest.mark.parametrize(("name", "way"), WAYS)
def test_what_a_strict_check_left_is_right(
    name: str, way: str, sound: Callable[[str], Sound], run: Run, tmp_path: Path, times: Callable[[int, int], int]
) -> None:
    good = sound(name)
    path = _copy(good, tmp_path)
    harmed = list(range(1, good.table.offsets.size, 4))
    slides.harm_tiles(path, (*MARKED, "random middle"), harmed)
    touching = slides.find_touching(good.manifest, good.table, harmed)
    manifest = _tile(path)
    assert manifest.slide.num_bad_tiles == touching.sum() > 0
    assert np.array_equal(manifest.x_l0, good.manifest.x_l0[~touching])
    truth = tmp_path / "truth.npy"
    np.save(truth, np.load(good.truth)[~touching])
    none = np.zeros(len(manifest), bool)
    found = run(readings.read_at_random, path, manifest, truth, none, way, times(10, 500), WAYS.index((name, way)))
    print(f"{name}, {way}, tiled after the damage: {found}")
    assert found.right > 0
    assert found[1:] == (0, 0, 0)


@pytest.mark.torture
@pytest.mark.parametrize(("name", "way"), WAYS)
def test_damage_that_came_after_tiling_is_refused_and_nothing_else(
    name: str, way: str, sound: Callable[[str], Sound], run: Run, tmp_path: Path, times: Callable[[int, int], int]
) -> None:
    good = sound(name)
    path = _copy(good, tmp_path)
    harmed = slides.find_inner(path)[::3]
    assert len(harmed) >= 4
    slides.harm_tiles(path, CERTAIN, harmed)
    assert open_slide(path).fingerprint == good.manifest.slide.fingerprint
    touching = slides.find_touching(good.manifest, good.table, harmed)
    assert np.array_equal(bad_rows(open_slide(path), good.manifest, np.arange(len(touching))), touching)
    found = run(
        readings.read_at_random, path, good.manifest, good.truth, touching, way, times(10, 500), WAYS.index((name, way))
    )
    print(f"{name}, {way}, damaged after tiling: {found}")
    assert found.wrong == found.refused_without_damage == 0
    assert found.right > 0
    assert found.refused > 0


NOTICED_BY = [
    # Damage that cuCIM does not raise, and the guards that notice it, each alone.
    ("Aperio JPEG, YCbCr", "undecodable", ["noise", "is_poisoned", "bad_mark_rows"]),
    ("Aperio JPEG, RGB", "zeroed half", ["noise", "bad_mark_rows"]),
    ("Aperio JPEG, RGB", "random middle", ["noise"]),
    ("Aperio JPEG 2000", "zeroed half", ["noise", "bad_mark_rows"]),
    ("TIFF LZW", "random middle", ["noise", "is_poisoned"]),
    ("TIFF LZW, predictor", "random middle", ["noise"]),
]


@pytest.mark.parametrize(("name", "kind", "guards"), NOTICED_BY)
def test_each_guard_alone_and_none(
    name: str, kind: str, guards: list[str], sound: Callable[[str], Sound], run: Run, tmp_path: Path
) -> None:
    good = sound(name)
    path = _copy(good, tmp_path)
    harmed = slides.find_inner(path)[::3]
    slides.harm_tiles(path, [kind], harmed)
    touching = slides.find_touching(good.manifest, good.table, harmed)
    arguments = (path, good.manifest, good.truth, touching, "in regions", 20)
    for guard in readings.GUARDS:
        assert (run(readings.read_with, [guard], *arguments).wrong == 0) == (guard in guards)
    assert run(readings.read_with, [], *arguments).wrong > 0


@pytest.mark.parametrize("name", ["Aperio JPEG, YCbCr", "Aperio JPEG, RGB"])
@pytest.mark.parametrize("guards", [list(readings.GUARDS), ["is_poisoned"]])
def test_damage_under_tiles_that_reach_past_the_slide(
    name: str, guards: list[str], sound: Callable[[str], Sound], run: Run, tmp_path: Path
) -> None:
    good = sound(name)
    path = _copy(good, tmp_path)
    rows, columns = good.table.shape
    x, y = np.meshgrid(np.arange(40, 1280, 96, np.int32), np.arange(40, 1024, 96, np.int32))
    assert max(x.max() + 96 - 1280, y.max() + 96 - 1024) > 0
    record = dataclasses.replace(good.manifest.slide, num_tiles=x.size)
    manifest = Manifest(record, x.ravel(), y.ravel(), np.ones(x.size, np.float32))
    truth = tmp_path / "truth.npy"
    run(readings.write_truth, path, manifest, truth)
    harmed = [row * columns + columns - 1 for row in range(1, rows - 1, 2)]
    slides.harm_tiles(path, ["undecodable"], harmed)
    manifest = _retold(manifest, path)
    touching = slides.find_touching(manifest, good.table, harmed)
    found = run(readings.read_with, guards, path, manifest, truth, touching, "as planned", 30)
    assert found.wrong == found.refused_without_damage == 0
    assert found.right > 0
    assert found.refused > 0


def test_damage_is_noticed_while_another_thread_opens_slides(
    sound: Callable[[str], Sound], run: Run, tmp_path: Path
) -> None:
    good, other = sound("Aperio JPEG, YCbCr"), sound("TIFF Deflate")  # Of the other cuCIM's C code complains.
    path = _copy(good, tmp_path)
    harmed = slides.find_inner(path)[::3]
    slides.harm_tiles(path, ["random middle"], harmed)
    touching = slides.find_touching(good.manifest, good.table, harmed)
    arguments = (path, good.manifest, good.truth, touching, "in regions", 60)
    found = run(readings.read_while_others_open, other.path, *arguments)
    assert found.wrong == found.refused_without_damage == 0
    assert found.refused > 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), WAYS)
def test_damaged_glass_between_tiles_refuses_none(
    name: str, way: str, sound: Callable[[str], Sound], run: Run, tmp_path: Path
) -> None:
    good = sound(name)
    path = _copy(good, tmp_path)
    manifest = _tile(path, min_tissue=0.9)
    beside = np.flatnonzero(~slides.lay(manifest, good.table).touched().ravel())
    assert len(beside) >= 4
    slides.harm_tiles(path, MARKED, beside.tolist())
    manifest = _retold(manifest, path)
    truth = tmp_path / "truth.npy"
    run(readings.write_truth, good.path, manifest, truth)
    found = run(readings.read_at_random, path, manifest, truth, np.zeros(len(manifest), bool), way, 10)
    assert found.right > 0
    assert found[1:] == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), WAYS)
def test_a_file_that_is_cut_while_it_is_open(
    name: str, way: str, sound: Callable[[str], Sound], run: Run, tmp_path: Path
) -> None:
    good = sound(name)
    path = _copy(good, tmp_path)
    found: readings.Tally = run(readings.read_after_cut, path, good.manifest, good.truth, path.stat().st_size // 2, way)
    assert found.wrong == 0
    assert found.right > 0
    assert found.refused > 0


@pytest.mark.parametrize("name", FORMATS)
def test_a_cut_file_is_refused_before_a_pixel_is_read(name: str, sound: Callable[[str], Sound], tmp_path: Path) -> None:
    good = sound(name)
    path = _copy(good, tmp_path)
    slide = open_slide(path)
    os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises(TilerError, match=r"cut file|not a slide that can be opened \(.*Short read"):
        _tile(path)
    if path.suffix == ".tif":  # Aperio's is not even opened.
        with pytest.raises(
            TilerError, match="slide case: the file changed since it was tiled, or is another slide's; tile it again"
        ):
            read_tiles(open_slide(path), good.manifest, np.arange(3))
    with pytest.raises(TilerError):
        slide.reopen()


@pytest.mark.parametrize("name", ["Aperio JPEG, YCbCr", "TIFF Deflate", "TIFF LZW"])
def test_what_openslide_passes_over_is_refused_too(name: str, sound: Callable[[str], Sound], tmp_path: Path) -> None:
    good = sound(name)
    path = _copy(good, tmp_path)
    slides.harm_tiles(path, ["random middle"], slides.find_inner(path)[:1])
    slide, rows = open_slide(path, "openslide"), np.arange(len(good.manifest))
    with pytest.raises(DamageError, match="damaged under"):
        read_plan(slide, good.manifest, plan_tiles(slide, good.manifest, rows, in_regions=True))
