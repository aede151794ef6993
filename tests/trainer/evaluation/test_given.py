"""Scores that a user gives: what is read of them, and what is refused in one sentence."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.cohort import Cohort
from trainer.errors import TrainerError
from trainer.evaluation.given import kept_scores, read_given, refuse_missing
from trainer.prepare import read_config

Make = Callable[..., Path]


def cohort_of(run: Path) -> Cohort:
    return Cohort.read(run / "cohort.csv", head=read_config(run).head)


@pytest.mark.parametrize("task", ["classes", "multilabel", "regression"])
def test_csv_and_parquet_with_lists_or_columns_say_the_same(make: Make, task: str) -> None:
    run = make(task=task)
    cohort = cohort_of(run)
    kept = read_given(run / "scores.parquet", cohort)
    test = kept_scores(run, "test", cohort.task)
    assert test is not None
    assert set(test) == set(cohort.of("test"))
    assert all((kept[slide_id] == test[slide_id]).all() for slide_id in test)
    predicted = "values" if task == "regression" else "probs"
    columns = {f"{predicted}_{name}": [row[i] for row in kept.values()] for i, name in enumerate(cohort.outputs)}
    table = {"slide_id": [f"{slide_id}.svs" for slide_id in kept], **columns}
    pq.write_table(pa.table(table), run / "given.parquet")
    lines = [",".join(table), *(",".join(map(str, row)) for row in zip(*table.values(), strict=True))]
    (run / "given.csv").write_text("\n".join(lines) + "\n")
    for file in ("given.parquet", "given.csv"):
        found = read_given(run / file, cohort)
        assert list(found) == list(kept)
        assert all((found[slide_id] == kept[slide_id]).all() for slide_id in kept)


def test_of_two_classes_the_second_is_enough(make: Make) -> None:
    run = make()
    (run / "given.csv").write_text("slide_id,probs_1\ns000_0,0.25\n")
    assert read_given(run / "given.csv", cohort_of(run))["s000_0"].tolist() == [0.75, 0.25]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("slide_id,score\ns000_0,0.5\n", "expected the columns slide_id, probs_0, probs_1, got slide_id, score"),
        ("probs_1\n0.5\n", "expected the columns slide_id, probs_0, probs_1, got probs_1"),
        ("slide_id,probs_1\n", "no rows; expected one for each slide"),
        ("", "expected the columns slide_id, probs_0, probs_1, got "),
        ("slide_id,probs_1\ns000_0,\n", "1 slides have scores that are not numbers: s000_0"),
        ("slide_id,probs_1\ns000_0,NaN\n", "1 slides have scores that are not numbers: s000_0"),
        ("slide_id,probs_1\ns000_0,high\n", "1 slides have scores that are not numbers: s000_0"),
        ("slide_id,probs_1\ns000_0\n", "1 slides have scores that are not numbers: s000_0"),
        (
            "slide_id,probs_1\ns000_0,-2.5\n",
            "expected probabilities from 0 to 1 that add up to 1, 1 slides have others",
        ),
        ("slide_id,probs_0,probs_1\ns000_0,0.5,0.9\n", "turn logits into probabilities first"),
        ("slide_id,probs_1\nnobody,0.5\n", "1 slides are not of the run's cohort: nobody; leave them out"),
        ("slide_id,probs_1\ns000_0,0.5\ns000_0.svs,0.6\n", "1 slides are there twice: s000_0; keep one row of each"),
    ],
)
def test_what_cannot_be_used_is_refused(make: Make, text: str, sentence: str) -> None:
    run = make()
    (run / "given.csv").write_text(text)
    with pytest.raises(TrainerError) as caught:
        read_given(run / "given.csv", cohort_of(run))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("probs", "sentence"),
    [
        ([[0.5, 0.25, 0.25], [0.5, 0.5]], "probs: expected 2 numbers a slide (0, 1), 1 slides have not: s000_0"),
        ([[0.5, None], [0.5, 0.5]], "1 slides have scores that are not numbers: s000_0"),
        ([None, [0.5, 0.5]], "probs: expected 2 numbers a slide (0, 1), 1 slides have not: s000_0"),
    ],
)
def test_lists_of_another_length_are_refused(make: Make, probs: list[list[float]], sentence: str) -> None:
    run = make()
    pq.write_table(pa.table({"slide_id": ["s000_0", "s000_1"], "probs": probs}), run / "given.parquet")
    with pytest.raises(TrainerError, match=r"given\.parquet") as caught:
        read_given(run / "given.parquet", cohort_of(run))
    assert sentence in str(caught.value)


def test_files_that_are_none_are_told(make: Make) -> None:
    run = make()
    (run / "torn.parquet").write_bytes((run / "scores.parquet").read_bytes()[:100])
    (run / "binary.csv").write_bytes(bytes(range(256)))
    for name in ("torn.parquet", "binary.csv", "nowhere.csv", "nowhere.parquet", ""):
        with pytest.raises(TrainerError, match="scores cannot be read") as caught:
            read_given(run / name, cohort_of(run))
        assert "\n" not in str(caught.value)


def test_missing_slides_are_named(make: Make) -> None:
    run = make()
    cohort = cohort_of(run)
    given = read_given(run / "scores.parquet", cohort)
    refuse_missing(run / "f", given, cohort, "test")
    del given["s000_1"]
    with pytest.raises(TrainerError, match=r"1 of 16 slides of test are missing: s000_1; add them"):
        refuse_missing(run / "f", given, cohort, "test")


def test_a_split_without_scores_has_none(make: Make) -> None:
    run = make()
    rows = pq.read_table(run / "scores.parquet", filters=[("split", "==", "test")])
    pq.write_table(rows, run / "scores.parquet")
    assert kept_scores(run, "val", "classes") is None
    found = kept_scores(run, "test", "classes")
    assert found is not None
    assert np.array(list(found.values())).shape == (16, 2)
    (run / "scores.parquet").unlink()
    assert kept_scores(run, "test", "classes") is None
