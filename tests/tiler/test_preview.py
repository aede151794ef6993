"""Pictures show tiles and areas where they are; the page tells of every slide, and is safe against what slides say."""

import base64
import dataclasses
import hashlib
import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from manifests.errors import ManifestError
from manifests.files import disk_name, mask_path, tiles_path, write_manifest
from manifests.schema import REASONS, Manifest, SlideRecord, records_to_catalog
from tiler import TilerError
from tiler.masks import MaskRecord, Overview, write_mask
from tiler.preview import Preview
from tiler.preview.album import spread
from tiler.preview.histogram import tile_histogram
from tiler.preview.page import write_page
from tiler.preview.panel import Bar, Words, bar_length_um, bar_text, break_text, draw_panel
from tiler.preview.picture import KEPT, REJECTED, SIDE_PX, draw_slide

PX_L0 = 16.0
HOSTILE = ("<script>alert(1)</script>", '"><img src=x>', "</script><b>", "&amp;'`${alert(1)}", "\u2028ü玉")


def _record(slide_id: str, **known: Any) -> SlideRecord:
    about = {"status": "ok", "mpp_x": 0.5, "mpp_y": 0.5, "mpp_source": "vendor", "backend": "cucim", "vendor": "aperio"}
    return SlideRecord(**{"slide_id": slide_id, "tile_px": 224, "tile_mpp": 0.5, **about, **known})


def _manifest(slide_id: str, corners_l0: list[tuple[int, int]], **known: Any) -> Manifest:
    x_l0, y_l0 = np.array(corners_l0, np.int32).reshape(-1, 2).T
    record = _record(slide_id, num_tiles=len(corners_l0), **known)
    return Manifest(record, x_l0, y_l0, np.ones(len(corners_l0), np.float32))


def _mask(width: int, height: int, outline: list[list[list[list[int]]]] | None = None) -> MaskRecord:
    """A white thumbnail, all tissue."""
    overview = Overview(np.full((height, width, 3), 255, np.uint8), 0.5 * PX_L0, PX_L0)
    return MaskRecord(overview, np.ones((height, width), np.uint8), outline or [])


def _write(root: Path, manifest: Manifest, mask: MaskRecord | None = None) -> None:
    write_manifest(tiles_path(root, manifest.slide.slide_id), manifest)
    if mask is not None:
        write_mask(mask_path(root, manifest.slide.slide_id), mask)


def _archive(root: Path, num: int) -> Path:
    for i in range(num):
        _write(root, _manifest(f"case_{i:02d}", [(224 * i, 0)]), _mask(100, 80))
    return root


def _preview(root: Path, out: Path, **flags: Any) -> tuple[dict[str, Any], int]:
    return Preview(manifests=root, out=out, **{"workers": 1, **flags}).run()


