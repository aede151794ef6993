"""What is predicted of a slide: losses, class weights, units; and whole runs of each task."""

import csv
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.aggregators import build_aggregator
from trainer.checkpoint import list_checkpoints, read_best_state
from trainer.cli import Train
from trainer.cohort import Case, Cohort, Split
from trainer.comm import Comm
from trainer.config import Aggregator
from trainer.config import Head as HeadConfig
from trainer.errors import TrainerError
from trainer.evaluation.cli import Evaluate
from trainer.heads import Head
from trainer.heatmaps.cli import Heatmap
from trainer.journal import read_events
from trainer.loading.shards import Shard, SlideInput
from trainer.sampler import StepPlan
from trainer.step import Engine
from trainer.targets import Targets, Task
from trainer.topology import Topology

NAN = math.nan


def cohort_of(task: Task, train: list[Targets], outputs: tuple[str, ...], others: tuple[Targets, ...] = ()) -> Cohort:
    splits: list[tuple[Targets, Split]] = [(t, "train") for t in train] + [(t, "test") for t in others]
    cases = tuple(
        Case(slide_id=f"s{i}", targets=t, specimen_id=f"s{i}", patient_id=f"s{i}", split=split, num_tiles=1)
        for i, (t, split) in enumerate(splits)
    )
    return Cohort(cases, outputs, task=task) if task == "classes" else Cohort(cases, task=task, columns=outputs)


def head_of(config: HeadConfig, train: list[Targets], outputs: tuple[str, ...], *others: Targets) -> Head:
    return Head.for_cohort(config, cohort_of(config.task, train, outputs, others))


@pytest.fixture
def outputs_3() -> Tensor:
    return torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64, requires_grad=True)


def test_the_loss_of_classes_is_cross_entropy_and_predictions_are_probabilities(outputs_3: Tensor) -> None:
    head = Head.of_classes(3)
    assert head.num_outputs == 3
    assert head.loss(outputs_3, (2.0,)).item() == pytest.approx(-math.log(outputs_3.softmax(0)[2].item()))
    assert torch.equal(head.predict(outputs_3.float()), outputs_3.float().double().softmax(0))


def test_a_class_weight_multiplies_the_loss_of_one_slide(outputs_3: Tensor) -> None:
    """With torch's `weight=` and its mean over a single slide, it would cancel."""
    config = HeadConfig(class_weights=(1.0, 3.0, 0.5))
    head = head_of(config, [(0.0,), (1.0,), (2.0,)], ("a", "b", "c"))
    plain = Head.of_classes(3)
    for label, weight in enumerate((1.0, 3.0, 0.5)):
        loss, true = head.loss(outputs_3, (float(label),)), plain.loss(outputs_3, (float(label),))
        assert loss.item() == pytest.approx(weight * true.item())
        (gradient,), (true_gradient,) = (torch.autograd.grad(value, outputs_3) for value in (loss, true))
        torch.testing.assert_close(gradient, weight * true_gradient)


def test_balanced_classes_count_the_same_over_the_training_slides_and_the_mean_weight_is_one() -> None:
    labels = [0.0] * 6 + [1.0] * 3 + [2.0]
    head = head_of(HeadConfig(class_weights="balanced"), [(label,) for label in labels], ("a", "b", "c"), (0.0,))
    total = [labels.count(c) * head.weights[c] for c in (0, 1, 2)]
    assert total == pytest.approx([10 / 3] * 3), "the test slide does not count"
    assert sum(total) == pytest.approx(len(labels))


def test_a_class_without_training_slides_keeps_the_weight_one() -> None:
    head = head_of(HeadConfig(class_weights="balanced"), [(0.0,)] * 3 + [(2.0,)], ("a", "b", "c"), (1.0,))
    assert head.weights == pytest.approx((4 / 6, 1, 4 / 2))


