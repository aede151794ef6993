"""Labels joined with manifests, and splits that keep a patient on one side."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from manifests import LocalManifests, Manifest, SlideRecord, write_manifest
from manifests.files import tiles_path
from trainer.cohort import Cohort, load_cohort
from trainer.config import Cohort as CohortConfig
from trainer.config import Head as HeadConfig
from trainer.errors import TrainerError

CONFIG = CohortConfig(val_fraction=0.25, test_fraction=0.25)


@pytest.fixture
def source(tmp_path: Path) -> LocalManifests:
    """Twelve slides, the last one empty; a and b are copies of one file."""
    for i in range(12):
        n = 0 if i == 11 else 4
        record = SlideRecord(
            slide_id=f"s{i}",
            status="ok" if n else "empty",
            num_tiles=n,
            mpp_x=0.5,
            mpp_y=0.5,
            tile_px=32,
            tile_mpp=1.0,
            fingerprint="twin" if i in (0, 1) else f"f{i}",
        )
        zeros = np.zeros(n, np.int32)
        write_manifest(tiles_path(tmp_path, f"s{i}"), Manifest(record, zeros, zeros, zeros.astype(np.float32)))
    return LocalManifests(tmp_path)


def write_labels(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "labels.csv"
    file.write_text(text)
    return file


def labels_of(n: int, patient: int = 1) -> str:
    return "slide_id,label,patient_id\n" + "".join(f"s{i},{i % 2},p{i // patient}\n" for i in range(n))


def test_a_patient_and_a_copied_slide_stay_on_one_side(tmp_path: Path, source: LocalManifests) -> None:
    for seed in range(10):
        cohort = load_cohort(write_labels(tmp_path, labels_of(11, patient=1)), source, CONFIG, seed)
        side = {case.slide_id: case.split for case in cohort.cases}
        assert side["s0"] == side["s1"]
        cohort = load_cohort(write_labels(tmp_path, labels_of(10, patient=2)), source, CONFIG, seed)
        side = {case.slide_id: case.split for case in cohort.cases}
        assert all(side[f"s{i}"] == side[f"s{i + 1}"] for i in range(0, 10, 2))
        assert {"train", "val", "test"} == set(side.values())


def test_splits_depend_on_the_seed_and_not_on_the_order_of_rows(tmp_path: Path, source: LocalManifests) -> None:
    header, *rows = labels_of(11).splitlines()
    forward = load_cohort(write_labels(tmp_path, "\n".join([header, *rows])), source, CONFIG, 0)
    backward = load_cohort(write_labels(tmp_path, "\n".join([header, *rows[::-1]])), source, CONFIG, 0)
    assert forward.cases == backward.cases
    others = [load_cohort(write_labels(tmp_path, labels_of(11)), source, CONFIG, seed).cases for seed in range(1, 6)]
    assert any(cases != forward.cases for cases in others)


def test_given_splits_are_used_and_a_leak_is_refused(tmp_path: Path, source: LocalManifests) -> None:
    rows = ["slide_id,label,patient_id,split", "s2,0,p2,train", "s3,1,p3,train", "s4,0,p4,val", "s5,1,p5,test"]
    cohort = load_cohort(write_labels(tmp_path, "\n".join(rows)), source, CONFIG, 0)
    assert [(case.slide_id, case.split) for case in cohort.cases] == [
        ("s2", "train"),
        ("s3", "train"),
        ("s4", "val"),
        ("s5", "test"),
    ]
    with pytest.raises(TrainerError, match=r"two sides of the split: slides s3, s6 in test and train"):
        load_cohort(write_labels(tmp_path, "\n".join([*rows, "s6,1,p3,test"])), source, CONFIG, 0)
    with pytest.raises(TrainerError, match=r"slides s0, s1 in test and train"):
        load_cohort(write_labels(tmp_path, "\n".join([*rows, "s0,1,p10,test", "s1,1,p11,train"])), source, CONFIG, 0)


def test_a_specimen_stays_on_one_side_without_patients(tmp_path: Path, source: LocalManifests) -> None:
    rows = [f"s{i},{i // 2 % 2},sp{i // 2}" for i in range(2, 10)]
    text = "\n".join(["slide_id,label,specimen_id", *rows])
    for seed in range(8):
        side = {c.slide_id: c.split for c in load_cohort(write_labels(tmp_path, text), source, CONFIG, seed).cases}
        assert all(side[f"s{i}"] == side[f"s{i + 1}"] for i in range(2, 10, 2))


def test_the_split_follows_from_patients_and_not_from_files(tmp_path: Path, source: LocalManifests) -> None:
    def side() -> dict[str, str]:
        cohort = load_cohort(write_labels(tmp_path, labels_of(11)), LocalManifests(source.root), CONFIG, 0)
        return {case.slide_id: case.split for case in cohort.cases}

    before = side()
    for i in range(2, 11):
        manifest = source[f"s{i}"]
        slide = dataclasses.replace(manifest.slide, fingerprint=f"other {i}")
        write_manifest(tiles_path(source.root, f"s{i}"), dataclasses.replace(manifest, slide=slide))
    (source.root / "catalog.parquet").unlink()
    assert side() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide_id,label,patient_id\ns2,0,p\ns3,1,\ns4,0,q\n", "1 slides have no patient_id while others do: s3"),
        ("slide,label\ns1,0\n", "expected the columns slide_id, label"),
        ("slide_id,label\n", "at least one row"),
        (
            labels_of(11) + "".join(f"x{i},0,q{i}\n" for i in range(9)),
            r"9 of 20 slides have no manifest: x0.*and 4 more",
        ),
        (labels_of(4) + "s1,1,p1\n", "1 slides are listed twice: s1"),
        ("slide_id,label\ns2,0\ns3,0\ns4,0\ns5,0\n", "has 1 of the classes"),
        ("slide_id,label,split\ns2,0,train\ns3,1,\n", "1 slides have no split while others do: s3"),
        ("slide_id,label,split\ns2,0,train\ns3,1,dev\n", "split 'dev': expected one of"),
        ("slide_id,label\ns2,0\ns3,\n", "1 slides have an empty label: s3"),
    ],
)
def test_bad_labels_are_refused_in_one_sentence(
    tmp_path: Path, source: LocalManifests, text: str, message: str
) -> None:
    with pytest.raises(TrainerError, match=message) as caught:
        load_cohort(write_labels(tmp_path, text), source, CONFIG, 0)
    assert "\n" not in str(caught.value)


def test_slides_without_tiles_are_left_out_and_told(tmp_path: Path, source: LocalManifests) -> None:
    cohort = load_cohort(write_labels(tmp_path, labels_of(12)), source, CONFIG, 0)
    assert "s11" not in {case.slide_id for case in cohort.cases}
    assert any("s11" in note for note in cohort.notes)


def test_labels_may_name_files_and_missing_patients_are_told(tmp_path: Path, source: LocalManifests) -> None:
    text = "slide_id,label\n" + "".join(f"s{i}.svs,{'tumour' if i % 2 else 'benign'}\n" for i in range(2, 11))
    cohort = load_cohort(write_labels(tmp_path, text), source, CONFIG, 0)
    assert cohort.classes == ("benign", "tumour")
    assert {case.slide_id for case in cohort.cases} == {f"s{i}" for i in range(2, 11)}
    assert any("its own patient" in note for note in cohort.notes)


def test_a_written_cohort_reads_back(tmp_path: Path, source: LocalManifests) -> None:
    cohort = load_cohort(write_labels(tmp_path, labels_of(11)), source, CONFIG, 0)
    cohort.write(tmp_path / "cohort.csv")
    assert Cohort.read(tmp_path / "cohort.csv").cases == cohort.cases


MANY = HeadConfig(task="multilabel", columns=("er", "pr"))
NUMBERS = HeadConfig(task="regression", columns=("hrd",))


def columns_of(rows: dict[int, str], header: str = "er,pr") -> str:
    return f"slide_id,{header}\n" + "".join(f"s{i},{cells}\n" for i, cells in rows.items())


def test_columns_of_yes_no_and_unknown(tmp_path: Path, source: LocalManifests) -> None:
    rows = {i: f"{i % 2},{i // 2 % 2}" for i in range(2, 11)} | {2: "1.0,", 3: ",0"}
    cohort = load_cohort(write_labels(tmp_path, columns_of(rows)), source, CONFIG, 0, head=MANY)
    targets = {case.slide_id: case.targets for case in cohort.cases}
    assert targets["s2"] == (1.0, math.nan)
    assert targets["s3"] == (math.nan, 0.0)
    assert targets["s4"] == (0.0, 0.0)
    assert (cohort.task, cohort.columns, cohort.outputs, cohort.classes) == (
        "multilabel",
        MANY.columns,
        MANY.columns,
        (),
    )


def test_numbers_read_back_bit_for_bit_and_unknown_ones_stay_unknown(tmp_path: Path, source: LocalManifests) -> None:
    head = HeadConfig(task="regression", columns=("hrd", "ki67"))
    rows = {i: f"{i / 7!r},{1e-17 * i!r}" for i in range(2, 11)} | {3: ",0.1", 4: "-3,"}
    cohort = load_cohort(write_labels(tmp_path, columns_of(rows, "hrd,ki67")), source, CONFIG, 0, head=head)
    assert {case.slide_id: case.targets for case in cohort.cases}["s5"] == (5 / 7, 1e-17 * 5)
    assert Counter(case.split for case in cohort.cases) == {"train": 5, "val": 2, "test": 2}, "a quarter of nine each"
    cohort.write(tmp_path / "cohort.csv")
    again = Cohort.read(tmp_path / "cohort.csv", head=head)
    assert again == dataclasses.replace(cohort, notes=())
    with pytest.raises(TrainerError, match=r"expected the run's head.columns \['er', 'pr'\]"):
        Cohort.read(tmp_path / "cohort.csv", head=MANY)


def test_a_class_may_be_in_any_column(tmp_path: Path, source: LocalManifests) -> None:
    text = "slide_id,label,grade\n" + "".join(f"s{i},x,{10 * (i % 3)}\n" for i in range(2, 11))
    head = HeadConfig(columns=("grade",))
    cohort = load_cohort(write_labels(tmp_path, text), source, CONFIG, 0, head=head)
    assert cohort.classes == cohort.outputs == ("0", "10", "20")
    assert {case.slide_id: case.label for case in cohort.cases}["s5"] == 2
    cohort.write(tmp_path / "cohort.csv")
    assert Cohort.read(tmp_path / "cohort.csv", head=head).cases == cohort.cases


def test_slides_of_which_nothing_is_known_are_left_out_and_told(tmp_path: Path, source: LocalManifests) -> None:
    rows = {i: f"{i % 2},{i // 2 % 2}" for i in range(2, 11)} | {4: ","}
    cohort = load_cohort(write_labels(tmp_path, columns_of(rows)), source, CONFIG, 0, head=MANY)
    assert "s4" not in {case.slide_id for case in cohort.cases}
    assert "1 slides have no er or pr and are left out: s4" in cohort.notes


def test_a_class_that_no_training_slide_has_is_told(tmp_path: Path, source: LocalManifests) -> None:
    text = "slide_id,label,split\ns2,a,train\ns3,b,train\ns4,c,test\ns5,a,test\n"
    cohort = load_cohort(write_labels(tmp_path, text), source, CONFIG, 0)
    assert "no training slide has the class c: it cannot be learned" in cohort.notes


@pytest.mark.parametrize(
    ("head", "text", "message"),
    [
        (MANY, "slide_id,er\ns2,1\n", r"expected the columns slide_id, er, pr and .*, got \['slide_id', 'er"),
        (
            MANY,
            columns_of({2: "1,0", 3: "2,0", 4: "yes,1"}),
            r"column er: expected 0, 1 or empty, 2 .*: s3 \('2'\), s4",
        ),
        (NUMBERS, columns_of({2: "1", 3: "inf", 4: "high"}, "hrd"), r"column hrd: expected a number .* s4 \('high'\)"),
        (NUMBERS, columns_of({2: "", 3: ""}, "hrd"), "column hrd is empty for all 2 slides: s2, s3"),
        (MANY, columns_of({2: "0,1", 3: "0,0", 4: "0,1"}), r"column er has only the value 0 among .* slides \(s"),
        (NUMBERS, columns_of({2: "7", 3: "7"}, "hrd"), "column hrd has only the value 7 among the 2 training slides"),
        (
            MANY,
            columns_of({2: "0,,train", 3: "1,,train", 4: "0,1,test"}, "er,pr,split"),
            r"column pr has no value among the 2 training slides \(s2, s3\)",
        ),
        (HeadConfig(columns=("patient_id",)), labels_of(4), r"columns to predict, \['patient_id'\] say something else"),
        (HeadConfig(columns=("grade",)), "slide_id,grade\ns2,1\ns3,\n", "1 slides have an empty grade: s3"),
    ],
)
def test_bad_columns_are_refused_in_one_sentence(
    tmp_path: Path, source: LocalManifests, head: HeadConfig, text: str, message: str
) -> None:
    with pytest.raises(TrainerError, match=message) as caught:
        load_cohort(write_labels(tmp_path, text), source, CONFIG, 0, head=head)
    assert "\n" not in str(caught.value)


def test_labels_whose_slides_all_have_no_tiles_are_refused(tmp_path: Path, source: LocalManifests) -> None:
    with pytest.raises(TrainerError, match="none of the slides has tiles: s11"):
        load_cohort(write_labels(tmp_path, columns_of({11: "1"}, "hrd")), source, CONFIG, 0, head=NUMBERS)
