"""What a sweep is of: kept, extended, and not mixed with another one."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from tests.trainer.sweep.made_up import DATA, made_up_plan
from trainer.config import Head, Optim
from trainer.errors import TrainerError
from trainer.provenance import digest_file
from trainer.sweep.grid import END_TO_END, Grid
from trainer.sweep.plan import Plan, describe_data, read_plan, read_split_method, settle_plan, write_plan

GRID = Grid(ks=(50, 350), precisions=("float32",), nprocs=(1,), splits=("s000", "s001"))


def changed(plan: Plan, **settings: object) -> Plan:
    """The plan with other settings."""
    configs = {method: dataclasses.replace(config, **settings) for method, config in plan.configs.items()}
    return dataclasses.replace(plan, configs=configs)


def test_a_plan_reads_back(tmp_path: Path) -> None:
    plan = made_up_plan(dataclasses.replace(GRID, ks=(50, "all"), methods=("end_to_end", "frozen_gma")))
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path) == plan
    assert read_plan(tmp_path / "none") is None


def test_the_same_goes_on_and_more_extends(tmp_path: Path) -> None:
    plan = made_up_plan(GRID)
    write_plan(tmp_path, plan)
    assert settle_plan(tmp_path, plan) == plan
    larger = made_up_plan(
        dataclasses.replace(GRID, ks=(50, 700), splits=("s000", "s002"), methods=("end_to_end", "frozen_gma"))
    )
    found = settle_plan(tmp_path, larger)
    assert set(found.points) == {*plan.points, *larger.points}
    assert found.points[: len(plan.points)] == plan.points
    assert set(found.splits) == {"s000", "s001", "s002"}
    assert set(found.configs) == {"end_to_end", "frozen_gma"}
    write_plan(tmp_path, found)
    # A part of it leaves it as it is.
    assert settle_plan(tmp_path, made_up_plan(dataclasses.replace(GRID, ks=(700,), splits=("s002",)))) == found


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (made_up_plan(GRID, "egfr_resnet50"), "the recipe, "),
        (made_up_plan(GRID, data=dataclasses.replace(DATA, labels_sha256="12" * 32)), "the labels differs"),
        (made_up_plan(GRID, data=dataclasses.replace(DATA, manifests_digest="12" * 32)), "the manifests differs"),
        (
            made_up_plan(GRID, splits={"s000": "other", "s001": "s001" * 16}),
            "the files of 1 splits, first s000 differs",
        ),
        (made_up_plan(GRID, splits={}, split_method=None), "whether there are --splits differs"),
        (made_up_plan(GRID, split_method="kfold"), "how the splits were drawn differs"),
        (made_up_plan(GRID, weights={END_TO_END: "12" * 32}), "the content of encoder.weights differs"),
        (changed(made_up_plan(GRID), optim=Optim(epochs=7), seed=1), "optim.aggregator_lr, optim.epochs"),
    ],
)
def test_another_sweep_is_refused_in_a_sentence(other: Plan, sentence: str, tmp_path: Path) -> None:
    plan = made_up_plan(GRID)
    if "aggregator_lr" in sentence:
        other = changed(plan, optim=dataclasses.replace(plan.configs[END_TO_END].optim, epochs=7), seed=1)
        sentence = "holds another sweep: optim.epochs, seed differ; give another --out"
    write_plan(tmp_path, plan)
    before = (tmp_path / "sweep.yaml").read_bytes()
    with pytest.raises(TrainerError) as caught:
        settle_plan(tmp_path, other)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "sweep.yaml").read_bytes() == before


def test_how_machines_do_the_work_makes_no_other_sweep(tmp_path: Path) -> None:
    plan = made_up_plan(GRID)
    write_plan(tmp_path, plan)
    machine = dataclasses.replace(plan.configs[END_TO_END].machine, read_ahead_gb=1.0, save_every=7)
    settle_plan(tmp_path, changed(plan, machine=machine))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(TrainerError, match=r"holds something else than a sweep \(no sweep.yaml\)"):
        read_plan(tmp_path)
    for text in ("", "[]", "sweep: 1", "sweep: 99", "a: b: c"):
        (tmp_path / "sweep.yaml").write_text(text)
        with pytest.raises(TrainerError, match="give another --out") as caught:
            read_plan(tmp_path)
        assert "\n" not in str(caught.value).replace("\\n", "")


def test_the_data_is_known_by_its_content(small_manifests: Path, small_cohort: Path, tmp_path: Path) -> None:
    labels = small_cohort / "labels.csv"
    data = describe_data(labels, small_manifests, Head(), are_split=False)
    assert data.labels_sha256 == digest_file(labels)
    assert (data.num_slides, data.tiles) == (12, "32 px at 2 mpp")
    # Elsewhere it is the same; with one slide less it is not.
    shutil.copytree(small_manifests, tmp_path / "moved")
    assert describe_data(labels, tmp_path / "moved", Head(), are_split=False) == data
    lines = labels.read_text().splitlines()
    (tmp_path / "fewer.csv").write_text("\n".join(lines[:-1]))
    fewer = describe_data(tmp_path / "fewer.csv", small_manifests, Head(), are_split=False)
    assert fewer.num_slides == 11
    assert fewer.manifests_digest != data.manifests_digest
    # Slides may be named by file, and one that is not there is told.
    (tmp_path / "files.csv").write_text("\n".join([lines[0], *(line.replace(",", ".svs,", 1) for line in lines[1:])]))
    by_file = describe_data(tmp_path / "files.csv", small_manifests, Head(), are_split=False)
    assert by_file.manifests_digest == data.manifests_digest
    (tmp_path / "more.csv").write_text("\n".join([*lines, lines[-1].replace(",", "x,", 1)]))
    with pytest.raises(TrainerError, match="1 of 13 slides have no manifest"):
        describe_data(tmp_path / "more.csv", small_manifests, Head(), are_split=False)


def test_splits_come_from_one_side(small_manifests: Path, tmp_path: Path, small_cohort: Path) -> None:
    lines = (small_cohort / "labels.csv").read_text().splitlines()
    (tmp_path / "l.csv").write_text("\n".join([f"{lines[0]},split", *(f"{line},train" for line in lines[1:])]))
    describe_data(tmp_path / "l.csv", small_manifests, Head(), are_split=False)
    with pytest.raises(TrainerError, match=r"has a column split, and there are --splits: give one of them"):
        describe_data(tmp_path / "l.csv", small_manifests, Head(), are_split=True)


def test_how_splits_were_drawn_is_known_if_it_is_said(tmp_path: Path) -> None:
    assert read_split_method(tmp_path) is None
    for text, method in (('{"method": "kfold"}', "kfold"), ("{}", None), ("torn", None), ("[]", None)):
        (tmp_path / "splits.json").write_text(text)
        assert read_split_method(tmp_path) == method