def test_the_loss_over_columns_is_the_mean_of_those_known(outputs_3: Tensor) -> None:
    head = head_of(HeadConfig(task="multilabel", columns=("a", "b", "c")), [(0.0, 1.0, 0.0)], ("a", "b", "c"))
    each = F.binary_cross_entropy_with_logits(
        outputs_3, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), reduction="none"
    )
    assert head.loss(outputs_3, (1.0, 0.0, 0.0)).item() == pytest.approx(each.mean().item())
    assert head.loss(outputs_3, (1.0, NAN, 0.0)).item() == pytest.approx(each[[0, 2]].mean().item())
    (gradient,) = torch.autograd.grad(head.loss(outputs_3, (1.0, NAN, 0.0)), outputs_3)
    assert gradient[1] == 0
    assert gradient.isfinite().all()
    assert torch.equal(head.predict(outputs_3), outputs_3.sigmoid())


def test_a_balanced_yes_weighs_as_much_as_all_noes_of_its_column(outputs_3: Tensor) -> None:
    train: list[Targets] = [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.0, NAN, 0.0), (0.0, NAN, 1.0)]
    config = HeadConfig(task="multilabel", columns=("a", "b", "c"), class_weights="balanced")
    head = head_of(config, train, ("a", "b", "c"))
    assert head.weights == pytest.approx((3, 1, 1 / 3))
    yes, no = -outputs_3[0].sigmoid().log(), -(1 - outputs_3[0].sigmoid()).log()
    assert head.loss(outputs_3, (1.0, NAN, NAN)).item() == pytest.approx(3 * yes.item())
    assert head.loss(outputs_3, (0.0, NAN, NAN)).item() == pytest.approx(no.item())


def test_numbers_are_learned_standardised_and_predicted_in_their_own_unit() -> None:
    train: list[Targets] = [(100.0, 0.1), (300.0, 0.2), (200.0, NAN)]
    head = head_of(HeadConfig(task="regression", columns=("a", "b")), train, ("a", "b"), (9e9, 9e9))
    assert head.means == pytest.approx((200, 0.15)), "the test slide does not count"
    assert head.stds == pytest.approx((math.sqrt(20_000 / 3), 0.05))
    outputs = torch.tensor([0.5, -1.0], dtype=torch.float64)
    assert head.predict(outputs).tolist() == pytest.approx([200 + 0.5 * head.stds[0], 0.10])
    squares = [(0.5 - 100 / head.stds[0]) ** 2, (-1.0 - 1.0) ** 2]
    assert head.loss(outputs, (300.0, 0.2)).item() == pytest.approx(sum(squares) / 2)
    assert head.loss(outputs, (NAN, 0.2)).item() == pytest.approx(squares[1])


