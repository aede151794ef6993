"""Tissue from outside: a mask picture or GeoJSON polygons that another program made, used instead of our own.

Whatever it holds is taken as it is: no speck is dropped, no hole filled, nothing rejected. A mask without any tissue is
a slide without tissue; one that cannot be read, or is of another slide's shape, is an error.
"""

import json
import math
import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from tiler.errors import TilerError

SUFFIXES = (".png", ".tif", ".tiff", ".geojson", ".json")

_MAX_ASPECT_ERROR = 0.02
_MAX_PICTURE_PX = 2_000_000_000
"""Larger pictures are not opened."""
_FINER = 4
"""Polygons are drawn this many times finer than the mask, then reduced to at least half a px."""
_MAX_CANVAS_PX = 100_000_000
"""Beyond this they are drawn less fine."""
_SUBPIXEL_BITS = 8
_FAR_PX = 1e6
"""Coordinates are clamped to this, px of the canvas: OpenCV counts 256ths of them in 32 bits."""


def find_masks(folder: Path, slide_ids: Iterable[str]) -> dict[str, Path]:
    """The masks of slides: `SLIDE_ID` and one of `SUFFIXES`; one listing, however many there are.

    Returns:
        slide_id to its mask; for a slide without one, where it might be: tiling it will fail.

    Raises:
        TilerError: `folder` is no folder, or a slide has two masks.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise TilerError(f"--masks {folder}: {error.strerror}; expected a folder of SLIDE_ID.png, .geojson …") from None
    found: dict[str, Path] = {}
    for name in names:
        suffix = next((s for s in SUFFIXES if name.lower().endswith(s)), None)
        if suffix is None:
            continue
        stem = unicodedata.normalize("NFC", name[: -len(suffix)])
        if stem in found:
            raise TilerError(f"--masks {folder}: {found[stem].name} and {name} are masks of one slide; keep one")
        found[stem] = folder / name
    return {slide_id: found.get(slide_id, folder / f"{slide_id}{SUFFIXES[0]}") for slide_id in slide_ids}


def read_outside(
    file: Path, shape: tuple[int, int], covers_l0: tuple[float, float], values: tuple[int, ...]
) -> NDArray[np.bool_]:
    """A mask from outside, in the frame of the slide's thumbnail.

    Args:
        file: see `find_masks`. A picture covers the whole slide at any resolution; polygons are in level-0 px.
        shape: (height, width) of the thumbnail.
        covers_l0: (width, height) in level-0 px that the thumbnail covers.
        values: pixel values that mean tissue; empty: all but 0.

    Raises:
        TilerError: not readable, or not of the slide's shape.
    """
    if file.suffix.lower() in (".json", ".geojson"):
        return _draw([polygon.rings for polygon in read_polygons(file)], shape, covers_l0)
    picture = _read_picture(file, shape)
    height, width = picture.shape[:2]
    error = abs(width / height * covers_l0[1] / covers_l0[0] - 1)
    # A small picture's sides are rounded to whole px.
    if error > max(_MAX_ASPECT_ERROR, 1 / min(width, height)):
        slide = " x ".join(str(round(side)) for side in covers_l0)
        raise TilerError(
            f"{file.name}: a picture of {width} x {height} px does not fit the slide of about {slide} px (sides differ "
            f"in ratio by {error:.0%}); give a mask of the whole slide"
        )
    tissue = _select(picture, values, file.name).view(np.uint8) * np.uint8(255)
    is_finer = height >= shape[0] and width >= shape[1]
    tissue = cv2.resize(tissue, shape[::-1], interpolation=cv2.INTER_AREA if is_finer else cv2.INTER_LINEAR)
    return np.asarray(tissue > 127)


class Polygon(NamedTuple):
    """A polygon of a GeoJSON file."""

    classes: tuple[str, ...]
    """Names of its feature's class, as QuPath has it: that of `Tumor: Positive` is named so, and by both its parts."""
    rings: list[NDArray[np.float64]]
    """(N, 2) each, level-0 px: the outer one, then its holes."""


