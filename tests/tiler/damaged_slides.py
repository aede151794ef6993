"""Makers of slides in every compression that cuCIM reads, and of damage to their compressed tiles.

Slides have level 0 and one of a quarter of it, so that tissue is looked for where nothing is damaged.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import cv2
import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from manifests import Manifest
from tiler.integrity.cover import Cover, cover
from tiler.synth.layout import smooth_noise
from tiler.synth.svs import encode_jpeg
from tiler.tiff_tables import TileTable, read_tables

Picture = NDArray[np.uint8]
Rows = NDArray[np.int64]

MPP = 0.5


class Format(NamedTuple):
    """How compressed tiles are written: `encode` makes one, TIFF's own writer all where it is None."""

    suffix: str
    layout: Mapping[str, Any]
    encode: Callable[[Picture], bytes] | None = None
    tile_px: int = 256
    has_shared_head: bool = False
    """Quantization and Huffman tables are kept once, beside the tiles, as Aperio does."""

    @property
    def is_jpeg(self) -> bool:
        return self.layout["compression"] == "jpeg"


def _format(suffix: str, compression: object, photometric: str = "rgb", **more: Any) -> Format:
    layout = {"compression": compression, "photometric": photometric, **more.pop("layout", {})}
    return Format(suffix, MappingProxyType(layout), **more)


def _encode_ycbcr(tile: Picture) -> bytes:
    return encode_jpeg(tile, 92)


def _encode_rgb(tile: Picture) -> bytes:
    return bytes(imagecodecs.jpeg8_encode(tile, 85, colorspace="rgb", outcolorspace="rgb", subsampling=(1, 1)))


def _encode_jpeg2000(tile: Picture) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(tile, 44, codecformat="j2k", mct=True))


_HALVED = {"subsampling": (2, 2)}
FORMATS = {
    "Aperio JPEG, YCbCr": _format(".svs", "jpeg", "ycbcr", encode=_encode_ycbcr, layout=_HALVED),
    "Aperio JPEG, RGB": _format(".svs", "jpeg", encode=_encode_rgb, tile_px=240, has_shared_head=True),
    "TIFF JPEG, YCbCr": _format(".tif", "jpeg", "ycbcr", encode=_encode_ycbcr, layout=_HALVED, tile_px=240),
    "TIFF JPEG, RGB": _format(".tif", "jpeg", encode=_encode_rgb),
    "Aperio JPEG 2000": _format(".svs", 33005, encode=_encode_jpeg2000),
    "TIFF Deflate": _format(".tif", "adobe_deflate"),
    "TIFF LZW": _format(".tif", "lzw"),
    "TIFF LZW, predictor": _format(".tif", "lzw", layout={"predictor": True}),
}
MARKED = ("undecodable", "random half", "zeroed half")
"""Damage after which a compressed tile has lost its marks, at least at its end."""
CERTAIN = (*MARKED, "random middle")
"""What a reader must notice while it reads."""
KINDS = (*CERTAIN, "lost sector", "64 random bytes", "one bit", "another tile")
"""A random middle is a random half whose end is kept; another tile's bytes are as many as fit."""
_SECTOR_BYTES, _END_BYTES = 512, 32


