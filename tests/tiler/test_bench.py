"""`slidegrad bench read`: the readers deliver the same tiles, the limit decodes what is needed once, numbers add up."""

import dataclasses
import io
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from rich.console import Console

import tiler.bench.limit
import tiler.bench.measure
import tiler.reader
from manifests import Manifest, SlidegradError, SlideRecord, open_manifests, sample_tiles
from tests.conftest import Ended
from tests.tiler import formats
from tiler import DamageError, ReadError, Slide, TilerConfig, TilerError, build_manifest, open_slide
from tiler.archive import Job, tile_archive
from tiler.bench.cli import Read
from tiler.bench.limit import ALIGNED, FASTEST, allocate, count_touched, find_needed, make_limit
from tiler.bench.measure import bench_slide, measure_peak
from tiler.bench.table import draw_table
from tiler.reader import plan_tiles

CONFIG = TilerConfig(tile_px=32, mpp=2.0, min_tissue=0)
FLAGS = ("--tile-px", "32", "--mpp", "2.0", "--min-tissue", "0")
READERS = ["read_tiles_1", "read_tiles_2", "cucim_per_tile", "cucim_batch_1", "cucim_batch_2", "openslide_per_tile"]

Opened = tuple[Slide, Manifest]


def _open(path: Path, config: TilerConfig = CONFIG) -> Opened:
    return open_slide(path), build_manifest(path, path.stem, config).manifest


@pytest.fixture(scope="module")
def path(small_cohort: Path) -> Path:
    return small_cohort / "slides" / "synth_0000.svs"


def test_the_command_measures_every_reader(path: Path, slidegrad: Callable[..., Ended]) -> None:
    done = slidegrad("bench", "read", path, *FLAGS, "--share", "1.0,0.4", "--rounds", "2")
    assert done.code == 0, done.stderr
    assert done.result is not None
    (slide,) = done.result["slides"]
    assert (slide["slide"], slide["compression"], slide["file_tile"]) == ("synth_0000", "JPEG", [256, 256])
    assert slide["num_measured"] == slide["num_tiles"]
    assert [share["num_tiles"] for share in slide["shares"]] == [slide["num_tiles"], round(0.4 * slide["num_tiles"])]
    for share in slide["shares"]:
        assert list(share["readers"]) == [*READERS, "limit", "limit_aligned"]
        assert all(rates["tiles_per_s"] > 0 for rates in share["readers"].values())
        assert list(share["ratio_per_core_s"]) == [*READERS[1:], "limit", "limit_aligned"]
        assert list(share["ratio_threads"]) == ["read_tiles_2"]
        assert share["peak_mb"] >= 0
    assert "openslide_per_tile" in done.stderr
    assert str(path.parent) not in done.stderr + json.dumps(done.result)


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, mpp=2.6)], ids=["native", "resampled"])
def test_all_readers_deliver_the_same_tiles(config: TilerConfig, path: Path) -> None:
    result = bench_slide(*_open(path, config), num_rounds=1)
    assert result["difference"] == dict.fromkeys(READERS[1:], 0.0)
    assert result["why_not"] == {}


def test_a_reader_that_delivers_other_pixels_is_seen(path: Path) -> None:
    grey = {"grey": lambda work: partial(work.out.fill, 128)}
    assert bench_slide(*_open(path), num_rounds=1, more=grey)["difference"]["grey"] > 10


def test_shares_are_drawn_as_the_sampler_draws_them(path: Path) -> None:
    slide, manifest = _open(path)
    seen = []
    spy = {"spy": lambda work: partial(seen.append, work.rows)}
    bench_slide(slide, manifest, shares=(1.0, 0.3), num_rounds=1, seed=7, more=spy)
    k = round(0.3 * len(manifest))
    drawn = sample_tiles(len(manifest), k=k, seed=7, epoch=0, slide_id=manifest.slide.slide_id)
    assert seen[-2].tolist() == list(range(len(manifest)))
    assert seen[-1].tolist() == drawn.tolist()


