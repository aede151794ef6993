"""The report of made-up runs: one offline file, all parts, missing parts named, nothing leaked, nothing injected."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from manifests.files import disk_name
from trainer.errors import TrainerError
from trainer.heatmaps.cards import draw_card
from trainer.measures.merits import measure_all
from trainer.reports.report import write_report
from trainer.reports.runlog import read_log, read_settings
from trainer.targets import Task

ODD_ID = "<script>alert('1')</script> & \"ä\" $x^2$"
ODD = "er \"<b>'"
"""A column."""
RUN = {
    "event": "run",
    "recipe": "tiny",
    "versions": {"slidegrad": "0.1.0", "python": "3.11.7", "torch": "2.9.0"},
    "digests": {"cohort": "c0" * 16, "manifests": "d1" * 16, "weights": None},
    "world_size": 3,
    "num_encoder_ranks": 2,
    "virtual_ranks": 4,
    "device": "cpu",
    "num_slides": {"train": 20, "val": 6, "test": 12},
    "started": "2025-01-02T03:04:05+00:00",
}
END = {"event": "end", "seconds": 3725.0}


class Page(HTMLParser):
    """Tags that were left open, scripts, and whatever a browser would fetch."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.described: list[str | None] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.text += " "
        self.described += [value for name, value in attrs if name == "aria-label"]
        self.loads += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "xlink:href", "data"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"style", "script"}:
            self.text += data


def step(number: int, epoch: int, **changes: Any) -> dict[str, Any]:
    line = {"event": "step", "step": number, "epoch": epoch, "slide_id": "a", "loss": 0.5, "lr": 1e-4}
    return line | {"num_tiles": 100, "step_s": 0.5, "data_wait_s": 0.1} | changes


def epoch(number: int, **changes: Any) -> dict[str, Any]:
    line = {"event": "epoch", "epoch": number, "train_loss": 0.5 / (number + 1), "val_loss": 0.6, "val_auc": 0.8}
    return line | {"seconds": 10.0, "tiles_per_s": 200.0, "device_hours": 0.5, "memory_gb": 1.25} | changes