def test_what_is_predicted_perfectly_costs_nothing() -> None:
    head = head_of(HeadConfig(task="regression", columns=("a",)), [(1e6,), (1e6 + 3,)], ("a",))
    outputs = torch.tensor([1.0], dtype=torch.float64)
    assert head.predict(outputs).item() == 1e6 + 3
    assert head.loss(outputs, (1e6 + 3,)).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            HeadConfig(class_weights=(1.0, 2.0)),
            "has 2 numbers: expected one for each of the 3 classes, in the order a, b",
        ),
        (
            HeadConfig(task="multilabel", columns=("a", "b", "c"), class_weights=(1.0,)),
            "has 1 numbers: expected one for each of the 3 columns, in the order a, b, c",
        ),
    ],
)
def test_a_wrong_number_of_class_weights_is_refused_by_name(config: HeadConfig, message: str) -> None:
    with pytest.raises(TrainerError, match=message) as caught:
        head_of(config, [(0.0, 1.0, 0.0)[: len(config.columns)]], ("a", "b", "c"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("numbers", [(0.0, 1e-200), (-1e300, 1e300)])
def test_numbers_without_a_usable_scale_are_refused(numbers: tuple[float, float]) -> None:
    with pytest.raises(TrainerError, match=r"head\.columns a: .* too large or too much alike"):
        head_of(HeadConfig(task="regression", columns=("a",)), [(number,) for number in numbers], ("a",))


def test_a_float32_loss_stays_float32() -> None:
    """The aggregator's backward pass takes no other."""
    outputs = torch.tensor([0.5, -1.0])
    heads = [
        (Head.of_classes(2), (1.0,)),
        (head_of(HeadConfig(task="multilabel", columns=("a", "b")), [(0.0, 1.0)], ("a", "b")), (1.0, NAN)),
        (head_of(HeadConfig(task="regression", columns=("a", "b")), [(0.0, 1.0), (1.0, 2.0)], ("a", "b")), (1.0, NAN)),
    ]
    for head, targets in heads:
        assert head.loss(outputs, targets).dtype == torch.float32
        assert head.predict(outputs).dtype == torch.float64


BRIGHTNESS = (20, 90, 160, 230)
"""Of four slides of grey tiles, the only thing to learn."""


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (HeadConfig(), [(0.0,), (0.0,), (1.0,), (1.0,)]),
        (HeadConfig(task="multilabel", columns=("a", "b")), [(0.0, 1.0), (0.0, 1.0), (1.0, NAN), (1.0, 0.0)]),
        (
            HeadConfig(task="regression", columns=("a", "b")),
            [(5020.0, NAN), (5090.0, 0.9), (5160.0, 0.8), (5230.0, 0.7)],
        ),
    ],
    ids=lambda value: value.task if isinstance(value, HeadConfig) else "",
)
def test_four_slides_are_learned_by_heart(config: HeadConfig, targets: list[Targets]) -> None:
    head = head_of(config, targets, ("bright", "dark") if config.task == "classes" else config.columns)
    torch.manual_seed(0)
    encoder, aggregator = Grey(), build_aggregator(Aggregator(name="mean"), 1, head.num_outputs)
    comm = Comm(Topology.make(1, "auto", 2), 0, torch.device("cpu"))
    engine = Engine(comm, encoder, aggregator, num_features=1, seed=0, head=head)
    optimizer = torch.optim.Adam([*encoder.parameters(), *aggregator.parameters()], lr=0.3)
    losses = []
    for _ in range(100):
        engine.set_training(True)
        optimizer.zero_grad()
        losses.append(sum(outcome.loss for outcome in engine.step(slides_of(targets))))
        optimizer.step()
    assert losses[-1] < losses[0] / 10
    engine.set_training(False)
    for slide in slides_of(targets):
        outputs = engine.score(slide).outputs_C
        assert outputs is not None
        found = head.predict(outputs).tolist()
        if config.task == "classes":
            assert found[round(slide.targets[0])] > 0.7
            continue
        for value, target in zip(found, slide.targets, strict=True):
            assert math.isnan(target) or abs(value - target) < (25 if target > 1000 else 0.3)


class Grey(nn.Module):
    """A tile's brightness, times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1)

    def forward(self, tiles_NHWC: Tensor) -> Tensor:
        features_N1: Tensor = self.scale(tiles_NHWC.float().mean((1, 2, 3))[:, None] / 128 - 1)
        return features_N1


def slides_of(targets: list[Targets]) -> list[SlideInput]:
    slides = []
    for i, (brightness, known) in enumerate(zip(BRIGHTNESS, targets, strict=True)):
        tiles = torch.full((3, 8, 8, 3), brightness, dtype=torch.uint8)
        cells = torch.zeros(3, 2, dtype=torch.int32)
        shards = [Shard(0, tiles[:2], cells[:2]), Shard(1, tiles[2:], cells[2:])]
        slides.append(SlideInput(StepPlan(i, 0, f"s{i}", 3, 3), shards, known))
    return slides


@pytest.fixture(scope="module")
def labels(small_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small cohort's labels with columns of each kind, some cells empty; of synth_0008 no number is known."""
    rows = list(csv.DictReader((small_cohort / "labels.csv").open()))
    splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 4
    for i, (row, split) in enumerate(zip(rows, splits, strict=True)):
        is_tumour = int(row["label"])
        row |= {"split": split, "grade": ["low", "mid", "high"][i % 3], "er": row["label"], "pr": str(int(i % 3 == 0))}
        row |= {"score": str(40 + 25.5 * is_tumour + i), "ki67": f"0.{i + 1}"}
        for column in {1: ["pr"], 2: ["ki67"], 8: ["er", "pr", "score", "ki67"], 9: ["pr"]}.get(i, []):
            row[column] = ""
    return write_labels(tmp_path_factory.mktemp("labels"), rows)


