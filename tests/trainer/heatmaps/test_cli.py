"""`slidegrad heatmap` on a run: one slide, several, a split; what it leaves, and what a user may get wrong."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from manifests import LocalManifests, Manifest, sample_tiles
from manifests.files import disk_name, mask_path, read_manifest, tiles_path
from services.index import TileIndex
from tests.trainer.heatmaps.made_values import ODD_ID
from tiler import open_slide, read_tiles
from tiler.archive import Job, tile_archive
from tiler.config import TilerConfig
from tiler.masks import read_mask
from trainer.checkpoint import save_checkpoint
from trainer.cli import Train
from trainer.comm import Comm
from trainer.errors import TrainerError
from trainer.heads import Head
from trainer.heatmaps.cli import Heatmap
from trainer.heatmaps.painting import tile_boxes
from trainer.heatmaps.sheet import plan_sheet, shown_side
from trainer.model import build_engine, halves_of
from trainer.prepare import open_run, prepare_run
from trainer.topology import Topology

TEST_IDS = (ODD_ID, "a", "a_tiles", "plain")
"""What is made of `a` must not take the name of what is made of `a_tiles`."""
GRADES = ("low", "mid", "high")


@pytest.fixture(scope="module")
def folder(small_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """slides/, manifests/ and labels.csv of eight slides, four of them for the test."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "slides").mkdir()
    names = (*(f"train_{i}" for i in range(4)), *TEST_IDS)
    rows = []
    for i, name in enumerate(names):
        (slide,) = (small_cohort / "slides").glob(f"synth_{i:04d}.*")
        shutil.copy(slide, folder / "slides" / f"{name}{slide.suffix}")
        known = {"label": i % 2, "grade": GRADES[i % 3], "ki67": 10 + 7 * i, "hrd": i / 100}
        rows.append({"slide_id": name, "split": "train" if i < 4 else "test", **known})
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    config = TilerConfig(tile_px=32, mpp=2.0)
    tile_archive(str(folder / "slides"), folder / "manifests", config, Job(num_workers=0))
    return folder


def make_run(folder: Path, run: Path, *flags: str) -> Path:
    """A run as it stands before its first step: its folder is prepared, its checkpoint has the initial weights."""
    paths = ["--manifests", str(folder / "manifests"), "--labels", str(folder / "labels.csv"), "--out", str(run)]
    command = Train.parse(["demo", *paths, "--optim.precision", "float64", *flags])
    topology = Topology.make(1, "auto", command.config.virtual_ranks)
    prepare_run(
        run, command.config, manifests=command.manifests, labels=command.labels, topology=topology, resume=False
    )
    job, comm = open_run(run), Comm(topology, 0, torch.device("cpu"))
    engine = build_engine(
        job.config, comm, tile_px=job.tile_px, head=Head.for_cohort(job.config.head, job.cohort), initial=True
    )
    halves = {name: {"model": half.state_dict()} for name, half in halves_of(engine).items()}
    assert not save_checkpoint(run, comm, halves, {"epoch": 0, "slide": None, "best_epoch": None})
    return run


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that no test changes."""
    return make_run(folder, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "run")


def manifest_of(folder: Path, slide_id: str) -> Manifest:
    return read_manifest(tiles_path(folder / "manifests", slide_id))


def facts_of(table: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(pq.read_schema(table).metadata[b"slidegrad"])
    return facts


def column(table: str, name: str) -> np.ndarray:
    return np.asarray(pq.read_table(table)[name].to_numpy())


def without_archive(run: Path, archive: Path) -> None:
    """The run's slides are looked for where there are none."""
    config = run / "config.yaml"
    text = config.read_text()
    assert "archive: null" in text
    config.write_text(text.replace("archive: null", f"archive: {archive}"))


