"""Finding slides: filters, orders, and cursors that stay right when slides come and go."""

import base64
import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.schema import SlideRecord, records_to_catalog
from services.errors import BadQueryError, ServiceError
from services.index import TileIndex
from services.labels import align_labels, read_labels
from services.search import SORTS, CatalogSearch, Search


def _pages(search: CatalogSearch, wanted: Search, limit: int = 100) -> list[list[str]]:
    """Slide ids, page by page."""
    pages, cursor = [], None
    while True:
        page = search.page(wanted, limit=limit, cursor=cursor)
        pages.append(page.slides["slide_id"].to_pylist())
        if (cursor := page.next_cursor) is None:
            return pages


def test_lists_slides_in_order_by_page_status_and_text(cohort: Path) -> None:
    search = TileIndex(cohort).catalog().search
    everything = ["B_3", "a_1", "a_2", "c_empty", "d_failed", "ö #5%"]
    assert _pages(search, Search()) == [everything]
    assert _pages(search, Search(), 4) == [everything[:4], everything[4:]]
    assert _pages(search, Search(), 3) == [everything[:3], everything[3:]]  # No empty page at the end.
    assert _pages(search, Search(status="ok"), 3) == [["B_3", "a_1", "a_2"], ["ö #5%"]]
    assert _pages(search, Search(q="b_")) == [["B_3"]]
    assert _pages(search, Search(q="%")) == [["ö #5%"]]  # Not a pattern.
    assert _pages(search, Search(q="o\N{COMBINING DIAERESIS}")) == [["ö #5%"]]
    assert _pages(search, Search(q="nothing")) == [[]]
    assert _pages(search, Search(prefix="a_")) == [["a_1", "a_2"]]
    assert _pages(search, Search(prefix="A_")) == [[]]
    assert _pages(search, Search(prefix="a_", q="2", status="ok")) == [["a_2"]]


def test_lists_slides_in_any_order(cohort: Path) -> None:
    search = TileIndex(cohort).catalog().search
    assert _pages(search, Search(sort="-slide_id"), 4)[1] == ["a_1", "B_3"]
    by_tiles = ["c_empty", "d_failed", "a_2", "ö #5%", "a_1", "B_3"]
    assert _pages(search, Search(sort="num_tiles")) == [by_tiles]
    assert _pages(search, Search(sort="-num_tiles")) == [by_tiles[:1:-1] + by_tiles[:2]]  # Equals stay by their id.
    assert _pages(search, Search(sort="status", q="_"), 2) == [["c_empty", "d_failed"], ["B_3", "a_1"], ["a_2"]]


records = st.dictionaries(
    st.text("abc", min_size=1, max_size=4),
    st.tuples(st.sampled_from(["ok", "empty", "failed"]), st.integers(0, 3), st.sampled_from([0.0, 0.5, float("nan")])),
    max_size=12,
)


def _search_of(slides: dict[str, tuple[str, int, float]]) -> CatalogSearch:
    made = [
        SlideRecord(slide_id=slide_id, status=status, num_tiles=num_tiles, tissue_mm2=tissue)  # type: ignore[arg-type]
        for slide_id, (status, num_tiles, tissue) in slides.items()
    ]
    return CatalogSearch(records_to_catalog(made))


@given(records, records, st.sampled_from(SORTS), st.integers(1, 4), st.data())
def test_a_page_follows_the_one_before_whatever_came_or_went_meanwhile(
    before: dict[str, tuple[str, int, float]],
    new: dict[str, tuple[str, int, float]],
    sort: str,
    limit: int,
    data: st.DataObject,
) -> None:
    gone = data.draw(st.sets(st.sampled_from(sorted(before)))) if before else set()
    after = {slide_id: slide for slide_id, slide in {**new, **before}.items() if slide_id not in gone}
    first = _search_of(before).page(Search(sort=sort), limit=limit)
    seen = first.slides["slide_id"].to_pylist()
    if first.next_cursor is None:
        assert sorted(seen) == sorted(before)
        return
    cursor: str | None = first.next_cursor
    rest: list[str] = []
    while cursor is not None:
        page = _search_of(after).page(Search(sort=sort), limit=limit, cursor=cursor)
        rest += page.slides["slide_id"].to_pylist()
        cursor = page.next_cursor
    assert len(rest) == len(set(rest))
    assert not set(rest) & set(seen)
    # Of those that were there all along none is missing, and they come in order.
    stayed = [slide_id for page in _pages(_search_of(before), Search(sort=sort)) for slide_id in page]
    assert [slide_id for slide_id in rest if slide_id in before] == [
        slide_id for slide_id in stayed[len(seen) :] if slide_id not in gone
    ]


