"""The tissue outline of a slide, out of the zip that holds its mask; no pixel is decoded."""

import json
import zipfile
from pathlib import Path

from manifests.errors import ManifestError
from manifests.exchange.tiles import Outline


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
    except FileNotFoundError:
        return None
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ManifestError(
            f"{mask.name}: not a readable mask ({type(error).__name__}); tile the slide again"
        ) from None
    return outline
