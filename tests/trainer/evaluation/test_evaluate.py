"""`slidegrad evaluate` of given scores: what it finds, which files it leaves, and what it refuses. Runs that are scored
are in `test_train`."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

import slidegrad
from trainer.cohort import Cohort
from trainer.errors import TrainerError
from trainer.evaluation.cli import Evaluate
from trainer.measures.merits import rounded
from trainer.prepare import read_config
from trainer.reports.report import write_report

Make = Callable[..., Path]


def evaluate(run: Path, **flags: Any) -> dict[str, Any]:
    flags.setdefault("scores", run / "scores.parquet")
    result, code = Evaluate(run_folder=run, **flags).run()
    assert code == 0
    json.dumps(result, allow_nan=False)
    return result


def refused(run: Path, **flags: Any) -> str:
    with pytest.raises(TrainerError) as caught:
        evaluate(run, **flags)
    assert "\n" not in str(caught.value)
    assert not (run / "evaluation").exists()
    return str(caught.value)


def test_two_classes_at_each_level(make: Make) -> None:
    run = make()
    before = {file.name for file in run.iterdir()}
    result = evaluate(run)
    cohort = Cohort.read(run / "cohort.csv", head=read_config(run).head)
    rows = pq.read_table(run / "scores.parquet", filters=[("split", "==", "test")]).to_pylist()
    labels = [cohort.of("test")[row["slide_id"]].label for row in rows]
    scores = [row["probs"][1] for row in rows]
    assert (result["split"], result["num_slides"], result["scores"], result["ci_by"]) == ("test", 16, "run", "patients")
    assert result["auc"] == round(roc_auc_score(labels, scores), 4)
    assert result["num_per_class"] == [labels.count(0), labels.count(1)]
    slides, patients = result["levels"]["slides"], result["levels"]["patients"]
    assert (slides["auc"], slides["auc_ci"]) == (result["auc"], result["auc_ci"])
    assert slides["average_precision"] == round(average_precision_score(labels, scores), 4)
    assert (slides["num"], slides["num_patients"], patients["num"]) == (16, 8, 8)
    by_patient = {row["patient_id"]: [] for row in rows}
    for row, label in zip(rows, labels, strict=True):
        by_patient[row["patient_id"]].append((label, row["probs"][1]))
    truth, found = zip(
        *((max(c for c, _ in own), np.mean([s for _, s in own])) for own in by_patient.values()), strict=True
    )
    assert patients["auc"] == rounded(roc_auc_score(truth, found))
    assert patients["num_differing"] == sum(len({c for c, _ in own}) > 1 for own in by_patient.values()) > 0
    assert result["levels"]["specimens"]["auc"] == patients["auc"]

    content = json.loads((run / "evaluation/test.json").read_text())
    assert result["evaluation"] == str(run / "evaluation/test.json")
    assert content["levels"]["slides"]["calibration"]["reliability"][0]["num"] >= 1
    assert content["levels"]["slides"]["auc"] == result["auc"]
    assert sorted(content["files"]) == ["test_calibration.png", "test_pr.png", "test_roc.png"]
    for name in content["files"]:
        assert (run / "evaluation" / name).read_bytes().startswith(b"\x89PNG")
    assert str(run) not in (run / "evaluation/test.json").read_text()
    assert {file.name for file in run.iterdir()} == before | {"evaluation"}, "result and report are those of the run"


def test_the_runs_report_shows_what_was_found_of_its_own_scores(make: Make) -> None:
    run, other = make(), make("other", seed=1)
    began = {"event": "run", "recipe": "demo", "started": "2026-01-01T00:00:00", "versions": {}, "num_slides": {}}
    began |= {"world_size": 0, "device": "", "digests": {}}
    (run / "metrics.jsonl").write_text(json.dumps(began) + '\n{"event": "end", "seconds": 1.0}\n')
    report = write_report(run)
    assert "Slides, specimens, patients" not in report.read_text()
    evaluate(run, by=("sex",), labels=run / "labels.csv", against=other)
    shown = report.read_text()
    for part in ("Slides, specimens, patients", "patients (8)", "Thresholds", "Subgroups", "Beside another run"):
        assert part in shown
    assert shown.count("data:image/jpeg") == 2, "precision and recall, calibration"
    assert "they count as the higher class" in shown
    (run / "result.json").write_text('{"best_epoch": 3}')  # Of another checkpoint than what was evaluated.
    assert "Slides, specimens, patients" not in write_report(run).read_text()


def test_thresholds_are_chosen_on_validation_slides(make: Make) -> None:
    run = make()
    result = evaluate(run, threshold=("0.3", "youden", "sensitivity=0.9"))
    fixed, youden, sensitive = result["levels"]["slides"]["thresholds"]
    assert (fixed["rule"], fixed["threshold"], fixed["chosen_on"]) == ("0.3", 0.3, None)
    assert youden["chosen_on"] == "16 validation slides"
    assert result["levels"]["patients"]["thresholds"][1]["chosen_on"] == "8 validation patients"
    # The test slides have no say: without them, and on the validation slides themselves, thresholds are the same.
    of_val = evaluate(run, split="val", threshold=("youden", "sensitivity=0.9"))["levels"]["slides"]["thresholds"]
    assert [one["threshold"] for one in of_val] == [youden["threshold"], sensitive["threshold"]]
    assert of_val[1]["sensitivity"]["value"] >= 0.9
    assert fixed["sensitivity"]["num"] + fixed["specificity"]["num"] <= 16


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"num_classes": 3, "patients": 36}, {"by_class", "balanced_accuracy", "brier"}),
        ({"task": "multilabel"}, {"by_column", "auc"}),
        ({"task": "regression"}, {"by_column"}),
    ],
)
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_other_tasks(make: Make, options: dict[str, Any], keys: set[str], pool: Any) -> None:
    run = make(**options)
    result = evaluate(run, pool=pool, by=("sex",), labels=run / "labels.csv")
    for section in result["levels"].values():
        assert keys <= set(section)
    content = json.loads((run / "evaluation/test.json").read_text())
    slides = content["levels"]["slides"]
    if result["task"] == "classes":
        assert np.sum(slides["confusion"]) == result["num_slides"]
        assert (slides["auc"], slides["auc_ci"]) == (result["auc"], result["auc_ci"])
        assert content["levels"]["patients"]["num_left_out"] > 0
    elif result["task"] == "multilabel":
        assert slides["by_column"]["er"]["auc_ci"] == result["auc_ci_by_column"]["er"]
        assert slides["by_column"]["er"]["calibration"]["brier"] > 0
    else:
        column = slides["by_column"]["ki67"]
        for name in ("r2", "mae", "spearman"):
            assert (
                column[f"{name}_ci"][0] < column[name] == result[f"{name}_by_column"]["ki67"] < column[f"{name}_ci"][1]
            )
        assert column["r2_ci"] == result["r2_ci_by_column"]["ki67"]
    assert (run / "evaluation/test_roc.png").exists() == (result["task"] != "regression")


def test_subgroups(make: Make) -> None:
    run = make()
    rows = list(csv.DictReader((run / "labels.csv").open()))
    for row in rows:  # All of one class at B.
        row["site"] = "B" if row["label"] == "1" and row["site"] == "B" else "[red]A=,"
    with (run / "more.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows([*rows, {**rows[0], "slide_id": "not_of_the_run"}])
    evaluate(run, by=("sex", "site"), labels=run / "more.csv")
    found = json.loads((run / "evaluation/test.json").read_text())["subgroups"]
    assert [(row["column"], row["value"]) for row in found] == [
        ("sex", "F"),
        ("sex", "M"),
        ("site", "B"),
        ("site", "[red]A=,"),
    ]
    assert found[0]["num_slides"] + found[1]["num_slides"] == 16
    assert found[0]["low"] <= found[0]["estimate"] <= found[0]["high"]
    alone = found[2]
    assert (alone["estimate"], alone["low"], alone["reason"]) == (None, None, "one class only")
    assert alone["num_positive"] == alone["num_slides"] > 0
    table = list(csv.DictReader((run / "evaluation/test_subgroups.csv").open(newline="")))
    assert [row["value"] for row in table] == [row["value"] for row in found]
    assert table[2]["estimate"] == ""
    evaluate(run)
    assert not (run / "evaluation/test_subgroups.csv").exists(), "it was of the evaluation before"


def test_a_file_without_labels_will_do_for_subgroups(make: Make) -> None:
    run = make()
    rows = list(csv.DictReader((run / "labels.csv").open()))
    text = "slide_id,site\n" + "".join(f"{row['slide_id']}.svs,{row['site']}\n" for row in rows)
    (run / "sites.csv").write_text(text)
    evaluate(run, by=("site",), labels=run / "sites.csv")
    table = list(csv.DictReader((run / "evaluation/test_subgroups.csv").open()))
    assert [row["value"] for row in table] == ["A", "B", "(empty)"]


def test_against_another_run(make: Make) -> None:
    run, other = make(), make("other", seed=1)
    table = pq.read_table(other / "scores.parquet")
    kept = [slide_id != "s000_0" for slide_id in table["slide_id"].to_pylist()]
    pq.write_table(table.filter(kept), other / "scores.parquet")
    found = evaluate(run, against=other)["against"]
    assert (found["num_slides"], found["num_not_shared"]) == (15, 1)
    slides = found["slides"]
    assert slides["difference"] == pytest.approx(slides["auc"] - slides["auc_other"], abs=1e-3)
    assert slides["difference_ci"][0] <= slides["difference"] <= slides["difference_ci"][1]
    assert (slides["ci_by"], found["patients"]["num"]) == ("patients", 8)
    assert 0 < slides["delong"]["p"] <= 1


@pytest.mark.parametrize(
    "options", [{"num_classes": 3, "patients": 36}, {"task": "multilabel"}, {"task": "regression"}]
)
def test_other_tasks_against_another_run(make: Make, options: dict[str, Any]) -> None:
    found = evaluate(make(**options), against=make("other", seed=1, **options))["against"]
    slides = found["slides"]
    parts = {"": slides} if "difference" in slides else {}
    for part in {**parts, **slides.get("by_class", {}), **slides.get("by_column", {})}.values():
        low, high = part["difference_ci"]
        assert low <= part["difference"] <= high
        assert ("delong" in part) == ("auc" in part and part is not slides)


def test_given_scores_leave_what_is_known_of_the_run(make: Make) -> None:
    run, other = make(), make("other", seed=1)
    own = evaluate(run)
    given = evaluate(run, scores=other / "scores.parquet", against=run)
    assert given["scores"] == "given"
    assert given["auc"] == given["against"]["slides"]["auc"] != own["auc"] == given["against"]["slides"]["auc_other"]
    assert json.loads((run / "evaluation/test.json").read_text())["levels"]["slides"]["auc"] == own["auc"]
    assert json.loads((run / "evaluation/test_given.json").read_text())["scores"] == "given"


def test_a_cohort_of_one_class_is_refused(make: Make) -> None:
    run = make()
    text = (run / "cohort.csv").read_text()
    (run / "cohort.csv").write_text(re.sub(r"^(s\d+_\d),1,(.*),test,", r"\1,0,\2,test,", text, flags=re.MULTILINE))
    sentence = refused(run)
    assert sentence.endswith(
        "the 16 slides of test are of one class (0), which nothing can be told apart from; give another --split"
    )
    (run / "cohort.csv").write_text(re.sub(r"^(s\d+_\d),1,(.*),val,", r"\1,0,\2,val,", text, flags=re.MULTILINE))
    assert "--threshold youden is chosen on validation slides, and these are of one class" in refused(
        run, threshold=("youden",)
    )
    (run / "cohort.csv").write_text(text.replace(",val,", ",train,"))
    assert "the run has none; give a number" in refused(run, threshold=("youden",))
    assert "no slides in the split 'val'" in refused(run, split="val")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"by": ("sex",)}, "--by needs --labels FILE beside it"),
        ({"labels": Path("labels.csv")}, "--labels needs --by COLUMN beside it"),
        ({"by": ("sex", "sex"), "labels": Path("labels.csv")}, "--by sex sex: sex is there twice"),
        ({"by": ("age",), "labels": Path("labels.csv")}, "--by age: no such column in"),
        ({"by": ("sex",), "labels": Path("nowhere.csv")}, "not readable as CSV (No such file or directory)"),
        ({"by": ("sex",), "labels": Path("config.yaml")}, "expected the column slide_id and at least one row"),
        ({"threshold": ("best",)}, "--threshold best: expected a number from 0 to 1, youden"),
        ({"manifests": Path("m")}, "--manifests m would have no effect"),
        ({"against": Path("run")}, "the run itself; give another"),
        ({"against": Path("nowhere")}, "no run here (no config.yaml)"),
        ({"scores": Path("nowhere.csv")}, "scores cannot be read (No such file or directory)"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(make: Make, flags: dict[str, Any], sentence: str) -> None:
    run = make()
    for name in ("labels", "scores"):
        if name in flags:
            flags = {**flags, name: run / flags[name]}
    if "against" in flags:
        flags = {**flags, "against": run.parent / flags["against"]}
    assert sentence in refused(run, **flags)


def test_labels_that_are_not_the_runs_are_refused(make: Make) -> None:
    run = make()
    lines = (run / "labels.csv").read_text().splitlines()
    for changed, sentence in {
        "missing": "1 of 16 slides of test are not in it: s000_0; add them",
        "twice": "1 slides are listed twice: s000_0; keep one row of each",
        "other": "1 slides have another label there than in the run's cohort: s000_0",
    }.items():
        one = {"missing": [], "twice": [lines[1]] * 2, "other": [lines[1].replace("s000_0,0", "s000_0,1")]}[changed]
        (run / "changed.csv").write_text("\n".join([lines[0], *one, *lines[2:]]))
        assert sentence in refused(run, by=("sex",), labels=run / "changed.csv")


def test_runs_that_are_not_alike_are_not_compared(make: Make) -> None:
    run = make()
    assert "predicts multilabel er, pr, this run classes 0, 1" in refused(run, against=make("m", task="multilabel"))
    other = make("other", seed=1)
    text = (other / "cohort.csv").read_text()
    (other / "cohort.csv").write_text(text.replace(",test,", ",train,", 1))
    assert "1 slides of test are of another split there: s000_0" in refused(run, against=other)
    (other / "cohort.csv").write_text(text.replace("s000_0,0,", "s000_0,1,"))
    assert "1 slides have other labels there: s000_0" in refused(run, against=other)
    (other / "cohort.csv").write_text(text)
    (other / "scores.parquet").unlink()
    assert "no scores of its test slides yet; run slidegrad evaluate on it first" in refused(run, against=other)


def test_a_threshold_of_what_has_no_two_answers_is_refused(make: Make) -> None:
    for name, options in {"3 classes": {"num_classes": 3}, "numbers": {"task": "regression"}}.items():
        run = make(name, **options)
        assert f"--threshold youden would have no effect: the run predicts {name}" in refused(
            run, threshold=("youden",)
        )


def test_the_front_door(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    run = make()
    flags = ["--scores", str(run / "scores.parquet"), "--by", "sex", "site", "--labels", str(run / "labels.csv")]
    assert slidegrad.main(["evaluate", str(run), *flags, "--threshold", "0.5", "youden"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["num_slides"] == 16
    assert "slides (16)" in err
    assert "patients (8)" in err
    assert "16 slides of 8 patients: bootstrap intervals draw patients" in err
    assert slidegrad.main(["evaluate", str(run), *flags[:2], "--split", "val", "--threshold", "1.5"]) == 2
    assert capfd.readouterr().err.startswith("slidegrad: --threshold 1.5: expected a number from 0 to 1")
    assert slidegrad.main(["evaluate", str(run / "nothing")]) == 2
    assert "no run here (no config.yaml)" in capfd.readouterr().err
