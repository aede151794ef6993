"""What OME metadata says of a picture: OME-XML in a TIFF, and the NGFF attributes of an OME-Zarr group.

Only the fields named here are taken; names, dates and descriptions are left where they are.
Sources: https://docs.openmicroscopy.org/ome-model/ and https://ngff.openmicroscopy.org (versions 0.4, 0.5).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

_UM = {
    "µm": 1.0,  # micro sign
    "μm": 1.0,  # Greek mu
    "um": 1.0,
    "micrometer": 1.0,
    "nm": 1e-3,
    "nanometer": 1e-3,
    "mm": 1e3,
    "millimeter": 1e3,
    "cm": 1e4,
    "centimeter": 1e4,
    "m": 1e6,
    "meter": 1e6,
    "Å": 1e-4,
    "angstrom": 1e-4,
}
"""Microns per unit of length, by the names of OME-XML and of NGFF."""
_RGB_COLOURS = ("FF0000", "00FF00", "0000FF")


@dataclass(frozen=True)
class OmeImage:
    """One image: size in px, microns per px (x, y) as stated or None, colours of its channels (RRGGBB) where stated."""

    width: int
    height: int
    mpp: tuple[str | float, str | float] | None
    colours: tuple[str, ...]


@dataclass(frozen=True)
class OmeFields:
    """The images that an OME-XML describes."""

    images: tuple[OmeImage, ...]

    def find(self, size: tuple[int, int]) -> OmeImage | None:
        """The image of this size (width, height), in px."""
        return next((image for image in self.images if (image.width, image.height) == size), None)


def parse_ome_xml(text: str | None) -> OmeFields:
    """The images of an OME-XML; none where it cannot be parsed."""
    try:
        root = ElementTree.fromstring(text or "")
        return OmeFields(tuple(_image(pixels) for pixels in root.iter() if pixels.tag.endswith("}Pixels")))
    except (ElementTree.ParseError, KeyError, ValueError):
        return OmeFields(())


def _image(pixels: ElementTree.Element) -> OmeImage:
    channels = [child for child in pixels if child.tag.endswith("}Channel")]
    # Color is RGBA in a signed 32-bit number.
    colours = [f"{(int(c.attrib['Color']) >> 8) & 0xFFFFFF:06X}" for c in channels if "Color" in c.attrib]
    sizes = [_length(pixels.get(f"PhysicalSize{a}"), pixels.get(f"PhysicalSize{a}Unit", "µm")) for a in "XY"]
    mpp = None if sizes[0] is None or sizes[1] is None else (sizes[0], sizes[1])
    return OmeImage(int(pixels.attrib["SizeX"]), int(pixels.attrib["SizeY"]), mpp, tuple(colours))


def _length(value: str | float | None, unit: str | None) -> str | float | None:
    """Microns; what is no number stays as it is, so that it can be named."""
    factor = _UM.get(unit or "")
    if value is None or factor is None:
        return None
    try:
        return float(value) * factor
    except ValueError:
        return value


@dataclass(frozen=True)
class Multiscale:
    """One NGFF pyramid: names of axes, paths of the levels' arrays (finest first), and the image's fields as above."""

    axes: tuple[str, ...]
    paths: tuple[str, ...]
    mpp: tuple[str | float, str | float] | None
    colours: tuple[str, ...]


def parse_ngff(attributes: Mapping[str, Any]) -> Multiscale | None:
    """The first pyramid of a group, None where it has none.

    Raises:
        KeyError, TypeError, ValueError: not as NGFF 0.4 or 0.5 wants it.
    """
    fields: Mapping[str, Any] = attributes.get("ome", attributes)  # 0.5 keeps all under "ome".
    if not fields.get("multiscales"):
        return None
    first = fields["multiscales"][0]
    axes = [axis if isinstance(axis, str) else axis["name"] for axis in first["axes"]]
    units = [None if isinstance(axis, str) else axis.get("unit") for axis in first["axes"]]
    scales = [_scale(part, len(axes)) for part in (first["datasets"][0], first)]
    sizes = [_length(scales[0][i] * scales[1][i], units[i]) for i in (axes.index("x"), axes.index("y"))]
    mpp = None if sizes[0] is None or sizes[1] is None else (sizes[0], sizes[1])
    channels = fields.get("omero", {}).get("channels", [])
    colours = tuple(str(channel["color"]).upper() for channel in channels if "color" in channel)
    return Multiscale(tuple(axes), tuple(level["path"] for level in first["datasets"]), mpp, colours)


def _scale(part: Mapping[str, Any], num_axes: int) -> list[float]:
    for step in part.get("coordinateTransformations", ()):
        if step["type"] == "scale":
            return [float(value) for value in step["scale"]]
    return [1.0] * num_axes


def are_rgb(colours: Sequence[str]) -> bool:
    """Separate channels are a picture's red, green and blue: by their colours, or nobody says otherwise."""
    return not colours or tuple(colours[:3]) == _RGB_COLOURS
