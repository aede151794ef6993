"""Masks of other programs, as pictures or GeoJSON, come out where they belong in the thumbnail's frame."""

import json
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from tiler import TilerError
from tiler.masks import trace_outline
from tiler.outside import find_masks, read_outside, read_polygons
from tiler.synth.layout import smooth_noise

SHAPE, COVERS = (60, 80), (1280.0, 960.0)
"""A thumbnail of 16 level-0 px per px."""
SQUARE = [[320, 160], [640, 160], [640, 480], [320, 480], [320, 160]]
HOLE = [[400, 240], [400, 400], [560, 400], [560, 240], [400, 240]]


def _classes(scale: float) -> np.ndarray:
    """Class 1 on the left, 3 in the middle, 0 elsewhere; `scale` px per px of the thumbnail."""
    picture = np.zeros((round(SHAPE[0] * scale), round(SHAPE[1] * scale)), np.uint8)
    picture[round(10 * scale) : round(50 * scale), round(10 * scale) : round(30 * scale)] = 1
    picture[round(10 * scale) : round(50 * scale), round(30 * scale) : round(50 * scale)] = 3
    return picture


def _written(file: Path, picture: np.ndarray) -> Path:
    if file.suffix == ".png":
        ok, png = cv2.imencode(".png", picture)
        assert ok
        file.write_bytes(bytes(png))
    else:
        tifffile.imwrite(file, picture, compression="zlib")
    return file


def _read(file: Path, *values: int) -> np.ndarray:
    mask = read_outside(file, SHAPE, COVERS, values)
    assert (mask.shape, mask.dtype) == (SHAPE, bool)
    return mask


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff"])
@pytest.mark.parametrize("scale", [0.5, 1, 3.7, 8])
@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_a_picture_of_any_resolution_and_depth_is_read(
    tmp_path: Path, suffix: str, scale: float, depth: type[np.generic]
) -> None:
    file = _written(tmp_path / f"case{suffix}", _classes(scale).astype(depth))
    for values, last in (((), 50), ((1, 3), 50), ((1,), 30)):
        expected = np.zeros(SHAPE, bool)
        expected[10:50, 10:last] = True
        assert (_read(file, *values) != expected).sum() <= (0 if scale in (1, 8) else 130)
    assert not _read(file, 2, 4, 300).any()


def test_16_bit_values_are_not_cut_to_8(tmp_path: Path) -> None:
    file = _written(tmp_path / "case.png", _classes(1).astype(np.uint16) * 300)
    assert _read(file, 300).sum() == 40 * 20
    assert not _read(file, 300 % 256).any()


def test_a_finer_mask_counts_from_one_half_on(tmp_path: Path) -> None:
    picture = np.zeros((240, 320), np.uint8)
    picture[:, 0:2], picture[:, 4:7], picture[:, 8:9] = 1, 1, 1  # Two, three and one of four columns.
    mask = _read(_written(tmp_path / "case.png", picture))
    assert mask[:, :3].all(axis=0).tolist() == [True, True, False]
    assert not mask[:, 2:].any()


def test_colours_transparency_palettes_and_single_bits(tmp_path: Path) -> None:
    expected = _classes(1) > 0
    colours = np.zeros((*SHAPE, 4), np.uint8)
    colours[expected, 1], colours[..., 3] = 200, 255
    assert np.array_equal(_read(_written(tmp_path / "colours.png", colours)), expected)
    assert np.array_equal(_read(_written(tmp_path / "colours.tif", colours[..., :3])), expected)
    with pytest.raises(TilerError, match=r"colours\.png: a picture in colours has no values"):
        _read(tmp_path / "colours.png", 1)
    greys = np.repeat(_classes(1)[..., None], 3, -1)
    assert np.array_equal(_read(_written(tmp_path / "greys.png", greys), 3), _classes(1) == 3)
    from PIL import Image

    palette = Image.fromarray(_classes(1), mode=None).convert("P")
    palette.putpalette([9, 9, 9, 255, 0, 0, 0, 0, 0, 0, 0, 255] + [0] * 756)
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(_read(tmp_path / "palette.png", 3), _classes(1) == 3)
    Image.fromarray(expected).save(tmp_path / "bits.png")
    assert np.array_equal(_read(tmp_path / "bits.png"), expected)
    assert np.array_equal(_read(tmp_path / "bits.png", 1), expected)


