"""Files as other tools write them, read beside a slide: what is taken, and what is refused in which words."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from manifests import Manifest, ManifestError, SlideRecord
from manifests.exchange import Format, LevelSize, TileSet, fit_tiles, read_tile_sets

LEVELS = (LevelSize(9000, 6000, 1.0), LevelSize(2250, 1500, 4.0), LevelSize(562, 375, 16.0071))
SLIDE = SlideRecord(
    slide_id="case_1", status="empty", width_l0=9000, height_l0=6000, mpp_x=0.25, mpp_y=0.25, mpp_source="vendor"
)
COORDS = np.array([[100, 200], [612, 200], [100, 712]])


def clam(file: Path, coords: Any = COORDS, **attributes: Any) -> Path:
    """As CLAM's `process_contour` and `save_hdf5` write it: chunks of one row, tuples as attributes."""
    given = {"patch_size": 256, "patch_level": 0, "downsample": (1.0, 1.0), "level_dim": (9000, 6000)}
    given |= {"downsampled_level_dim": (9000, 6000), "name": "case_1", "save_path": "RESULTS/patches"}
    return _save(file, np.asarray(coords), {**given, **attributes})


def trident(file: Path, coords: Any = COORDS, **attributes: Any) -> Path:
    """As TRIDENT's `coords_to_h5` writes it."""
    given = {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20}
    given |= {"overlap": 0, "name": "case_1", "savetodir": "job", "level0_width": 9000, "level0_height": 6000}
    return _save(file, np.asarray(coords), {**given, **attributes})


def _save(file: Path, coords: np.ndarray, attributes: dict[str, Any]) -> Path:
    with h5py.File(file, "w") as store:
        written = store.create_dataset("coords", data=coords, maxshape=(None, None), chunks=(1, 2))
        written.attrs.update({name: value for name, value in attributes.items() if value is not None})
    return file


def square(x: float, y: float, side: float = 512, **properties: Any) -> dict[str, Any]:
    """A rectangle as QuPath exports it."""
    ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}


def qupath(file: Path, *features: dict[str, Any]) -> Path:
    """A collection."""
    file.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return file


def read(kind: Format, *files: Path, tile_px: int | None = None) -> TileSet:
    """The one slide in the files."""
    (found,) = read_tile_sets(kind, list(files), tile_px)
    if isinstance(found, ManifestError):
        raise found
    return found


def fit(tiles: TileSet, tile_px: int | None = None, **slide: Any) -> Manifest:
    """Its manifest."""
    return fit_tiles(tiles, dataclasses.replace(SLIDE, **slide), LEVELS, tile_px).manifest


def plan(manifest: Manifest) -> tuple[Any, ...]:
    """How its tiles are read."""
    record = manifest.slide
    return record.level, record.read_w, record.read_h, record.tile_px, record.tile_mpp


def corners(manifest: Manifest) -> set[tuple[int, int]]:
    """Its corners."""
    return set(zip(manifest.x_l0.tolist(), manifest.y_l0.tolist(), strict=True))