def test_of_a_large_slide_the_first_tiles_are_measured(path: Path) -> None:
    slide, manifest = _open(path)
    assert len(manifest) > 10
    seen = []
    spy = {"spy": lambda work: partial(seen.append, work.rows)}
    result = bench_slide(slide, manifest, shares=(1.0, 0.4), num_rounds=1, seed=7, most_tiles=10, more=spy)
    drawn = sample_tiles(10, k=4, seed=7, epoch=0, slide_id=manifest.slide.slide_id)
    assert max(seen[0]) < 10  # Of the trial.
    assert [rows.tolist() for rows in seen[-2:]] == [list(range(10)), drawn.tolist()]
    assert (result["num_tiles"], result["num_measured"]) == (len(manifest), 10)
    assert [share["num_tiles"] for share in result["shares"]] == [10, 4]
    assert f"the first 10 of {len(manifest)} tiles" in str(draw_table(result).title)


@pytest.mark.parametrize(
    ("name", "decoder", "config"),
    [
        ("CMU-1-Small-Region.svs", "jpeg8_decode", TilerConfig()),
        ("CMU-1-Small-Region.svs", "jpeg8_decode", TilerConfig(mpp=0.8)),
        ("TCGA-CR-7395-01A-01-TS1.svs", "jpeg2k_decode", TilerConfig(default_mpp=0.5)),
    ],
    ids=["JPEG of RGB with tables apart", "resampled", "JPEG 2000"],
)
def test_the_limit_decodes_each_needed_tile_once_and_right(
    name: str, decoder: str, config: TilerConfig, real_slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide, manifest = _open(real_slides / name, config)
    rows = np.arange(0, len(manifest), 3)
    needed = find_needed(slide, manifest, rows)
    assert len(needed.index) == plan_tiles(slide, manifest, rows).num_decoded
    places = needed.table.offsets.flat[needed.index], needed.table.num_bytes.flat[needed.index]
    content = slide.path.read_bytes()
    tiles = [content[at : at + size] for at, size in zip(*map(np.ndarray.tolist, places), strict=True)]
    expected = [needed.table.decode(tile, i)[0] for tile, i in zip(tiles, needed.index.tolist(), strict=True)]  # type: ignore[index]
    run = make_limit(slide.path, needed, manifest, len(rows), FASTEST)
    got, decode = [], getattr(imagecodecs, decoder)

    def spy(*arguments: Any, **options: Any) -> object:
        pixels = decode(*arguments, **options)
        got.append((arguments[0], pixels.copy(), options["out"].ctypes.data % 64))
        return pixels

    monkeypatch.setattr(imagecodecs, decoder, spy)
    run()
    assert [tile for tile, _, _ in got] == tiles
    assert {place for _, _, place in got} == {16}
    assert all(np.array_equal(pixels, right[0]) for (_, pixels, _), right in zip(got, expected, strict=True))


@pytest.mark.parametrize("compression", ["jpeg", "zlib", "lzw", None])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_the_limit_knows_every_codec(compression: str | None, planar: str, tmp_path: Path) -> None:
    picture = formats.draw_picture()
    layout = {"planarconfig": planar, "photometric": "rgb", "resolution": (20_000, 20_000), "resolutionunit": 3}
    samples = np.moveaxis(picture, 2, 0) if planar == "separate" else picture
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, samples, tile=(64, 64), compression=compression, **layout)
    result = bench_slide(*_open(path, TilerConfig(tile_px=32, mpp=0.5, min_tissue=0)), threads=(1,), num_rounds=1)
    (share,) = result["shares"]
    assert share["readers"]["limit"]["tiles_per_s"] > 0


def test_tiles_that_a_writer_cut_at_the_edge_are_decoded_too(tmp_path: Path) -> None:
    picture = formats.draw_picture()[:100, :150]
    tiles = [picture[y : y + 64, x : x + 64] for y in range(0, 100, 64) for x in range(0, 150, 64)]
    path = tmp_path / "cut.tif"
    layout = {"photometric": "ycbcr", "subsampling": (2, 2), "resolution": (20_000, 20_000), "resolutionunit": 3}
    tifffile.imwrite(
        path, iter(map(formats.encode_jpeg, tiles)), shape=picture.shape, dtype=np.uint8, tile=(64, 64),
        compression="jpeg", **layout,
    )  # fmt: skip
    slide, manifest = _open(path, TilerConfig(tile_px=50, mpp=0.5, min_tissue=0))
    rows = np.arange(len(manifest))
    needed = find_needed(slide, manifest, rows)
    assert len(needed.index) == 6
    make_limit(path, needed, manifest, len(rows), FASTEST)()