def draw(width: int, height: int) -> Picture:
    """Pieces of tissue on glass, no two places alike, RGB (height, width, 3)."""
    rng = np.random.default_rng(0)
    density = np.zeros((height, width, 3))
    for absorption, px in (((0.65, 0.70, 0.29), 4), ((0.22, 0.80, 0.56), 12)):
        density += np.exp(0.6 * smooth_noise(rng, (height, width), px))[..., None] * np.array(absorption) * 0.5
    y, x = np.mgrid[:height, :width]
    density[(x // 512 + y // 512) % 2 == 1] = 0.02
    picture = 243 * np.exp(-density) + rng.normal(0, 2, (height, width, 3))
    return np.asarray(np.clip(picture, 0, 255).round().astype(np.uint8))


def write(path: Path, name: str, picture: Picture) -> Path:
    """Writes a picture in one of the `FORMATS`."""
    fmt = FORMATS[name]
    height, width = picture.shape[:2]
    size, tile_px = f"{width}x{height}", fmt.tile_px
    text = f"Aperio Image Library v12.0.0 \r\n{size} [0,0 {size}] ({tile_px}x{tile_px})|AppMag = 20|MPP = {MPP}"
    with tifffile.TiffWriter(path) as tiff:
        for step in (1, 4):
            pixels: Any = cv2.resize(picture, None, fx=1 / step, fy=1 / step, interpolation=cv2.INTER_AREA)
            layout = {"shape": pixels.shape, "dtype": np.uint8, **fmt.layout}
            if fmt.encode is not None:
                tiles = [fmt.encode(tile) for tile in _cut(pixels, tile_px)]
                if fmt.has_shared_head:
                    heads, tiles = zip(*map(_split_head, tiles), strict=True)
                    assert len(set(heads)) == 1
                    layout["jpegtables"] = heads[0]
                pixels = iter(tiles)
            tiff.write(
                pixels,
                tile=(tile_px, tile_px),
                description=text if fmt.suffix == ".svs" else None,
                subfiletype=int(step > 1 and fmt.suffix == ".tif"),
                resolution=(1e4 / MPP, 1e4 / MPP),
                resolutionunit="CENTIMETER",
                metadata=None,
                software=False,
                **layout,
            )
    if fmt.is_jpeg and fmt.layout["photometric"] == "rgb":  # The writer takes any JPEG for YCbCr.
        with tifffile.TiffFile(path, mode="r+b") as tiff:
            for page in tiff.pages:
                page.tags["PhotometricInterpretation"].overwrite(2)
    return path


def _cut(picture: Picture, tile_px: int) -> list[Picture]:
    height, width = picture.shape[:2]
    padded = np.pad(picture, ((0, -height % tile_px), (0, -width % tile_px), (0, 0)), mode="edge")
    corners = [(y, x) for y in range(0, height, tile_px) for x in range(0, width, tile_px)]
    return [np.ascontiguousarray(padded[y : y + tile_px, x : x + tile_px]) for y, x in corners]


def _split_head(jpeg: bytes) -> tuple[bytes, bytes]:
    """A JPEG's tables (DQT, DHT) as a JPEG of their own, and the rest: ITU-T T.81 B.5, abbreviated formats."""
    head, rest, at = b"\xff\xd8", b"\xff\xd8", 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if jpeg[at + 1] in (0xDB, 0xC4):
            head += jpeg[at:end]
        else:
            rest += jpeg[at:end]
        at = end
    return head + b"\xff\xd9", rest + jpeg[at:]


def harm(kind: str, tile: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """A compressed tile's bytes, damaged; as many as before.

    Args:
        kind: one of `KINDS`.
        tile: the bytes.
        other: another tile's, no longer than these.
        rng: where and what is drawn from.
    """
    half = len(tile) // 2
    if kind == "undecodable":
        return rng.bytes(len(tile))
    if kind == "random half":
        return tile[:half] + rng.bytes(len(tile) - half)
    if kind == "random middle":
        return tile[:half] + rng.bytes(len(tile) - half - _END_BYTES) + tile[-_END_BYTES:]
    if kind == "zeroed half":
        return tile[:half] + bytes(len(tile) - half)
    if kind == "lost sector":
        at = int(rng.integers(len(tile) - _SECTOR_BYTES))
        return tile[:at] + bytes(_SECTOR_BYTES) + tile[at + _SECTOR_BYTES :]
    if kind == "64 random bytes":
        at = int(rng.integers(len(tile) - 64))
        return tile[:at] + rng.bytes(64) + tile[at + 64 :]
    if kind == "one bit":
        at = int(rng.integers(len(tile)))
        return tile[:at] + bytes([tile[at] ^ 1 << int(rng.integers(8))]) + tile[at + 1 :]
    assert kind == "another tile"
    return (other + tile[len(other) :])[: len(tile)]


def harm_tiles(path: Path, kinds: Sequence[str], indices: Sequence[int], seed: int = 0) -> None:
    """Damages tiles of level 0 of a file, each in one of these ways after the other."""
    rng, content = np.random.default_rng(seed), bytearray(path.read_bytes())
    table = read_tables(path)[0]
    places = [slice(at, at + n) for at, n in zip(table.offsets.ravel(), table.num_bytes.ravel(), strict=True)]
    sound = [bytes(content[place]) for place in places]
    for i, index in enumerate(indices):
        fits = [tile for j, tile in enumerate(sound) if j != index and len(tile) <= len(sound[index])]
        content[places[index]] = harm(kinds[i % len(kinds)], sound[index], (fits or sound)[-1], rng)
    with path.open("r+b") as stream:  # In place: the file stays the one that it is.
        stream.write(content)


def find_inner(path: Path, end_bytes: int = 1 << 16) -> list[int]:
    """Tiles of level 0 that a fingerprint does not look at."""
    table, size = read_tables(path)[0], path.stat().st_size
    ends = (table.offsets + table.num_bytes).ravel()
    return np.flatnonzero((table.offsets.ravel() >= end_bytes) & (ends <= size - end_bytes)).tolist()


def lay(manifest: Manifest, table: TileTable) -> Cover:
    """The compressed tiles of level 0 under the tiles of a manifest."""
    size = manifest.slide.read_w, manifest.slide.read_h
    x, y = manifest.x_l0.astype(np.int64), manifest.y_l0.astype(np.int64)
    return cover(x, y, size, (table.tile_w, table.tile_h), table.shape)


def find_touching(manifest: Manifest, table: TileTable, indices: Sequence[int]) -> NDArray[np.bool_]:
    """Which tiles of a manifest touch these compressed tiles of level 0, (n,)."""
    return lay(manifest, table).touching(np.isin(np.arange(table.offsets.size), indices).reshape(table.shape))