@pytest.mark.parametrize(
    ("attributes", "tile_px", "expected"),
    [
        ({}, None, (0, 256, 256, 256, 0.25)),
        ({"patch_size": 512}, 224, (0, 512, 512, 224, 512 / 224 * 0.25)),
        ({"patch_size": 512, "custom_downsample": 2}, None, (0, 512, 512, 256, 0.5)),
        ({"patch_level": 1, "level_dim": (2250, 1500)}, None, (1, 256, 256, 256, 1.0)),
        (
            {"patch_size": np.int64(32), "patch_level": np.int64(2), "level_dim": (562, 375)},
            None,
            (2, 32, 32, 32, 4.001775),
        ),
    ],
)
def test_clam_patches_are_read_at_their_own_level(
    attributes: dict[str, Any], tile_px: int | None, expected: tuple[float, ...], tmp_path: Path
) -> None:
    manifest = fit(read("clam", clam(tmp_path / "case_1.h5", **attributes)), tile_px)
    assert plan(manifest) == pytest.approx(expected)
    assert corners(manifest) == {(100, 200), (612, 200), (100, 712)}
    assert manifest.tissue.tolist() == [1, 1, 1]
    assert manifest.slide.status == "ok"


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, (0, 512, 512, 256, 0.5)),
        ({"target_magnification": 10, "patch_size_level0": 1024}, (1, 256, 256, 256, 1.0)),
        ({"target_magnification": 5, "patch_size_level0": 2048}, (1, 512, 512, 256, 2.0)),
        # Its patch_size_level0 is rounded down, what its reader reads is not.
        ({"patch_size": 255, "level0_magnification": 41, "patch_size_level0": 522}, (0, 523, 523, 255, 0.512745)),
        ({"level0_magnification": "None", "target_magnification": None}, (0, 512, 512, 256, 0.5)),
    ],
)
def test_trident_patches_are_read_at_the_coarsest_level_that_is_fine_enough(
    attributes: dict[str, Any], expected: tuple[float, ...], tmp_path: Path
) -> None:
    manifest = fit(read("trident", trident(tmp_path / "case_1_patches.h5", **attributes)))
    assert plan(manifest) == pytest.approx(expected)
    assert corners(manifest) == {(100, 200), (612, 200), (100, 712)}


def test_a_job_folder_is_looked_through_for_patches_not_features(tmp_path: Path) -> None:
    for folder in ("20x_256px_0px_overlap/patches", "20x_256px_0px_overlap/features_uni_v1"):
        (tmp_path / folder).mkdir(parents=True)
    trident(tmp_path / "20x_256px_0px_overlap/patches/case_1_patches.h5")
    trident(tmp_path / "20x_256px_0px_overlap/features_uni_v1/case_1.h5", [[5, 5]])
    assert len(read("trident", tmp_path).x_l0) == 3


@pytest.mark.parametrize("kind", ["clam", "trident"])
def test_a_file_without_patches_is_an_empty_slide(kind: Format, tmp_path: Path) -> None:
    write = clam if kind == "clam" else trident
    manifest = fit(read(kind, write(tmp_path / "a.h5", np.zeros((0, 2), np.int64))))
    assert (len(manifest), manifest.slide.status) == (0, "empty")


def test_the_slides_name_is_the_attribute_then_the_files(tmp_path: Path) -> None:
    assert read("clam", clam(tmp_path / "x.h5", name="Schnitt ä")).names == ("Schnitt ä", "x")
    assert read("trident", trident(tmp_path / "y_patches.h5", name=None)).names == ("y", "y_patches")


def test_qupaths_tiles_are_taken_and_its_annotations_left(tmp_path: Path) -> None:
    hole = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [9, 9], [0, 9], [0, 0]]]}}
    tiles = [square(0, 443.2, 443.2, objectType="tile"), square(443.2, 443.2, 443.2, objectType="tile")]
    rectangle = square(0, 0, 5000, objectType="annotation")
    manifest = fit(read("geojson", qupath(tmp_path / "case_1.geojson", hole, rectangle, *tiles)), tile_px=220)
    assert corners(manifest) == {(0, 443), (443, 443)}
    assert plan(manifest) == pytest.approx((0, 443, 443, 220, 443 / 220 * 0.25))


def test_rectangles_do_where_nothing_is_called_a_tile(tmp_path: Path) -> None:
    features = [square(0, 0, classification={"name": "Tissue"}), square(8, 9), square(520, 9)]
    (tmp_path / "list.geojson").write_text(json.dumps(features))  # A bare list, as older versions export.
    manifest = fit(read("geojson", tmp_path / "list.geojson"))
    assert corners(manifest) == {(8, 9), (520, 9)}
    assert plan(manifest)[:4] == (0, 512, 512, 224)