def read_polygons(file: Path) -> list[Polygon]:
    """The polygons of a GeoJSON file, but those of classes that are no tissue.

    Raises:
        TilerError: not readable, or not GeoJSON.
    """
    try:
        return list(_polygons(_parse(file), file.name))
    except RecursionError:
        raise TilerError(f"{file.name}: not GeoJSON polygons (nested too deep); export it again") from None


def _read_picture(file: Path, shape: tuple[int, int]) -> NDArray[Any]:
    """A picture's px as they are stored, (h, w) or (h, w, channels); of a pyramid the coarsest level fine enough.

    A palette's px are its indices, which are the classes where a program writes classes.
    """
    try:
        if file.suffix.lower() == ".png":
            with PngImageFile(file) as png:  # Not through Image.open, which warns of large pictures.
                _check_size(png.width, png.height, file.name)
                picture = np.asarray(png)
        else:
            with tifffile.TiffFile(file) as tiff:
                picture = _read_level(tiff.series[0], shape, file.name)
    except TilerError:
        raise
    except Exception as error:  # noqa: BLE001 - decoders raise what they like on damaged files
        raise TilerError(f"{file.name}: not a readable mask picture ({_why(error, file)}); make it again") from None
    return picture


def _read_level(series: Any, shape: tuple[int, int], name: str) -> NDArray[Any]:
    """One level of a TIFF series, samples last."""
    if not {"Y", "X"} <= set(series.axes) <= {"Y", "X", "S"}:
        raise TilerError(f"{name}: expected one picture of the slide, got a stack of axes {series.axes}; save it alone")
    fine = [level for level in series.levels if min(np.subtract(_sides(level), shape)) >= 0]
    level = fine[-1] if fine else series.levels[0]
    height, width = _sides(level)
    _check_size(width, height, name)
    picture: NDArray[Any] = level.asarray()
    return np.moveaxis(picture, level.axes.index("S"), -1) if "S" in level.axes else picture


def _sides(level: Any) -> tuple[int, int]:
    """(height, width), px."""
    sizes = dict(zip(level.axes, level.shape, strict=True))
    return sizes["Y"], sizes["X"]


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > _MAX_PICTURE_PX:
        raise TilerError(
            f"{name}: expected a picture of at most {_MAX_PICTURE_PX:,} px, got {width} x {height}; give a smaller one"
        )


def _why(error: Exception, file: Path) -> str:
    """An error's text on one line, without the folder."""
    return " ".join(str(error).replace(str(file), file.name).split())


def _select(picture: NDArray[Any], values: tuple[int, ...], name: str) -> NDArray[np.bool_]:
    """Where a picture says tissue, (h, w). Colours must be greys if values are asked for; transparency is ignored."""
    if picture.ndim == 3:
        colours = picture[..., : {2: 1, 4: 3}.get(picture.shape[2], picture.shape[2])]
        if not values:
            return np.asarray((colours != 0).any(-1))
        if (colours != colours[..., :1]).any():
            raise TilerError(
                f"{name}: a picture in colours has no values to compare with --mask-values; save it as grey"
            )
        picture = colours[..., 0]
    return np.asarray(np.isin(picture, values) if values else picture != 0)


