"""A split that is given in a file: used as it is, or refused in one sentence; and the files of many splits."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from manifests import LocalManifests
from trainer.cohort import Cohort, load_cohort, refuse_other_split
from trainer.config import Cohort as CohortConfig
from trainer.config import Head
from trainer.errors import TrainerError
from trainer.splits.files import SplitFolder, read_split, read_summary, split_name, to_csv
from trainer.splits.grouping import Split

NUM = 12
SIDES: list[Split] = ["train", "train", "train", "val", "test", "train"]
GIVEN: dict[str, Split] = {f"s{i}": SIDES[i // 2] for i in range(NUM)}
"""Both slides of a patient, one of each class, on one side."""


@pytest.fixture
def source(make_source) -> LocalManifests:  # type: ignore[no-untyped-def]
    """Twelve slides with tiles, and `bare`, which has none."""
    found: LocalManifests = make_source({**{f"s{i}": f"f{i}" for i in range(NUM)}, "bare": ""})
    return found


def write_labels(folder: Path, *more: str, columns: str = "slide_id,label,patient_id") -> Path:
    rows = [f"s{i},{i % 2},p{i // 2}" for i in range(NUM)]
    (folder / "labels.csv").write_text("\n".join([columns, *rows, *more]))
    return folder / "labels.csv"


def write_split(folder: Path, given: Mapping[str, str] = GIVEN, header: str = "slide_id,split") -> Path:
    (folder / "split.csv").write_text("\n".join([header, *(f"{name},{side}" for name, side in given.items())]))
    return folder / "split.csv"


def load(folder: Path, source: LocalManifests, given: Mapping[str, str], config: CohortConfig | None = None) -> Cohort:
    return load_cohort(
        write_labels(folder),
        source,
        config or CohortConfig(),
        0,
        split=write_split(folder, given),
        usual=CohortConfig(),
    )


def sides_of(cohort: Cohort) -> dict[str, str]:
    return {case.slide_id: case.split for case in cohort.cases}


def test_a_given_split_is_used_as_it_is(tmp_path: Path, source: LocalManifests) -> None:
    cohort = load(tmp_path, source, dict(reversed(GIVEN.items())))
    assert sides_of(cohort) == GIVEN
    assert cohort.notes == ()
    named = {f"{name}.svs": side for name, side in GIVEN.items()}
    assert sides_of(load(tmp_path, source, named)) == GIVEN, "as the labels, it may name files"


def test_slides_that_the_labels_lack_are_told_once(tmp_path: Path, source: LocalManifests) -> None:
    cohort = load(tmp_path, source, {**GIVEN, "other": "train", "another": "val"})
    assert sides_of(cohort) == GIVEN
    assert cohort.notes == ("2 slides of --split are not in the labels: another, other",)


def test_slides_that_are_left_out_for_another_reason_are_not_told_as_missing(
    tmp_path: Path, source: LocalManifests
) -> None:
    labels = write_labels(tmp_path, "bare,1,p9")
    for given in (GIVEN, {**GIVEN, "bare": "test"}):
        cohort = load_cohort(labels, source, CohortConfig(), 0, split=write_split(tmp_path, given))
        assert cohort.notes == ("1 labelled slides have no tiles and are left out: bare",)


def test_shares_that_do_nothing_are_told(tmp_path: Path, source: LocalManifests) -> None:
    cohort = load(tmp_path, source, GIVEN, CohortConfig(val_fraction=0.3, test_fraction=0.1))
    assert cohort.notes == (
        "cohort.val_fraction=0.3 changes nothing: the split is given",
        "cohort.test_fraction=0.1 changes nothing: the split is given",
    )
    labels = tmp_path / "own.csv"
    rows = [f"s{i},{i % 2},p{i // 2},{GIVEN[f's{i}']}" for i in range(NUM)]
    labels.write_text("\n".join(["slide_id,label,patient_id,split", *rows]))
    cohort = load_cohort(labels, source, CohortConfig(test_fraction=0.3), 0, usual=CohortConfig())
    assert cohort.notes == ("cohort.test_fraction=0.3 changes nothing: the split is given",)


def test_no_validation_is_a_choice(tmp_path: Path, source: LocalManifests) -> None:
    without = {name: "train" if side == "val" else side for name, side in GIVEN.items()}
    with pytest.raises(TrainerError, match=r"without a patient in val; .* and --cohort.val-fraction 0"):
        load(tmp_path, source, without)
    cohort = load(tmp_path, source, without, CohortConfig(val_fraction=0))
    assert sides_of(cohort) == without
    assert cohort.notes == (), "here the share does something"
    cohort = load(tmp_path, source, GIVEN, CohortConfig(val_fraction=0))
    assert cohort.notes == ("cohort.val_fraction=0 changes nothing: the split is given",)


def changed(**sides: str) -> dict[str, str]:
    return {**GIVEN, **sides}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({k: v for k, v in GIVEN.items() if k not in ("s3", "s4")}, r"2 of 12 slides of the labels are not in it: s3"),
        (changed(s3="val"), "1 patients .* are on two sides of the split: slides s2, s3 in train and val"),
        (changed(s3="dev"), "slide s3: split 'dev': expected one of train, val, test"),
        (changed(s3="Train"), "slide s3: split 'Train': expected one of"),
        (changed(s3=""), "slide s3: split '': expected one of"),
        (changed(**{"s3.svs": "train"}), "slide s3 is listed twice, with and without its suffix"),
        (changed(s8="train", s9="train"), "a split without a patient in test; give another split"),
        (dict.fromkeys(GIVEN, "test"), "a split without a patient in train; give another split"),
        ({**GIVEN, "": "train"}, "1 of 13 rows have no slide_id"),
        ({}, r"expected the columns slide_id, split and at least one row, got no rows"),
    ],
)
def test_a_split_that_does_not_fit_is_refused_in_one_sentence(
    given: dict[str, str], message: str, tmp_path: Path, source: LocalManifests
) -> None:
    with pytest.raises(TrainerError, match=message) as caught:
        load(tmp_path, source, given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", ["train", "val", "test"])
def test_a_side_with_one_class_is_refused(side: Split, tmp_path: Path, source: LocalManifests) -> None:
    """Each slide a patient of its own."""
    rows = [f"s{i},{'well' if i < 6 else 'ill'}" for i in range(NUM)]
    (tmp_path / "l.csv").write_text("\n".join(["slide_id,label", *rows]))
    others = [name for name in ("train", "val", "test") if name != side]
    given = {f"s{i}": side if i < 4 else others[i % 2] for i in range(NUM)}
    with pytest.raises(TrainerError) as caught:
        load_cohort(tmp_path / "l.csv", source, CohortConfig(), 0, split=write_split(tmp_path, given))
    expected = f"{side} has the class well alone, as too few patients have another (class ill: 6); give another split"
    assert expected in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"nowhere.csv: not readable as CSV \(No such file or directory\)"):
        read_split(tmp_path / "nowhere.csv")
    with pytest.raises(TrainerError, match=r"not readable as CSV \(Is a directory\)"):
        read_split(tmp_path)
    (tmp_path / "odd.csv").write_bytes(b"slide_id,split\ns1,\xff\xfe\n")
    with pytest.raises(TrainerError, match="not readable as CSV"):
        read_split(tmp_path / "odd.csv")
    with pytest.raises(TrainerError, match=r"expected the columns slide_id, split .*, got \['slide', 'fold'\]"):
        read_split(write_split(tmp_path, header="slide,fold"))
    (tmp_path / "twice.csv").write_text("slide_id,split\ns1,train\ns1,train\n")
    with pytest.raises(TrainerError, match="slide s1 is listed twice"):
        read_split(tmp_path / "twice.csv")


def test_one_split_at_a_time(tmp_path: Path, source: LocalManifests) -> None:
    rows = [f"s{i},{i % 2},{GIVEN[f's{i}']}" for i in range(NUM)]
    (tmp_path / "l.csv").write_text("\n".join(["slide_id,label,split", *rows]))
    with pytest.raises(TrainerError, match="the labels have a column split already"):
        load_cohort(tmp_path / "l.csv", source, CohortConfig(), 0, split=write_split(tmp_path))


def test_a_run_that_is_gone_on_with_keeps_its_split(tmp_path: Path, source: LocalManifests) -> None:
    cohort = load(tmp_path, source, GIVEN)
    refuse_other_split(cohort, write_split(tmp_path, {**GIVEN, "other": "val"}))
    with pytest.raises(TrainerError, match=r"another --split than the run's: 2 slides are on other sides, s0, s1"):
        refuse_other_split(cohort, write_split(tmp_path, changed(s0="test", s1="test")))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("tumor", "Tumor"), r"column label: one class is written in several ways: 'Tumor' and 'tumor'; write it in"),
        (("in situ", "in  situ"), "'in  situ' and 'in situ'"),
        (("1", "1.0"), "'1' and '1.0'"),
    ],
)
def test_two_names_of_one_class_are_refused(
    names: tuple[str, str], message: str, tmp_path: Path, source: LocalManifests
) -> None:
    rows = [f"s{i},{('other', *names)[i % 3]}" for i in range(NUM)]
    (tmp_path / "l.csv").write_text("\n".join(["slide_id,label", *rows]))
    with pytest.raises(TrainerError, match=message):
        load_cohort(tmp_path / "l.csv", source, CohortConfig(), 0)


@pytest.mark.parametrize(
    ("lone", "note"),
    [
        (
            "tumuor",
            "the class tumuor has one patient, who is on one side of any split; is it tumor, which 5 have, mist",
        ),
        ("lymphoma", "the class lymphoma has one patient, who is on one side of any split"),
    ],
)
def test_a_class_with_one_patient_is_told_with_the_name_it_is_like(
    lone: str, note: str, tmp_path: Path, source: LocalManifests
) -> None:
    rows = [f"s{i},{lone if i in (3,) else ('benign', 'tumor')[i % 2]}" for i in range(NUM)]
    (tmp_path / "l.csv").write_text("\n".join(["slide_id,label", *rows]))
    notes = load_cohort(tmp_path / "l.csv", source, CohortConfig(), 0).notes
    assert [told for told in notes if told.startswith(note)]
    assert sum("one patient" in told for told in notes) == 1
    assert ("mistyped" in " ".join(notes)) == (lone == "tumuor")


def test_what_cannot_be_measured_on_a_side_is_told(tmp_path: Path, source: LocalManifests) -> None:
    """As labels that name the split may say what they like."""
    rows = [f"s{i},{i % 2 if i < 9 else 0},{'train' if i < 9 else 'test'}" for i in range(NUM)]
    (tmp_path / "l.csv").write_text("\n".join(["slide_id,er,split", *rows]))
    for head, what in (
        (Head(columns=("er",)), "test has no slide of the class 1: it cannot be measured there"),
        (Head(task="multilabel", columns=("er",)), "test has fewer than two values of er: it cannot be measured there"),
    ):
        assert what in load_cohort(tmp_path / "l.csv", source, CohortConfig(), 0, head).notes


def test_a_written_split_is_sorted_and_reads_back(tmp_path: Path) -> None:
    odd: dict[str, Split] = {"b": "val", "a,b": "train", 'a"b': "test"}
    (tmp_path / "split.csv").write_text(to_csv(odd), encoding="utf-8")
    assert read_split(tmp_path / "split.csv") == odd
    assert to_csv(odd) == 'slide_id,split\n"a""b",test\n"a,b",train\nb,val\n'
    assert [split_name(0), split_name(999)] == ["split_000", "split_999"]


def test_a_folder_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with SplitFolder(tmp_path / "deep" / "splits") as folder:
            folder.add("split_000", GIVEN)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list((tmp_path / "deep").iterdir()) == []
    assert read_summary(tmp_path / "deep" / "splits") is None


def test_a_folder_that_another_run_filled_meanwhile_is_left_alone(tmp_path: Path) -> None:
    with SplitFolder(tmp_path / "splits") as folder, SplitFolder(tmp_path / "splits") as late:
        folder.add("split_000", GIVEN)
        folder.finish({"of": "the first"})
        with pytest.raises(TrainerError, match=r"cannot write there \(another run has filled it"):
            late.finish({"of": "the second"})
    assert json.loads((tmp_path / "splits" / "splits.json").read_text()) == {"of": "the first"}
    assert [file.name for file in tmp_path.iterdir()] == ["splits"]