def _tables(folder: Path, tiles: str, slides: str | None = None) -> list[Path]:
    (folder / "tile_data.csv").write_text(tiles)
    if slides is not None:
        (folder / "slide_data.csv").write_text(slides)
    return [folder]


def test_the_reference_trainers_tables_are_read(tmp_path: Path) -> None:
    tiles = "slide,x,y,level,mult,extra\n007,100,200.0,1,1.0,?\n007,1124,200,1,1.0,?\nb,0,0,0,2.0044642857142856,?\n"
    slides = "slide,path,EGFR,split\n007,/data,1,train\nb,/data,0,train\nc,/data,0,val\n"
    found = list(read_tile_sets("eagle", _tables(tmp_path, tiles, slides), None))
    first, second, third = (fit(t) for t in found if isinstance(t, TileSet))
    assert [t.names for t in found if isinstance(t, TileSet)] == [("007",), ("b",), ("c",)]
    assert (plan(first), corners(first)) == ((1, 224, 224, 224, 1.0), {(100, 200), (1124, 200)})
    assert plan(second)[:4] == (0, 449, 449, 224)
    assert third.slide.status == "empty"
    tile_data = tmp_path / "tile_data.csv"
    read_px = [t.read_size for t in read_tile_sets("eagle", [tile_data], 256) if isinstance(t, TileSet)]
    assert read_px == [(256, 256), (513, 513)]


def test_one_slide_whose_rows_disagree_leaves_the_others(tmp_path: Path) -> None:
    tiles = "slide,x,y,level,mult\na,0,0,0,1\na,300,0,1,1\nb,0,0,0,1\nc,0.5,0,0,1\n"
    bad, good, half = read_tile_sets("eagle", _tables(tmp_path, tiles), None)
    assert str(bad) == "slide a: several values of level (0, 1); one slide's tiles are read in one way"
    assert isinstance(good, TileSet)
    assert str(half) == "slide c: some coordinates are no whole level-0 px"


@pytest.mark.parametrize(
    ("tiles", "error"),
    [
        ("slide,x,y,mult\na,0,0,1\n", "tile_data.csv: no column level"),
        ("slide,x,y,level,mult\na,left,0,0,1\n", "tile_data.csv: not readable as CSV"),
        ("slide,x,y,level\na,0,0,0\n", "give tile_data.csv"),
        ("", "tile_data.csv: not readable as CSV"),
    ],
)
def test_a_table_that_is_none_is_refused(tiles: str, error: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=error):
        list(read_tile_sets("eagle", _tables(tmp_path, tiles), None))


def _group(file: Path) -> Path:
    with h5py.File(file, "w") as store:
        store.create_group("coords")
    return file


