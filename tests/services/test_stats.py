"""The archive in numbers: bins, reasons, and what is not told."""

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from manifests import SlideRecord
from manifests.schema import records_to_catalog
from services.stats import summarise


def _catalog(*records: SlideRecord) -> pa.Table:
    return records_to_catalog(list(records))


def _failed(slide_id: str, sentence: str) -> SlideRecord:
    return SlideRecord(slide_id=slide_id, status="failed", error=f"slide {slide_id}: {sentence}")


def _ok(slide_id: str, num_tiles: int) -> SlideRecord:
    return SlideRecord(slide_id=slide_id, status="ok", num_tiles=num_tiles)


def test_bins_grow_by_1_2_5_and_reach_from_the_smallest_slide_to_the_largest() -> None:
    tiles = [7, 20, 49, 50, 1000]
    histogram = summarise(_catalog(*(_ok(f"s{n}", n) for n in tiles)))["histogram"]
    assert histogram["edges"] == [5, 10, 20, 50, 100, 200, 500, 1000, 2000]
    assert histogram["counts"] == [1, 0, 2, 1, 0, 0, 0, 1]


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=30))
def test_every_ok_slide_is_in_one_bin(tiles: list[int]) -> None:
    histogram = summarise(_catalog(*(_ok(f"s{i}", n) for i, n in enumerate(tiles))))["histogram"]
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1
    for count, low, high in zip(histogram["counts"], histogram["edges"], histogram["edges"][1:], strict=False):
        assert count == sum(low <= n < high for n in tiles)
    assert sum(histogram["counts"]) == len(tiles)


def test_an_archive_without_usable_slides_has_no_bins() -> None:
    assert summarise(_catalog(_failed("a", "cut")))["histogram"] == {"edges": [], "counts": []}


def test_failures_are_grouped_by_reason_whatever_the_slide_and_its_numbers() -> None:
    catalog = _catalog(
        _failed("a", "region 224x224 at (3, 4), level 1: cut"),
        _failed("b", "region 224x224 at (55, 6), level 0: cut"),
        _failed("c_1", "a slide c_10 of no scale; c_1 needs --default-mpp 0.5"),
        _failed("d", ""),
        _ok("e", 5),
    )
    failures = summarise(catalog)["failures"]
    assert failures[0] == {
        "reason": "region …x… at (…, …), level …: cut",
        "num_slides": 2,
        "slide_ids": ["a", "b"],
    }
    assert {(one["reason"], *one["slide_ids"]) for one in failures[1:]} == {
        ("a slide c_… of no scale; … needs --default-mpp …", "c_1"),
        ("no reason told", "d"),
    }


def test_of_a_reason_with_many_slides_only_some_are_named() -> None:
    [failure] = summarise(_catalog(*(_failed(f"s{i:04}", "cut") for i in range(300))))["failures"]
    assert (failure["num_slides"], len(failure["slide_ids"])) == (300, 100)
