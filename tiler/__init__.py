"""The tiler: from a slide file to a manifest of its tissue tiles, and from a manifest to pixels. No model, no web."""

from tiler.build import build_manifest
from tiler.config import TilerConfig
from tiler.errors import ReadError, TilerError
from tiler.reader import read_tiles
from tiler.slide import Slide, open_slide

__all__ = ["ReadError", "Slide", "TilerConfig", "TilerError", "build_manifest", "open_slide", "read_tiles"]
