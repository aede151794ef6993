"""Annotated regions: which tiles lie inside, whose they are, and that a run keeps those that it began with."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from manifests import Manifest, SlideRecord, open_manifests
from manifests.errors import SlidegradError
from tests.trainer.test_train import arguments
from tiler.outside import Polygon
from trainer.cli import Train
from trainer.cohort import Cohort, load_cohort
from trainer.comm import Comm
from trainer.config import Cohort as CohortConfig
from trainer.config import RunConfig, Tiles
from trainer.errors import TrainerError
from trainer.journal import read_events
from trainer.loop import Loop
from trainer.prepare import open_run, prepare_run
from trainer.regions import changes_since, find_regions, read_regions, rows_inside
from trainer.sampler import SlideSampler, draw_rows, plan_epoch, plan_scoring
from trainer.topology import Topology

SIDE = 128
"""Of a tile, level-0 px."""


def manifest_of(corners: NDArray[np.int64]) -> Manifest:
    record = SlideRecord(
        slide_id="s", status="ok", num_tiles=len(corners), mpp_x=0.5, mpp_y=0.5, tile_px=32, tile_mpp=2.0
    )
    x_l0, y_l0 = corners.T.astype(np.int32)
    return Manifest(record, x_l0, y_l0, np.ones(len(corners), np.float32))


def is_inside(x: float, y: float, ring: list[list[float]]) -> bool:
    """A ray to the right crosses the ring's sides an odd number of times."""
    crossings = 0
    for (x0, y0), (x1, y1) in zip(ring, [*ring[1:], ring[0]], strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
            crossings += 1
    return crossings % 2 == 1


def star(rng: np.random.Generator, centre: tuple[float, float], radius: float, num: int) -> list[list[float]]:
    """A ring round a centre, jagged, of coordinates with fractions that no tile's centre has."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, num))
    radii = radius * rng.uniform(0.4, 1, num)
    ring = [[centre[0] + r * np.cos(a), centre[1] + r * np.sin(a)] for a, r in zip(angles, radii, strict=True)]
    return [[round(x) + 0.37, round(y) + 0.37] for x, y in ring]


@settings(max_examples=40)
@example(3424, 2)  # A tile in a part of a hole that lies outside.
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_rows_inside_are_those_of_a_ray_and_of_opencv(seed: int, num_polygons: int) -> None:
    """Polygons that overlap, each with a hole, some of it outside of them."""
    rng = np.random.default_rng(seed)
    manifest = manifest_of(rng.integers(0, 40_000, (150, 2)))
    shapes = []
    for _ in range(num_polygons):
        x, y = rng.uniform(5_000, 35_000, 2)
        shapes.append([star(rng, (x, y), 12_000, 12), star(rng, (x, y), 5_000, 7)])
    found = rows_inside(manifest, [Polygon((), [np.array(ring) for ring in rings]) for rings in shapes])
    centres = np.stack([manifest.x_l0, manifest.y_l0], 1) + SIDE / 2
    expected = [
        row
        for row, (x, y) in enumerate(centres.tolist())
        if any(is_inside(x, y, outer) and not is_inside(x, y, hole) for outer, hole in shapes)
    ]
    assert found.tolist() == expected

    def by_opencv(centre: list[float], ring: list[list[float]]) -> bool:
        return cv2.pointPolygonTest(np.array(ring, np.float32), centre, False) > 0

    assert found.tolist() == [
        row
        for row, centre in enumerate(centres.tolist())
        if any(by_opencv(centre, outer) and not by_opencv(centre, hole) for outer, hole in shapes)
    ]


def test_a_centre_on_an_edge_is_inside_and_on_a_holes_edge_outside() -> None:
    grid = np.array([(x, y) for y in range(6) for x in range(6)]) * SIDE
    outer = np.array([(0.5, 0.5), (4.5, 0.5), (4.5, 4.5), (0.5, 4.5)]) * SIDE
    hole = np.array([(1.5, 1.5), (3.5, 1.5), (3.5, 3.5), (1.5, 3.5)]) * SIDE
    found = rows_inside(manifest_of(grid), [Polygon((), [outer, hole])])
    cells = {(int(row) % 6, int(row) // 6) for row in found}
    assert cells == {(x, y) for x in range(5) for y in range(5)} - {(x, y) for x in (1, 2, 3) for y in (1, 2, 3)}
    assert rows_inside(manifest_of(grid), []).tolist() == []
    assert rows_inside(manifest_of(grid[:0]), [Polygon((), [outer])]).tolist() == []


ELIGIBLE = {"a": np.array([1, 4, 5, 9, 30]), "b": np.array([7]), "none": np.array([], np.int64)}
NUM_TILES = {"a": 40, "b": 20, "c": 6, "none": 10}


@pytest.mark.parametrize("tiles", [Tiles(tiles="all"), Tiles(tiles="all", max_tiles=3), Tiles(tiles="fixed", k=8)])
def test_only_eligible_rows_are_drawn_in_any_epoch_on_any_number_of_ranks(tiles: Tiles) -> None:
    for epoch in range(5):
        by_world = []
        for world_size in (1, 3):
            topology, drawn = Topology.make(world_size, "auto", 4), dict[tuple[str, int], list[int]]()
            for rank in range(world_size):
                sampler = SlideSampler(NUM_TILES, topology, rank, seed=1, tiles=tiles, eligible=ELIGIBLE)
                sampler.set_epoch(epoch)
                drawn |= {(plan.step.slide_id, plan.virtual_rank): plan.rows.tolist() for plan in sampler}
            by_world.append(drawn)
        assert by_world[0] == by_world[1]
        rows = {slide: [row for v in range(4) for row in by_world[0][slide, v]] for slide in ("a", "b", "c")}
        assert not any(slide == "none" for slide, _ in by_world[0])
        for slide, found in rows.items():
            usable = ELIGIBLE[slide].tolist() if slide in ELIGIBLE else list(range(NUM_TILES[slide]))
            assert set(found) <= set(usable)
            assert found == sorted(found)
            assert len(found) == (tiles.k or min(len(usable), tiles.max_tiles))


def test_a_slide_without_rows_is_left_out_and_no_other_takes_its_place() -> None:
    plain = plan_epoch(NUM_TILES, epoch=0, seed=0, fraction=0.5, tiles=Tiles())
    assert len(plain) == 2
    gone = {plain[0].slide_id: np.array([], np.int64)}
    (left,) = plan_epoch(NUM_TILES, epoch=0, seed=0, fraction=0.5, tiles=Tiles(), eligible=gone)
    assert (left.slide_id, left.index) == (plain[1].slide_id, 0)


def test_scoring_knows_of_no_regions() -> None:
    assert [draw_rows(step, 0).tolist() for step in plan_scoring({"a": 40}, tiles=Tiles())] == [list(range(40))]


def square(x: float, y: float, side: float, *hole: float) -> list[list[list[float]]]:
    def ring(x: float, y: float, side: float) -> list[list[float]]:
        return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]

    return [ring(x, y, side), *([ring(*hole)] if hole else [])]  # type: ignore[arg-type]


def feature(coordinates: Any, name: str | None = "Tumor", kind: str = "Polygon") -> dict[str, Any]:
    properties = {"objectType": "annotation"} | ({"classification": {"name": name}} if name else {})
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties}


def annotate(folder: Path, name: str, *features: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"type": "FeatureCollection", "features": features}))


@pytest.fixture(scope="module")
def labels(small_cohort: Path) -> Path:
    return small_cohort / "labels.csv"


@pytest.fixture(scope="module")
def cohort(small_manifests: Path, labels: Path) -> Cohort:
    """As a run of the demo has it: six training slides."""
    config = CohortConfig(val_fraction=0.15, test_fraction=0.35)
    return load_cohort(labels, open_manifests(small_manifests), config, 0)


def median_corner(manifest: Manifest) -> tuple[float, float]:
    return float(np.median(manifest.x_l0)), float(np.median(manifest.y_l0))


EVERYWHERE = square(-1e6, -1e6, 2e6)
FAR = square(1e6, 1e6, 10)


def test_annotations_are_found_by_slide_and_class(small_manifests: Path, cohort: Cohort, tmp_path: Path) -> None:
    source, folder, training = open_manifests(small_manifests), tmp_path / "R", list(cohort.of("train"))
    x, y = median_corner(source[training[0]])
    half = square(x - 1e6, y - 1e6, 1e6)  # Up to the median, and no further.
    annotate(folder, f"{training[0]}.geojson", feature(half, "Tumor: Positive"), feature(EVERYWHERE, "Stroma"))
    annotate(folder, f"{training[1]}.svs.json", feature([EVERYWHERE], kind="MultiPolygon"), feature(FAR))
    annotate(folder, f"{training[2]}.geojson", feature(FAR))
    annotate(folder, f"{training[3]}.geojson", feature(EVERYWHERE, "Stroma"), feature(EVERYWHERE, None))
    annotate(folder, "of_no_slide.geojson", feature(EVERYWHERE))
    annotate(folder, f"{next(iter(cohort.of('test')))}.geojson", feature(EVERYWHERE))
    (folder / f"._{training[4]}.geojson").write_bytes(b"\x00of macOS")
    found = find_regions(Tiles(regions=folder, region_class="Tumor"), cohort, source)
    assert set(found.rows) == set(training[:2])
    first = source[training[0]]
    centres = np.stack([first.x_l0, first.y_l0], 1) + SIDE / 2
    assert found.rows[training[0]].tolist() == np.flatnonzero((centres <= (x, y)).all(1)).tolist()
    assert 0 < len(found.rows[training[0]]) < len(first)
    assert len(found.rows[training[1]]) == len(source[training[1]])
    used, whole = sum(map(len, found.rows.values())), sum(len(source[s]) for s in training[:2])
    assert found.notes == (
        f"tiles.regions: 2 of 6 training slides use the {used} of their {whole} tiles that lie inside annotations; "
        "all tiles are used of 2 without a file, 1 without a tile's centre inside, 1 without anything drawn of the "
        "class 'Tumor'",
    )
    everything = find_regions(Tiles(regions=folder), cohort, source)
    assert set(everything.rows) == {*training[:2], training[3]}
    assert everything.digest == found.digest


@pytest.mark.parametrize(
    ("features", "name", "message"),
    [
        (None, "", r"tiles.regions .*R: No such file or directory; expected a folder of SLIDE_ID.geojson"),
        ([feature(EVERYWHERE)], "other.geojson", "of 6 training slides 6 without a file$"),
        ([feature(FAR)], "", "of 6 training slides 5 without a file, 1 without a tile's centre inside$"),
        ([feature(EVERYWHERE, "Stroma")], "", "1 without anything drawn of the class 'Tumor', but Stroma$"),
        ([{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[["x"]]]}}], "", "not GeoJSON polygons"),
    ],
)
def test_annotations_that_leave_nothing_are_told_in_a_sentence(
    features: list[Any] | None, name: str, message: str, small_manifests: Path, cohort: Cohort, tmp_path: Path
) -> None:
    folder, region_class = tmp_path / "R", "Tumor" if "class" in message else None
    if features is not None:
        annotate(folder, name or f"{min(cohort.of('train'))}.geojson", *features)
    with pytest.raises(SlidegradError, match=message) as caught:
        find_regions(Tiles(regions=folder, region_class=region_class), cohort, open_manifests(small_manifests))
    assert "\n" not in str(caught.value)


def test_two_files_of_one_slide_are_refused(small_manifests: Path, cohort: Cohort, tmp_path: Path) -> None:
    slide_id = min(cohort.of("train"))
    for suffix in (".geojson", ".svs.geojson"):
        annotate(tmp_path / "R", slide_id + suffix, feature(EVERYWHERE))
    with pytest.raises(TrainerError, match=f"slide {slide_id} has two files of annotations; keep one"):
        find_regions(Tiles(regions=tmp_path / "R"), cohort, open_manifests(small_manifests))


def train(manifests: Path, labels: Path, run: Path, *more: str) -> None:
    parsed, comm = Train.parse(arguments(manifests, labels, run, *more)), Comm(Topology.make(1, "auto", 2), 0, CPU)
    prepare_run(run, parsed.config, manifests=manifests, labels=labels, topology=comm.topology, resume=parsed.resume)
    with closing(Loop(open_run(run), comm, lambda **_: None)) as loop:
        loop.run()


CPU = torch.device("cpu")
ALL = ("--tiles.tiles", "all", "--tiles.k", "None", "--optim.epochs", "1", "--machine.keep", "all")


def test_a_run_trains_inside_regions_scores_whole_slides_and_keeps_what_it_began_with(
    small_manifests: Path,
    labels: Path,
    cohort: Cohort,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, training, run = open_manifests(small_manifests), list(cohort.of("train")), tmp_path / "run"
    for slide_id in training[:2]:
        x, y = median_corner(source[slide_id])
        annotate(tmp_path / "R", f"{slide_id}.geojson", feature(square(x - 1e6, y - 1e6, 1e6)))
    monkeypatch.chdir(tmp_path)
    train(small_manifests, labels, run, *ALL, "--tiles.regions", "R", "--tiles.region-class", "Tumor")
    assert "note: tiles.regions: 2 of 6 training slides use the " in capsys.readouterr().err
    rows = read_regions(run)
    assert list(rows) == training[:2]
    used = {e["slide_id"]: e["num_tiles"] for e in read_events(run) if e["event"] == "step"}
    assert used == {slide_id: len(rows.get(slide_id, source[slide_id])) for slide_id in training}
    assert all(used[slide_id] < len(source[slide_id]) for slide_id in rows)
    config = RunConfig.from_yaml((run / "config.yaml").read_text(), "")
    assert config.tiles.regions == tmp_path / "R"

    resume = (*ALL, "--resume", "--tiles.regions", "R")
    with pytest.raises(TrainerError, match=r"other settings than the run's: tiles\.region_class"):
        train(small_manifests, labels, run, *resume, "--tiles.region-class", "Stroma")
    train(small_manifests, labels, run, *resume)
    assert "annotations" not in capsys.readouterr().err
    annotate(tmp_path / "R", f"{training[2]}.geojson", feature(EVERYWHERE))
    train(small_manifests, labels, run, *resume)
    assert "note: the annotations in tiles.regions changed since the run began" in capsys.readouterr().err
    assert list(read_regions(run)) == training[:2]
    (tmp_path / "R").rename(tmp_path / "elsewhere")
    assert changes_since(run, config.tiles, cohort) == []

    (run / "regions.parquet").write_bytes(b"torn")
    with pytest.raises(TrainerError, match=r"regions\.parquet, the tiles inside annotations, is missing or damaged"):
        train(small_manifests, labels, run, *resume)
