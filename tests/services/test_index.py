"""TileIndex: what it finds, and that it notices what the tiler changes under it."""

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests import Manifest, ManifestError, SlideRecord, sample_tiles, shard
from manifests.compact import compact
from manifests.files import tiles_path
from manifests.source import open_stored
from services.errors import BadQueryError, NothingToSampleError, UnavailableError, UnknownSlideError
from services.errors import UnreadableManifestError as Unreadable
from services.index import TileIndex
from services.queries import BBox, Draw, check_draw, find_tiles
from services.stats import summarise

WriteSlide = Callable[..., Manifest]
ONE_DRAW = Draw(k=1, seed=0, epoch=0, part=0, num_parts=1)


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
    source = index.manifest("B_3")
    rows: list[int] = []
    num_matched = 1
    while len(rows) < num_matched:
        found = index.tiles(source, bbox=None, min_tissue=0.25, limit=256, offset=len(rows))
        rows += found.rows.tolist()
        num_matched = found.num_matched
    assert rows == np.flatnonzero(source.manifest.tissue >= np.float32(0.25)).tolist()


@pytest.mark.parametrize("k", [1, 500, 1200, 4000])
def test_samples_are_those_of_the_local_functions(cohort: Path, k: int) -> None:
    index = TileIndex(cohort)
    for part in range(7):
        draw = Draw(k=k, seed=3, epoch=2, part=part, num_parts=7)
        expected = shard(sample_tiles(1200, k=k, seed=3, epoch=2, slide_id="B_3"), part=part, num_parts=7)
        assert np.array_equal(index.sample(index.manifest("B_3"), draw).rows, expected)


def test_failed_and_empty_slides_and_wrong_parts_are_told_apart(cohort: Path) -> None:
    index = TileIndex(cohort)
    with pytest.raises(NothingToSampleError, match="d_failed failed when it was tiled"):
        index.sample(index.manifest("d_failed"), ONE_DRAW)
    with pytest.raises(NothingToSampleError, match="c_empty has no tissue tiles"):
        index.sample(index.manifest("c_empty"), ONE_DRAW)
    with pytest.raises(BadQueryError, match="part is 2 of 2"):
        check_draw(index.manifest("a_1").manifest, Draw(k=1, seed=0, epoch=0, part=2, num_parts=2))


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


def test_new_changed_and_removed_slides_are_listed_without_a_catalogue_being_written(
    cohort: Path, write_slide: WriteSlide
) -> None:
    index = TileIndex(cohort)
    written = (cohort / "catalog.parquet").stat().st_mtime_ns
    assert index.refresh() is False
    write_slide("e_6", 1, 1)
    write_slide("a_1", 2, 2)
    tiles_path(cohort, "a_2").unlink()
    assert index.refresh() is True
    listed = dict(zip(*index.catalog().table.select(["slide_id", "num_tiles"]).to_pydict().values(), strict=True))
    assert listed == {"B_3": 1200, "a_1": 4, "c_empty": 0, "d_failed": 0, "e_6": 1, "ö #5%": 9}
    assert (cohort / "catalog.parquet").stat().st_mtime_ns == written


def test_the_list_is_brought_up_to_date_in_the_background(cohort: Path, write_slide: WriteSlide) -> None:
    index = TileIndex(cohort, rescan_s=0.05)
    index.start()
    write_slide("e_6", 1, 1)
    deadline = time.monotonic() + 20
    while len(index.catalog().table) < 7 and time.monotonic() < deadline:
        time.sleep(0.02)
    index.close()
    assert "e_6" in index.catalog().table["slide_id"].to_pylist()


def test_without_a_catalogue_the_folder_is_scanned(cohort: Path, write_slide: WriteSlide) -> None:
    (cohort / "catalog.parquet").unlink()
    index = TileIndex(cohort)
    assert len(index.catalog().table) == 6
    write_slide("e_6", 1, 1)
    index.refresh()
    assert len(index.catalog().table) == 7
    assert not (cohort / "catalog.parquet").exists()


def test_manifests_are_kept_by_their_bytes(cohort: Path) -> None:
    size = {slide_id: TileIndex(cohort).manifest(slide_id).num_bytes for slide_id in ("a_1", "a_2", "B_3")}
    index = TileIndex(cohort, max_bytes=size["a_1"] + size["B_3"])
    first, second = index.manifest("a_1"), index.manifest("a_2")
    assert index.manifest("a_1") is first
    index.manifest("B_3")  # a_2 is the one asked least recently.
    assert index.manifest("a_1") is first
    assert index.manifest("a_2") is not second
    tiny = TileIndex(cohort, max_bytes=size["B_3"] - 1)
    first = tiny.manifest("a_1")
    assert tiny.manifest("B_3") is not tiny.manifest("B_3")  # Larger than all there is: served, not kept.
    assert tiny.manifest("a_1") is first


