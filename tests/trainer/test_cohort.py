"""Labels joined with manifests, and splits that keep a patient on one side."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from manifests import LocalManifests, Manifest, SlideRecord, write_manifest
from manifests.files import tiles_path
from trainer.cohort import Cohort, load_cohort
from trainer.config import Cohort as CohortConfig
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