@pytest.mark.parametrize("slide_id", [ODD_ID, "plain"])
def test_one_slide_leaves_all_files_and_they_tell_it_by_its_id(folder: Path, run: Path, slide_id: str) -> None:
    result, code = Heatmap(run_folder=run, slide_ids=(slide_id,)).run()
    assert code == 0
    stem = disk_name(slide_id)
    ends = {
        "heatmap": ".png",
        "contribution": "_contribution.png",
        "sheet": "_tiles.png",
        "geojson": ".geojson",
        "table": ".parquet",
    }
    for key, end in ends.items():
        assert Path(result[key]) == run / "heatmaps" / f"{stem}{end}"
        assert Path(result[key]).stat().st_size > 500
    assert len(list((run / "heatmaps").iterdir())) == len(ends), "nothing else, nothing half-written"
    assert set(result) == {"slide_id", "probs", *ends}
    assert result["slide_id"] == facts_of(result["table"])["slide_id"] == slide_id
    manifest = manifest_of(folder, slide_id)
    collection = json.loads(Path(result["geojson"]).read_text())
    assert len(collection["features"]) == len(manifest) == pq.read_metadata(result["table"]).num_rows
    assert collection["slidegrad"]["slide_id"] == slide_id
    slides = folder / "slides"
    for file in (run / "heatmaps").iterdir():
        for told in (str(slides), slides.parent.name, ".svs"):
            assert told.encode() not in file.read_bytes(), file.name


def test_contributions_add_up_to_the_log_odds_and_attention_to_one(run: Path) -> None:
    result, _ = Heatmap(run_folder=run, slide_ids=("a",), sheet=False).run()
    facts, probs = facts_of(result["table"]), result["probs"]
    assert facts["what"] == "log-odds of class 1 over 0"
    assert facts["total"] == pytest.approx(np.log(probs[1] / probs[0]), rel=1e-4)
    assert column(result["table"], "contribution").sum(dtype=float) + facts["base"] == pytest.approx(
        facts["total"], abs=1e-6
    )
    assert column(result["table"], "attention").sum() == pytest.approx(1, abs=1e-5)
    assert abs(column(result["table"], "contribution")).max() > 0


def test_the_sheet_shows_the_tiles_that_stand_highest_and_lowest(folder: Path, run: Path) -> None:
    result, _ = Heatmap(run_folder=run, slide_ids=("plain",), top=3).run()
    parts, manifest = column(result["table"], "contribution"), manifest_of(folder, "plain")
    rows = np.array([*np.argsort(-parts, kind="stable")[:3], *np.argsort(parts, kind="stable")[:3]])
    (file,) = (folder / "slides").glob("plain.*")
    tiles = read_tiles(open_slide(file), manifest, rows)
    sheet = cv2.imread(result["sheet"])[..., ::-1]
    side = shown_side(32)
    layout = plan_sheet(3, 3, side, 4)
    assert sheet.shape[:2] == (layout.height, layout.width)
    for tile, (left, top) in zip(tiles, layout.corners, strict=True):
        shown = sheet[top : top + side, left : left + side]
        assert (shown[::5, ::5] == tile).all()
    labelled = [f["properties"].get("classification", {}).get("name") for f in _features(result)]
    assert {i for i, name in enumerate(labelled) if name == "Highest contribution"} == set(rows[:3].tolist())
    assert {i for i, name in enumerate(labelled) if name == "Lowest contribution"} == set(rows[3:].tolist())


def _features(result: dict[str, Any]) -> list[dict[str, Any]]:
    features: list[dict[str, Any]] = json.loads(Path(result["geojson"]).read_text())["features"]
    return features


def test_a_tile_is_painted_where_the_thumbnail_shows_it(folder: Path) -> None:
    """Neither turned nor mirrored: a tile is as dark as the place of the thumbnail that takes its colour."""
    manifest = manifest_of(folder, "plain")
    overview = read_mask(mask_path(folder / "manifests", "plain")).overview
    (file,) = (folder / "slides").glob("plain.*")
    tiles = read_tiles(open_slide(file), manifest, np.arange(len(manifest)))
    boxes = tile_boxes(manifest, overview.mpp)
    places = [overview.thumbnail[top:bottom, left:right].mean() for left, top, right, bottom in boxes.tolist()]
    assert np.corrcoef(places, tiles.mean((1, 2, 3)))[0, 1] > 0.98


def test_several_slides_and_a_name_that_another_slide_has(run: Path) -> None:
    result, code = Heatmap(run_folder=run, slide_ids=("a_tiles", "a", "a")).run()
    assert (code, result["num_slides"], result["num_failed"], result["failed"]) == (0, 2, 0, [])
    both = {slide["slide_id"]: slide for slide in result["slides"]}
    assert list(both) == ["a_tiles", "a"], "in the order asked for, each once"
    assert Path(both["a_tiles"]["heatmap"]).name == "a_tiles.png"
    files = [slide[key] for slide in both.values() for key in ("heatmap", "contribution", "sheet", "geojson", "table")]
    assert len(set(files)) == 10
    assert all(Path(file).is_file() for file in files)
    assert Path(both["a"]["sheet"]).name.startswith("a_tiles-")