def write_lines(run: Path, lines: list[dict[str, Any]], tail: str = "") -> None:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def write_scores(
    run: Path, probs: list[list[float]], labels: list[int], split: str = "test", first: str = "s0"
) -> None:
    num = len(labels)
    table = {
        "slide_id": [first, *(f"s{i}" for i in range(1, num))],
        "patient_id": [f"p{i}" for i in range(num)],
        "split": [split] * num,
        "label": pa.array(labels, pa.int32()),
        "probs": pa.array(probs, pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(table), run / "scores.parquet")


def write_targets(run: Path, task: Task, targets: list[list[float | None]], predicted: list[list[float]]) -> None:
    """Scores of columns, with the result that belongs to them."""
    num, names = len(targets), [ODD, "ki67 $x$", "hrd"][: len(targets[0])]
    table = {
        "slide_id": [f"s{i}" for i in range(num)],
        "patient_id": [f"p{i}" for i in range(num)],
        "split": ["test"] * num,
        "targets": pa.array(targets, pa.list_(pa.float64())),
        "values" if task == "regression" else "probs": pa.array(predicted, pa.list_(pa.float64())),
    }
    pq.write_table(pa.table(table), run / "scores.parquet")
    measured = measure_all(task, tuple(names), np.array(targets, np.float64), np.array(predicted))
    result = {**measured, "split": "test", "num_slides": num, "task": task, "columns": names, "best_epoch": 1}
    (run / "result.json").write_text(json.dumps(result))


def text_of(run: Path) -> str:
    return " ".join(Page(write_report(run).read_text()).text.split())


def binary(scores: list[float]) -> list[list[float]]:
    return [[1 - score, score] for score in scores]


@pytest.fixture
def whole_run(tmp_path: Path) -> Path:
    """A run with everything, whose first slide has an odd name and whose settings and errors hold paths."""
    run = tmp_path / "run <7>"
    lines = [RUN, *(step(i, i // 10) for i in range(40)), *(epoch(i, val_auc=0.7 + 0.05 * i) for i in range(4))]
    reason = "damaged tile: /archive/Doe, Jane/S 1.svs: expected JPEG"
    lines += [{"event": "skip", "slide_id": ODD_ID, "epoch": e, "reason": reason} for e in (0, 1)]
    write_lines(run, [*lines, END])
    labels = [1] * 25 + [0] * 30
    scores = np.random.default_rng(0).normal(np.array(labels) * 1.5)
    probs = 1 / (1 + np.exp(-scores))
    probs[0] = 0.999
    write_scores(run, binary(probs.tolist()), labels, first=ODD_ID)
    result = {"auc": 0.8765, "auc_ci": [0.7654, 0.9432], "num_slides": 55, "split": "test", "val_auc": 0.85}
    result |= {"best_epoch": 3, "run": "/home/doe/run", "skipped": [reason, "no /archive/b.svs"]}
    (run / "result.json").write_text(json.dumps(result))
    config = {"seed": 11, "machine": {"manifests": "/data/Doe/m", "archive": None}, "encoder": {"name": "resnet18"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "heatmaps").mkdir()
    picture = np.full((40, 60, 3), 200, np.uint8)
    (run / "heatmaps" / f"{disk_name(ODD_ID)}.png").write_bytes(draw_card(picture, picture, 8.0))
    return run


def test_whole_report(whole_run: Path) -> None:
    file = write_report(whole_run)
    assert file == whole_run / "report.html"
    assert not list(whole_run.glob(".*")), "no half-written file is left"
    html = file.read_text()
    page = Page(html)
    text = " ".join(page.text.split())
    assert not page.open
    for part in (
        "tiny",
        "run <7>",
        "Test AUC 0.876",
        "95 % interval 0.765 to 0.943",
        "55 25 positive, 30 negative",
        "Validation AUC 0.850 checkpoint of epoch 3",
        "1 h 2 min",
        "200 tiles/s",
        "ROC curve",
        "Scores by class",
        "Validation AUC",
        "Learning rate",
        "20.0 % over the run",
        "20 training, 6 validation, 12 test",
        "3, of which 2 encode, as 4 virtual ranks",
        "python 3.11.7",
        "d1" * 16,
        "none: random weights",
        "device-hours",
        "at most 1.25 GB of memory in a process",
        "torch 2.9.0",
        "seed 11",
        "encoder.name resnet18",
        "machine.manifests [path]",
        "the chance that a positive slide scores higher",
    ):
        assert part in text
    assert page.tags.count("svg") == 6
    assert page.tags.count("figure") == 7
    assert 'class="missing"' not in html
    assert 'class="notes"' not in html


def test_nothing_is_loaded_from_elsewhere(whole_run: Path) -> None:
    html = write_report(whole_run).read_text()
    page = Page(html)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.loads
    assert all(target.startswith(("#", "data:image/jpeg;base64,")) for target in page.loads)
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert "default-src 'none'" in html


def test_no_path_and_no_markup_of_a_user_gets_in(whole_run: Path) -> None:
    html = write_report(whole_run).read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(" in html
    text = Page(html).text
    assert ODD_ID in text
    assert "damaged tile: [path]: expected JPEG" in text
    for leak in ("/archive", "/data", "/home", "Doe", "S 1.svs", "b.svs"):
        assert leak not in html


def test_figures_share_no_ids(whole_run: Path) -> None:
    html = write_report(whole_run).read_text()
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"', html))
    assert {a or b for a, b in targets} <= set(ids)


def test_only_a_log(tmp_path: Path) -> None:
    write_lines(tmp_path / "run", [RUN])
    text = " ".join(Page(write_report(tmp_path / "run").read_text()).text.split())
    for part in (
        "Not scored yet",
        "had not ended",
        "No scores in this run's folder",
        "No heatmap in this run's folder",
        "No epoch has ended yet",
        "No validation AUC was logged",
        "No step was logged",
        "None: every slide that was drawn could be read",
        "holds no config.yaml",
    ):
        assert part in text


def test_no_test_split(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_lines(run, [RUN | {"num_slides": {"train": 9, "val": 4, "test": 0}}, step(0, 0), epoch(0), END])
    assert "This cohort has no test slides." in write_report(run).read_text()
    write_scores(run, binary([0.9, 0.4, 0.6, 0.1]), [1, 1, 0, 0], split="val")
    text = " ".join(Page(write_report(run).read_text()).text.split())
    assert "Validation AUC 0.750" in text
    assert "These are not test results: they come from the validation slides" in text
    assert "The smallest class has 2 slides" in text


@pytest.mark.parametrize(
    ("scores", "labels", "told"),
    [
        ([0.9, 0.8], [1, 1], "of one class"),
        ([0.9, float("nan")], [1, 0], "the model diverged"),
        ([0.9, 0.1], [1, 0], "separate the classes wholly"),
    ],
)
def test_degenerate_scores(tmp_path: Path, scores: list[float], labels: list[int], told: str) -> None:
    run = tmp_path / "run"
    write_lines(run, [RUN, step(0, 0, loss=None), epoch(0, train_loss=None, val_loss=None, val_auc=None), END])
    (run / "result.json").write_text(
        json.dumps({"auc": None, "auc_ci": [None, None], "num_slides": 2, "split": "test"})
    )
    write_scores(run, binary(scores), labels)
    assert told in write_report(run).read_text()


def test_many_classes_give_a_table(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_lines(run, [RUN, END])
    labels = [0, 1, 2] * 8
    probs = np.random.default_rng(0).dirichlet(np.ones(3), 24)
    write_scores(run, probs.tolist(), labels)
    (run / "result.json").write_text(json.dumps({"classes": ["LUAD", "LUSC", "<none>"], "split": "test"}))
    html = write_report(run).read_text()
    assert "Test AUC, mean over classes" in Page(html).text
    assert "Each class against the rest" in html
    assert "ROC curves of 3" in html
    assert "&lt;none&gt;" in html


def test_columns_of_yes_and_no_give_a_row_and_a_curve_each(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_lines(run, [RUN, step(0, 0), *(epoch(i, val_auc=0.6 + i / 10) for i in range(2)), END])
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (60, 3)).astype(float)
    probs = 1 / (1 + np.exp(-rng.normal(truth * 2)))
    truth[:10, 1], truth[:, 2] = np.nan, 1
    write_targets(run, "multilabel", [[None if np.isnan(v) else v for v in row] for row in truth], probs.tolist())
    page = Page(write_report(run).read_text())
    text = " ".join(page.text.split())
    assert not page.open
    result = json.loads((run / "result.json").read_text())
    ones = int(np.nansum(truth[:, 1]))
    assert f"Test AUC, mean over columns {result['auc']:.3f}" in text
    assert "Test slides 60 3 columns" in text
    assert f"ki67 $x$ {ones} {50 - ones} {result['auc_by_column']['ki67 $x$']:.3f}" in text
    assert "hrd 60 0 – – " in text, "one value only"
    assert f"{result['auc_by_column'][ODD]:.3f} {ODD}" in text, "the legend of the ROC curves"
    assert page.tags.count("svg") == 5
    assert "Validation AUC 0.700 checkpoint of epoch 1" in text


def test_one_column_is_shown_as_two_classes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_lines(run, [RUN, END])
    truth: list[list[float | None]] = [[float(i % 2)] for i in range(50)]
    write_targets(run, "multilabel", truth, [[0.3 + 0.01 * i * (i % 2)] for i in range(50)])
    text = text_of(run)
    assert f"25 {ODD} = 1, 25 {ODD} = 0" in text
    assert f"Lowest scores of {ODD} = 1 slides Slide Score s1 0.310 s3 0.330" in text
    assert "ROC curve" in text


def test_numbers_give_a_scatter_and_r2_in_the_headline(tmp_path: Path) -> None:
    run = tmp_path / "run"
    lines = [epoch(i, val_auc=None, val_r2=value) for i, value in enumerate((-1.5, 0.4))]
    write_lines(run, [RUN, step(0, 0), *lines, END])
    truth = np.random.default_rng(0).normal(40, 10, 30)
    predicted = truth + 1
    predicted[[4, 7]] -= (25, 12)
    write_targets(run, "regression", [[v] for v in truth], predicted[:, None].tolist())
    (run / "heatmaps").mkdir()
    picture = np.full((40, 60, 3), 200, np.uint8)
    highest = int(predicted.argmax())
    for i in (4, highest):
        (run / "heatmaps" / f"s{i}.png").write_bytes(draw_card(picture, picture, 8.0))
    result = json.loads((run / "result.json").read_text())
    page = Page(write_report(run).read_text())
    text = " ".join(page.text.split())
    assert not page.open
    for part in (
        f"Test R² {result['r2']:.3f} 95 % interval {result['r2_ci'][0]:.3f} to {result['r2_ci'][1]:.3f}",
        f"30 mean error {result['mae']:.4g}, rank correlation {result['spearman']:.3f}",
        "Validation R² 0.400 checkpoint of epoch 1",
        f"{ODD}: predicted and true",
        f"{ODD}: most underestimated Slide True Predicted s4 {truth[4]:.4g} {predicted[4]:.4g} s7",
        f"Slide s{highest}, {ODD} {truth[highest]:.4g}, predicted {predicted[highest]:.4g}",
        "1 is perfect, 0 no better than the slides' mean",
    ):
        assert part in text
    assert "AUC" not in text
    assert page.tags.count("svg") == 5
    assert f"Predicted against true {ODD}" in page.described


def test_columns_of_numbers_are_told_one_by_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_lines(run, [RUN, END])
    rows: list[list[float | None]] = [[float(i), None if i else 3.0, i / 100] for i in range(25)]
    write_targets(run, "regression", rows, [[float(i), 1.0, float("nan")] for i in range(25)])
    (run / "heatmaps").mkdir()
    picture = np.full((40, 60, 3), 200, np.uint8)
    for i in (3, 24):
        (run / "heatmaps" / f"s{i}.png").write_bytes(draw_card(picture, picture, 8.0))
    text = text_of(run)
    assert f"{ODD} 25 1.000 1.000 to 1.000 0 1.000" in text
    assert "ki67 $x$ 1 – – 2 –" in text
    assert "hrd 25 – – – –" in text
    assert "the model diverged" in text
    assert f"Slide s24, {ODD} 24, predicted 24" in text
    assert "Few slides: ki67 $x$ is known of 1; then" in text


def test_a_checkpoint_chosen_by_the_loss_is_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    lines = [epoch(i, val_auc=None, val_loss=loss) for i, loss in enumerate((0.6, 0.4, 0.5))]
    write_lines(run, [RUN, *lines, END])
    text = text_of(run)
    assert "Validation loss 0.400 checkpoint of epoch 1" in text
    assert "The checkpoint was chosen by the validation loss: no epoch had a validation AUC." in text


def test_class_names_from_the_result(whole_run: Path) -> None:
    result = json.loads((whole_run / "result.json").read_text())
    (whole_run / "result.json").write_text(json.dumps(result | {"classes": ["normal", "$tumour & <b>$"]}))
    page = Page(write_report(whole_run).read_text())
    assert not page.open
    assert "25 $tumour & <b>$, 30 normal" in page.text
    assert "score (probability of $tumour & <b>$)" in page.text, "no formula"


def test_log_of_a_resumed_and_torn_run(tmp_path: Path) -> None:
    first = [RUN, step(0, 0, loss=1.0), step(1, 0, loss=2.0), epoch(0, train_loss=1.0), END]
    second = [RUN | {"versions": {"slidegrad": "0.2.0"}}, step(1, 0, loss=3.0), epoch(0, train_loss=4.0)]
    write_lines(tmp_path, [*first, *second], tail='{"event": "epoch", "epoch": 7, "tra')
    log = read_log(tmp_path)
    assert [line["loss"] for line in log.steps] == [1.0, 3.0]
    assert [line["train_loss"] for line in log.epochs] == [4.0]
    assert (log.run["versions"]["slidegrad"], log.num_starts, log.end) == ("0.2.0", 2, None)
    assert "Started 2 times" in write_report(tmp_path).read_text()


def test_best_epoch_so_far_is_chosen_as_the_loop_does(tmp_path: Path) -> None:
    lines = [epoch(0, val_auc=0.7), epoch(1, val_auc=0.9, val_loss=0.6), epoch(2, val_auc=0.9, val_loss=0.4), epoch(3)]
    write_lines(tmp_path, [RUN, *lines])
    assert "Validation AUC 0.900 checkpoint of epoch 2" in " ".join(
        Page(write_report(tmp_path).read_text()).text.split()
    )


@pytest.mark.parametrize(("batchnorm", "is_told"), [("virtual", True), ("running", False)])
def test_a_dark_focus_is_explained_where_tiles_are_normalised_together(
    whole_run: Path, batchnorm: str, is_told: bool
) -> None:
    (whole_run / "config.yaml").write_text(yaml.safe_dump({"encoder": {"batchnorm": batchnorm}}))
    assert ("be dark here itself" in write_report(whole_run).read_text()) is is_told


def test_the_clearest_positive_slide_is_shown(whole_run: Path) -> None:
    write_scores(whole_run, binary([0.2, 0.6, 0.8, 0.9]), [1, 1, 1, 0], first=ODD_ID)
    card = (whole_run / "heatmaps" / f"{disk_name(ODD_ID)}.png").read_bytes()
    for slide_id in ("s1", "s3", "of no slide"):
        (whole_run / "heatmaps" / f"{slide_id}.png").write_bytes(card)
    text = " ".join(Page(write_report(whole_run).read_text()).text.split())
    assert "Slide s1, label positive, score 0.600" in text, "s2 has no picture, s3 is negative"


def test_long_runs_stay_small(tmp_path: Path) -> None:
    write_lines(tmp_path, [RUN, *(step(i, 0) for i in range(20_000)), epoch(0), END])
    assert write_report(tmp_path).stat().st_size < 300_000


def test_no_run_and_unreadable_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="no run here"):
        write_report(tmp_path)
    write_lines(tmp_path, [RUN])
    for name in ("result.json", "config.yaml", "scores.parquet"):
        (tmp_path / name).write_text("{torn: [")
        with pytest.raises(TrainerError, match=f"{name}: not readable"):
            write_report(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "heatmaps").mkdir()
    (tmp_path / "heatmaps" / "s.png").write_bytes(b"no picture")
    assert "No heatmap" in write_report(tmp_path).read_text()


def test_settings_that_are_paths_are_blank_whatever_they_look_like(tmp_path: Path) -> None:
    config = {"machine": {"manifests": "Doe/m", "archive": "Doe"}, "encoder": {"weights": None, "name": "hf-hub:a/b"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert read_settings(tmp_path) == {
        "machine.manifests": "[path]",
        "machine.archive": "[path]",
        "encoder.weights": "null",
        "encoder.name": "hf-hub:a/b",
    }
