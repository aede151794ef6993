"""TileIndex: what it finds, and that it notices what the tiler changes under it."""

import errno
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests import Manifest, ManifestError, SlideRecord, sample_tiles, shard
from manifests.catalog import rebuild_catalog
from manifests.files import tiles_path
from services.errors import BadQueryError, NothingToSampleError, UnavailableError, UnknownSlideError
from services.errors import UnreadableManifestError as Unreadable
from services.index import TileIndex, without_paths
from services.queries import BBox, Draw, draw_tiles, find_slides, find_tiles
from services.stats import summarise

WriteSlide = Callable[..., Manifest]
ONE_DRAW = Draw(k=1, seed=0, epoch=0, part=0, num_parts=1)


def _ids(index: TileIndex, *, limit: int = 100, status: str | None = None, q: str = "") -> list[list[str]]:
    """Slide ids, page by page."""
    pages, cursor, table = [], None, index.catalog().table
    while True:
        page = find_slides(table, status=status, q=q, limit=limit, cursor=cursor)
        pages.append(page.slides["slide_id"].to_pylist())
        if (cursor := page.next_cursor) is None:
            return pages


def test_lists_slides_in_order_by_page_status_and_text(cohort: Path) -> None:
    index = TileIndex(cohort)
    everything = ["B_3", "a_1", "a_2", "c_empty", "d_failed", "ö #5%"]
    assert _ids(index) == [everything]
    assert _ids(index, limit=4) == [everything[:4], everything[4:]]
    assert _ids(index, limit=3) == [everything[:3], everything[3:]]  # No empty page at the end.
    assert _ids(index, status="ok", limit=3) == [["B_3", "a_1", "a_2"], ["ö #5%"]]
    assert _ids(index, q="b_") == [["B_3"]]
    assert _ids(index, q="%") == [["ö #5%"]]  # Not a pattern.
    assert _ids(index, q="o\N{COMBINING DIAERESIS}") == [["ö #5%"]]
    assert _ids(index, q="nothing") == [[]]


def test_a_slide_that_appears_between_pages_hides_no_other(cohort: Path, write_slide: WriteSlide) -> None:
    index = TileIndex(cohort)
    first = find_slides(index.catalog().table, status=None, q="", limit=2, cursor=None)
    write_slide("AAA", 1, 1)
    rebuild_catalog(cohort)
    second = find_slides(index.catalog().table, status=None, q="", limit=2, cursor=first.next_cursor)
    assert second.slides["slide_id"].to_pylist() == ["a_2", "c_empty"]
    assert second.num_matched == 7


def test_bbox_is_half_open_and_takes_every_tile_it_touches(cohort: Path) -> None:
    manifest = TileIndex(cohort).manifest("a_1").manifest  # 10 x 8 tiles of 448 level-0 px.

    def rows(text: str) -> list[int]:
        return list(find_tiles(manifest, bbox=BBox.parse(text), min_tissue=0))

    assert rows("0,0,1,1") == [0]
    assert rows("447,447,448,448") == [0]
    assert rows("447,0,449,1") == [0, 1]
    assert rows("448,448,896,896") == [11]
    assert rows("-5,-5,0,0") == []
    assert rows("4480,0,9999,9999") == []
    assert rows("-2147483647,-2147483647,2147483647,2147483647") == list(range(80))


@pytest.mark.parametrize(
    "text", ["", "1,2,3", "1,2,3,4,5", "0,0,a,1", "0,0,0,1", "5,0,4,1", "0,0,1.5,1", "0,0,1,9999999999"]
)
def test_other_boxes_are_refused(text: str) -> None:
    with pytest.raises(BadQueryError, match="bbox"):
        BBox.parse(text)


box_edges = st.tuples(st.integers(-50, 400), st.integers(1, 300))


