"""The tiler's settings. Everything that changes a manifest is here, and its hash is in the manifest."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from tiler.errors import TilerError

Backend = Literal["auto", "cucim", "openslide", "tifffile", "zarr"]
Check = Literal["none", "markers", "decode", "sample"]
Method = Literal["otsu", "hsv", "entropy"]


@dataclass(frozen=True, kw_only=True)
class TissueConfig:
    """What counts as tissue."""

    method: Annotated[Method, tyro.conf.arg(name="tissue")] = "otsu"
    """otsu: saturation, for most stains; hsv: fixed colour ranges; entropy: texture, for pale or fatty tissue."""
    min_speck_um2: float = 4_000.0
    """Smaller pieces of tissue are dropped, um^2; 0 keeps all."""
    max_hole_um2: float = 4_000.0
    """Smaller holes in tissue are filled, um^2; 0 fills none."""
    reject_pen: bool = True
    """Green, red, blue and black pen marks are no tissue."""
    reject_black: bool = True
    """Black areas (fill of the scanner, edges of the glass) are no tissue."""
    reject_white: bool = True
    """Blank areas inside the tissue's outline are no tissue."""
    reject_blur: bool = True
    """Areas out of focus are no tissue."""
    mask_values: tuple[int, ...] = ()
    """Values that mean tissue in the pictures of --masks; all but 0 by default."""

    def __post_init__(self) -> None:
        for name in ("min_speck_um2", "max_hole_um2"):
            if not 0 <= getattr(self, name) < float("inf"):
                flag = "--" + name.replace("_", "-")
                raise TilerError(f"{flag} {getattr(self, name)}: expected an area of 0 um^2 or more")
        if any(not 0 <= value <= 65_535 for value in self.mask_values):
            raise TilerError(f"--mask-values {self.mask_values}: expected pixel values from 0 to 65535")


@dataclass(frozen=True, kw_only=True)
class TilerConfig:
    """Which tiles a manifest holds."""

    tile_px: int = 224
    """Output tile side, px."""
    mpp: float = 0.5
    """Microns per output px."""
    tissue: Annotated[TissueConfig, tyro.conf.arg(name="")] = field(default_factory=TissueConfig)
    min_tissue: float = 0.25
    """Least share of a tile that must be tissue, 0 to 1; 0 keeps every tile inside the slide, rejecting nothing."""
    overlap: int = 0
    """Output px shared by neighbouring tiles."""
    offset: tuple[int, int] = (0, 0)
    """Where the grid starts (x, y), output px from the slide's top-left corner."""
    align: bool = False
    """Tiles start at corners of the slide's own compressed tiles: fastest to read, leaves gaps between tiles."""
    default_mpp: float | None = None
    """Microns per level-0 px for slides that do not say."""
    backend: Backend = "auto"
    """Reader; auto takes cuCIM where it reads the format, else OpenSlide, else tifffile or zarr."""
    check: Check = "markers"
    """How to look for damaged tiles. markers: both ends of each JPEG; decode: every used one; sample: two readers."""
    max_bad: float = 0.05
    """A slide with a larger share of damaged tiles has failed, 0 to 1; below it they are left out."""

    def __post_init__(self) -> None:
        if not 1 <= self.tile_px <= 65_536:
            raise TilerError(f"--tile-px {self.tile_px}: expected 1 to 65,536 px")
        if not 0 < self.mpp <= 100:
            raise TilerError(f"--mpp {self.mpp}: expected microns per px in (0, 100]")
        if not 0 <= self.min_tissue <= 1:
            raise TilerError(f"--min-tissue {self.min_tissue}: expected a share in [0, 1]")
        if not 0 <= self.overlap < self.tile_px:
            raise TilerError(f"--overlap {self.overlap}: expected px in [0, tile-px)")
        if min(self.offset) < 0:
            raise TilerError(f"--offset {self.offset[0]} {self.offset[1]}: expected 0 px or more")
        if self.align and (self.overlap or any(self.offset)):
            raise TilerError("--align lays the grid on the slide's own tiles; leave --overlap and --offset out")
        if self.default_mpp is not None and not 0 < self.default_mpp <= 100:
            raise TilerError(f"--default-mpp {self.default_mpp}: expected microns per px in (0, 100]")
        if not 0 <= self.max_bad <= 1:
            raise TilerError(f"--max-bad {self.max_bad}: expected a share in [0, 1]")

    def to_json(self) -> str:
        """The resolved config, keys sorted."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @property
    def hash(self) -> str:
        """16 hex digits that change with any setting."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=8).hexdigest()
