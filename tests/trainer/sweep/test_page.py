"""What a sweep leaves, of runs that are made up: rows, figures, and one page without anything from elsewhere."""

import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path

import cv2
import pyarrow.parquet as pq
import pytest

from tests.trainer.reports.test_report import Page
from tests.trainer.sweep.made_up import auc_of, loss_of, made_up_plan, make_run, make_sweep, val_of
from trainer.errors import TrainerError
from trainer.sweep.grid import Grid
from trainer.sweep.page import collect
from trainer.sweep.plan import Plan
from trainer.sweep.states import Ended, run_folder, write_ended

GRID = Grid(
    ks=(50, 350, 700, 2100),
    precisions=("float32",),
    nprocs=(1,),
    splits=("s000", "s001", "s002"),
    methods=("end_to_end", "frozen_gma"),
)
PLAN = made_up_plan(GRID, "finetune_vit_base", weights=dict.fromkeys(GRID.methods, "ef" * 32))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 runs: one failed, one was begun, one left nothing, 21 are done."""
    folder = tmp_path_factory.mktemp("sweeps") / "made_up"
    make_sweep(folder, PLAN)
    failed, begun, unknown = PLAN.points[:3]
    for point in (failed, begun, unknown):
        shutil.rmtree(run_folder(folder, point.name))
    write_ended(folder, failed.name, Ended(code=2, reason="no <b> slide at /archive/Doe Jane/1.svs; mount it"))
    make_run(folder, begun, PLAN.configs["end_to_end"], num_epochs=1, is_done=False)
    write_ended(folder, begun.name, Ended(code=75, reason="stopped by SIGTERM"))
    (folder / "logs" / f"{unknown.name}.ended.json").unlink()
    collect(folder, PLAN)
    return folder


def page_of(sweep: Path) -> Page:
    return Page((sweep / "report.html").read_text())


def test_every_run_is_a_row_with_all_that_is_known(sweep: Path) -> None:
    rows = {row["run"]: row for row in pq.read_table(sweep / "results.parquet").to_pylist()}
    assert list(rows) == [point.name for point in PLAN.points]
    failed, begun, unknown, *done = (rows[point.name] for point in PLAN.points)
    assert (failed["state"], begun["state"], unknown["state"]) == ("failed", "begun", "open")
    assert failed["reason"] == "no <b> slide at [path]; mount it"
    assert begun["num_epochs"] == 1
    assert begun["test_auc"] is None
    for point, row in zip(PLAN.points[3:], done, strict=True):
        assert (row["method"], row["k"], row["split"], row["seed"]) == (point.method, point.k, point.split, 0)
        assert row["test_auc"] == auc_of(point)
        assert row["test_auc_high"] == pytest.approx(auc_of(point) + 0.1)
        assert row["best_val_auc"] == val_of(point)
        assert row["final_train_loss"] == pytest.approx(loss_of(point))
        assert (row["num_epochs"], row["seconds"], row["tiles_per_s"]) == (3, 300, 50)
        assert row["device_hours"] == pytest.approx(300 / 3600)
        assert row["peak_rss_gb"] == pytest.approx(1.5)
        assert (row["num_train"], row["num_test"], row["version"]) == (80, 24, "0.1.0")
    digests = {method: {row["config_digest"] for row in done if row["method"] == method} for method in GRID.methods}
    assert [len(values) for values in digests.values()] == [1, 1]
    assert digests["end_to_end"] != digests["frozen_gma"]
    in_csv = list(csv.DictReader((sweep / "results.csv").open()))
    assert [row["run"] for row in in_csv] == list(rows)
    assert float(in_csv[-1]["test_auc"]) == done[-1]["test_auc"]
    curves = pq.read_table(sweep / "curves.parquet").to_pylist()
    assert len(curves) == 21 * 3 + 1
    assert set(curves[0]) >= {"run", "k", "epoch", "train_loss", "val_loss", "val_auc"}


def test_a_resumed_run_counts_each_epoch_once(tmp_path: Path) -> None:
    plan = made_up_plan(Grid(ks=(50,), precisions=("float32",), nprocs=(3,)))
    make_sweep(tmp_path, plan)
    file = run_folder(tmp_path, plan.points[0].name) / "metrics.jsonl"
    again = {"event": "epoch", "epoch": 2, "train_loss": 0.125, "val_loss": None, "val_auc": None, "seconds": 50.0}
    with file.open("a") as stream:
        stream.write(json.dumps(again | {"tiles_per_s": 70.0}) + '\n{"event": "epoch", "epo')
    ((row,), _, _) = collect(tmp_path, plan)
    assert (row.num_epochs, row.final_train_loss, row.seconds) == (3, 0.125, 250)
    assert row.device_hours == pytest.approx(3 * 250 / 3600)


def test_the_page_is_whole_and_loads_nothing(sweep: Path) -> None:
    html, page = (sweep / "report.html").read_text(), page_of(sweep)
    assert html.startswith("<!doctype html>")
    assert page.open == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "http" not in html.replace("http-equiv", "")
    assert not re.findall(r"url\((?!#)", html)
    links = [load for load in page.loads if not load.startswith(("#", "data:"))]
    assert len(links) == 21
    assert all((sweep / link).is_file() for link in links)
    assert html.count("default-src 'none'") == 1
    assert "/archive" not in html
    assert "Doe" not in html
    assert "<b> slide" not in html
    for picture in page.described:
        assert picture


def test_the_page_says_what_was_run_and_what_was_not(sweep: Path) -> None:
    text = " ".join(page_of(sweep).text.split())
    for said in (
        "21 of 24",
        "3 of 24 runs are not done (1 failed, 1 begun, not ended, 1 not begun)",
        "the table is of those that are",
        "120 of 90 patients, tiles of 32 px at 2 mpp",
        "SHA-256 of the file " + "ab" * 32,
        "3, Monte-Carlo cross-validation, by patient",
        "Best validation AUC",
        "Nadeau and Bengio's (2003) corrected resampled t",
        "no <b> slide at [path]; mount it",
        "What finetune_vit_base+frozen_gma changes",
        "encoder.freeze none all",
        "the mean final training loss",
        "Training loss by epoch: end to end",
        "Device-hours",
    ):
        assert said in text, said
    # Both methods of a foundation model's fine-tuning, and what they share.
    weights = "vit_base_patch16_224, its own weights (pretrained), SHA-256 of the file " + "ef" * 32
    assert f"Encoder starts from {weights}; the same for both methods" in text


def test_methods_from_different_weights_are_told_apart(tmp_path: Path) -> None:
    grid = dataclasses.replace(GRID, ks=(50,), splits=("s000",))
    plan = made_up_plan(grid, "finetune_vit_base", weights={"end_to_end": "ef" * 32, "frozen_gma": "12" * 32})
    make_sweep(tmp_path, plan, num_epochs=1)
    collect(tmp_path, plan)
    text = " ".join(page_of(tmp_path).text.split())
    assert "the same for both methods" not in text
    assert "Encoder of frozen encoder, GMA starts from vit_base_patch16_224, its own weights (pretrained)" in text


def test_the_figures_are_files_too(sweep: Path) -> None:
    stems = {file.stem for file in (sweep / "plots").glob("*.svg")}
    by_epoch = {f"loss_by_epoch_{method}_float32_1" for method in GRID.methods}
    assert stems == {*by_epoch, "loss_by_k", "test_auc_by_k", "best_val_auc_by_k"}
    for stem in stems:
        picture = cv2.imread(str(sweep / "plots" / f"{stem}.png"))
        assert picture.shape[1] > 1000
        assert picture.min() < 128
        assert (sweep / "plots" / f"{stem}.svg").read_text().startswith("<?xml")


def test_a_curve_that_the_points_do_not_settle_is_not_drawn(tmp_path: Path, sweep: Path) -> None:
    plan = made_up_plan(Grid(ks=(50, 350), precisions=("float32",), nprocs=(1,)))
    make_sweep(tmp_path, plan)
    collect(tmp_path, plan)
    told = "No curve is drawn through end to end: the points do not settle one"
    assert told in page_of(tmp_path).text
    assert "Dashed" not in page_of(tmp_path).text
    assert told not in page_of(sweep).text
    assert "One split: there is no spread over splits" in page_of(tmp_path).text


@pytest.mark.parametrize("state", ["nothing begun", "no epoch ended"])
def test_a_page_of_a_sweep_that_has_hardly_begun(state: str, tmp_path: Path) -> None:
    if state == "no epoch ended":
        make_run(tmp_path, PLAN.points[0], PLAN.configs["end_to_end"], num_epochs=0, is_done=False)
    rows, _, _ = collect(tmp_path, PLAN)
    assert {row.state for row in rows} <= {"open", "begun"}
    page = page_of(tmp_path)
    assert page.open == []
    assert "No epoch has ended yet." in page.text


def test_folds_are_told_and_a_result_that_cannot_be_read_costs_its_run_alone(tmp_path: Path) -> None:
    grid = Grid(ks=(50,), precisions=("float32",), nprocs=(1,), splits=("s000", "s001"))
    plan: Plan = made_up_plan(grid, split_method="kfold")
    make_sweep(tmp_path, plan)
    (run_folder(tmp_path, plan.points[0].name) / "result.json").write_text('{"auc": 0.')
    rows, _, _ = collect(tmp_path, plan)
    assert rows[0].test is None
    assert rows[1].test == auc_of(plan.points[1])
    assert "result.json is not readable" in page_of(tmp_path).text
    assert "k folds: training slides overlap, test slides do not" in page_of(tmp_path).text


def test_a_reference_must_be_there(sweep: Path) -> None:
    with pytest.raises(TrainerError, match="--reference tile_max: expected a method of the sweep, one of end_to_end, "):
        collect(sweep, PLAN, "tile_max")