def write_labels(folder: Path, rows: list[dict[str, str]]) -> Path:
    file = folder / "labels.csv"
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return file


def train(manifests: Path, labels: Path, run: Path, *more: str, epochs: int = 2) -> dict[str, Any]:
    words = ["demo", "--manifests", str(manifests), "--labels", str(labels), "--out", str(run)]
    quick = ["--tiles.k", "8", "--optim.epochs", str(epochs), "--optim.warmup-epochs", "0"]
    result, code = Train.parse([*words, *quick, *more]).run()
    assert code == 0
    return result


MULTILABEL = ("--head.task", "multilabel", "--head.columns", "er", "pr", "--head.class-weights", "balanced")
REGRESSION = ("--head.task", "regression", "--head.columns", "score", "ki67")


@pytest.fixture(scope="module", params=["multilabel", "regression"])
def finished(
    request: pytest.FixtureRequest, small_manifests: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, Any]]:
    """The task, and a run of two epochs with its result."""
    run = tmp_path_factory.mktemp("runs") / request.param
    flags = {"multilabel": MULTILABEL, "regression": REGRESSION}[request.param]
    return request.param, run, train(small_manifests, labels, run, *flags)


def test_a_run_of_several_columns_leaves_scores_a_result_and_a_report(
    finished: tuple[str, Path, dict[str, Any]],
) -> None:
    task, run, result = finished
    scores = pq.read_table(run / "scores.parquet").to_pylist()
    assert [row["slide_id"] for row in scores] == ["synth_0009", "synth_0010", "synth_0011"], "0008 is not known"
    assert result == json.loads((run / "result.json").read_text())
    assert (result["task"], result["num_slides"]) == (task, 3)
    html = (run / "report.html").read_text()
    assert not re.search(r"(/tmp|/home|\.svs|\.tiff?\b)", html)
    epochs = [event for event in read_events(run) if event["event"] == "epoch"]
    state = read_best_state(run)
    if task == "multilabel":
        assert [row["targets"] for row in scores] == [[0, None], [0, 0], [1, 0]]
        assert all(0 < p < 1 for row in scores for p in row["probs"])
        assert result["columns"] == ["er", "pr"]
        assert result["auc_by_column"]["pr"] is None, "no test slide is a yes"
        assert result["auc"] == result["auc_by_column"]["er"]
        assert result["num_by_column"] == {"er": [2, 1], "pr": [2, 0]}
        assert all(0 <= epoch["val_auc"] <= 1 and "val_r2" not in epoch for epoch in epochs)
        assert "Test AUC, mean over columns" in html
        assert result["val_auc"] == state["val_auc"]
    else:
        true = [(float(40 + 25.5 * (i == 11) + i), pytest.approx(float(f"0.{i + 1}"))) for i in (9, 10, 11)]
        assert [tuple(row["targets"]) for row in scores] == true
        assert all(10 < row["values"][0] < 110 for row in scores), "in the column's own unit"
        assert result["auc"] is None
        assert result["r2"] == pytest.approx(sum(result["r2_by_column"].values()) / 2, abs=1e-3)
        assert result["mae_by_column"]["score"] > result["mae_by_column"]["ki67"] > 0
        assert set(result["spearman_by_column"]) == {"score", "ki67"}
        assert all(epoch["val_auc"] is None and epoch["val_r2"] <= 1 for epoch in epochs)
        assert "Test R², mean over columns" in html
        assert result["val_r2"] == state["val_r2"]
    assert result["chosen_by"] == {"multilabel": "auc", "regression": "r2"}[task]
    highest = max(scores, key=lambda row: row["probs" if task == "multilabel" else "values"][0])["slide_id"]
    assert Path(result["heatmap"]).stem == highest


