"""What passes between Slidegrad and other tools: one slide's tile corners, and how its tiles are read.

Other tools' files say less of the geometry than a manifest does, and each says it in its own way. So every file that
Slidegrad exports carries a `ReadPlan` beside what the other tool expects, where that tool does not look; an import
takes the plan if it is there, and else what the tool's own fields say.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from manifests.errors import ManifestError
from manifests.schema import Manifest, SlideRecord

Format = Literal["clam", "trident", "geojson", "eagle", "csv"]
Outline = list[list[list[list[float]]]]
"""Tissue polygons, each a list of rings (outer first, then holes) of [x, y] in level-0 px: GeoJSON's MultiPolygon."""
MAX_PX = 2**31
"""Manifests hold 32-bit numbers."""
Add = Callable[[Manifest, Outline], list[str]]
"""Writes one slide; returns sentences on what of it the format cannot say."""


@dataclass(frozen=True, kw_only=True)
class ReadPlan:
    """How one slide's tiles are read: the fields of a `SlideRecord` that an import needs."""

    slide_id: str
    width_l0: int
    height_l0: int
    tile_px: int
    tile_mpp: float
    overlap: int
    level: int
    read_w: int
    read_h: int

    @classmethod
    def of(cls, record: SlideRecord) -> Self:
        """The plan of a slide that has one."""
        return cls(**{f.name: getattr(record, f.name) for f in dataclasses.fields(cls)})

    def to_json(self) -> str:
        """As one line of JSON, ASCII alone."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> Self:
        """The plan in a parsed JSON object or a row of a table; other keys are passed over.

        Raises:
            ManifestError: a field is missing or of another type.
        """
        try:
            plan = cls(**{f.name: f.type(values[f.name]) for f in dataclasses.fields(cls)})  # type: ignore[operator]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ManifestError(f"{where}: Slidegrad's part of it is damaged ({error}); export it again") from None
        sizes = plan.width_l0, plan.height_l0, plan.tile_px, plan.read_w, plan.read_h
        if min(sizes) < 1 or max(sizes) >= MAX_PX or not 0 < plan.tile_mpp < float("inf"):
            raise ManifestError(f"{where}: Slidegrad's part of it is damaged ({plan.to_json()}); export it again")
        return plan


@dataclass(frozen=True, kw_only=True, eq=False)
class TileSet:
    """One slide's tiles as a file of another tool has them, not yet compared with the slide.

    `x_l0`, `y_l0` (int64, n): top-left corners in level-0 px; `tissue` (float32, n) in [0, 1], or None where the file
    does not tell. The geometry is either `level` with `read_size`, or `footprint_l0`, or neither.
    """

    names: tuple[str, ...]
    """What the file calls its slide, the surest first."""
    x_l0: NDArray[np.int64]
    y_l0: NDArray[np.int64]
    tissue: NDArray[np.float32] | None = None
    tile_px: int | None = None
    """Output tile side, px."""
    tile_mpp: float | None = None
    """Microns per output px."""
    overlap: int = 0
    """Output px shared by neighbouring tiles."""
    level: int | None = None
    read_size: tuple[int, int] | None = None
    """(width, height) of a tile, px of `level`."""
    footprint_l0: tuple[float, float] | None = None
    """(width, height) of a tile, level-0 px."""
    level_sizes: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """(width, height), px, of levels of the slide that the tiles were made on, where the file tells."""
    num_left_out: int = 0
    """Tiles that the slide has, but a capped export left out."""

    @classmethod
    def planned(
        cls,
        plan: ReadPlan,
        x_l0: NDArray[np.int64],
        y_l0: NDArray[np.int64],
        tissue: NDArray[np.float32] | None = None,
        names: tuple[str, ...] = (),
        num_left_out: int = 0,
    ) -> Self:
        """Tiles that Slidegrad exported."""
        return cls(
            names=(plan.slide_id, *names),
            x_l0=x_l0,
            y_l0=y_l0,
            tissue=tissue,
            tile_px=plan.tile_px,
            tile_mpp=plan.tile_mpp,
            overlap=plan.overlap,
            level=plan.level,
            read_size=(plan.read_w, plan.read_h),
            level_sizes={0: (plan.width_l0, plan.height_l0)},
            num_left_out=num_left_out,
        )


def whole_numbers(values: NDArray[Any], where: str) -> NDArray[np.int64]:
    """Coordinates as int64.

    Raises:
        ManifestError: some are no whole px, or no numbers at all.
    """
    if values.dtype.kind not in "iuf":
        raise ManifestError(f"{where}: coordinates are no numbers ({values.dtype}); expected whole level-0 px")
    numbers = np.asarray(values, np.float64)
    if not np.isfinite(numbers).all() or (numbers != np.round(numbers)).any():
        raise ManifestError(f"{where}: some coordinates are no whole level-0 px")
    if np.abs(numbers).max(initial=0) >= MAX_PX:
        raise ManifestError(f"{where}: coordinates of 2^31 px and more")
    return numbers.astype(np.int64)


def file_stem(slide_id: str, fallback: str) -> str:
    """The slide id as a file stem, unchanged where a file can have it: other tools look for that name."""
    fits = "/" not in slide_id and "\0" not in slide_id and not slide_id.startswith(".")
    return slide_id if fits and 0 < len(slide_id.encode()) <= 200 else fallback
