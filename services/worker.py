"""What is done in a process of its own, never in the one that answers HTTP: thumbnails and tiles become pictures.

A slide's file may crash, hang or swell whatever decodes it (`services.decoder` sees to that), and readers print and
raise what holds file names: nothing of that leaves this process. One thing to know before changing it: the HTTP process
imports this module to send its functions here, so tiler is imported within them.
"""

import functools
import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from manifests import Manifest
from services.errors import ServiceError, SlideFileError, UnavailableError, UnreadableMaskError

if TYPE_CHECKING:
    from tiler import Slide

_MAX_SIDE_PX = 4096
"""Longest side of a thumbnail; a larger one is halved until it fits."""
_JPEG_QUALITY = 88
_OPEN_SLIDES = 4
_TISSUE = (0, 158, 115)
"""Colour of tissue among the areas; the reasons' are those of `slidegrad preview`."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What is shown of a whole slide; both pictures have one frame, whose last px may reach past the slide's edge."""

    thumbnail: bytes
    """JPEG."""
    areas: bytes
    """PNG with a palette: 0 transparent, 1 tissue, i + 1 left out for `manifests.schema.REASONS[i]`."""
    px_l0: float
    """Level-0 px per px of the pictures."""
    legend: str
    """JSON: the areas that the slide has, each with its value, name, colour and share of the picture."""


def prepare() -> None:
    """What a process does before its first slide: it falls silent, since readers print the names of files."""
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    from tiler.pool import prepare_process

    prepare_process()


def run_limited(memory_bytes: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """Does the work in a process that ends itself when it holds too much memory. Its time is the pool's to watch."""
    from tiler.pool import Limits, run_guarded

    return run_guarded(Limits(time_s=math.inf, memory_bytes=memory_bytes), work, *arguments)


def draw_pictures(file: Path, slide_id: str) -> Pictures:
    """The thumbnail and the areas that the tiler kept.

    Args:
        file: the slide's mask (`manifests.files.mask_path`).
        slide_id: what the slide is called in errors.

    Raises:
        UnreadableMaskError: there is a file, but not one that can be read.
    """
    from tiler.masks import read_mask

    try:
        mask = read_mask(file)
        thumbnail, areas, px_l0 = mask.overview.thumbnail, mask.areas, mask.overview.px_l0
        while max(areas.shape) > _MAX_SIDE_PX:
            thumbnail, areas, px_l0 = _halved(thumbnail), np.ascontiguousarray(areas[::2, ::2]), 2 * px_l0
        legend = _legend(areas)
        picture = Image.fromarray(areas, mode="P")
        picture.putpalette(bytes(channel for _, colour in _names() for channel in colour))
        return Pictures(
            thumbnail=_encode(Image.fromarray(thumbnail), "JPEG", quality=_JPEG_QUALITY),
            areas=_encode(picture, "PNG", transparency=0, optimize=False),
            px_l0=px_l0,
            legend=json.dumps(legend),
        )
    except Exception:  # noqa: BLE001 - the boundary: what is raised names the file
        raise UnreadableMaskError(
            f"slide {slide_id}: its thumbnail cannot be read; tile the slide again with --overwrite"
        ) from None


def cut_tile(path: Path, manifest: Manifest, row: int) -> bytes:
    """One tile as PNG, the very pixels that training reads.

    Args:
        path: the slide's file; it is named in no error.
        manifest: the tile alone: the slide's manifest with one row.
        row: which tile of the whole manifest it is, for errors.

    Raises:
        UnavailableError: the file is not there, or cannot be reached.
        SlideFileError: it is another file than the one that was tiled, or its pixels cannot be had.
    """
    from tiler import DamageError, TilerError, read_tiles

    slide_id = manifest.slide.slide_id
    try:
        state = path.stat()
        if not path.is_dir():
            path.open("rb").close()  # `open_slide` would make a verdict on the file of what is the system's trouble.
        # cuCIM may not be installed here, or no longer be right for the file: "auto" then takes what shows the same.
        backend = "auto" if manifest.slide.backend == "cucim" else manifest.slide.backend
        slide = _open(path, backend, (state.st_size, state.st_mtime_ns))
        if slide.fingerprint != manifest.slide.fingerprint:
            raise SlideFileError(
                f"slide {slide_id}: its file changed since it was tiled, so that its tiles are no longer those of the "
                "manifest; tile it again"
            )
        pixels = read_tiles(slide, manifest, np.zeros(1, np.int64), num_threads=1)
        return _encode(Image.fromarray(pixels[0]), "PNG", compress_level=1)
    except ServiceError:
        raise
    except DamageError:
        text = f"slide {slide_id}: the file is damaged under tile {row}; restore it from its source"
        raise SlideFileError(text) from None
    except OSError:
        raise UnavailableError(
            f"slide {slide_id}: its file is not where it was when it was tiled, or may not be read; mount the archive "
            "there, or start the service with --archive"
        ) from None
    except Exception as error:  # noqa: BLE001 - the boundary: readers' words hold file names
        _open.cache_clear()  # A handle may be good for nothing after an error.
        known = "its reader refuses the file" if isinstance(error, TilerError) else type(error).__name__
        text = f"slide {slide_id}: tile {row} cannot be read ({known}); `slidegrad doctor` on the file says why"
        raise SlideFileError(text) from None


@functools.lru_cache(maxsize=_OPEN_SLIDES)
def _open(path: Path, backend: Any, _state: tuple[int, int]) -> "Slide":
    """The open slide; a file that was replaced meanwhile, told by its size and time, is opened anew."""
    from tiler import open_slide

    return open_slide(path, backend)


def _names() -> list[tuple[str, tuple[int, int, int]]]:
    """Name and colour of every value of the areas."""
    from manifests.schema import REASONS
    from tiler.preview.picture import REJECTED

    # An artefact is never labelled "tissue", the first of the reasons: its value is the tissue's own.
    return [("nothing", (0, 0, 0)), ("tissue", _TISSUE), *((reason, REJECTED[reason]) for reason in REASONS[1:])]


def _legend(areas: NDArray[np.uint8]) -> list[dict[str, Any]]:
    shares = np.bincount(areas.ravel(), minlength=len(_names())) / areas.size
    return [
        {"value": value, "name": name, "colour": f"#{bytes(colour).hex()}", "share": round(float(shares[value]), 6)}
        for value, (name, colour) in enumerate(_names())
        if value and shares[value]
    ]


def _halved(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    import cv2

    height, width = (-(-side // 2) for side in picture.shape[:2])
    return np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def _encode(picture: Image.Image, form: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, form, **options)
    return sink.getvalue()