@given(
    box_edges, box_edges, st.floats(0, 1), st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=40)
)
def test_filters_agree_with_one_tile_at_a_time(
    x: tuple[int, int], y: tuple[int, int], min_tissue: float, corners: list[tuple[int, int]]
) -> None:
    slide = SlideRecord(
        slide_id="s", status="ok", num_tiles=len(corners), mpp_x=0.5, mpp_y=0.25, tile_px=30, tile_mpp=0.5
    )
    tissue = np.linspace(0, 1, len(corners), dtype=np.float32)
    x_l0, y_l0 = (np.array([c[axis] for c in corners], np.int32) for axis in (0, 1))
    manifest = Manifest(slide, x_l0, y_l0, tissue)
    box = BBox(x0=x[0], x1=sum(x), y0=y[0], y1=sum(y))
    width, height = 30, 60  # Anisotropic: 30 output px at 0.5 mpp are 30 px across and 60 px down.
    expected = [
        row
        for row, (left, top) in enumerate(corners)
        if max(left, box.x0) < min(left + width, box.x1)
        and max(top, box.y0) < min(top + height, box.y1)
        and tissue[row] >= np.float32(min_tissue)
    ]
    assert find_tiles(manifest, bbox=box, min_tissue=min_tissue).tolist() == expected


def test_offset_and_limit_page_through_all_tiles(cohort: Path) -> None:
    index = TileIndex(cohort)
    rows: list[int] = []
    offset: int | None = 0
    while offset is not None:
        found = index.tiles("B_3", bbox=None, min_tissue=0.25, limit=256, offset=offset)
        rows += found.rows.tolist()
        offset = found.about["next_offset"]
    assert rows == np.flatnonzero(index.manifest("B_3").manifest.tissue >= np.float32(0.25)).tolist()


@pytest.mark.parametrize("k", [1, 500, 1200, 4000])
def test_samples_are_those_of_the_local_functions(cohort: Path, k: int) -> None:
    index = TileIndex(cohort)
    for part in range(7):
        draw = Draw(k=k, seed=3, epoch=2, part=part, num_parts=7)
        expected = shard(sample_tiles(1200, k=k, seed=3, epoch=2, slide_id="B_3"), part=part, num_parts=7)
        assert np.array_equal(index.sample("B_3", draw).rows, expected)


def test_failed_and_empty_slides_and_wrong_parts_are_told_apart(cohort: Path) -> None:
    index = TileIndex(cohort)
    with pytest.raises(NothingToSampleError, match="d_failed failed when it was tiled"):
        index.sample("d_failed", ONE_DRAW)
    with pytest.raises(NothingToSampleError, match="c_empty has no tissue tiles"):
        index.sample("c_empty", ONE_DRAW)
    with pytest.raises(BadQueryError, match="part is 2 of 2"):
        draw_tiles(index.manifest("a_1").manifest, Draw(k=1, seed=0, epoch=0, part=2, num_parts=2))


def test_a_replaced_manifest_is_noticed(cohort: Path, write_slide: WriteSlide) -> None:
    index = TileIndex(cohort)
    before = index.manifest("a_1")
    assert index.manifest("a_1") is before  # Kept while the file is the same.
    write_slide("a_1", 2, 2)
    after = index.manifest("a_1")
    assert (len(before.manifest), len(after.manifest)) == (80, 4)
    assert before.hash != after.hash
    tiles_path(cohort, "a_1").unlink()
    with pytest.raises(UnknownSlideError):
        index.manifest("a_1")


def test_a_replaced_catalogue_is_noticed(cohort: Path, write_slide: WriteSlide) -> None:
    index = TileIndex(cohort)
    before = index.catalog()
    assert index.catalog() is before
    write_slide("e_6", 1, 1)
    rebuild_catalog(cohort)
    after = index.catalog()
    assert "e_6" in after.table["slide_id"].to_pylist()
    assert before.hash != after.hash