def _parse(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise TilerError(f"{file.name}: not readable as GeoJSON ({_why(error, file)}); export it again") from None


def _polygons(item: Any, name: str, classes: tuple[str, ...] = ()) -> Iterator[Polygon]:
    """All polygons of a GeoJSON value, whose feature has these classes.

    Points and lines cover no area and are passed over, and so are features whose class says that they are no tissue:
    "Background", and, as in QuPath, names that end in an asterisk ("Ignore*", "Artefact*").

    Source: RFC 7946; arrays of features and `classification` are QuPath's.
    """
    if isinstance(item, list):
        for part in item:
            yield from _polygons(part, name, classes)
        return
    kind = item.get("type") if isinstance(item, dict) else None
    try:
        match kind:
            case "FeatureCollection":
                yield from _polygons(list(item["features"]), name)
            case "Feature":
                names = _class_names(item.get("properties") or {})
                if item.get("geometry") is not None and not _is_passed_over(names):
                    yield from _polygons(item["geometry"], name, _with_parts(names))
            case "GeometryCollection":
                yield from _polygons(list(item["geometries"]), name, classes)
            case "Polygon":
                yield from (Polygon(classes, rings) for rings in _rings([item["coordinates"]]))
            case "MultiPolygon":
                yield from (Polygon(classes, rings) for rings in _rings(item["coordinates"]))
            case "Point" | "MultiPoint" | "LineString" | "MultiLineString":
                return
            case _:
                raise ValueError(f"type {kind!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TilerError(f"{name}: not GeoJSON polygons ({error}); export it again") from None


def _class_names(properties: dict[str, Any]) -> list[str]:
    classification = properties.get("classification") or {}
    if isinstance(classification, dict):
        names = classification.get("names") or [classification.get("name") or ""]
    else:
        names = [classification]
    return [str(name) for name in names]


def _is_passed_over(names: list[str]) -> bool:
    return any(name.lower() == "background" or name.endswith("*") for name in names)


def _with_parts(names: list[str]) -> tuple[str, ...]:
    """Names, and the parts of a derived one; QuPath writes it as `A: B`, and newer as a list of A and B."""
    parts = [part for name in names for part in name.split(": ")]
    return tuple(dict.fromkeys(name for name in (*names, ": ".join(names), *parts) if name))


def _rings(coordinates: list[Any]) -> Iterator[list[NDArray[np.float64]]]:
    for polygon in coordinates:
        rings = [np.asarray([position[:2] for position in ring], np.float64) for ring in polygon]
        if any(not np.isfinite(ring).all() for ring in rings):
            raise ValueError("a coordinate is no number")
        if rings and len(rings[0]) >= 3:
            yield [ring for ring in rings if len(ring) >= 3]


def _draw(
    polygons: list[list[NDArray[np.float64]]], shape: tuple[int, int], covers_l0: tuple[float, float]
) -> NDArray[np.bool_]:
    """The union of polygons as a mask: px of which at least half is inside. What lies outside the slide is cut off."""
    finer = max(1, min(_FINER, math.isqrt(_MAX_CANVAS_PX // max(1, shape[0] * shape[1]))))
    height, width = shape[0] * finer, shape[1] * finer
    canvas = np.zeros((height, width), np.uint8)
    scale = np.array([width / covers_l0[0], height / covers_l0[1]])
    for rings in polygons:
        # OpenCV counts from the middle of the first px.
        placed = [np.clip(ring * scale - 0.5, -_FAR_PX, _FAR_PX) for ring in rings]
        low = np.clip(np.floor(placed[0].min(axis=0)).astype(int) - 1, 0, (width, height))
        high = np.clip(np.ceil(placed[0].max(axis=0)).astype(int) + 2, 0, (width, height))
        if (high <= low).any():
            continue
        piece = np.zeros((high[1] - low[1], high[0] - low[0]), np.uint8)
        lines = [np.rint((ring - low) * 2**_SUBPIXEL_BITS).astype(np.int32) for ring in placed]
        cv2.fillPoly(piece, lines, 255, shift=_SUBPIXEL_BITS)
        # fillPoly takes in every px that the outline touches; half of them lies inside.
        cv2.polylines(piece, lines, isClosed=True, color=128, shift=_SUBPIXEL_BITS)
        part = canvas[low[1] : high[1], low[0] : high[0]]
        np.maximum(part, piece, out=part)
    return np.asarray(cv2.resize(canvas, shape[::-1], interpolation=cv2.INTER_AREA) > 127)