def test_of_a_pyramid_the_coarsest_level_that_is_fine_enough_is_read(tmp_path: Path) -> None:
    file = tmp_path / "case.tif"
    with tifffile.TiffWriter(file) as tiff:
        tiff.write(np.zeros((480, 640), np.uint8), tile=(64, 64), subifds=2, compression="zlib")
        tiff.write(_classes(2), tile=(64, 64), subfiletype=1, compression="zlib")
        tiff.write(np.zeros_like(_classes(0.5)), tile=(64, 64), subfiletype=1, compression="zlib")
    assert np.array_equal(_read(file), _classes(1) > 0)


def test_a_picture_of_another_shape_is_told_with_both_sizes(tmp_path: Path) -> None:
    file = _written(tmp_path / "case.png", np.ones((600, 900), np.uint8))
    with pytest.raises(
        TilerError, match=r"case\.png: a picture of 900 x 600 px does not fit the slide of about 1280 x 960"
    ):
        _read(file)
    # 1.9 % off is rounding and margins; so is a whole px of a small picture.
    assert _read(_written(tmp_path / "nearly.png", np.ones((600, 785), np.uint8))).all()
    assert _read(_written(tmp_path / "small.png", np.ones((13, 16), np.uint8))).all()


@pytest.mark.parametrize("name", ["case.png", "case.tif", "case.geojson", "case.json"])
def test_a_mask_that_cannot_be_read_is_one_sentence_without_the_folder(tmp_path: Path, name: str) -> None:
    for content in (
        None,
        b"",
        b"\x89PNG\r\n\x1a\n" + b"x" * 40,
        b"II*\x00" + b"\xff" * 40,
        b'{"type": "Polygon"}',
        b"[1]",
    ):
        (tmp_path / name).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(TilerError, match=rf"^{name}: not ") as told:
            _read(tmp_path / name)
        assert str(tmp_path) not in str(told.value)
        assert "\n" not in str(told.value)


def test_a_damaged_picture_and_a_stack_are_told(tmp_path: Path) -> None:
    file = _written(tmp_path / "case.png", _classes(8))
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(TilerError, match=r"case\.png: not a readable mask picture"):
        _read(file)
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((5, *SHAPE), np.uint8), photometric="minisblack")
    with pytest.raises(TilerError, match=r"stack\.tif: expected one picture of the slide, got a stack"):
        _read(tmp_path / "stack.tif")


def _polygon(*rings: list[list[float]]) -> dict[str, object]:
    return {"type": "Polygon", "coordinates": list(rings)}


def _feature(geometry: object, **properties: object) -> dict[str, object]:
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def _saved(tmp_path: Path, item: object) -> Path:
    (tmp_path / "case.geojson").write_text(json.dumps(item), encoding="utf-8-sig")
    return tmp_path / "case.geojson"


SOLID, HOLLOW = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
SOLID[10:30, 20:40] = HOLLOW[10:30, 20:40] = True
HOLLOW[15:25, 25:35] = False


@pytest.mark.parametrize(
    "item",
    [
        _polygon(SQUARE, HOLE),
        {"type": "MultiPolygon", "coordinates": [[SQUARE, HOLE]]},
        {"type": "GeometryCollection", "geometries": [_polygon(SQUARE, HOLE)]},
        _feature(_polygon(SQUARE, HOLE), objectType="annotation"),
        {"type": "FeatureCollection", "features": [_feature(_polygon(SQUARE, HOLE), tissue_id=0)]},
        [_feature(_polygon(SQUARE, HOLE), classification={"name": "Tumor", "color": [200, 0, 0]})],
        _polygon([[*point, 5.0] for point in SQUARE], HOLE[::-1]),
    ],
)
def test_every_kind_of_geojson_gives_the_polygon_with_its_hole(tmp_path: Path, item: object) -> None:
    assert np.array_equal(_read(_saved(tmp_path, item)), HOLLOW)


def test_overlapping_polygons_are_joined_and_one_may_fill_anothers_hole(tmp_path: Path) -> None:
    twice = [_feature(_polygon(SQUARE)), _feature(_polygon(SQUARE)), _feature(_polygon(HOLE))]
    assert np.array_equal(_read(_saved(tmp_path, {"type": "FeatureCollection", "features": twice})), SOLID)
    filled = [_feature(_polygon(SQUARE, HOLE)), _feature(_polygon(HOLE))]
    assert np.array_equal(_read(_saved(tmp_path, filled)), SOLID)


@pytest.mark.parametrize(
    "classification", [{"name": "Background"}, {"name": "Ignore*"}, {"names": ["Stroma", "Artefact*"]}, "background"]
)
def test_features_that_are_no_tissue_by_their_class_are_passed_over(tmp_path: Path, classification: object) -> None:
    ignored = _feature(_polygon([[0, 0], [1280, 0], [1280, 960], [0, 960]]), classification=classification)
    assert np.array_equal(_read(_saved(tmp_path, [ignored, _feature(_polygon(SQUARE))])), SOLID)