@pytest.mark.parametrize("place", [FASTEST, ALIGNED, 63])
def test_a_buffer_begins_where_it_is_told(place: int) -> None:
    for side in (1, 7, 256):
        buffer = allocate((side, side, 3), place)
        assert buffer.ctypes.data % 64 == place
        assert buffer.shape == (side, side, 3)
        assert buffer.flags.c_contiguous


def test_compressed_tiles_are_counted_under_each_tile(path: Path) -> None:
    slide, _ = _open(path)
    x, y = (np.array(corner, np.int32) for corner in ([0, 224, 448], [0, 0, 224]))
    sizes = {"read_w": 224, "read_h": 224, "tile_px": 224, "tile_mpp": 0.5, "mpp_x": 0.5, "mpp_y": 0.5}
    manifest = Manifest(SlideRecord(slide_id="s", status="ok", num_tiles=3, **sizes), x, y, np.ones(3, np.float32))
    # Of 256 px: the first tile lies in one, the second in two columns, the third in two columns and two rows.
    assert count_touched(slide, manifest, np.arange(3)) == 1 + 2 + 4
    assert find_needed(slide, manifest, np.arange(3)).index.tolist() == [
        column + row * find_needed(slide, manifest, np.arange(3)).table.shape[1]
        for row, columns in ((0, (0, 1, 2)), (1, (1, 2)))
        for column in columns
    ]


def test_rates_are_medians_and_ratios_are_taken_round_by_round() -> None:
    assert tiler.bench.measure._rates(100, [1.0, 2.0, 4.0], [0.5, 1.0, 1.0]) == {
        "tiles_per_s": 50.0,
        "spread": 1.5,
        "tiles_per_core_s": 100.0,
        "core_spread": 0.5,
    }
    # The second round was slow for all, and the third for ours: 4, 4 and 1 times as fast.
    assert tiler.bench.measure._ratio([4.0, 40.0, 4.0], [1.0, 10.0, 4.0]) == 4.0


