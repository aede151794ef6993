"""What a synthetic cohort looks like: sizes, shares and how often the special cases come.

Not for how it is drawn (layout.py, texture.py) nor for which slide gets what (plan.py). Before changing a default:
the same seed then gives other slides, so every number measured on such a cohort moves.
"""

from dataclasses import dataclass

from manifests.errors import SlidegradError

MPP = 0.5
"""Microns per pixel of level 0, in x and y."""
CELL_PX = 16
"""Level-0 px per layout cell: layouts and truth maps are drawn at 8 microns per cell."""
GRID_PX = 128
"""Slide sizes are multiples of this (level-0 px), so that a mirrored slide falls on the same tile grid."""
MAX_SIDE_PX = 16_384
"""Largest side of a slide in level-0 px: level 0 is held in memory while it is drawn."""


@dataclass(frozen=True, kw_only=True)
class CohortConfig:
    """The look of a synthetic cohort; pixels are level-0 px at 0.5 microns."""

    width_px: tuple[int, int] = (3072, 5120)
    """Least and greatest slide width in level-0 px; multiples of 128 are drawn between them."""
    height_px: tuple[int, int] = (2560, 3584)
    """Least and greatest slide height in level-0 px; multiples of 128 are drawn between them."""
    tissue_fraction: tuple[float, float] = (0.25, 0.45)
    """Least and greatest share of the slide that is tissue (0 to 1)."""
    scant_fraction: tuple[float, float] = (0.015, 0.03)
    """The same for scant slides, which hold almost no tissue (0 to 1)."""
    tumour_fraction: tuple[float, float] = (0.03, 0.09)
    """Least and greatest share of a positive slide's tissue tiles that are tumour (0 to 1)."""
    lookalike_fraction: tuple[float, float] = (0.0, 0.03)
    """Share of a positive slide's tissue tiles that are look-alike (0 to 1); a negative slide holds both shares."""
    max_foci: int = 4
    """Most tumour foci on a positive slide (count)."""
    scant_every: int = 20
    """One pair in this many is scant (count of pairs; 0: none)."""
    pen_every: int = 12
    """One pair in this many has pen marks (count of pairs; 0: none)."""
    stain_variation: float = 1.0
    """How far stain and white differ between pairs; 0: not at all, 1: as between a few laboratories."""
    jpeg_quality: int = 85
    """JPEG quality of every tile (1 to 100)."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            SlidegradError: A field is outside what can be drawn.
        """
        for name in ("width_px", "height_px"):
            low, high = getattr(self, name)
            if not (512 <= low <= high <= MAX_SIDE_PX) or _last_multiple(high) < low:
                raise SlidegradError(
                    f"synth config: {name} wants 512 <= low <= high <= {MAX_SIDE_PX} with a multiple of {GRID_PX} "
                    f"between them, got ({low}, {high})"
                )
        for name, most in _GREATEST_FRACTION.items():
            low, high = getattr(self, name)
            if not 0 <= low <= high <= most:
                raise SlidegradError(f"synth config: {name} wants 0 <= low <= high <= {most}, got ({low}, {high})")
        if min(self.tissue_fraction[0], self.scant_fraction[0], self.tumour_fraction[0]) <= 0:
            raise SlidegradError("synth config: tissue_fraction, scant_fraction and tumour_fraction must be above 0")
        for name, least, greatest in _RANGES:
            value = getattr(self, name)
            if not least <= value <= greatest:
                raise SlidegradError(f"synth config: {name} wants {least} to {greatest}, got {value}")


_GREATEST_FRACTION = {"tissue_fraction": 0.6, "scant_fraction": 0.2, "tumour_fraction": 0.3, "lookalike_fraction": 0.2}
_RANGES = (
    ("max_foci", 1, 16),
    ("scant_every", 0, 1_000_000),
    ("pen_every", 0, 1_000_000),
    ("stain_variation", 0.0, 2.0),
    ("jpeg_quality", 1, 100),
)


def _last_multiple(high_px: int) -> int:
    return high_px // GRID_PX * GRID_PX