class _Tags(HTMLParser):
    """Start tags of a page, with their attributes, and the text of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data


def _data(page: Path) -> dict[str, Any]:
    """The table's data as the page's script would read it."""
    found: dict[str, Any] = json.loads(_Tags(page.read_text()).scripts[0])
    return found


def _state(page: Path) -> dict[str, str]:
    data = _data(page)
    codes = data["codes"]["picture"]
    return dict(zip(data["columns"]["slide_id"], (codes["names"][i] for i in codes["rows"]), strict=True))


def _near(px: NDArray[np.uint8], colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(px.astype(int) - np.array(colour)).max() < 40)


# The picture.


def test_a_tile_is_framed_where_it_lies() -> None:
    # One tile of 224 level-0 px at (3200, 1600): from (200, 100) to (214, 114) of a thumbnail shown as it is.
    picture = draw_slide(_manifest("case", [(3200, 1600)]), _mask(900, 800))
    for x, y in ((200, 107), (214, 107), (207, 100), (207, 114)):
        assert _near(picture[y, x], KEPT), (x, y)
    inside, outside = picture[107, 207], picture[130, 207]
    assert (outside == 255).all()
    assert (inside < 255).any(), "the union is tinted"
    assert inside.min() > 220, "and the tissue is seen through it"


def test_tiles_too_small_for_lines_show_their_union_alone() -> None:
    # 224 level-0 px are 1.75 px of a thumbnail at 128 level-0 px per px.
    corners = [(224 * x, 224 * y) for x in range(100, 200) for y in range(100, 200)]
    overview = Overview(np.full((900, 900, 3), 255, np.uint8), 64.0, 128.0)
    mask = MaskRecord(overview, np.ones((900, 900), np.uint8), [])
    picture = draw_slide(_manifest("case", corners), mask)
    inside = picture[180:345, 180:345]
    assert len(np.unique(inside.reshape(-1, 3), axis=0)) == 1
    assert (inside[0, 0] != picture[500, 500]).any()


def test_every_reason_has_its_colour_where_it_is() -> None:
    mask = _mask(900, 800)
    for value in range(2, len(REASONS) + 1):
        mask.areas[100:200, 100 * value : 100 * value + 80] = value
    mask.areas[600:, :] = 0
    picture = draw_slide(_manifest("case", []), mask)
    for value, reason in enumerate(REASONS[1:], start=2):
        part = picture[110:190, 100 * value + 10 : 100 * value + 70].reshape(-1, 3)
        assert any(_near(px, REJECTED[reason]) for px in part), reason
    assert len({REJECTED[reason] for reason in REASONS} | {KEPT}) == len(REASONS) + 1
    assert (picture[700, 400] < 250).all(), "no tissue is greyed"
    assert (picture[300, 400] == 255).all(), "tissue is left as it is"


def test_the_outline_kept_is_drawn_else_the_masks_own() -> None:
    ring = [[1600, 1600], [6400, 1600], [6400, 6400], [1600, 6400], [1600, 1600]]
    told = draw_slide(_manifest("case", []), _mask(900, 800, [[ring]]))
    assert (told[100, 150:350] < 90).all()
    assert (told[50:90, 150:350] == 255).all()
    mask = _mask(900, 800)
    mask.areas[:300] = 0
    own = draw_slide(_manifest("case", []), mask)
    assert (own[298:302, 100:800].min(0) < 90).all()


@pytest.mark.parametrize("size", [(8192, 3000), (3000, 8192), (8000, 60), (60, 8000), (19, 13), (1, 1), (900, 800)])
def test_any_shape_of_slide_fits(size: tuple[int, int]) -> None:
    picture = draw_slide(_manifest("case", [(0, 0)]), _mask(*size))
    height, width = picture.shape[:2]
    assert max(height, width) <= SIDE_PX + 450
    assert min(height, width) >= 100
    assert picture.dtype == np.uint8


def test_a_tall_slide_has_its_words_beside_it() -> None:
    tall, wide = (draw_slide(_manifest("case", []), _mask(*size)) for size in ((400, 1000), (1000, 400)))
    assert tall.shape[0] == 1000
    assert wide.shape[1] == 1000


@pytest.mark.parametrize("mpp", [0.9, 8.0, 33.3])
def test_the_scale_bar_is_as_long_as_it_says(mpp: float) -> None:
    panel = draw_panel("", [[Bar(mpp)]], 480)
    dark = (panel < 60).all(-1)
    bar = max(run for row in dark for run in "".join("#" if is_dark else " " for is_dark in row).split())
    assert abs(len(bar) - bar_length_um(226 * mpp) / mpp) <= 0.5


def test_a_bar_is_a_round_number_of_microns() -> None:
    assert [bar_length_um(room) for room in (1, 1.99, 2, 49.9, 50, 999, 1000, 7300)] == [
        1, 1, 2, 20, 50, 500, 1000, 5000,
    ]  # fmt: skip
    assert [bar_text(length) for length in (20, 500, 1000, 5000)] == ["20 µm", "500 µm", "1 mm", "5 mm"]


@given(st.text(min_size=1, max_size=60), st.integers(40, 300))
def test_broken_text_is_whole_and_fits(text: str, room: int) -> None:
    pieces = break_text(text, room, 0.5)
    assert "".join(pieces) == text
    widths = [cv2.getTextSize(piece, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)[0][0] for piece in pieces]
    assert all(width <= room or len(piece) == 1 for piece, width in zip(pieces, widths, strict=True))


@pytest.mark.parametrize("slide_id", ["x" * 300, "W" * 299, "TCGA-CR-7395", "äöü玉" * 40])
def test_words_reach_no_edge_of_the_panel(slide_id: str) -> None:
    panel = draw_panel(slide_id, [[Words(slide_id), Words("tail")], [Bar(8.0)]], 400)
    assert (panel[:, -8:] == 255).all()
    assert (panel[:, :8] == 255).all()
    assert (panel[-4:] == 255).all()
    assert (panel < 128).any()


# Which slides are drawn.


@given(st.integers(0, 500), st.integers(0, 300))
def test_a_spread_is_even_and_holds_both_ends(total: int, num: int) -> None:
    ids = [str(i) for i in range(total)]
    found = spread(ids, num)
    assert len(found) == min(total, num)
    places = [int(i) for i in found]
    assert places == sorted(set(places))
    if 2 <= num <= total:
        assert (places[0], places[-1]) == (0, total - 1)
        steps = np.diff(places)
        assert steps.max() - steps.min() <= 1


def test_a_tiled_cohort_becomes_pictures_and_a_page(small_manifests: Path, tmp_path: Path) -> None:
    result, code = _preview(small_manifests, tmp_path / "out")
    page = tmp_path / "out" / "index.html"
    assert code == 0
    assert result == {"page": str(page), "num_slides": 12, "num_pictures": 12, "ok": 12, "empty": 0, "failed": 0}
    for slide_id, name in zip(_data(page)["columns"]["slide_id"], _data(page)["files"].values(), strict=True):
        assert name == f"{disk_name(slide_id)}.jpg"
        assert cv2.imread(str(page.parent / "pictures" / name)) is not None
    assert str(small_manifests) not in page.read_text()


def test_a_second_run_draws_only_what_changed(tmp_path: Path) -> None:
    root, out = _archive(tmp_path / "m", 4), tmp_path / "out"
    _preview(root, out)
    pictures = sorted((out / "pictures").iterdir())
    before = [file.stat().st_ino for file in pictures]
    os.utime(tiles_path(root, "case_01"))
    os.utime(mask_path(root, "case_02"))
    assert _preview(root, out)[0]["num_pictures"] == 4
    is_same = [file.stat().st_ino == inode for file, inode in zip(pictures, before, strict=True)]
    assert is_same == [True, False, False, True]


def test_pictures_are_limited_and_chosen(tmp_path: Path) -> None:
    root, out = _archive(tmp_path / "m", 9), tmp_path / "out"
    assert _preview(root, out, max_slides=3)[0]["num_pictures"] == 3
    drawn = [slide_id for slide_id, state in _state(out / "index.html").items() if state == "drawn"]
    assert drawn == ["case_00", "case_04", "case_08"]
    # A second run adds to what is there; the page lists every slide either way.
    result, _ = _preview(root, out, slides=("case_02", "case_03"), max_slides=1)
    assert (result["num_pictures"], result["num_slides"]) == (5, 9)
    assert _preview(root, tmp_path / "none", max_slides=0)[0]["num_pictures"] == 0


def test_slides_without_mask_keep_their_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = _archive(tmp_path / "m", 2), tmp_path / "out"
    _write(root, _manifest("imported", [(0, 0)]))
    _write(root, _manifest("broken", [], status="failed", error="slide broken: empty file (0 bytes)"), _mask(9, 9))
    result, code = _preview(root, out)
    assert (code, result["num_slides"], result["num_pictures"], result["failed"]) == (0, 4, 2, 1)
    state = _state(out / "index.html")
    assert (state["imported"], state["broken"]) == ("no mask", "failed")
    assert "want of a mask and thumbnail: 1" in capsys.readouterr().err


def test_a_torn_mask_is_told_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = _archive(tmp_path / "m", 3), tmp_path / "out"
    torn = mask_path(root, "case_01")
    torn.write_bytes(torn.read_bytes()[:-40])
    result, code = _preview(root, out)
    assert (code, result["num_pictures"]) == (1, 2)
    told = capsys.readouterr().err
    assert "no picture: slide case_01: its manifest or tissue mask cannot be read" in told
    assert str(tmp_path) not in told
    assert _state(out / "index.html") == {"case_00": "drawn", "case_01": "unreadable", "case_02": "drawn"}


def test_an_interrupt_leaves_whole_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, out = _archive(tmp_path / "m", 4), tmp_path / "out"
    calls = []

    def write_half(file: Path, data: bytes) -> int:
        calls.append(file)
        written = write_bytes(file, data[: len(data) // 2 if len(calls) == 3 else len(data)])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return written

    write_bytes = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(KeyboardInterrupt):
        _preview(root, out)
    assert [entry.name for entry in out.iterdir()] == ["pictures"]
    pictures = list((out / "pictures").iterdir())
    assert len(pictures) == 2
    assert all(cv2.imread(str(file)) is not None for file in pictures)


@pytest.mark.slow
def test_processes_draw_what_one_process_draws(tmp_path: Path) -> None:
    root = _archive(tmp_path / "m", 25)
    torn = mask_path(root, "case_07")
    torn.write_bytes(torn.read_bytes()[:-40])
    assert _preview(root, tmp_path / "one")[1] == _preview(root, tmp_path / "two", workers=2)[1] == 1
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / name / "pictures").iterdir()} for name in ("one", "two")
    )
    assert len(one) == 24
    assert one == two


def test_wrong_usage_is_refused_in_one_sentence(tmp_path: Path) -> None:
    root = _archive(tmp_path / "m", 1)
    (tmp_path / "file").touch()
    for flags, sentence in (
        ({"out": root / "tiles"}, r"inside tiles/"),
        ({"out": root / "tiles" / "ab" / ".." / "new"}, r"inside tiles/"),
        ({"out": root / "masks" / "new"}, r"inside masks/"),
        ({"out": tmp_path / "file"}, r"cannot make this folder"),
        ({"slides": ("case_77",)}, r"--slides case_77: no such slide"),
        ({"max_slides": -1}, r"--max-slides -1: expected 0 or more"),
        ({"workers": 0}, r"--workers 0: expected at least 1"),
    ):
        with pytest.raises(TilerError, match=sentence):
            _preview(root, **{"out": tmp_path / "out", **flags})
    assert not (root / "tiles" / "new").exists()
    with pytest.raises(ManifestError, match="no manifests here"):
        _preview(tmp_path / "nothing", tmp_path / "out")


# The page.


def test_a_hostile_slide_id_stays_text(tmp_path: Path) -> None:
    root, out = tmp_path / "m", tmp_path / "out"
    for slide_id in HOSTILE:
        _write(root, _manifest(slide_id, [(0, 0)], vendor=slide_id, mpp_source=slide_id), _mask(60, 50))
    for slide_id in (f"failed {slide_id}" for slide_id in HOSTILE):
        _write(root, _manifest(slide_id, [], status="failed", error=f"slide {slide_id}: {slide_id} is odd"))
    assert _preview(root, out)[0]["num_pictures"] == len(HOSTILE)
    page = out / "index.html"
    found = _Tags(page.read_text())
    assert [tag for tag, _ in found.tags if tag in ("b", "img", "script")].count("script") == 2
    assert [attributes.get("id") for tag, attributes in found.tags if tag == "img"] == ["picture"]
    data = _data(page)
    assert data["columns"]["slide_id"] == sorted([*HOSTILE, *(f"failed {slide_id}" for slide_id in HOSTILE)])
    assert all((out / "pictures" / name).is_file() for name in data["files"].values())


def test_no_script_but_the_pages_own_may_run(tmp_path: Path) -> None:
    _preview(_archive(tmp_path / "m", 1), tmp_path / "out")
    found = _Tags((tmp_path / "out" / "index.html").read_text())
    policy = next(a["content"] for tag, a in found.tags if tag == "meta" and a.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(found.scripts[1].encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    _preview(_archive(tmp_path / "m", 1), tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "://" not in page
    assert "url(" not in page
    assert not [a for _, a in _Tags(page).tags if a.keys() & {"src", "href", "srcset", "onclick"}]


def _page_of(records: list[SlideRecord], tmp_path: Path) -> str:
    write_page(tmp_path / "index.html", records_to_catalog(records), {r.slide_id: "not drawn" for r in records})
    return (tmp_path / "index.html").read_text()


def test_the_table_holds_every_slide_in_order(tmp_path: Path) -> None:
    records = [
        _record("b", num_tiles=7, rejected_pen=3, mpp_x=0.25037, mpp_y=0.25037, vendor="mirax", level=2),
        _record("a", status="empty", tissue_mm2=1.23456, vendor="zeiss"),
        _record("c", status="failed", error="slide c: gone"),
    ]
    _page_of(records, tmp_path)
    data = _data(tmp_path / "index.html")
    columns, codes = data["columns"], data["codes"]
    assert (data["num"], columns["slide_id"], columns["num_tiles"]) == (3, ["a", "b", "c"], [0, 7, 0])
    assert (columns["rejected_pen"], columns["level"]) == ([0, 3, 0], [0, 2, 0])
    assert (columns["tissue_mm2"], columns["mpp_x"]) == ([1.23, 0, 0], [0.5, 0.25, 0.5])
    assert [codes["status"]["names"][i] for i in codes["status"]["rows"]] == ["empty", "ok", "failed"]
    assert codes["vendor"]["names"] == sorted(codes["vendor"]["names"]), "the page sorts by the codes"
    assert data["errors"] == {"2": "slide c: gone"}


def test_a_number_that_is_none_does_not_empty_the_page(tmp_path: Path) -> None:
    _page_of([_record("a", tissue_mm2=float("nan"), mpp_x=float("inf"), mpp_y=float("inf"))], tmp_path)
    assert _data(tmp_path / "index.html")["columns"]["mpp_x"] == [0.0]


def test_failures_are_grouped_by_reason(tmp_path: Path) -> None:
    reasons = {"a1": "3 of 40 tiles are damaged", "a2": "17 of 1,000 tiles are damaged", "b": "a1 is no slide"}
    records = [_record(s, status="failed", error=f"slide {s}: {reason}") for s, reason in reasons.items()]
    page = _page_of(records, tmp_path)
    assert "<b>2</b> N of N tiles are damaged</summary>" in page
    assert "<li>a2: 17 of 1,000 tiles are damaged</li>" in page
    assert page.index("N of N tiles") < page.index("a1 is no slide"), "the most frequent first"


def test_scales_are_counted_by_vendor_and_reader(tmp_path: Path) -> None:
    same = {"mpp_x": 0.25201, "mpp_y": 0.25204}
    records = [
        _record("a", **same),
        _record("b", **{**same, "mpp_conflict": True, "mpp_other": 0.5039}),
        _record("c", mpp_x=0.25, mpp_y=0.26, backend="openslide"),
        _record("d", status="failed"),
    ]
    cells = _page_of(records, tmp_path)
    row = '<td>aperio</td><td>cucim</td><td>0.252</td><td>vendor</td><td class="num">2</td>'
    assert row in cells
    assert "other: 0.504" in cells
    assert "<td>0.250 × 0.260</td>" in cells
    assert cells.count("<td>aperio</td>") == 2, "a failed slide has no scale"


def test_slides_without_tiles_are_told_beside_the_histogram(tmp_path: Path) -> None:
    empty = _record("a", status="empty")
    assert "No slide has tiles." in _page_of([empty], tmp_path)
    assert "Left out: 1 slide without tiles." in _page_of([empty, _record("b", num_tiles=5)], tmp_path)


# The histogram.


@given(st.lists(st.one_of(st.integers(0, 60), st.integers(0, 2_000_000)), max_size=60))
def test_every_slide_with_tiles_is_in_the_bin_that_says_so(counts: list[int]) -> None:
    with_tiles = [n for n in counts if n]
    found = tile_histogram(counts)
    if found is None:
        assert not with_tiles
        return
    for bin_ in found.bins:
        assert bin_.num_slides == sum(bin_.low <= n <= bin_.high for n in with_tiles)
        assert -1e-9 <= bin_.left < bin_.right <= 1 + 1e-9
    assert sum(bin_.num_slides for bin_ in found.bins) == len(with_tiles)
    assert found.num_most == max(bin_.num_slides for bin_ in found.bins)
    assert all(-1e-9 <= mark.at <= 1 + 1e-9 for mark in (*found.ticks, *found.marks))
    assert [mark.at for mark in found.ticks] == sorted(mark.at for mark in found.ticks)


def test_a_wide_spread_is_drawn_by_ratio_and_a_narrow_one_evenly() -> None:
    wide, narrow = tile_histogram([10, 100, 1_000, 10_000]), tile_histogram(list(range(900, 1_000)))
    assert wide is not None
    assert narrow is not None
    assert (wide.is_log, narrow.is_log) == (True, False)
    assert [tick.text for tick in wide.ticks] == ["10", "100", "1,000", "10k"]
    assert narrow.ticks[0].value == 0


def test_median_and_shares_are_those_of_manifest_stats() -> None:
    found = tile_histogram([0, *range(1, 101)])
    assert found is not None
    expected = {"median": 50.5, "95 %": 95.05, "99 %": 99.01, "largest": 100}
    assert {mark.text: mark.value for mark in found.marks} == pytest.approx(expected)


def test_every_status_is_known_to_the_page(tmp_path: Path) -> None:
    records = [dataclasses.replace(_record(status), status=status) for status in ("ok", "empty", "failed")]
    page = _page_of(records, tmp_path)
    for status in ("ok", "empty", "failed"):
        assert f"<option>{status}</option>" in page