def test_peak_memory_is_that_of_reading(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide, manifest = _open(path)
    rows = np.arange(len(manifest))
    assert (least := measure_peak(slide, manifest, rows, 1)) is not None
    read_tiles = tiler.bench.measure.read_tiles

    def wasteful(*arguments: Any) -> object:
        np.ones(200_000_000, np.uint8)
        return read_tiles(*arguments)

    monkeypatch.setattr(tiler.bench.measure, "read_tiles", wasteful)
    assert (most := measure_peak(slide, manifest, rows, 1)) is not None
    assert 190 < most - least < 400


def test_tiles_come_from_manifests(path: Path, small_manifests: Path) -> None:
    result, code = Read(slides=(path,), manifests=str(small_manifests), rounds=1, threads="1").run()
    assert code == 0
    assert result["slides"][0]["num_tiles"] == len(open_manifests(small_manifests)["synth_0000"])


def test_without_cucim_its_columns_say_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cucim", None)
    result = bench_slide(*_open(path), num_rounds=1)
    assert result["backend"] == "openslide"
    missing = {"cucim_per_tile", "cucim_batch_1", "cucim_batch_2"}
    assert set(result["why_not"]) == missing
    assert "not installed" in result["why_not"]["cucim_per_tile"]
    (share,) = result["shares"]
    assert {name for name, rates in share["readers"].items() if rates is None} == missing


def test_the_table_shows_what_was_measured_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cucim", None)
    result = bench_slide(*_open(path), num_rounds=1)
    shown = Console(file=io.StringIO(), width=80, record=True)
    shown.print(draw_table(result))
    lines = [line.split() for line in shown.export_text().splitlines()]
    rows = {name: line for line in lines for name in result["shares"][0]["readers"] if name in line}
    assert list(rows) == ["read_tiles_1", "read_tiles_2", "openslide_per_tile", "limit", "limit_aligned"]
    assert rows["read_tiles_1"][0] == f"{result['num_tiles']:,}"
    assert rows["limit"][1] == f"{result['shares'][0]['readers']['limit']['tiles_per_s']:,.0f}"


def test_where_there_are_no_tables_there_is_no_limit(tmp_path: Path) -> None:
    path = formats.write_ome_zarr(tmp_path / "slide.ome.zarr", formats.draw_picture())
    result = bench_slide(*_open(path, dataclasses.replace(CONFIG, default_mpp=0.5)), num_rounds=1)
    (share,) = result["shares"]
    assert {name for name, rates in share["readers"].items() if rates} == {"read_tiles_1", "read_tiles_2"}
    assert result["why_not"]["limit"] == "its compressed tiles are in no TIFF's tables"
    assert set(share["decoded_per_tile"]) == {"read_tiles", "per_tile"}


def test_a_reader_that_fails_is_left_out_and_names_no_path(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise openslide.OpenSlideError(f"cannot read {path}")

    opened = _open(path)
    monkeypatch.setattr(openslide.OpenSlide, "read_region", fail)
    result = bench_slide(*opened, num_rounds=1)
    assert result["why_not"] == {"openslide_per_tile": "cannot read synth_0000"}
    assert result["shares"][0]["readers"]["openslide_per_tile"] is None


def test_where_ours_fails_it_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ReadError("slide synth_0000: no")

    opened = _open(path)
    monkeypatch.setattr(tiler.bench.readers, "read_tiles", fail)
    with pytest.raises(ReadError, match="slide synth_0000: no"):
        bench_slide(*opened, num_rounds=1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"slides": ()}, "no SLIDE; name one or more"),
        ({"slides": (Path("/nowhere/missing.svs"),)}, "slide missing: no such file"),
        ({"slides": (Path("/nowhere/missing.svs"),) * 2, "mpp": 0}, "--mpp 0: expected"),
        ({"most_tiles": 0}, "--most-tiles 0: expected 1 or more"),
        ({"share": "0"}, r"--share 0: expected shares in \(0, 1\]"),
        ({"share": "1.0,1.5"}, r"--share 1.0,1.5: expected shares in \(0, 1\]"),
        ({"share": "half"}, "--share half: expected shares"),
        ({"share": "nan"}, "--share nan: expected shares"),
        ({"threads": "0"}, "--threads 0: expected 1 to 1024 threads"),
        ({"threads": "1,"}, "--threads 1,: expected 1 to 1024 threads"),
        ({"rounds": 0}, "--rounds 0: expected 1 or more"),
        ({"tile_px": 0}, "--tile-px 0: expected"),
        ({"mpp": 2.0, "min_tissue": 1.0, "tile_px": 224}, "slide synth_0000: no tiles to read; give --min-tissue 0"),
        (
            {"mpp": 2.0, "tile_px": 512},
            "slide synth_0000: no tile of 512 px at 2 mpp fits in; give a smaller --tile-px",
        ),
        ({"min_tissue": 0, "tile_px": 4096}, "no tile of 4096 px at 0.5 mpp fits in; give a smaller --tile-px"),
        ({"manifests": "m", "mpp": 2.0}, "--manifests says which tiles; leave --tile-px, --mpp"),
        ({"manifests": "m", "tile_px": TilerConfig.tile_px}, "--manifests says which tiles"),
        ({"manifests": "m", "mpp": TilerConfig.mpp}, "--manifests says which tiles"),
        ({"manifests": "m", "min_tissue": TilerConfig.min_tissue}, "--manifests says which tiles"),
        ({"manifests": "m", "default_mpp": 0.5}, "--manifests says which tiles"),
        ({"manifests": "/nowhere"}, "/nowhere"),
    ],
)
def test_bad_input_is_told_in_one_sentence(options: dict[str, Any], sentence: str, path: Path) -> None:
    with pytest.raises(SlidegradError, match=sentence) as caught:
        Read(**{"slides": (path,), **options}).run()
    assert "\n" not in str(caught.value)