def test_a_split_and_a_slide_of_it_that_fails(folder: Path, run: Path, tmp_path: Path, capfd: Any) -> None:
    manifests = shutil.copytree(folder / "manifests", tmp_path / "manifests")
    mask_path(manifests, "plain").unlink()
    result, code = Heatmap(run_folder=run, split="test", manifests=manifests, sheet=False).run()
    assert code == 1
    assert (result["num_slides"], result["num_failed"]) == (3, 1)
    assert [slide["slide_id"] for slide in result["slides"]] == sorted(set(TEST_IDS) - {"plain"})
    (lost,) = result["failed"]
    assert lost["slide_id"] == "plain"
    assert lost["reason"].startswith("slide plain: ")
    assert "no readable tissue mask" in lost["reason"]
    assert str(tmp_path) not in json.dumps(lost)
    assert "failed: slide plain: " in capfd.readouterr().err
    assert (run / "heatmaps" / "plain.parquet").is_file(), "what needs no thumbnail is there"


def test_without_the_slides_the_rest_is_drawn_from_what_an_earlier_call_left(
    run: Path, tmp_path: Path, capfd: Any
) -> None:
    first, _ = Heatmap(run_folder=run, slide_ids=("a",), sheet=False).run()
    before = {key: Path(first[key]).read_bytes() for key in ("heatmap", "contribution", "geojson", "table")}
    for key in ("heatmap", "contribution", "geojson"):
        Path(first[key]).unlink()
    without_archive(run, tmp_path / "gone")
    again, code = Heatmap(run_folder=run, slide_ids=("a",)).run()
    assert code == 0
    assert again["sheet"] is None
    assert again["no_sheet"].startswith("slide a: its file cannot be read (No such file or directory); look whether")
    assert str(tmp_path) not in again["no_sheet"]
    assert again["probs"] == first["probs"]
    assert {key: Path(again[key]).read_bytes() for key in before} == before
    assert "no sheet: slide a: its file cannot be read" in capfd.readouterr().err
    with pytest.raises(TrainerError, match=r"^slide plain: its file cannot be read"):
        Heatmap(run_folder=run, slide_ids=("plain",)).run()
    result, code = Heatmap(run_folder=run, slide_ids=("a", "plain")).run()
    assert (code, result["num_slides"], [lost["slide_id"] for lost in result["failed"]]) == (1, 1, ["plain"])


def test_pictures_of_other_values_do_not_stay_beside_new_ones(run: Path) -> None:
    first, _ = Heatmap(run_folder=run, slide_ids=("a",)).run()
    assert Path(first["sheet"]).is_file()
    second, _ = Heatmap(run_folder=run, slide_ids=("a",), output="0", sheet=False).run()
    assert not Path(first["sheet"]).exists(), "it showed what speaks for the other class"
    facts = facts_of(second["table"])
    assert (facts["origin"]["output"], facts["what"]) == ("0", "log-odds of class 0 over 1")


def test_an_aggregator_that_tells_no_contributions(folder: Path, tmp_path: Path, capfd: Any) -> None:
    run = make_run(folder, tmp_path / "run", "--aggregator.name", "max")
    result, code = Heatmap(run_folder=run, slide_ids=("a",), top=2).run()
    sentence = "aggregator max gives no contributions: its outputs are no sum over tiles"
    assert (code, result["contribution"], result["no_contribution"]) == (0, None, sentence)
    assert f"note: {sentence}" in capfd.readouterr().err
    assert not (run / "heatmaps" / "a_contribution.png").exists()
    assert np.isnan(column(result["table"], "contribution")).all()
    names = {f["properties"].get("classification", {}).get("name") for f in _features(result)}
    assert names == {"Highest attention", "Lowest attention", None}
    assert Path(result["sheet"]).is_file()
    with pytest.raises(TrainerError, match=f"--output 1 would have no effect: {sentence}"):
        Heatmap(run_folder=run, slide_ids=("a",), output="1").run()


