"""Whole runs: real slides, many processes, resume, and what a user may get wrong."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import load_file

from manifests import LocalManifests
from manifests.catalog import read_paths
from manifests.errors import SlidegradError
from tiler.archive import Job, tile_archive
from tiler.config import TilerConfig
from trainer.checkpoint import chosen_checkpoint, list_checkpoints, load_half
from trainer.cli import Train
from trainer.config import Encoder
from trainer.encoders.encoder import build_encoder
from trainer.evaluation.cli import Evaluate
from trainer.heatmaps.cli import Heatmap
from trainer.journal import read_events

QUICK = ("--optim.epochs", "2", "--tiles.k", "8", "--optim.precision", "float64")


def arguments(manifests: Path, labels: Path, out: Path, *more: str) -> list[str]:
    paths = {"--manifests": manifests, "--labels": labels, "--out": out}
    return ["demo", *(str(word) for pair in paths.items() for word in pair), *more]


def train(*args: Any) -> dict[str, Any]:
    result, code = Train.parse(arguments(*args)).run()
    assert code == 0
    return result


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Both halves of the newest checkpoint, by name."""
    newest = list_checkpoints(run)[-1]
    halves = {half: load_half(newest, half)["model"] for half in ("encoder", "aggregator")}
    return {f"{half}.{name}": value for half, state in halves.items() for name, value in state.items()}


def losses(run: Path) -> list[tuple[str, float]]:
    """(slide, loss) of every step, the last line of a step counting."""
    steps = {e["step"]: (e["slide_id"], e["loss"]) for e in read_events(run) if e["event"] == "step"}
    return [steps[i] for i in sorted(steps)]


@pytest.fixture(scope="module")
def labels(small_cohort: Path) -> Path:
    return small_cohort / "labels.csv"


@pytest.fixture(scope="module")
def finished(small_manifests: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs in this process."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    train(small_manifests, labels, run, *QUICK)
    return run


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    cohort = list(csv.DictReader((finished / "cohort.csv").open()))
    test_slides = {row["slide_id"] for row in cohort if row["split"] == "test"}
    scores = pq.read_table(finished / "scores.parquet").to_pylist()
    assert {row["slide_id"] for row in scores} == test_slides
    assert result["num_slides"] == len(test_slides) > 0
    assert 0 <= result["auc"] <= 1
    assert result["auc_ci"][0] <= result["auc"] <= result["auc_ci"][1]
    assert result["split"] == "test"
    assert (finished / "report.html").read_text().startswith("<!")
    assert Path(result["heatmap"]).stat().st_size > 1000
    assert any((finished / "tensorboard").iterdir())
    events = [event["event"] for event in read_events(finished)]
    assert (events[0], events[-1]) == ("run", "end")
    assert events.count("epoch") == 2
    start, *_, end = read_events(finished)
    assert {"slidegrad", "python", "torch"} <= set(start["versions"])
    assert all(len(start["digests"][what]) == 64 for what in ("cohort", "manifests"))
    assert start["digests"]["weights"] is None, "random ones"
    epochs = [event for event in read_events(finished) if event["event"] == "epoch"]
    assert sum(epoch["seconds"] for epoch in epochs) <= end["seconds"]
    assert all(epoch["device_hours"] * 3600 == pytest.approx(epoch["seconds"]) for epoch in epochs)
    assert all(epoch["memory_gb"] > 0.1 for epoch in epochs)
    patients = {split: {r["patient_id"] for r in cohort if r["split"] == split} for split in ("train", "val", "test")}
    assert not patients["train"] & patients["test"]
    assert not patients["train"] & patients["val"]


def test_the_encoder_is_there_for_timm_and_for_the_next_run(finished: Path) -> None:
    file = finished / "weights" / "encoder.safetensors"
    found = build_encoder(Encoder(name="test_resnet", weights=str(file)), 32).state_dict()
    saved = load_half(chosen_checkpoint(finished), "encoder")["model"]
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], value.to(found[name].dtype)) for name, value in saved.items())
    backbone = timm.create_model("test_resnet", num_classes=0)
    backbone.load_state_dict(load_file(file))
    assert load_file(file.with_name("aggregator.safetensors"))


