"""The readers behind one small interface, one file each.

cuCIM where its pixels are right, OpenSlide for the other scanners' formats, tifffile for OME-TIFF and what neither
opens, zarr for OME-Zarr. All are only asked for pixels of the pyramid; label and macro images are never opened. A
handle is cheap to open, is used from many threads, and never crosses a process border.
"""

from tiler.backends.cucim_reader import CucimPixels, why_not_cucim
from tiler.backends.openslide_reader import OpenslidePixels
from tiler.backends.pixels import PAD_VALUE, Level, Pixels
from tiler.backends.tifffile_reader import TifffilePixels
from tiler.backends.zarr_reader import ZarrPixels

__all__ = [
    "PAD_VALUE",
    "CucimPixels",
    "Level",
    "OpenslidePixels",
    "Pixels",
    "TifffilePixels",
    "ZarrPixels",
    "why_not_cucim",
]
