"""`slidegrad splits`, and `slidegrad train` on what it drew."""

import csv
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifests import LocalManifests
from trainer.cli import Train
from trainer.errors import TrainerError
from trainer.prepare import prepare_run
from trainer.splits.cli import Predicted, Splits
from trainer.topology import Topology

NUM = 60
FEW = {"num": 3, "val_fraction": 0.2}


def labels_of(rows: list[str], folder: Path, header: str = "slide_id,label,patient_id") -> Path:
    (folder / "labels.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "labels.csv"


@pytest.fixture
def source(make_source) -> LocalManifests:  # type: ignore[no-untyped-def]
    """Sixty slides; 0 and 7, of two patients, are one file."""
    found: LocalManifests = make_source({f"s{i}": f"f{0 if i == 7 else i}" for i in range(NUM)})
    return found


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Two slides a patient, every third patient ill."""
    return labels_of([f"s{i},{'ill' if i // 2 % 3 == 0 else 'well'},p{i // 2}" for i in range(NUM)], tmp_path)


def read(file: Path) -> dict[str, str]:
    return {row["slide_id"]: row["split"] for row in csv.DictReader(file.open())}


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def test_files_and_their_summary(
    source: LocalManifests, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "splits"
    result, code = Splits(manifests=source.root, labels=labels, out=out).run()
    assert code == 0
    assert (result["num_splits"], result["num_slides"], result["num_patients"], result["is_new"]) == (20, 60, 29, True)
    names = [f"split_{i:03d}.csv" for i in range(20)]
    assert sorted(file.name for file in out.iterdir()) == [*names, "splits.json"]
    summary = json.loads((out / "splits.json").read_text())
    assert summary["method"] == "mccv"
    assert (summary["num"], summary["val_fraction"], summary["test_fraction"], summary["seed"]) == (20, 0.15, 0.2, 0)
    assert summary["cohort"] == result["cohort"]
    for name, told in zip(names, summary["splits"], strict=True):
        sides = read(out / name)
        assert list(sides) == sorted(f"s{i}" for i in range(NUM))
        assert told["file"] == name
        for side in ("train", "val", "test"):
            slides = [i for i in range(NUM) if sides[f"s{i}"] == side]
            ill = [i for i in slides if i // 2 % 3 == 0]
            assert told[side]["num_slides"] == len(slides)
            assert told[side]["slides_of"] == {"ill": len(ill), "well": len(slides) - len(ill)}
            patients = {0 if i // 2 == 3 else i // 2 for i in slides}  # Patients 0 and 3 share a file.
            assert told[side]["num_patients"] == len(patients)
    assert "p1" not in (out / "splits.json").read_text(), "no patient's name"
    told_words = capsys.readouterr().err
    assert "test             6 patients, 12 " in told_words
    assert "patients of ill 2, well 4" in told_words


def test_a_second_run_changes_nothing_and_says_so(
    source: LocalManifests, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(**more: Any) -> dict[str, Any]:
        return Splits(manifests=source.root, labels=labels, out=tmp_path / "out", **{**FEW, **more}).run()[0]

    (tmp_path / "out").mkdir()  # An empty folder is as good as none.
    assert draw()["is_new"]
    before = contents(tmp_path / "out")
    header, *rows = labels.read_text().splitlines()
    labels.write_text("\n".join([header, *rows[::-1]]))  # In another order it is the same cohort.
    assert not draw()["is_new"]
    assert "holds these splits already; nothing was changed" in capsys.readouterr().err
    for more, message in (
        ({"num": 4}, "drawn otherwise, with num 3 there and 4 here; give another --out"),
        ({"seed": 1, "val_fraction": 0.1}, "val_fraction 0.2 there and 0.1 here, seed 0 there and 1 here"),
        ({"method": "kfold"}, "method mccv there and kfold here, test_fraction 0.2 there and None here"),
    ):
        with pytest.raises(TrainerError, match=message):
            draw(**more)
    labels.write_text(labels.read_text().replace("s5,well", "s5,ill"))
    with pytest.raises(TrainerError, match="of another cohort, as slides, labels or patients have changed since"):
        draw()
    labels.write_text(labels.read_text().replace("s5,ill", "s5,well").replace(",p4\n", ",p5\n"))
    with pytest.raises(TrainerError, match="of another cohort"):
        draw()
    assert contents(tmp_path / "out") == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_what_was_changed_since_is_told(source: LocalManifests, labels: Path, tmp_path: Path) -> None:
    command = Splits(manifests=source.root, labels=labels, out=tmp_path / "out", **FEW)
    command.run()
    file = tmp_path / "out" / "split_001.csv"
    text = file.read_text()
    file.write_text(text.replace("s1,train", "s1,test") if "s1,train" in text else text.replace("s1,", "s1x,"))
    with pytest.raises(TrainerError, match=r"split_001.csv was changed since it was drawn; give another --out"):
        command.run()
    file.unlink()
    with pytest.raises(TrainerError, match=r"split_001.csv is missing since it was drawn"):
        command.run()
    (tmp_path / "out" / "splits.json").write_text("{")
    with pytest.raises(TrainerError, match=r"its splits.json is none of this version"):
        command.run()


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_place_that_holds_something_else_is_left_alone(
    place: str, source: LocalManifests, labels: Path, tmp_path: Path
) -> None:
    out = source.root if place == "folder" else labels
    before = contents(tmp_path / "manifests"), labels.read_text()
    with pytest.raises(TrainerError, match=r"something other than splits is there \(no splits.json\); give another"):
        Splits(manifests=source.root, labels=labels, out=out).run()
    assert (contents(tmp_path / "manifests"), labels.read_text()) == before


def test_folds_and_other_heads(source: LocalManifests, tmp_path: Path) -> None:
    rows = [f"s{i},{i % 2},{i % 5 // 4},{i / 7}" for i in range(NUM)]
    labels = labels_of(rows, tmp_path, "slide_id,er,pr,hrd")
    for head in (
        Predicted(task="multilabel", columns=("er", "pr")),
        Predicted(task="regression", columns=("hrd",)),
        Predicted(columns=("pr",)),
    ):
        out = tmp_path / head.columns[-1] / head.task
        result, _ = Splits(manifests=source.root, labels=labels, out=out, method="kfold", head=head).run()
        assert result["num_splits"] == 5
        folds = [{s for s, side in read(file).items() if side == "test"} for file in sorted(out.glob("*.csv"))]
        assert sorted(slide_id for fold in folds for slide_id in fold) == sorted(f"s{i}" for i in range(NUM))
        assert {len(fold) for fold in folds} <= {11, 12, 13}
        assert json.loads((out / "splits.json").read_text())["test_fraction"] is None


HALF = [f"s{i},{i % 2}" for i in range(NUM)]


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        (HALF, {"method": "kfold", "num": 60}, "--num 60: expected at most 59 folds, one for each patient"),
        (HALF, {"method": "kfold", "num": 40}, "give fewer folds than --num 40"),
        (HALF, {"method": "kfold", "test_fraction": 0.3}, "--test-fraction 0.3 would have no effect"),
        (HALF, {"test_fraction": 0.001}, "split_000: a split without a patient in test; give a larger --test-fraction"),
        (HALF, {"val_fraction": 0.001}, "split_000: a split without a patient in val; give a larger --val-fraction"),
        (
            [f"s{i},{int(i < 4)}" for i in range(NUM)],
            {"val_fraction": 0.1},
            r"val has the class 0 alone, as too few patients have another \(class 1: 4\); give a larger --val-fraction",
        ),
        (
            [f"s{i},{int(i < 4)}" for i in range(NUM)],
            {"val_fraction": 0.2, "test_fraction": 0.1},
            r"test has the class 0 alone, .* \(class 1: 4\); give a larger --test-fraction",
        ),
        (
            [f"s{i},{int(i < 3)}" for i in range(NUM)],
            {"val_fraction": 0.3, "test_fraction": 0.6},
            r"train has the class 0 alone, .* \(class 1: 3\); give a smaller --val-fraction or --test-fraction",
        ),
        (
            [f"s{i},{int(i < 2)}" for i in range(NUM)],
            {"val_fraction": 0.25, "test_fraction": 0.25},
            r"\(class 1: 2\); 3 sides need a patient each: label more of them, or leave the class out",
        ),
        ([f"s{i},1" for i in range(NUM)], {}, "split_000: the training split has 1 of the classes"),
        ([f"s{i},{('a', 'A')[i % 2]}" for i in range(NUM)], {}, "one class is written in several ways: 'A' and 'a'"),
        ([f"s{i},{i % 2}" for i in range(NUM + 1)], {}, "1 of 61 slides have no manifest: s60"),
        (HALF, {"num": 0}, "--num 0: expected 1 to 1000"),
        (HALF, {"head": Predicted(columns=("grade",))}, "expected the columns slide_id, grade"),
        (HALF, {"head": Predicted(columns=("a", "b"))}, "head.columns .* one column, as head.task is classes"),
        (HALF, {"labels": Path("nowhere.csv")}, "--labels nowhere.csv: not readable as CSV"),
        (HALF, {"out": Path("/dev/null/splits")}, r"--out /dev/null/splits: cannot write there \(Not a directory\)"),
        (HALF, {"out": Path("x" * 300)}, "cannot .* name too long"),
    ],
)
def test_bad_input_is_one_sentence(
    rows: list[str], more: dict[str, Any], message: str, source: LocalManifests, tmp_path: Path
) -> None:
    given = {"manifests": source.root, "labels": labels_of(rows, tmp_path, "slide_id,label"), "out": tmp_path / "out"}
    with pytest.raises(TrainerError, match=f"(?i){message}") as caught:
        Splits(**{**given, **more}).run()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*.tmp"))


def test_labels_with_a_split_are_refused(source: LocalManifests, tmp_path: Path) -> None:
    labels = labels_of([f"{row},train" for row in HALF], tmp_path, "slide_id,label,split")
    with pytest.raises(TrainerError, match="has a column split, beside which drawn splits could not be used"):
        Splits(manifests=source.root, labels=labels, out=tmp_path / "out").run()


def test_rare_classes_that_a_side_lacks_are_told(
    source: LocalManifests, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = labels_of([f"s{i},{'c' if i < 2 else 'ab'[i % 2]}" for i in range(NUM)], tmp_path, "slide_id,label")
    Splits(manifests=source.root, labels=labels, out=tmp_path / "out", num=3).run()
    told = capsys.readouterr().err
    for side in ("val", "test"):
        expected = f"{side} has no slide of the class c in split_000, split_001, split_002: it cannot be measured"
        assert expected in told


def test_the_command_line(source: LocalManifests, labels: Path, tmp_path: Path, slidegrad: Callable[..., Any]) -> None:
    words = ("splits", "--manifests", source.root, "--labels", labels, "--out", tmp_path / "out", "--num", 2)
    ended = slidegrad(*words)
    assert (ended.code, ended.result["is_new"]) == (0, True)
    assert len(list((tmp_path / "out").iterdir())) == 3
    ended = slidegrad(*words, "--seed", 1)
    assert (ended.code, ended.result) == (2, None)
    assert ended.stderr.splitlines()[-1].startswith("slidegrad: --out")
    assert "Traceback" not in ended.stderr


def test_a_run_has_the_split_it_was_given_and_keeps_it(
    small_manifests: Path, small_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = small_cohort / "labels.csv"
    Splits(manifests=small_manifests, labels=labels, out=tmp_path / "splits", num=3, test_fraction=0.3).run()
    given = tmp_path / "splits" / "split_002.csv"
    words = ["demo", "--manifests", str(small_manifests), "--labels", str(labels), "--out", str(tmp_path / "run")]
    command = Train.parse([*words, "--split", str(given), "--cohort.test-fraction", "0.5"])
    assert command.split == given

    def prepare(split: Path | None, *, resume: bool) -> None:
        prepare_run(
            tmp_path / "run",
            command.config,
            manifests=small_manifests,
            labels=labels,
            split=split,
            topology=Topology.make(1, "auto", 2),
            resume=resume,
        )

    prepare(given, resume=False)
    assert read(tmp_path / "run" / "cohort.csv") == read(given)
    told = capsys.readouterr().err
    assert "note: cohort.test_fraction=0.5 changes nothing: the split is given" in told
    assert "val_fraction" not in told, "the recipe's own share is no change"
    before = (tmp_path / "run" / "cohort.csv").read_text()
    prepare(given, resume=True)
    prepare(None, resume=True)
    others = [file for file in sorted((tmp_path / "splits").glob("*.csv")) if read(file) != read(given)]
    with pytest.raises(TrainerError, match="--resume with another --split than the run's"):
        prepare(others[0], resume=True)
    assert (tmp_path / "run" / "cohort.csv").read_text() == before


@pytest.mark.slow
def test_a_run_trains_and_is_tested_on_its_split(small_manifests: Path, small_cohort: Path, tmp_path: Path) -> None:
    labels = small_cohort / "labels.csv"
    Splits(manifests=small_manifests, labels=labels, out=tmp_path / "splits", num=2, test_fraction=0.3).run()
    given = tmp_path / "splits" / "split_001.csv"
    words = ["demo", "--manifests", small_manifests, "--labels", labels, "--out", tmp_path / "run", "--split", given]
    quick = ["--optim.epochs", "1", "--tiles.k", "8"]
    result, code = Train.parse([*map(str, words), *quick]).run()
    assert code == 0
    sides: dict[str, list[str]] = defaultdict(list)
    for slide_id, side in read(given).items():
        sides[side].append(slide_id)
    assert result["num_slides"] == len(sides["test"])
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {step["slide_id"] for step in steps if step["event"] == "step"} == set(sides["train"])