def test_a_resumed_run_is_bit_equal_to_the_one_never_stopped(
    finished: Path, small_manifests: Path, labels: Path, tmp_path: Path
) -> None:
    """Stopped after the first epoch, in the middle of a line of the journal."""
    run = tmp_path / "resumed"
    shutil.copytree(finished, run)
    shutil.rmtree(list_checkpoints(run)[-1])
    log = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(log[: log.index('"epoch": 1') + 30])
    train(small_manifests, labels, run, "--resume")
    true, found = weights(finished), weights(run)
    assert all(torch.equal(found[name], value) for name, value in true.items())
    assert losses(run) == losses(finished)


@pytest.mark.slow
def test_three_processes_give_the_answer_of_one(
    finished: Path, small_manifests: Path, labels: Path, tmp_path: Path, slidegrad: Callable[..., Any]
) -> None:
    """The command a user types, with torchrun behind it: one aggregator, two encoder ranks, the same virtual ranks."""
    run = tmp_path / "three"
    ended = slidegrad("train", *arguments(small_manifests, labels, run, *QUICK, "--nproc", "3"))
    assert ended.code == 0, ended.stderr
    assert ended.result == json.loads((run / "result.json").read_text())
    assert [slide for slide, _ in losses(run)] == [slide for slide, _ in losses(finished)]
    for name, value in weights(finished).items():
        torch.testing.assert_close(weights(run)[name], value, rtol=1e-9, atol=1e-9, msg=name)
    journal = next(iter(read_events(run)))
    assert (journal["world_size"], journal["num_encoder_ranks"], journal["virtual_ranks"]) == (3, 2, 2)