WORDS = np.array([["a", "b"]], "S1")


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("clam", {"patch_level": "abc"}, r"patch_level is \['abc'\], expected whole numbers"),
        ("clam", {"patch_level": 0.5}, r"patch_level is \[0\.5\], expected whole numbers"),
        ("clam", {"level_dim": ("a", "b")}, "level_dim is .* expected whole numbers"),
        ("clam", {"coords": WORDS}, "coordinates are no numbers"),
        ("trident", {"coords": WORDS}, "coordinates are no numbers"),
        ("trident", {"patch_size": "abc"}, "no attributes patch_size"),
        ("trident", {"patch_size": 1e308, "level0_magnification": 1e308}, "no attributes"),
    ],
)
def test_words_in_place_of_numbers_are_told(kind: Format, given: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = (clam if kind == "clam" else trident)(tmp_path / "a.h5", **given)
    with pytest.raises(ManifestError, match=f"^a.h5: .*{words}"):
        read(kind, file)


_RING = "[[0, 0], [9, 0], [9, 9], [0, 9], [0, 0]]"


def _odd(geometry: str, properties: str = '{"objectType": "tile"}') -> str:
    return f'{{"geometry": {geometry}, "properties": {properties}}}'


def _polygon(coordinates: str) -> str:
    return f'{{"type": "Polygon", "coordinates": {coordinates}}}'


@pytest.mark.parametrize(
    ("feature", "words"),
    [
        (_odd('"x"'), "1 of 1 tiles are no upright rectangles"),
        (_odd('"x"', "[1]"), "no tiles in it"),
        (_odd(_polygon("{}")), "1 of 1 tiles are no"),
        (_odd(_polygon('{"a": 1}')), "1 of 1 tiles are no"),
        (_odd(_polygon("[[{}]]")), "1 of 1 tiles are no"),
        (_odd(_polygon(f"[[[1{'0' * 400}, 0]]]")), "1 of 1 tiles are no"),
        (_odd(_polygon(f"[{_RING.replace('0', '-Infinity')}]")), "no whole level-0 px"),
        (_odd(_polygon(f"[{_RING.replace('9', '1e17')}]").replace("0,", "1e16,")), "no|coordinates of"),
        ("[" * 100_000, "not readable as GeoJSON"),
        (
            '{"slidegrad": {"slide_id": "a", "width_l0": 9, "height_l0": 9, "tile_px": 9, "tile_mpp": 1, "overlap": 0, '
            f'"level": 0, "read_w": 9, "read_h": 9}}, "features": [{_odd(_polygon(f"[{_RING}]"), "?")}]}}'.replace(
                "?", '{"objectType": "tile", "measurements": {"tissue": "much"}}'
            ),
            "a tile's tissue is 'much', expected a share",
        ),
    ],
    ids=range(10),
)
def test_geojson_of_another_shape_is_told(feature: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "odd.geojson").write_text(feature)
    with pytest.raises(ManifestError, match=f"^odd.geojson: .*({words})"):
        read("geojson", tmp_path / "odd.geojson")


def test_files_of_another_kind_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "features.h5", "w") as store:
        store["features"] = np.zeros((3, 8))
    (tmp_path / "text.h5").write_text("no HDF5")
    qupath(tmp_path / "contours.geojson", square(0, 0, classification={"name": "Tissue"}), {"type": "Feature"})
    qupath(tmp_path / "sizes.geojson", square(0, 0, 512, objectType="tile"), square(512, 0, 300, objectType="tile"))
    (tmp_path / "cut.geojson").write_text('{"type": "Featu')
    (tmp_path / "number.geojson").write_text("7")
    cases: list[tuple[Format, Path, str]] = [
        ("clam", clam(tmp_path / "no_size.h5", patch_size=None), "no attributes patch_size and patch_level"),
        ("clam", trident(tmp_path / "t.h5"), "import trident"),
        ("trident", clam(tmp_path / "c.h5"), "import clam"),
        ("clam", clam(tmp_path / "flat.h5", [[1, 2, 3]]), r"shape \(1, 3\), expected \(n, 2\)"),
        ("clam", clam(tmp_path / "half.h5", [[1.5, 2]]), "no whole level-0 px"),
        ("clam", tmp_path / "features.h5", r"no dataset coords in it, only \['features'\]"),
        ("clam", tmp_path / "text.h5", "not a readable HDF5 file"),
        ("clam", tmp_path / "missing.h5", "no such file"),
        ("clam", clam(tmp_path / "torn.h5", slidegrad='{"slide_id": "a"}'), "export it again"),
        ("geojson", tmp_path / "contours.geojson", "2 contours; give contours to `slidegrad tile --masks`"),
        ("geojson", tmp_path / "sizes.geojson", "several sizes, 300x300 to 512x512"),
        ("geojson", tmp_path / "cut.geojson", "not readable as GeoJSON"),
        ("geojson", tmp_path / "number.geojson", "no tiles in it"),
        ("clam", _group(tmp_path / "group.h5"), r"no dataset coords in it, only \['coords'\]"),
    ]
    for kind, file, words in cases:
        with pytest.raises(ManifestError, match=words) as told:
            read(kind, file)
        assert str(told.value).startswith(f"{file.name}: ")
        assert str(tmp_path) not in str(told.value)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ManifestError, match="no files here"):
        read("clam", tmp_path / "nothing")


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"coords": [[0, 0], [9000, 0]]}, r"1 of 2 tiles begin outside its 9000x6000 px, first \(9000, 0\)"),
        ({"coords": [[-1, 0]]}, "1 of 1 tiles begin outside"),
        ({"patch_level": 3}, "tiles of level 3, but the slide has 3 levels, 0 to 2"),
        ({"level_dim": (9001, 6000)}, "level 0 has 9000x6000 px, in the file of tiles 9001x6000"),
    ],
)
def test_tiles_that_do_not_go_with_the_slide_are_refused(
    attributes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    tiles = read("clam", clam(tmp_path / "a.h5", **attributes))
    with pytest.raises(ManifestError, match=f"^slide case_1: {words}"):
        fit(tiles)


def test_resolution_is_not_made_up_and_a_wrong_scale_is_noticed(tmp_path: Path) -> None:
    tiles = read("clam", clam(tmp_path / "a.h5", patch_size=128))
    with pytest.raises(
        ManifestError, match=r"tiles of 128x128 px of level 0 for an output of 224 px.* give --tile-px 128"
    ):
        fit(tiles, tile_px=224)
    said = dataclasses.replace(tiles, tile_mpp=0.5)
    with pytest.raises(ManifestError, match=r"tiles of 0\.5 mpp in the file, but 0\.25 by the slide's scale"):
        fit(said)
    assert fit(said, mpp_x=0.501, mpp_y=0.501).slide.tile_mpp == 0.5


def test_sizes_that_no_manifest_can_hold_are_refused(tmp_path: Path) -> None:
    tiles = read("clam", clam(tmp_path / "a.h5"))
    with pytest.raises(ManifestError, match=r"tiles of 256 px, read as \d+x\d+ px; expected less than 2\^31"):
        fit(dataclasses.replace(tiles, read_size=(2**31, 2**31)))
    with pytest.raises(ManifestError, match="slide a: mult 1e"):
        read("eagle", *_tables(tmp_path, "slide,x,y,level,mult\na,0,0,0,1e307\n"))


def test_a_broken_line_far_down_in_slide_data_is_told(tmp_path: Path) -> None:
    slides = "slide,path\n" + "a,/data\n" * 300_000 + "b,/data,one too many\n"
    with pytest.raises(ManifestError, match=r"slide_data\.csv: not readable as CSV"):
        list(read_tile_sets("eagle", _tables(tmp_path, "slide,x,y,level,mult\na,0,0,0,1\n", slides), None))


def test_tiles_past_the_edge_are_kept_and_doubled_ones_once(tmp_path: Path) -> None:
    tiles = read("clam", clam(tmp_path / "a.h5", [[8900, 5900], [0, 0], [8900, 5900], [8744, 5744]]))
    fitted = fit_tiles(tiles, SLIDE, LEVELS)
    assert corners(fitted.manifest) == {(8900, 5900), (0, 0), (8744, 5744)}
    assert (fitted.num_past_edge, fitted.num_doubled) == (1, 1)


@pytest.mark.parametrize("overlap", [0, 192])
def test_rows_come_into_block_order(overlap: int, tmp_path: Path) -> None:
    step = 256 - overlap
    x, y = np.meshgrid(np.arange(16) * step, np.arange(16) * step, indexing="ij")
    tiles = read("clam", clam(tmp_path / "a.h5", np.stack([x.ravel(), y.ravel()], axis=1) + 17))
    manifest = fit(dataclasses.replace(tiles, overlap=overlap))
    # Along a Hilbert curve one step leads to a neighbour.
    steps = np.abs(np.diff(manifest.x_l0)) + np.abs(np.diff(manifest.y_l0))
    assert steps.tolist() == [step] * 255
