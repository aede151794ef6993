"""The tissue outline of a slide, out of the zip that holds its mask; no pixel is decoded."""

import json
import zipfile
import zlib
from pathlib import Path

from manifests.errors import ManifestError
from manifests.exchange.tiles import Outline

_UNREADABLE = (
    *(OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError),
    *(LookupError, AttributeError, TypeError, ValueError),
)
"""What Python says of a damaged zip, and of JSON of another shape."""


def read_outline(mask: Path) -> Outline | None:
    """The polygons round a slide's tissue; None where there is no mask.

    Args:
        mask: see `manifests.files.mask_path`: a zarr v3 zip store whose root attributes hold `outline`.

    Raises:
        ManifestError: a mask that cannot be read.
    """
    try:
        with zipfile.ZipFile(mask) as store:
            outline: Outline = json.loads(store.read("zarr.json"))["attributes"].get("outline", [])
            if not all(isinstance(ring, list) for polygon in outline for ring in polygon):
                raise ValueError("the outline holds no rings")
    except FileNotFoundError:
        return None
    except _UNREADABLE as error:
        raise ManifestError(
            f"{mask.name}: not a readable mask ({type(error).__name__}); tile the slide again"
        ) from None
    return outline