@pytest.mark.slow
def test_two_groups_of_two_processes_give_the_answer_of_one_and_go_on_as_one(
    finished: Path, small_manifests: Path, labels: Path, tmp_path: Path, slidegrad: Callable[..., Any]
) -> None:
    """Stopped after the first epoch; the second is done by a single process."""
    run = tmp_path / "groups"
    flags = (*QUICK, "--machine.groups", "2")
    ended = slidegrad("train", *arguments(small_manifests, labels, run, *flags, "--nproc", "4"))
    assert ended.code == 0, ended.stderr
    journal = next(iter(read_events(run)))
    assert (journal["num_groups"], journal["num_encoder_ranks"], journal["virtual_ranks"]) == (2, 2, 2)
    for (slide, loss), (expected_slide, expected) in zip(losses(run), losses(finished), strict=True):
        assert slide == expected_slide
        assert loss == pytest.approx(expected, rel=1e-9)
    for name, value in weights(finished).items():
        torch.testing.assert_close(weights(run)[name], value, rtol=1e-9, atol=1e-9, msg=name)
    scores = {run: pq.read_table(run / "scores.parquet").to_pylist() for run in (run, finished)}
    assert [row["slide_id"] for row in scores[run]] == [row["slide_id"] for row in scores[finished]]
    shutil.rmtree(list_checkpoints(run)[-1])
    train(small_manifests, labels, run, "--resume", "--machine.groups", "1")
    for name, value in weights(finished).items():
        torch.testing.assert_close(weights(run)[name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_evaluate_scores_again_what_training_scored(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = json.loads((run / "result.json").read_text())
    result, code = Evaluate(run_folder=run).run()
    assert code == 0
    assert result["auc"] == before["auc"]
    result, _ = Evaluate(run_folder=run, split="val").run()
    assert result["split"] == "val"
    assert json.loads((run / "result.json").read_text())["auc"] == before["auc"]
    assert {row["split"] for row in pq.read_table(run / "scores.parquet").to_pylist()} == {"test", "val"}


@pytest.mark.slow
def test_a_threshold_is_chosen_on_validation_slides_which_are_scored_once(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    result, code = Evaluate(run_folder=run, threshold=("youden",)).run()
    assert code == 0
    assert result == json.loads((run / "result.json").read_text())
    assert (run / "evaluation/test_roc.png").exists()
    (youden,) = result["levels"]["slides"]["thresholds"]
    assert youden["chosen_on"] == "2 validation slides"
    assert not (run / "result_val.json").exists()
    assert "scoring val" in capfd.readouterr().err
    again, _ = Evaluate(run_folder=run, threshold=("youden",)).run()
    assert "scoring val" not in capfd.readouterr().err
    assert again == result
    kept, _ = Evaluate(run_folder=run, threshold=("youden",), scores=run / "scores.parquet").run()
    assert kept["levels"] == result["levels"], "scores are kept to the last bit"
    # As if training had gone on since: the validation scores are of an older checkpoint.
    table = pq.read_table(run / "scores.parquet")
    for split, flags in {"val": {}, "test": {"scores": run / "scores.parquet"}}.items():
        about = {b"slidegrad": json.dumps({"epochs": {split: 7}}).encode()}
        pq.write_table(table.replace_schema_metadata(about), run / "scores.parquet")
        if not flags:
            Evaluate(run_folder=run, threshold=("youden",)).run()
            assert "scoring val" in capfd.readouterr().err
            continue
        with pytest.raises(SlidegradError, match="of an older checkpoint; score anew, without --scores"):
            Evaluate(run_folder=run, **flags).run()


def test_test_slides_of_one_class_end_no_training_but_are_not_evaluated(
    small_manifests: Path, labels: Path, tmp_path: Path
) -> None:
    rows = list(csv.DictReader(labels.open()))
    test = [row["slide_id"] for row in rows if row["label"] == "0"][:2]
    file = tmp_path / "labels.csv"
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["slide_id", "label", "split"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "split": "test" if row["slide_id"] in test else "train"} for row in rows)
    result = train(small_manifests, file, tmp_path / "run", "--optim.epochs", "1", "--tiles.k", "8")
    assert (result["auc"], result["num_slides"]) == (None, 2)
    before = (tmp_path / "run/scores.parquet").read_bytes()
    with pytest.raises(SlidegradError, match=r"the 2 slides of test are of one class \(0\)") as caught:
        Evaluate(run_folder=tmp_path / "run").run()
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run/scores.parquet").read_bytes() == before


def test_manifests_that_were_tiled_anew_are_refused(finished: Path, small_cohort: Path, tmp_path: Path) -> None:
    tile_archive(str(small_cohort / "slides"), tmp_path / "M", TilerConfig(tile_px=32, mpp=1.0), Job(num_workers=0))
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with pytest.raises(SlidegradError, match=r"none of the 4 slides of test could be scored, the first: .* tiled anew"):
        Evaluate(run_folder=run, manifests=tmp_path / "M").run()
    for name in ("result.json", "scores.parquet"):  # The old result is worth more.
        assert (run / name).read_bytes() == (finished / name).read_bytes()


def test_a_heatmap_of_any_slide_of_the_cohort(finished: Path) -> None:
    result, code = Heatmap(run_folder=finished, slide_ids=("synth_0001",)).run()
    assert code == 0
    assert Path(result["heatmap"]).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SlidegradError, match="slide nobody: not in the cohort"):
        Heatmap(run_folder=finished, slide_ids=("nobody",)).run()


def test_the_same_seed_gives_the_same_numbers(
    finished: Path, small_manifests: Path, labels: Path, tmp_path: Path
) -> None:
    train(small_manifests, labels, tmp_path / "again", *QUICK)
    assert losses(tmp_path / "again") == losses(finished)
    train(small_manifests, labels, tmp_path / "other", *QUICK, "--seed", "1")
    assert losses(tmp_path / "other") != losses(finished)


def test_bf16_and_graphs_that_are_not_kept_train_too(small_manifests: Path, labels: Path, tmp_path: Path) -> None:
    flags = ("--optim.epochs", "1", "--tiles.k", "8", "--optim.precision", "bf16", "--machine.keep", "0")
    train(small_manifests, labels, tmp_path / "run", *flags)
    assert all(0 < loss < 10 for _, loss in losses(tmp_path / "run"))
    assert all(value.dtype != torch.bfloat16 for value in weights(tmp_path / "run").values())


def test_two_steps_on_the_real_slides(real_slides: Path, tmp_path: Path) -> None:
    """No validation, no test slides: it trains, and says what it cannot score."""
    config = TilerConfig(tile_px=64, mpp=2.0, default_mpp=0.5)
    records = tile_archive(str(real_slides), tmp_path / "M", config, Job(num_workers=0)).catalog.to_pylist()
    assert [record["status"] for record in records] == ["ok", "ok"]
    labels = tmp_path / "labels.csv"
    labels.write_text("slide_id,label,split\nCMU-1-Small-Region,0,train\nTCGA-CR-7395-01A-01-TS1,1,train\n")
    result = train(tmp_path / "M", labels, tmp_path / "run", "--optim.epochs", "1", "--tiles.k", "32")
    assert len(losses(tmp_path / "run")) == 2
    assert result["auc"] is None
    assert result["num_slides"] == 0


def test_a_slide_that_changed_is_skipped_and_told(
    small_cohort: Path, labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.loading.reading.RETRY_DELAYS_S", (0.0, 0.0))
    slides = tmp_path / "slides"
    shutil.copytree(small_cohort / "slides", slides)
    tile_archive(str(slides), tmp_path / "M", TilerConfig(tile_px=32, mpp=2.0), Job(num_workers=0))
    run = tmp_path / "run"
    parsed = Train.parse(arguments(tmp_path / "M", labels, run, *QUICK))
    paths = read_paths(LocalManifests(tmp_path / "M").root)
    with paths["synth_0002"].open("ab") as stream:
        stream.write(b"more")
    paths["synth_0003"].unlink()
    for more in ([], ["--resume"]):  # Whatever split they are in; told again after a resume.
        result, code = parsed.run() if not more else Train.parse(arguments(tmp_path / "M", labels, run, *more)).run()
        assert code == 1
        assert result["num_skipped"] == 2
        told = " ".join(result["skipped"])
        assert "slide synth_0002: the file changed since it was tiled" in told
        assert "slide synth_0003" in told
        assert str(slides) not in (run / "metrics.jsonl").read_text() + told


def test_any_error_of_a_reader_is_a_skipped_slide(
    small_manifests: Path, labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise IndexError("odd")

    monkeypatch.setattr("trainer.loading.reading.read_plan", read)
    with pytest.raises(SlidegradError, match=r"none of .* slides could be read; first: slide .*: IndexError: odd"):
        train(small_manifests, labels, tmp_path / "run", *QUICK, "--cohort.max-skipped", "1")
    with pytest.raises(SlidegradError, match=r"4 of 6 slides could not be read, more than cohort\.max_skipped=0\.1"):
        train(small_manifests, labels, tmp_path / "another", *QUICK)


def test_calibration_that_has_nothing_to_measure_says_so(small_manifests: Path, labels: Path, tmp_path: Path) -> None:
    more = ("--tiles.k", "None", "--tiles.tiles", "all", "--tiles.max-tiles", "2", "--virtual-ranks", "2")
    with pytest.raises(SlidegradError, match="none of the first 6 slides gave a virtual rank two tiles to measure"):
        train(small_manifests, labels, tmp_path / "run", "--optim.epochs", "1", *more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--nproc", "1", "--machine.aggregator", "dedicated"], "--nproc 1 with machine.aggregator=dedicated"),
        (["--nproc", "0"], "--nproc 0: expected at least 1"),
        (["--nproc", "3", "--machine.groups", "2"], "--nproc 3 does not make machine.groups=2 groups of one size"),
        (
            ["--nproc", "2", "--machine.groups", "2", "--optim.slides-per-step", "1"],
            "machine.groups=2 with optim.slides_per_step=1",
        ),
        (["--machine.keep", "-1"], "machine.keep is -1: expected auto, all, or a number from 0"),
        (["--encoder.batchnorm", "sync"], "encoder.batchnorm=sync with --nproc 1: needs a GPU for each, there are 0"),
        (
            ["--encoder.freeze", "all", "--encoder.batchnorm", "virtual"],
            "encoder.batchnorm is virtual: expected frozen",
        ),
        (["--encoder.freeze", "99"], "encoder.freeze is 99"),
        (["--encoder.pooling", "token"], "encoder.pooling is token"),
        (["--aggregator.name", "transmil", "--aggregator.hidden", "12"], "aggregator.hidden is 12"),
        (["--head.columns", "grade"], "grade"),
        (["--head.class-weights", "1", "2", "3"], "head.class_weights has 3 numbers: expected one for each of the 2"),
        (["--head.task", "regression", "--head.class-weights", "balanced"], "head.class_weights is balanced"),
        (["--encoder.name", "resnet999"], "encoder.name 'resnet999': timm does not know it"),
        (["--encoder.weights", "/nowhere/w.pth"], "encoder.weights /nowhere/w.pth: no such file"),
        (["--tiles.tiles", "all"], "neither tiles.k nor tiles.k_per_rank; k is 96, give --tiles.k None"),
        (["--tiles.k", "2"], "tiles.k=2 over virtual_ranks=2: BatchNorm has nothing to measure"),
        (["--optim.ema", "0.9", "--encoder.batchnorm", "sync"], "optim.ema is 0.9: expected None"),
        (["--cohort.balance", "once", "--head.task", "regression"], "cohort.balance is once: expected none"),
        (["--machine.recompute"], "machine.recompute with encoder.name 'test_resnet'"),
        (["--restarts", "1"], "--restarts 1: expected 0, or more with --nproc from 2"),
        (["--seed", "-1"], "seed is -1"),
        (["--resume"], "holds no run"),
        (["--optim.lr", "-1"], "optim.lr is -1"),
        (["--out", "/dev/null/run"], "cannot write there"),
    ],
)
def test_what_cannot_work_is_refused_before_any_slide_is_read(
    more: list[str], message: str, small_manifests: Path, labels: Path, tmp_path: Path
) -> None:
    with pytest.raises(SlidegradError) as caught:
        Train.parse(arguments(small_manifests, labels, tmp_path / "run", *more)).run()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_folder_that_holds_another_run_is_left_alone(finished: Path, small_manifests: Path, labels: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}
    with pytest.raises(SlidegradError, match="holds another run; give --resume"):
        Train.parse(arguments(small_manifests, labels, finished)).run()
    with pytest.raises(SlidegradError, match=r"--resume with other settings than the run's: optim\.lr"):
        Train.parse(arguments(small_manifests, labels, finished, "--resume", "--optim.lr", "0.5")).run()
    assert before == {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}


def test_the_command_line_says_one_sentence_and_exits_with_2(
    small_manifests: Path, labels: Path, tmp_path: Path, slidegrad: Callable[..., Any]
) -> None:
    for words, message in (
        (["brest", "--manifests", "M", "--labels", "L", "--out", "O"], "unknown recipe 'brest'; one of demo"),
        (arguments(tmp_path / "none", labels, tmp_path / "run"), "no manifests here"),
        (arguments(small_manifests, labels, tmp_path / "run", "--optim.speed", "3"), "--optim.speed"),
    ):
        ended = slidegrad("train", *words)
        assert ended.code == 2
        assert message in ended.stderr
        assert "Traceback" not in ended.stderr