@pytest.mark.parametrize(
    ("classification", "classes"),
    [
        ({"name": "Tumor"}, ("Tumor",)),
        ({"name": "Tumor: Positive"}, ("Tumor: Positive", "Tumor", "Positive")),
        ({"names": ["Tumor", "Positive"]}, ("Tumor", "Positive", "Tumor: Positive")),
        ("Tumor", ("Tumor",)),
        ({}, ()),
        (None, ()),
    ],
)
def test_a_polygon_knows_the_classes_of_its_feature(
    tmp_path: Path, classification: object, classes: tuple[str, ...]
) -> None:
    inner = {"type": "GeometryCollection", "geometries": [_polygon(SQUARE, HOLE), _polygon(HOLE)]}
    found = read_polygons(_saved(tmp_path, [_feature(inner, classification=classification), _polygon(SQUARE)]))
    assert [polygon.classes for polygon in found] == [classes, classes, ()]
    assert [len(polygon.rings) for polygon in found] == [2, 1, 1]


def test_json_that_is_nested_without_end_is_told(tmp_path: Path) -> None:
    (tmp_path / "case.geojson").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(TilerError, match=r"^case\.geojson: not GeoJSON polygons"):
        read_polygons(tmp_path / "case.geojson")


def test_what_lies_outside_the_slide_is_cut_off(tmp_path: Path) -> None:
    far = [[-1e12, -1e12], [640, -1e12], [640, 480], [-1e12, 480]]
    mask = _read(_saved(tmp_path, [_feature(_polygon(far)), _feature(_polygon([[2000, 0], [3000, 0], [3000, 900]]))]))
    assert mask[:30, :40].all()
    assert mask.sum() == 30 * 40
    # A slanting side that begins outside: it cuts a corner of 640 x 480 px off the slide.
    slanting = [[-640, 0], [1280, 0], [1280, 1440]]
    share = _read(_saved(tmp_path, _polygon(slanting))).mean()
    assert share == pytest.approx(7 / 8, abs=0.01)


@pytest.mark.parametrize(
    "item",
    [
        {"type": "FeatureCollection", "features": []},
        [],
        _feature(None),
        {"type": "Point", "coordinates": [1, 2]},
        {"type": "LineString", "coordinates": SQUARE},
        {"type": "MultiPolygon", "coordinates": []},
        _polygon([[1, 1], [2, 2]]),
    ],
)
def test_geojson_without_an_area_is_an_empty_mask(tmp_path: Path, item: object) -> None:
    assert not _read(_saved(tmp_path, item)).any()


@pytest.mark.parametrize(
    "item",
    [
        {"type": "Feature", "geometry": {"type": "Circle"}},
        {"type": "Polygon", "coordinates": [[["a", 1], [2, 2], [3, 3]]]},
        {"type": "Polygon", "coordinates": [[[float("nan"), 1], [2, 2], [3, 3]]]},
        {"type": "Polygon", "coordinates": 5},
        {"features": []},
        5,
    ],
)
def test_json_that_is_no_geojson_is_told(tmp_path: Path, item: object) -> None:
    with pytest.raises(TilerError, match=r"^case\.geojson: not GeoJSON polygons .*export it again$"):
        _read(_saved(tmp_path, item))


def test_an_outline_drawn_again_is_the_mask_it_came_from(tmp_path: Path) -> None:
    mask = smooth_noise(np.random.default_rng(4), SHAPE, 12) > 0.3
    outline = {"type": "MultiPolygon", "coordinates": trace_outline(mask, 16.0)}
    again = _read(_saved(tmp_path, outline))
    assert 2 * (again & mask).sum() / (again.sum() + mask.sum()) > 0.98


def test_masks_are_found_by_the_slides_ids(tmp_path: Path) -> None:
    for name in ("case.1.png", "case.10.GeoJSON", "notes.txt", unicodedata.normalize("NFD", "Schnitt ä.tif")):
        (tmp_path / name).touch()
    found = find_masks(tmp_path, ["case.1", "case.10", "Schnitt ä", "other"])
    assert [found[name].is_file() for name in found] == [True, True, True, False]
    assert found["case.10"].name == "case.10.GeoJSON"
    (tmp_path / "case.1.json").touch()
    with pytest.raises(TilerError, match=r"case\.1\.json and case\.1\.png are masks of one slide; keep one"):
        find_masks(tmp_path, [])
    with pytest.raises(TilerError, match=r"--masks .*nowhere: No such file or directory; expected a folder"):
        find_masks(tmp_path / "nowhere", [])
