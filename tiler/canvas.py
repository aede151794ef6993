"""Where the parts of tiles that reads bring are put together, by any number of threads. No file is read here."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from tiler.plan import BlockRead


@dataclass(eq=False)
class Canvas:
    """Tiles being put together: at their own scale in `out` itself, else on sheets until whole, then resampled.

    So the px of a resampled tile are those of its own read, whatever it was read with. `places` (n,) is where in `out`
    each tile goes, `missing` (n,) how many of its parts are still to come.
    """

    out: NDArray[np.uint8]
    places: NDArray[np.int64]
    read_shape: tuple[int, int]
    missing: NDArray[np.int64]
    sheets: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    spare: list[NDArray[np.uint8]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, read: BlockRead, region: NDArray[np.uint8]) -> None:
        """Cuts the parts of tiles out of a region."""
        out, places = self.out, self.places
        if self.read_shape == out.shape[1:3]:
            for tile, left, top, x, y, width, height in read.parts.tolist():
                part = region[top : top + height, left : left + width]
                out[places[tile], y : y + height, x : x + width] = part
            return
        for tile, left, top, x, y, width, height in read.parts.tolist():
            sheet = self._sheet(tile)
            sheet[y : y + height, x : x + width] = region[top : top + height, left : left + width]
            if self._is_whole(tile):
                cv2.resize(sheet, (out.shape[2], out.shape[1]), out[places[tile]], interpolation=cv2.INTER_AREA)
                self.spare.append(sheet)

    def _sheet(self, tile: int) -> NDArray[np.uint8]:
        with self.lock:
            if tile not in self.sheets:
                self.sheets[tile] = self.spare.pop() if self.spare else np.empty((*self.read_shape, 3), np.uint8)
            return self.sheets[tile]

    def _is_whole(self, tile: int) -> bool:
        with self.lock:
            self.missing[tile] -= 1
            return not self.missing[tile] and bool(self.sheets.pop(tile).size)


def count_parts(reads: Iterable[BlockRead], num_tiles: int) -> NDArray[np.int64]:
    """Of how many parts each tile of a plan is made up, (num_tiles,)."""
    parts = [read.parts[:, 0] for read in reads]
    return np.bincount(np.concatenate(parts), minlength=num_tiles) if parts else np.zeros(0, np.int64)
