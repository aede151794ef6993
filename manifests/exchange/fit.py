"""Tiles from elsewhere, compared with the slide itself and brought into a manifest. Pure.

Nothing is moved or made up: a corner that is not on the slide, a level that the slide does not have or a scale that
cannot be is an error of that slide. Rows come into block order, in which manifests are read fast, so that row i of the
source is no longer row i; corners, not row numbers, connect the two.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from manifests.errors import ManifestError
from manifests.exchange.tiles import MAX_PX, TileSet
from manifests.geometry import MPP_TOLERANCE, hilbert_order
from manifests.schema import Manifest, SlideRecord

DEFAULT_TILE_PX = 224
_MPP_SLACK = 0.02


@dataclass(frozen=True)
class LevelSize:
    """One level of the slide: its size in px, level-0 px per px."""

    width: int
    height: int
    downsample: float


@dataclass(frozen=True)
class Fitted:
    """A manifest, how many of its tiles reach past the slide's edge, and how many corners came more than once."""

    manifest: Manifest
    num_past_edge: int
    num_doubled: int


def fit_tiles(tiles: TileSet, record: SlideRecord, levels: tuple[LevelSize, ...], tile_px: int | None = None) -> Fitted:
    """The manifest of one slide, from tiles of another tool.

    A tile that only reaches past the right or lower edge is kept: CLAM and TRIDENT make such tiles, and readers show
    white there. A corner that comes twice is kept once. Where the file does not tell the tissue share it is 1.

    Args:
        tiles: what the file says.
        record: what the slide itself says: id, size, scale, fingerprint …; its tile fields are filled in here.
        levels: the slide's levels, finest first.
        tile_px: output tile side the user asks for, px; the read size stays as it is.

    Raises:
        ManifestError: file and slide do not go together; one sentence.
    """
    where = f"slide {record.slide_id}"
    _compare_levels(tiles, levels, where)
    px = tile_px or tiles.tile_px or DEFAULT_TILE_PX
    level, (read_w, read_h) = _settle_read(tiles, levels, px, where)
    if max(px, read_w, read_h) >= MAX_PX:
        raise ManifestError(f"{where}: tiles of {px} px, read as {read_w}x{read_h} px; expected less than 2^31")
    extent_l0 = read_w * levels[level].downsample, read_h * levels[level].downsample
    if min(read_w, read_h) < px * (1 - MPP_TOLERANCE) - 1:
        raise ManifestError(
            f"{where}: tiles of {read_w}x{read_h} px of level {level} for an output of {px} px; "
            f"resolution that was not scanned is not made up: give --tile-px {min(read_w, read_h)}"
        )
    tile_mpp = (extent_l0[0] * record.mpp_x + extent_l0[1] * record.mpp_y) / (2 * px)
    if tiles.tile_mpp is not None and px == tiles.tile_px:
        if abs(tile_mpp - tiles.tile_mpp) > (_MPP_SLACK + 1 / min(read_w, read_h)) * tiles.tile_mpp:
            raise ManifestError(
                f"{where}: tiles of {tiles.tile_mpp:.4g} mpp in the file, but {tile_mpp:.4g} by the slide's scale "
                f"({record.mpp_source}); give the scale that the tiles were made with"
            )
        tile_mpp = tiles.tile_mpp
    outside = (tiles.x_l0 < 0) | (tiles.y_l0 < 0) | (tiles.x_l0 >= record.width_l0) | (tiles.y_l0 >= record.height_l0)
    if outside.any():
        at = int(np.flatnonzero(outside)[0])
        raise ManifestError(
            f"{where}: {int(outside.sum())} of {len(outside)} tiles begin outside its {record.width_l0}x"
            f"{record.height_l0} px, first ({tiles.x_l0[at]}, {tiles.y_l0[at]}); are these level-0 px of it?"
        )
    corners, first = np.unique(np.stack([tiles.y_l0, tiles.x_l0], axis=1), axis=0, return_index=True)
    tissue = np.ones(len(tiles.x_l0), np.float32) if tiles.tissue is None else tiles.tissue
    overlap = tiles.overlap if 0 <= tiles.overlap < px else 0
    y_l0, x_l0 = corners.T
    col, row = (
        np.round(corner / (side * (1 - overlap / px))).astype(np.int64)
        for corner, side in zip((x_l0, y_l0), extent_l0, strict=True)
    )
    order = hilbert_order(col, row)
    filled = dataclasses.replace(
        record,
        status="ok" if len(order) else "empty",
        num_tiles=len(order),
        tile_px=px,
        tile_mpp=tile_mpp,
        overlap=overlap,
        level=level,
        read_w=read_w,
        read_h=read_h,
    )
    manifest = Manifest(
        filled, x_l0[order].astype(np.int32), y_l0[order].astype(np.int32), tissue[first][order].astype(np.float32)
    )
    # A px of slack: sizes of levels are rounded.
    past = (x_l0 + extent_l0[0] > record.width_l0 + 1) | (y_l0 + extent_l0[1] > record.height_l0 + 1)
    return Fitted(manifest, int(past.sum()), len(tiles.x_l0) - len(order))


def _compare_levels(tiles: TileSet, levels: tuple[LevelSize, ...], where: str) -> None:
    for level, size in tiles.level_sizes.items():
        if 0 <= level < len(levels) and size != (levels[level].width, levels[level].height):
            raise ManifestError(
                f"{where}: level {level} has {levels[level].width}x{levels[level].height} px, in the file of tiles "
                f"{size[0]}x{size[1]}; these tiles were made on another scan"
            )


def _settle_read(tiles: TileSet, levels: tuple[LevelSize, ...], px: int, where: str) -> tuple[int, tuple[int, int]]:
    """Level and read size: the file's own where it tells them, else those of the coarsest level that is fine enough."""
    if tiles.level is not None and tiles.read_size is not None:
        if not 0 <= tiles.level < len(levels):
            raise ManifestError(
                f"{where}: tiles of level {tiles.level}, but the slide has {len(levels)} levels, 0 to {len(levels) - 1}"
            )
        if min(tiles.read_size) < 1 or px < 1:
            raise ManifestError(
                f"{where}: tiles of {tiles.read_size[0]}x{tiles.read_size[1]} px; expected at least 1x1"
            )
        return tiles.level, tiles.read_size
    sides = tiles.footprint_l0 or (px, px)
    fine = [i for i, lv in enumerate(levels) if px * lv.downsample <= min(sides) * (1 + MPP_TOLERANCE)]
    level = max(fine, key=lambda i: levels[i].downsample, default=0)
    exact = [side / levels[level].downsample for side in sides]
    if all(abs(side / px - 1) <= MPP_TOLERANCE for side in exact):
        return level, (px, px)
    return level, (max(1, round(exact[0])), max(1, round(exact[1])))
