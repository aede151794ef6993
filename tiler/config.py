"""The tiler's settings. Everything that changes a manifest is here, and its hash is in the manifest."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Literal

from tiler.errors import TilerError


@dataclass(frozen=True, kw_only=True)
class TilerConfig:
    """Which tiles a manifest holds."""

    tile_px: int = 224
    """Output tile side, px."""
    mpp: float = 0.5
    """Microns per output px."""
    tissue: Literal["otsu"] = "otsu"
    """Tissue method."""
    reject_pen: bool = True
    """Pen marks are no tissue; turn off for stains without eosin whose tissue is lost."""
    min_tissue: float = 0.25
    """Least share of a tile that must be tissue, 0 to 1; 0 keeps every tile inside the slide."""
    overlap: int = 0
    """Output px shared by neighbouring tiles."""
    default_mpp: float | None = None
    """Microns per level-0 px for slides that do not say."""
    backend: Literal["auto", "cucim", "openslide"] = "auto"
    """Reader; auto takes cuCIM where it reads the format, else OpenSlide."""

    def __post_init__(self) -> None:
        if self.tile_px < 1:
            raise TilerError(f"--tile-px {self.tile_px}: expected at least 1 px")
        if not 0 < self.mpp <= 100:
            raise TilerError(f"--mpp {self.mpp}: expected microns per px in (0, 100]")
        if not 0 <= self.min_tissue <= 1:
            raise TilerError(f"--min-tissue {self.min_tissue}: expected a share in [0, 1]")
        if not 0 <= self.overlap < self.tile_px:
            raise TilerError(f"--overlap {self.overlap}: expected px in [0, tile-px)")
        if self.default_mpp is not None and not 0 < self.default_mpp <= 100:
            raise TilerError(f"--default-mpp {self.default_mpp}: expected microns per px in (0, 100]")

    def to_json(self) -> str:
        """The resolved config, keys sorted."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @property
    def hash(self) -> str:
        """16 hex digits that change with any setting."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=8).hexdigest()
