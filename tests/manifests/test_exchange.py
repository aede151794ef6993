"""Round trips: what is exported and imported again is the same tiles, read in the same way, in every format."""

import dataclasses
import json
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests import Manifest, ManifestError, SlideRecord
from manifests.exchange import EXPORTERS, Format, LevelSize, Outline, TileSet, fit_tiles, read_outline, read_tile_sets
from manifests.exchange.geojson import spread_rows
from manifests.exchange.tables import read_groups
from manifests.geometry import choose_read, level_to_l0

FORMATS = get_args(Format)
PLAN = ("tile_px", "tile_mpp", "level", "read_w", "read_h")
SQUARES: Outline = [[[[0, 0], [90, 0], [90, 90], [0, 90], [0, 0]], [[9, 9], [9, 20], [20, 20], [9, 9]]]]
AWKWARD = [
    "Schnitt ä 标本",
    'a,"b"',
    "two\nlines",
    "a\rb",
    " spaces ",
    "007",
    "=1+1",
    "../up/and away",
    ".hidden",
    "L" * 240,
]

ids = st.one_of(
    st.sampled_from(AWKWARD),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=30),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A slide as a manifest and as the tiler would open it."""

    manifest: Manifest
    levels: tuple[LevelSize, ...]


@st.composite
def cases(draw: st.DrawFn, slide_id: str) -> Case:
    """A slide with fractional downsamples, unlike scales in x and y, and tiles that are often resampled."""
    mpp_x = draw(st.floats(0.1, 1.0))
    mpp_y = mpp_x * draw(st.sampled_from([1.0, 1.002, 0.93, 1.08]))
    downsamples = (1.0, draw(st.sampled_from([2.0, 4.0, 4.0003, 2.9971])), draw(st.sampled_from([16.0, 16.0071, 11.3])))
    tile_px = draw(st.integers(8, 300))
    tile_mpp = max(mpp_x, mpp_y) * draw(st.one_of(st.sampled_from([1.0, 2.0, 4.0]), st.floats(1.0, 30.0)))
    read = choose_read(downsamples, (mpp_x, mpp_y), tile_px, tile_mpp)
    downsample = downsamples[read.level]
    cells = draw(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=40, unique=True))
    col, row = np.array(cells, np.int64).reshape(-1, 2).T
    x_l0, y_l0 = level_to_l0(col * read.read_w, downsample), level_to_l0(row * read.read_h, downsample)
    width, height = (int(61 * side * downsample) + 100 for side in (read.read_w, read.read_h))
    record = SlideRecord(
        slide_id=slide_id,
        status="ok" if cells else "empty",
        num_tiles=len(cells),
        width_l0=width,
        height_l0=height,
        mpp_x=mpp_x,
        mpp_y=mpp_y,
        tile_px=tile_px,
        tile_mpp=tile_mpp,
        overlap=draw(st.integers(0, tile_px - 1)),
        level=read.level,
        read_w=read.read_w,
        read_h=read.read_h,
    )
    tissue = np.array(draw(st.lists(st.floats(0, 1, width=32), min_size=len(cells), max_size=len(cells))), np.float32)
    levels = tuple(LevelSize(int(width / d), int(height / d), d) for d in downsamples)
    return Case(Manifest(record, x_l0, y_l0, tissue), levels)


archives = st.lists(ids, min_size=1, max_size=3, unique=True).flatmap(lambda names: st.tuples(*map(cases, names)))


def export(kind: Format, out: Path, manifests: Iterable[Manifest], outline: Outline = SQUARES, most: int = 9999) -> set:
    """Writes the manifests; returns what the format said it cannot say."""
    with EXPORTERS[kind](out, most) as add:
        return {sentence for manifest in manifests for sentence in add(manifest, outline)}


def read_all(kind: Format, files: list[Path], tile_px: int | None = None) -> dict[str, TileSet]:
    """What the files hold, by the surest name; none may fail."""
    tile_sets = list(read_tile_sets(kind, files, tile_px))
    assert [t for t in tile_sets if isinstance(t, ManifestError)] == []
    return {t.names[0]: t for t in tile_sets if isinstance(t, TileSet)}


def as_opened(record: SlideRecord) -> SlideRecord:
    """What is known of a slide before its tiles are."""
    names = ("slide_id", "width_l0", "height_l0", "mpp_x", "mpp_y")
    return SlideRecord(status="empty", **{name: getattr(record, name) for name in names})


def corners(manifest: Manifest) -> dict[tuple[int, int], float]:
    """Corner to tissue share."""
    return dict(zip(zip(manifest.x_l0.tolist(), manifest.y_l0.tolist(), strict=True), manifest.tissue, strict=True))


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=40)
@given(archive=archives)
def test_a_round_trip_loses_no_coordinate_and_no_geometry(kind: Format, archive: tuple[Case, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        export(kind, Path(folder), [case.manifest for case in archive])
        found = read_all(kind, [Path(folder)]) if kind != "csv" or any(len(c.manifest) for c in archive) else {}
    for case in archive:
        before = case.manifest
        if kind == "csv" and not len(before):
            assert before.slide.slide_id not in found
            continue
        fitted = fit_tiles(found.pop(before.slide.slide_id), as_opened(before.slide), case.levels)
        after = fitted.manifest
        assert corners(after).keys() == corners(before).keys()
        assert fitted.num_doubled == 0
        if kind != "eagle":
            assert corners(after) == corners(before)
        names = PLAN if kind == "csv" else (*PLAN, "overlap")
        assert [getattr(after.slide, n) for n in names] == [getattr(before.slide, n) for n in names]
    assert not found


def one(slide_id: str = "case_1", n: int = 3, **fields: Any) -> Manifest:
    """A slide of 4,000 x 3,000 px at 0.25 mpp with n tiles of 448 px at level 0, in a row."""
    record = SlideRecord(
        slide_id=slide_id,
        status="ok",
        num_tiles=n,
        **{"width_l0": 4000, "height_l0": 3000, "mpp_x": 0.25, "mpp_y": 0.25, "tile_px": 224, "tile_mpp": 0.5}
        | {"read_w": 448, "read_h": 448}
        | fields,
    )
    x = np.arange(n, dtype=np.int32) * 448
    return Manifest(record, x, np.full(n, 7, np.int32), np.linspace(0, 1, n, dtype=np.float32))


def test_clam_files_hold_what_its_reader_asks_for(tmp_path: Path) -> None:
    manifest = one(level=1, read_w=224, read_h=224, mpp_x=0.1251, mpp_y=0.1251)
    assert export("clam", tmp_path, [manifest, one("nothing", 0), one("resampled")]) == set()
    with h5py.File(tmp_path / "patches" / "resampled.h5") as store:
        assert store["coords"].attrs["patch_size"] == 448  # What is read; the encoder's transform resizes it to 224.
    with h5py.File(tmp_path / "patches" / "case_1.h5") as store:
        coords, attrs = store["coords"], dict(store["coords"].attrs)
        assert coords[:].tolist() == [[0, 7], [448, 7], [896, 7]]
        assert coords.dtype == np.int64
    assert (attrs["patch_size"], attrs["patch_level"], attrs["name"]) == (224, 1, "case_1")
    assert attrs["downsample"].tolist() == [4.0, 4.0]
    assert attrs["level_dim"].tolist() == attrs["downsampled_level_dim"].tolist() == [1000, 750]
    # A slide without tiles makes CLAM's feature extraction stop, so that it is not in its list.
    assert (tmp_path / "process_list_autogen.csv").read_text() == "slide_id\ncase_1\nresampled\n"


def test_trident_files_hold_what_its_reader_asks_for(tmp_path: Path) -> None:
    export("trident", tmp_path, [one(), one("b", mpp_x=0.2465, mpp_y=0.2465, read_w=454, read_h=454)])
    folder = tmp_path / "20x_224px_0px_overlap" / "patches"
    with h5py.File(folder / "case_1_patches.h5") as store:
        attrs = dict(store["coords"].attrs)
        assert store["coords"][:].tolist() == [[0, 7], [448, 7], [896, 7]]
    attrs.pop("slidegrad")
    assert attrs == {
        "patch_size": 224,
        "patch_size_level0": 448,
        "level0_magnification": 40,
        "target_magnification": 20,
        "overlap": 0,
        "name": "case_1",
        "savetodir": "20x_224px_0px_overlap",
        "level0_width": 4000,
        "level0_height": 3000,
    }
    with h5py.File(folder / "b_patches.h5") as store:
        attrs = store["coords"].attrs
        side = round(attrs["patch_size"] * attrs["level0_magnification"] / attrs["target_magnification"])
    assert side == round(224 * 0.5 / 0.2465) == 454  # Snapped to 40x it would be 448.
    contours = json.loads((tmp_path / "contours_geojson" / "case_1.geojson").read_text())
    assert [f["properties"] for f in contours["features"]] == [{"tissue_id": 0, "num_holes": 1}]
    assert contours["features"][0]["geometry"] == {"type": "Polygon", "coordinates": SQUARES[0]}


def test_geojson_has_the_tissue_and_the_tiles_as_qupath_names_them(tmp_path: Path) -> None:
    assert export("geojson", tmp_path, [one()]) == set()
    tissue, first, *rest = json.loads((tmp_path / "case_1.geojson").read_text())["features"]
    assert tissue["geometry"] == {"type": "MultiPolygon", "coordinates": SQUARES}
    assert tissue["properties"]["objectType"] == "annotation"
    assert tissue["properties"]["classification"]["name"] == "Tissue"
    assert first["geometry"]["coordinates"] == [[[0, 7], [448, 7], [448, 455], [0, 455], [0, 7]]]
    assert first["properties"] == {"objectType": "tile", "isLocked": True, "measurements": {"tissue": 0.0}}
    assert len(rest) == 2


def test_a_capped_geojson_says_so_and_an_import_of_it_too(tmp_path: Path) -> None:
    (said,) = export("geojson", tmp_path, [one(n=8)], most=3)
    assert "--max-tiles" in said
    tiles = read_all("geojson", [tmp_path])["case_1"]
    assert (tiles.x_l0.tolist(), tiles.num_left_out) == ([0, 2 * 448, 5 * 448], 5)


@given(n=st.integers(0, 500), most=st.integers(1, 500))
def test_spread_rows_are_distinct_and_leave_no_wide_gap(n: int, most: int) -> None:
    rows = spread_rows(n, most)
    assert len(rows) == min(n, most)
    steps = np.diff(np.append(rows, n))
    assert not n or (rows[0] == 0 and steps.min() >= 1 and steps.max() <= -(-n // len(rows)))


def test_eagle_tables_have_the_columns_of_the_reference_trainer(tmp_path: Path) -> None:
    export("eagle", tmp_path, [one(), one("nothing", 0), one("low", 1, level=2, read_w=224, read_h=224)])
    assert (tmp_path / "tile_data.csv").read_text().splitlines() == [
        "slide,x,y,level,mult",
        "case_1,0,7,0,2.0",
        "case_1,448,7,0,2.0",
        "case_1,896,7,0,2.0",
        "low,0,7,2,1.0",
    ]
    lines = (tmp_path / "slide_data.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines] == [
        ["slide", "num_tiles"],
        ["case_1", "3"],
        ["nothing", "0"],
        ["low", "1"],
    ]


def test_the_trainers_mult_is_that_of_x(tmp_path: Path) -> None:
    export("eagle", tmp_path, [one(n=1, mpp_y=0.27, read_h=415)])
    assert (tmp_path / "tile_data.csv").read_text().splitlines()[1] == "case_1,0,7,0,2.0"


def test_the_plain_csv_is_plain(tmp_path: Path) -> None:
    (said,) = export("csv", tmp_path, [one(n=2), one("nothing", 0)])
    assert "no row" in said
    assert (tmp_path / "tiles.csv").read_text() == (
        "slide_id,x_l0,y_l0,tissue,level,read_w,read_h,tile_px,tile_mpp\n"
        "case_1,0,7,0.0,0,448,448,224,0.5\n"
        "case_1,448,7,1.0,0,448,448,224,0.5\n"
    )


@pytest.mark.parametrize("kind", ["clam", "trident", "eagle"])
def test_tools_that_know_squares_alone_say_what_is_lost(kind: Format, tmp_path: Path) -> None:
    manifest = one(mpp_y=0.27, read_h=415)
    (said,) = export(kind, tmp_path, [manifest])
    assert "differs in x and y" in said


@pytest.mark.parametrize("kind", FORMATS)
def test_a_second_export_replaces_the_first(kind: Format, tmp_path: Path) -> None:
    for n in (5, 2):
        export(kind, tmp_path, [one(n=n)])
    assert len(read_all(kind, [tmp_path])["case_1"].x_l0) == 2


@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_that_breaks_off_leaves_no_half_table(kind: Format, tmp_path: Path) -> None:
    export(kind, tmp_path, [one(n=5)])

    def breaks_off() -> Iterator[Manifest]:
        yield one("other")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        export(kind, tmp_path, breaks_off())
    assert len(read_all(kind, [tmp_path])["case_1"].x_l0) == 5
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_outline_is_read_from_the_masks_attributes(tmp_path: Path) -> None:
    mask = tmp_path / "a.zarr.zip"
    assert read_outline(mask) is None
    with zipfile.ZipFile(mask, "w") as store:
        store.writestr("zarr.json", json.dumps({"attributes": {"mpp": 8.0, "px_l0": 16, "outline": SQUARES}}))
    assert read_outline(mask) == SQUARES
    mask.write_bytes(b"PK")
    with pytest.raises(ManifestError, match="not a readable mask"):
        read_outline(mask)
    for text in ("[]", '{"attributes": []}', '{"attributes": {"outline": 7}}', '{"attributes": {"outline": [[1]]}}'):
        with zipfile.ZipFile(mask, "w") as store:
            store.writestr("zarr.json", text)
        with pytest.raises(ManifestError, match="not a readable mask"):
            read_outline(mask)


@settings(max_examples=30)
@given(rows=st.lists(st.tuples(st.sampled_from(["a", "b", 'c,"d"', "007"]), st.integers(0, 99)), max_size=60))
def test_rows_of_a_slide_need_not_lie_together(rows: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "t.csv"
        quoted = [f'"{name.replace(chr(34), chr(34) * 2)}",{x}' for name, x in rows]
        file.write_text("\n".join(["slide,x", *quoted, ""]))
        groups = {name: table.column("x").to_pylist() for name, table in read_groups(file, "slide", {"x": pa.int64()})}
    assert groups == {name: [x for other, x in rows if other == name] for name, _ in rows}


def test_a_slide_comes_once_however_big_the_table(tmp_path: Path) -> None:
    rows = [f"{name},{x}" for name in ("first", "a", "b", "a", "last") for x in range(100_000)]
    (tmp_path / "t.csv").write_text("\n".join(["slide,x", *rows]))
    groups = [(name, len(table)) for name, table in read_groups(tmp_path / "t.csv", "slide", {"x": pa.int64()})]
    assert groups == [("first", 100_000), ("b", 100_000), ("a", 200_000), ("last", 100_000)]