def test_a_slide_that_the_manifests_do_not_know_is_refused(small_manifests: Path, real_slides: Path) -> None:
    other = real_slides / "CMU-1-Small-Region.svs"
    with pytest.raises(TilerError, match=r"slide CMU-1-Small-Region: no slide of --manifests is this file"):
        Read(slides=(other,), manifests=str(small_manifests)).run()


def test_a_slide_without_scale_is_told_of_the_one_flag_there_is(real_slides: Path) -> None:
    with pytest.raises(TilerError, match=r"no microns-per-pixel \(aperio; .* tried\); give --default-mpp$"):
        Read(slides=(real_slides / "TCGA-CR-7395-01A-01-TS1.svs",)).run()


def test_a_manifest_without_tiles_says_so(path: Path, tmp_path: Path) -> None:
    tile_archive(str(path), tmp_path, TilerConfig(tile_px=224, mpp=2.0, min_tissue=1.0), Job(num_workers=0))
    with pytest.raises(TilerError, match=r"slide synth_0000: its manifest has no tiles; .* leave --manifests out"):
        Read(slides=(path,), manifests=str(tmp_path)).run()


def test_a_slide_that_fails_costs_no_other(path: Path, slidegrad: Callable[..., Ended]) -> None:
    missing, torn = path.with_name("missing.svs"), path.parent.parent / "labels.csv"
    done = slidegrad("bench", "read", missing, path, torn, *FLAGS, "--rounds", "1", "--threads", "1")
    assert done.code == 1, done.stderr
    assert done.result is not None
    assert [slide["slide"] for slide in done.result["slides"]] == ["synth_0000"]
    assert [failed["slide"] for failed in done.result["failed"]] == ["missing", "labels"]
    sentences = [failed["error"] for failed in done.result["failed"]]
    assert sentences[0] == "slide missing: no such file"
    assert sentences[1].startswith("slide labels: not a slide")
    # Each is told when it is done.
    places = [done.stderr.index(text) for text in (sentences[0], "openslide_per_tile", sentences[1])]
    assert places == sorted(places)
    assert str(path.parent.parent) not in done.stderr + json.dumps(done.result)


def test_where_no_slide_of_several_is_measured_all_are_listed() -> None:
    result, code = Read(slides=(Path("/nowhere/a.svs"), Path("/nowhere/b.svs"))).run()
    assert (code, result["slides"]) == (1, [])
    assert [failed["error"] for failed in result["failed"]] == ["slide a: no such file", "slide b: no such file"]


@pytest.mark.parametrize(
    ("is_tiled_here", "sentence"),
    [
        (True, "slide synth_0000: damaged under 3 of its tiles; restore it from its source"),
        (False, "slide synth_0000: damaged under 3 of its tiles, which .* or tile it again with --check decode"),
    ],
)
def test_damage_names_a_way_out_that_there_is(
    is_tiled_here: bool, sentence: str, path: Path, small_manifests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        tiler.reader._refuse_damage(SlideRecord(slide_id="synth_0000", status="ok"), np.ones(3, bool))

    monkeypatch.setattr(tiler.bench.readers, "read_tiles", fail)
    tiles = {"tile_px": 32, "mpp": 2.0} if is_tiled_here else {"manifests": str(small_manifests)}
    with pytest.raises(TilerError, match=f"^{sentence}$") as caught:
        Read(slides=(path,), **tiles).run()
    assert isinstance(caught.value.__cause__, DamageError)


def test_wrong_usage_is_exit_code_2(slidegrad: Callable[..., Ended]) -> None:
    done = slidegrad("bench", "read", "/nowhere/missing.svs")
    assert (done.code, done.result) == (2, None)
    assert done.stderr.splitlines()[-1] == "slidegrad: slide missing: no such file"
    assert slidegrad("bench").code == 2
    assert slidegrad("bench", "write").code == 2