def _encode(*parts: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(parts).encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    ("sort", "cursor"),
    [
        ("slide_id", ""),
        ("slide_id", "é"),
        ("slide_id", "a"),
        ("slide_id", "bm90IGpzb24"),
        ("slide_id", _encode("slide_id")),
        ("slide_id", _encode("num_tiles", 1, "a_1")),
        ("slide_id", _encode("slide_id", None, 5)),
        ("num_tiles", _encode("num_tiles", "x", "a_1")),
        ("num_tiles", _encode("num_tiles", True, "a_1")),
        ("num_tiles", _encode("num_tiles", float("nan"), "a_1")),
        ("num_tiles", _encode("num_tiles", None, "a_1")),
        ("num_tiles", _encode("-num_tiles", 1, "a_1")),
        ("status", _encode("status", 1, "a_1")),
        ("slide_id", base64.urlsafe_b64encode(b"[" * 900).decode()),
    ],
)
def test_a_cursor_of_another_order_or_of_nobody_is_refused(cohort: Path, sort: str, cursor: str) -> None:
    with pytest.raises(BadQueryError, match="cursor"):
        TileIndex(cohort).catalog().search.page(Search(sort=sort), limit=2, cursor=cursor)


def test_a_cursor_may_hold_numbers_of_any_size(cohort: Path) -> None:
    search = TileIndex(cohort).catalog().search
    for value, num_left in ((10**40, 0), (-(10**40), 6), (80.5, 1)):
        page = search.page(Search(sort="num_tiles"), limit=9, cursor=_encode("num_tiles", value, "a_1"))
        assert len(page.slides) == num_left


LABELS = """slide_id,label,Site,patient_id,Specimen_ID,scan,split
B_3,tumour,north,p1,s1,/data/Jane Doe/x.svs,train
a_1.svs,normal,north,p2,s2,,
ö #5%,tumour,,p3,s3,,test
stranger,tumour,south,p4,s4,,
"""


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    file = tmp_path / "labels.csv"
    file.write_text(LABELS, encoding="utf-8")
    return file


def test_slides_are_found_by_their_labels(cohort: Path, labels: Path) -> None:
    search = TileIndex(cohort, labels=labels).catalog().search
    assert _pages(search, Search(labels=(("label", "tumour"),))) == [["B_3", "ö #5%"]]
    assert _pages(search, Search(labels=(("label", "tumour"), ("Site", "north")))) == [["B_3"]]
    assert _pages(search, Search(labels=(("Site", "nowhere"),))) == [[]]
    assert search.labels_of("B_3") == {"label": "tumour", "Site": "north", "split": "train"}
    assert search.labels_of("a_1") == {"label": "normal", "Site": "north"}  # Named as its file.
    assert search.labels_of("a_2") == search.labels_of("nobody") == {}


def test_patients_specimens_and_paths_are_never_among_the_labels(cohort: Path, labels: Path) -> None:
    catalog = TileIndex(cohort, labels=labels).catalog()
    assert catalog.search.labels.column_names == ["label", "Site", "split"]
    for column in ("patient_id", "Specimen_ID", "scan"):
        with pytest.raises(BadQueryError, match="label names no column of the labels; there are: label, Site, split"):
            catalog.search.page(Search(labels=((column, "p1"),)), limit=1)


def test_labels_that_change_are_noticed(cohort: Path, labels: Path) -> None:
    index = TileIndex(cohort, labels=labels)
    before = index.catalog()
    labels.write_text("slide_id,grade\nB_3,2\n")
    assert index.refresh() is True
    assert index.labels_of("B_3") == {"grade": "2"}
    labels.write_text("nothing of use")
    with pytest.raises(ServiceError):
        index.refresh()
    assert index.labels_of("B_3") == {"grade": "2"}
    assert before.hash != index.catalog().hash


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected the column slide_id"),
        ("name,label\na,1\n", "expected the column slide_id"),
        ("slide_id,label\na,1\na,2\n", "slide a is listed twice"),
    ],
)
def test_labels_of_no_use_are_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "labels.csv"
    file.write_text(text)
    with pytest.raises(ServiceError, match=words):
        read_labels(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ServiceError, match="not readable as CSV"):
        read_labels(file)


def test_labels_stand_in_the_order_of_the_slides() -> None:
    aligned = align_labels({"x": {"c": "3", "a": "1"}, "y": {}}, ["a", "b", "c"])
    assert aligned.to_pydict() == {"x": ["1", None, "3"], "y": [None, None, None]}
    assert aligned.schema.field("y").type.value_type == pa.string()
