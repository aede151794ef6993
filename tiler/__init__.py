"""The tiler: from a slide file to a manifest of its tissue tiles, and from a manifest to pixels. No model, no web."""

from tiler.build import build_manifest
from tiler.config import TilerConfig
from tiler.errors import DamageError, ReadError, TilerError
from tiler.reader import TilePlan, plan_tiles, read_plan, read_tiles
from tiler.slide import Slide, open_slide

__all__ = [
    "DamageError",
    "ReadError",
    "Slide",
    "TilePlan",
    "TilerConfig",
    "TilerError",
    "build_manifest",
    "open_slide",
    "plan_tiles",
    "read_plan",
    "read_tiles",
]
