"""zarr: OME-Zarr folders (NGFF 0.4 and 0.5), one pyramid of RGB or grey pictures.

A chunk that was never written has the array's fill value, as zarr has it: a lost chunk cannot be told from it, but
changes the slide's fingerprint.
"""

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from tiler.backends.pixels import make_levels, read_inside, to_rgb
from tiler.errors import TilerError
from tiler.ome import Multiscale, are_rgb, parse_ngff

_BAD_METADATA = (OSError, KeyError, TypeError, ValueError, IndexError, AttributeError)


class ZarrPixels:
    """zarr: px of a level are floor(x_l0 / downsample), so every level is exact.

    Raises:
        TilerError: no OME-Zarr, or not a brightfield picture.
    """

    name = "zarr"

    def __init__(self, path: Path) -> None:
        group, self.multiscale = _open_pyramid(path)
        axes = self.multiscale.axes
        try:
            arrays: list[Any] = [group[level] for level in self.multiscale.paths]
            self._arrays = sorted(arrays, key=lambda array: -array.shape[axes.index("x")])
            sizes, tiles = (
                [(shape[axes.index("x")], shape[axes.index("y")]) for shape in shapes]
                for shapes in ([a.shape for a in self._arrays], [a.chunks for a in self._arrays])
            )
        except _BAD_METADATA as error:
            raise TilerError(f"no readable OME-Zarr ({type(error).__name__}: {error})") from None
        for array in self._arrays:
            _refuse_other_arrays(array, self.multiscale)
        self.levels = make_levels(sizes, tiles)

    def read(self, x_l0: int, y_l0: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        axes = self.multiscale.axes

        def inside(x0: int, y0: int, x1: int, y1: int) -> NDArray[np.uint8]:
            where = {"x": slice(x0, x1), "y": slice(y0, y1), "c": slice(None)}
            part = np.asarray(self._arrays[level][tuple(where.get(axis, 0) for axis in axes)])
            kept = [axis for axis in axes if axis in where]
            if "c" not in kept:
                return to_rgb(part.transpose(kept.index("y"), kept.index("x"))[..., None])
            return to_rgb(part.transpose(*(kept.index(axis) for axis in "yxc")))

        return read_inside(self.levels[level], (x_l0, y_l0), (width, height), inside)

    def is_exact(self, level: int) -> bool:  # noqa: ARG002 - the protocol's signature
        return True


def _open_pyramid(path: Path) -> tuple[zarr.Group, Multiscale]:
    """The group with the pyramid: the folder itself, or its first image as bioformats2raw lays them out."""
    try:
        group = zarr.open_group(path, mode="r", use_consolidated=False)
        attributes = dict(group.attrs)
        found = parse_ngff(attributes)
        ome: Any = attributes.get("ome", attributes)
        if found is None and "bioformats2raw.layout" in ome:
            group = zarr.open_group(path / "0", mode="r", use_consolidated=False)
            found = parse_ngff(dict(group.attrs))
    except _BAD_METADATA as error:
        raise TilerError(f"no readable OME-Zarr ({type(error).__name__}: {error})") from None
    if found is None:
        raise TilerError("a zarr folder without NGFF multiscales, expected OME-Zarr 0.4 or 0.5")
    return group, found


def _refuse_other_arrays(array: Any, multiscale: Multiscale) -> None:
    axes = multiscale.axes
    if array.dtype != np.uint8:
        raise TilerError(f"its pixels are {array.dtype}, expected 8-bit brightfield; export it as 8-bit RGB")
    counts = dict(zip(axes, array.shape, strict=True))
    num_channels = counts.get("c", 1)
    if num_channels not in (1, 3, 4) or (num_channels > 1 and not are_rgb(multiscale.colours)):
        coloured = f" coloured {' '.join(multiscale.colours)}" if multiscale.colours else ""
        raise TilerError(f"it has {num_channels} channels{coloured}, expected RGB or grey")
    stacked = ", ".join(f"{axis} {n}" for axis, n in counts.items() if axis not in "xyc" and n > 1)
    if stacked:
        raise TilerError(f"it is a stack of pictures ({stacked}), expected one brightfield picture")