def test_many_who_ask_at_once_read_a_manifest_once(cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, num_loads, everybody = TileIndex(cohort), 0, threading.Barrier(32)
    load = index._store.load

    def count(slide_id: str) -> tuple[Manifest, str]:
        nonlocal num_loads
        num_loads += 1
        return load(slide_id)

    monkeypatch.setattr(index._store, "load", count)

    def ask(_: int) -> str:
        everybody.wait()
        return index.manifest("B_3").hash

    with ThreadPoolExecutor(32) as pool:
        assert len(set(pool.map(ask, range(32)))) == 1
    assert num_loads == 1


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


def test_damage_is_told_without_the_path(cohort: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = TileIndex(cohort)
    tiles_path(cohort, "a_1").write_bytes(b"PAR1 torn")
    with pytest.raises(Unreadable) as torn:
        index.manifest("a_1")
    shutil.rmtree(cohort)
    with pytest.raises(UnavailableError) as gone:
        index.refresh()
    with pytest.raises(UnavailableError):
        index.check()
    assert len(index.catalog().table) == 6  # What was there is still told.
    assert str(cohort) not in f"{torn.value} {gone.value} {caplog.text}"
    with pytest.raises(ManifestError, match="no manifests here"):
        TileIndex(cohort)


def test_many_threads_see_one_answer_while_a_manifest_is_replaced(cohort: Path, write_slide: WriteSlide) -> None:
    index = TileIndex(cohort, max_bytes=4096 + 1200 * 12)
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


def test_errors_of_slides_are_told_without_paths(cohort: Path) -> None:
    index = TileIndex(cohort)
    assert index.manifest("d_failed").manifest.slide.error == "slide d_failed: cannot open [path]: cut file"
    assert "Jane" not in str(index.catalog().table["error"].to_pylist())


def test_links_that_lead_out_of_the_root_are_refused_others_are_followed(cohort: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.parquet"
    tiles_path(cohort, "a_1").rename(elsewhere)
    tiles_path(cohort, "a_1").symlink_to(elsewhere)
    inside = cohort / "inside.parquet"
    tiles_path(cohort, "a_2").rename(inside)
    tiles_path(cohort, "a_2").symlink_to(inside)
    folder = tiles_path(cohort, "B_3").parent
    folder.rename(tmp_path / "folder")
    folder.symlink_to(tmp_path / "folder")
    index = TileIndex(cohort)
    for slide_id in ("a_1", "B_3"):
        with pytest.raises(UnknownSlideError):
            index.manifest(slide_id)
    assert len(index.manifest("a_2").manifest) == 1
    assert index.catalog().table["slide_id"].to_pylist() == ["a_2", "c_empty", "d_failed", "ö #5%"]


@pytest.fixture
def compacted(cohort: Path, tmp_path: Path) -> Path:
    out = tmp_path / "set"
    compact(open_stored(cohort), out)
    return out


def test_a_compacted_set_is_served_as_the_tree_it_was_made_from(cohort: Path, compacted: Path) -> None:
    tree, packed = TileIndex(cohort), TileIndex(compacted)
    assert packed.catalog().table.equals(tree.catalog().table)
    for slide_id in packed.catalog().table["slide_id"].to_pylist():
        here, there = tree.manifest(slide_id), packed.manifest(slide_id)
        assert there.manifest.slide == here.manifest.slide
        assert there.manifest.to_table().equals(here.manifest.to_table())
    with pytest.raises(UnknownSlideError):
        packed.manifest("nobody")
    assert packed.manifest("B_3") is packed.manifest("B_3")
    assert packed.manifest("B_3").hash == TileIndex(compacted).manifest("B_3").hash


def test_a_set_that_is_replaced_is_noticed_as_a_whole(cohort: Path, compacted: Path, write_slide: WriteSlide) -> None:
    index = TileIndex(compacted)
    before = index.manifest("a_1")
    write_slide("a_1", 2, 2)
    write_slide("e_6", 1, 1)
    compact(open_stored(cohort), compacted)
    assert index.manifest("a_1").hash == before.hash  # The list and the manifests are of one version.
    assert index.refresh() is True
    assert (len(index.manifest("a_1").manifest), len(index.manifest("e_6").manifest)) == (4, 1)
    assert index.manifest("a_1").hash != before.hash


def test_a_shard_that_is_a_link_out_of_the_set_is_refused(compacted: Path, tmp_path: Path) -> None:
    [shard_file] = (compacted / "shards").glob("*.parquet")
    shard_file.rename(tmp_path / "elsewhere")
    shard_file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unreadable):
        TileIndex(compacted).manifest("a_1")


@pytest.mark.parametrize("kind", ["tree", "set"])
def test_manifests_in_an_object_store_are_served(cohort: Path, compacted: Path, kind: str) -> None:
    store = fsspec.filesystem("memory")
    address = f"memory://index-{kind}-{cohort.parent.name}"
    store.put(str(cohort if kind == "tree" else compacted) + "/", address, recursive=True)
    index = TileIndex(address)
    assert index.catalog().table.equals(TileIndex(cohort).catalog().table)
    there, here = index.manifest("B_3"), TileIndex(cohort).manifest("B_3")
    assert there.manifest.to_table().equals(here.manifest.to_table())
    assert (there.hash == here.hash) is (kind == "tree")
    with pytest.raises(UnknownSlideError):
        index.manifest("nobody")
    index.check()


def test_summary_counts_every_slide(cohort: Path) -> None:
    summary = summarise(TileIndex(cohort).catalog().table)
    assert summary["status"] == {"ok": 4, "empty": 1, "failed": 1}
    assert summary["num_tiles"] == 80 + 1 + 1200 + 9
    assert summary["tiles_per_slide"]["max"] == 1200
    assert summary["tiles_per_slide"]["p50"] == 44.5