def test_a_run_of_several_columns_goes_on_and_is_scored_again(
    finished: tuple[str, Path, dict[str, Any]], small_manifests: Path, labels: Path, tmp_path: Path
) -> None:
    task, finished_run, result = finished
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    again, code = Evaluate(run_folder=run).run()
    assert code == 0
    same = {key: value for key, value in result.items() if key not in ("run", "heatmap", "report")}
    assert same.items() <= again.items()
    shutil.rmtree(list_checkpoints(run)[-1])
    resumed = train(small_manifests, labels, run, "--resume")
    assert {key: resumed[key] for key in same} == same
    flags = ("--head.columns", "score" if task == "multilabel" else "er")
    with pytest.raises(TrainerError, match=r"other settings than the run's: head\.columns"):
        train(small_manifests, labels, run, "--resume", *flags)


def test_a_heatmap_alone_predicts_what_the_run_predicted(finished: tuple[str, Path, dict[str, Any]]) -> None:
    """It scores one slide, whose own numbers must not become the scale."""
    task, run, _ = finished
    name = "probs" if task == "multilabel" else "values"
    (true,) = [row for row in pq.read_table(run / "scores.parquet").to_pylist() if row["slide_id"] == "synth_0010"]
    found, _ = Heatmap(run_folder=run, slide_ids=("synth_0010",)).run()
    assert found[name] == pytest.approx(true[name], abs=1e-3)


def test_three_classes_of_a_named_column_with_weights(small_manifests: Path, labels: Path, tmp_path: Path) -> None:
    flags = ("--head.columns", "grade", "--head.class-weights", "1", "2", "3")
    result = train(small_manifests, labels, tmp_path / "run", *flags, epochs=1)
    assert result["classes"] == ["high", "low", "mid"]
    assert sum(result["num_per_class"]) == 4
    assert "grade" in (tmp_path / "run/cohort.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--head.class-weights", "1", "2", "3"), "3 numbers: expected one for each of the 2 classes"),
        (("--head.columns", "stage"), "expected the columns slide_id, stage"),
        (
            ("--head.task", "regression", "--head.columns", "grade"),
            "column grade: expected a number or empty, 12 slides",
        ),
        (("--head.task", "multilabel", "--head.columns", "er", "score"), "column score: expected 0, 1 or empty"),
        (("--head.columns", "er", "pr"), "one column, as head.task is classes"),
    ],
)
def test_what_cannot_be_predicted_is_refused_before_any_slide_is_read(
    flags: tuple[str, ...], message: str, small_manifests: Path, labels: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainerError, match=message) as caught:
        train(small_manifests, labels, tmp_path / "run", *flags)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run/config.yaml").exists()


def test_where_validation_has_one_class_the_loss_chooses_and_the_report_says_so(
    small_manifests: Path, labels: Path, tmp_path: Path
) -> None:
    rows = [row for row in csv.DictReader(labels.open()) if row["slide_id"] != "synth_0006"]
    file = write_labels(tmp_path, rows)
    result = train(small_manifests, file, tmp_path / "run")
    losses = [event["val_loss"] for event in read_events(tmp_path / "run") if event["event"] == "epoch"]
    assert result["val_auc"] is None
    assert (result["best_epoch"], result["chosen_by"]) == (losses.index(min(losses)), "loss")
    assert result["val_loss"] == min(losses)
    assert "chosen by the validation loss" in (tmp_path / "run/report.html").read_text().replace("\n", " ")
