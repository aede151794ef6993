"""What a manifest holds: one slide's record and the coordinates of its tiles.

`SlideRecord` is defined once: it is the metadata of every manifest file and, field for field, a row of the catalogue.
Parse at the edge (`SlideRecord.from_json`), trust inside. Before changing a field, read SPEC.md and raise
`SCHEMA_VERSION`: users' manifests outlive this code.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from manifests.errors import ManifestError
from manifests.geometry import line_numbers

SCHEMA_VERSION = 2
_READABLE = (1, 2)
"""Version 1 knew no reasons of rejection; what it lacks is 0."""
REASONS = ("tissue", "pen", "black", "white", "blur")
"""Why a place of the grid holds no tile: too little tissue at all, or too little once such areas are left out."""
Status = Literal["ok", "empty", "failed"]

TILE_SCHEMA = pa.schema([("x_l0", pa.int32()), ("y_l0", pa.int32()), ("tissue", pa.float32())])
_ARROW_TYPES = {str: pa.string(), Status: pa.string(), int: pa.int32(), float: pa.float64(), bool: pa.bool_()}


@dataclass(frozen=True, kw_only=True)
class SlideRecord:
    """One slide's outcome: its true scale, the resolved read plan of its tiles, and what was checked.

    Pixel sizes with `_l0` are level-0 px; `read_*` are px at `level`; `tile_px` is output px at `tile_mpp`.
    """

    slide_id: str
    status: Status
    error: str = ""
    """Why the slide failed, one sentence; empty otherwise."""
    num_tiles: int = 0
    num_bad_tiles: int = 0
    """Tiles left out because their bytes are damaged."""
    num_rejected: int = 0
    """Grid positions left out, the sum of the five reasons below; each counts once, for the first that holds."""
    rejected_tissue: int = 0
    rejected_pen: int = 0
    rejected_black: int = 0
    rejected_white: int = 0
    rejected_blur: int = 0
    width_l0: int = 0
    height_l0: int = 0
    mpp_x: float = 0.0
    """Microns per level-0 px, as found; 0 where unknown."""
    mpp_y: float = 0.0
    mpp_source: str = ""
    """Where the mpp came from: vendor | tiff | csv | default."""
    mpp_conflict: bool = False
    """Two sources disagree by more than 2 %, and the first of the order above was used; or one was absurd."""
    mpp_other: float = 0.0
    """What the other source says (x), where they disagree; 0 elsewhere."""
    backend: str = ""
    """The reader to use: cucim | openslide | tifffile | zarr."""
    vendor: str = ""
    fingerprint: str = ""
    """Hash of the slide file, without any clock; training refuses a file that does not match."""
    check: str = "none"
    """How its bytes were looked at: none | markers | decode | sample."""
    tile_px: int = 0
    tile_mpp: float = 0.0
    overlap: int = 0
    """Output px shared by neighbouring tiles."""
    level: int = 0
    read_w: int = 0
    read_h: int = 0
    tissue_mm2: float = 0.0
    config_hash: str = ""
    version: str = ""
    """Slidegrad's version that wrote the manifest."""

    def to_json(self) -> str:
        """The record as JSON, the value of the Parquet metadata key `slidegrad` together with the schema version."""
        return json.dumps({"schema_version": SCHEMA_VERSION, "slide": dataclasses.asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """Parses a record.

        Args:
            text: what `to_json` wrote.
            where: the file it came from, for the error.

        Raises:
            ManifestError: no such JSON, another schema version, or fields missing.
        """
        try:
            data = json.loads(text)
            version, fields = data["schema_version"], dict(data["slide"])
        except (ValueError, KeyError, TypeError) as error:
            raise ManifestError(f"{where}: not a Slidegrad manifest ({type(error).__name__}: {error})") from None
        if version not in _READABLE:
            raise ManifestError(f"{where}: manifest schema {version}, this version reads {SCHEMA_VERSION}; tile again")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := set(fields) - known:
            raise ManifestError(f"{where}: unknown manifest fields {sorted(unknown)}")
        try:
            record = cls(**fields)
        except TypeError as error:
            raise ManifestError(f"{where}: incomplete manifest record ({error})") from None
        if record.status not in get_args(Status):
            raise ManifestError(f"{where}: status {record.status!r}, expected one of {get_args(Status)}")
        return record


CATALOG_SCHEMA = pa.schema([(f.name, _ARROW_TYPES[f.type]) for f in dataclasses.fields(SlideRecord)])


@dataclass(frozen=True, eq=False)
class Manifest:
    """One slide's tiles, in block order (neighbours in the array are neighbours on the slide).

    `x_l0`, `y_l0` (int32, n) are the top-left corners in level-0 px; `tissue` (float32, n) is the tissue share, 0 to 1.
    """

    slide: SlideRecord
    x_l0: NDArray[np.int32]
    y_l0: NDArray[np.int32]
    tissue: NDArray[np.float32]

    def __post_init__(self) -> None:
        n = self.slide.num_tiles
        if not len(self.x_l0) == len(self.y_l0) == len(self.tissue) == n:
            raise ManifestError(
                f"slide {self.slide.slide_id}: {n} tiles in the record, {len(self.x_l0)} in the columns"
            )

    def __len__(self) -> int:
        return len(self.x_l0)

    @property
    def footprint_l0(self) -> tuple[int, int]:
        """(width, height) in level-0 px that one tile covers, rounded to whole px."""
        if not self.slide.tile_px:
            return 0, 0
        extent_um = self.slide.tile_px * self.slide.tile_mpp
        return round(extent_um / self.slide.mpp_x), round(extent_um / self.slide.mpp_y)

    @property
    def cells(self) -> NDArray[np.int32]:
        """(column, row) of every tile (n, 2) in the slide's grid of tiles; the smallest column and row are 0.

        Neighbours of one grid have neighbouring cells, and no two of its tiles share one, if its stride is at least
        8 px of the read level. Tiles that an aligned grid lays 1.5 times their side apart, or wider, are two cells
        apart, or more. Coordinates off any grid fall into the nearest cell; see `line_numbers`.
        """
        slide = self.slide
        if not len(self):
            return np.zeros((0, 2), np.int32)
        stride_um = (slide.tile_px - slide.overlap) * slide.tile_mpp
        axes = (self.x_l0, slide.mpp_x), (self.y_l0, slide.mpp_y)
        return np.stack([line_numbers(starts, stride_um / mpp) for starts, mpp in axes], axis=1)

    def to_table(self) -> pa.Table:
        """The tiles as an Arrow table in `TILE_SCHEMA`, without metadata."""
        return pa.Table.from_arrays([self.x_l0, self.y_l0, self.tissue], schema=TILE_SCHEMA)

    @classmethod
    def from_table(cls, slide: SlideRecord, table: pa.Table) -> Self:
        """A manifest from a record and an Arrow table with the columns of `TILE_SCHEMA`."""
        columns: list[Any] = [table.column(name).to_numpy() for name in TILE_SCHEMA.names]
        return cls(slide, *columns)


def records_to_catalog(records: list[SlideRecord]) -> pa.Table:
    """One catalogue row per record, sorted by slide_id."""
    rows = sorted((dataclasses.asdict(record) for record in records), key=lambda row: str(row["slide_id"]))
    return pa.Table.from_pylist(rows, schema=CATALOG_SCHEMA)