def test_three_classes_and_part_of_the_tiles(folder: Path, tmp_path: Path) -> None:
    """A scoring that sees five tiles leaves the others without a value."""
    run = make_run(folder, tmp_path / "run", "--head.columns", "grade", "--tiles.max-tiles", "5")
    result, _ = Heatmap(run_folder=run, slide_ids=("a",), output="low").run()
    facts, parts = facts_of(result["table"]), column(result["table"], "contribution")
    assert facts["outputs"] == ["high", "low", "mid"]
    logits = np.log(result["probs"])
    assert facts["total"] == pytest.approx(logits[1] - (logits[0] + logits[2]) / 2, rel=1e-4, abs=1e-5)
    rows = sample_tiles(len(parts), k=5, seed=0, epoch=0, slide_id="a")
    assert np.flatnonzero(np.isfinite(parts)).tolist() == rows.tolist()
    assert np.flatnonzero(np.isfinite(column(result["table"], "attention"))).tolist() == rows.tolist()
    assert np.nansum(parts, dtype=float) + facts["base"] == pytest.approx(facts["total"], abs=1e-6)
    seen = ["contribution" in f["properties"]["measurements"] for f in _features(result)]
    assert seen == np.isfinite(parts).tolist()


def test_numbers_have_contributions_in_their_own_unit(folder: Path, tmp_path: Path) -> None:
    flags = ("--head.task", "regression", "--head.columns", "ki67", "hrd", "--aggregator.name", "mean")
    run = make_run(folder, tmp_path / "run", *flags)
    for name, position in (("", 0), ("hrd", 1)):
        result, _ = Heatmap(run_folder=run, slide_ids=("a",), output=name, sheet=False).run()
        facts = facts_of(result["table"])
        assert facts["total"] == pytest.approx(result["values"][position], rel=1e-4)
        total = column(result["table"], "contribution").sum() + facts["base"]
        assert total == pytest.approx(facts["total"], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"slide_ids": ("plane",)}, r"^slide plane: not in the cohort of .*; did you mean plain\?$"),
        (
            {"slide_ids": ("a", "x/y", "zz")},
            r"^2 slides, x/y, zz: not in the cohort of .*csv lists its slides$",
        ),
        ({}, r"^expected ids of slides behind the run, or --split test; got neither$"),
        ({"slide_ids": ("a",), "split": "test"}, r"or --split test; not both$"),
        ({"split": "val"}, r"no slides in the split 'val'$"),
        ({"slide_ids": ("a",), "top": 0}, r"^--top 0: expected 1 to 120$"),
        ({"slide_ids": ("a",), "output": "2"}, r"^--output 2: expected a class of the run, one of 0, 1$"),
        ({"slide_ids": ("a",), "run_folder": Path("/nowhere")}, r"^/nowhere: no run here"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(run: Path, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainerError, match=message):
        Heatmap(**{"run_folder": run, **flags}).run()
    assert not (run / "heatmaps").exists()


def test_a_damaged_table_is_made_again(run: Path) -> None:
    first, _ = Heatmap(run_folder=run, slide_ids=("a",), sheet=False).run()
    whole = Path(first["table"]).read_bytes()
    Path(first["table"]).write_bytes(whole[: len(whole) // 2])
    Heatmap(run_folder=run, slide_ids=("a",), sheet=False).run()
    assert Path(first["table"]).read_bytes() == whole


@pytest.mark.slow
def test_the_command_line_takes_slides_a_split_and_no_sheet(run: Path, slidegrad: Callable[..., Any]) -> None:
    ended = slidegrad("heatmap", run, "a", ODD_ID, "--no-sheet", "--top", "3")
    assert ended.code == 0, ended.stderr
    assert [slide["slide_id"] for slide in ended.result["slides"]] == ["a", ODD_ID]
    assert {slide["no_sheet"] for slide in ended.result["slides"]} == {"not asked for"}
    ended = slidegrad("heatmap", run, "nobody")
    assert ended.code == 2
    assert "Traceback" not in ended.stderr


def test_manifests_are_told_by_the_hash_that_the_service_tells(folder: Path, run: Path) -> None:
    result, _ = Heatmap(run_folder=run, slide_ids=("a",), sheet=False).run()
    told = facts_of(result["table"])["origin"]["manifest_hash"]
    assert told == TileIndex(LocalManifests(folder / "manifests").root).manifest("a").hash