def test_without_a_catalogue_a_read_only_folder_is_scanned(
    cohort: Path, write_slide: WriteSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("services.index.open_manifests", refuse)
    (cohort / "catalog.parquet").unlink()
    index = TileIndex(cohort)
    assert len(index.catalog().table) == 6
    write_slide("e_6", 1, 1)
    assert len(index.catalog().table) == 7
    assert not (cohort / "catalog.parquet").exists()


def test_only_so_many_manifests_are_kept(cohort: Path) -> None:
    index = TileIndex(cohort, max_cached=2)
    first, second = index.manifest("a_1"), index.manifest("a_2")
    assert index.manifest("a_1") is first
    index.manifest("B_3")  # a_2 is the one asked least recently.
    assert index.manifest("a_1") is first
    assert index.manifest("a_2") is not second


def test_an_id_that_leads_to_another_slides_file_is_unknown(cohort: Path) -> None:
    other = tiles_path(cohort, "stranger")
    other.parent.mkdir(exist_ok=True)
    shutil.copy(tiles_path(cohort, "a_1"), other)
    with pytest.raises(UnknownSlideError):
        TileIndex(cohort).manifest("stranger")


@pytest.mark.parametrize("slide_id", ["", "..", "../a_1", "/etc/passwd", "a_1\0", "x" * 5000])
def test_no_id_leaves_the_folder(cohort: Path, slide_id: str) -> None:
    with pytest.raises(UnknownSlideError):
        TileIndex(cohort).manifest(slide_id)


def test_damage_is_told_without_the_path(cohort: Path) -> None:
    index = TileIndex(cohort)
    tiles_path(cohort, "a_1").write_bytes(b"PAR1 torn")
    with pytest.raises(Unreadable) as torn:
        index.manifest("a_1")
    shutil.rmtree(cohort)
    with pytest.raises(UnavailableError) as gone:
        index.catalog()
    assert str(cohort) not in f"{torn.value} {gone.value}"
    with pytest.raises(ManifestError, match="no manifests here"):
        TileIndex(cohort)


def test_many_threads_see_one_answer_while_a_manifest_is_replaced(cohort: Path, write_slide: WriteSlide) -> None:
    index = TileIndex(cohort, max_cached=1)
    seen: dict[str, int] = {}
    write_slide("a_1", 10, 8)

    def ask(i: int) -> tuple[str, int]:
        index.manifest("B_3" if i % 5 == 0 else "a_2")  # Throws a_1 out again and again.
        found = index.manifest("a_1")
        return found.hash, len(found.manifest)

    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(ask, range(200))
        for i in range(20):
            write_slide("a_1", 10, 8 + i % 2)
        for digest, num_tiles in answers:
            assert seen.setdefault(digest, num_tiles) == num_tiles
    assert set(seen.values()) <= {80, 90}


def test_a_sentence_keeps_everything_but_paths(cohort: Path) -> None:
    keep = "slide x: 3 / 5 tiles, text/html, 0.25/0.5 mpp (Aperio; MPP, XResolution tried)"
    assert without_paths(keep) == keep
    assert without_paths("a: cannot open /data/Jane Doe/x.svs: cut") == "a: cannot open …: cut"
    assert without_paths(r"a: 'C:\scans\Jane Doe\x.svs' and \\nas\x, cut") == "a: '…' and …, cut"
    index = TileIndex(cohort)
    assert index.manifest("d_failed").manifest.slide.error == "slide d_failed: cannot open …: cut file"
    assert "Jane" not in str(index.catalog().table["error"].to_pylist())


def test_summary_counts_every_slide(cohort: Path) -> None:
    summary = summarise(TileIndex(cohort).catalog().table)
    assert summary["status"] == {"ok": 4, "empty": 1, "failed": 1}
    assert summary["num_tiles"] == 80 + 1 + 1200 + 9
    assert summary["tiles_per_slide"]["max"] == 1200
    assert summary["tiles_per_slide"]["p50"] == 44.5
