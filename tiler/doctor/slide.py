"""What each reader sees in a slide, and whether they see the same pixels."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from manifests.geometry import level_to_l0
from tiler.config import Backend
from tiler.errors import ReadError, TilerError
from tiler.guard import guarded
from tiler.outcome import hide_paths
from tiler.slide import Slide, open_slide
from tiler.tiff import read_tiff

_MAX_DIFFERENCE = 3.0
"""Grey levels; decoders of one JPEG or JPEG 2000 tile differ by less than 1 on average, wrong pixels by tens."""


def examine_slide(path: Path, default_mpp: float | None = None) -> dict[str, Any]:
    """What the readers see in a slide, and whether they see the same pixels.

    Args:
        path: the slide.
        default_mpp: microns per level-0 px, as the user knows them: that the slide does not say is then no problem.

    Returns:
        backend and why it is the one, vendor, sizes in px (levels as width, height, downsample), tile (width, height)
        and compression of level 0, the scale and its source, and the x of another field that disagrees, microns per
        level-0 px, None where none does; `readers`: "opens" or why not; `parity`: for each pair of
        readers the mean absolute difference in grey levels over sampled tiles, one number for each level that both
        have and can read, None for the others; `problems`, each with the way out.

    Raises:
        TilerError: it cannot be opened.
    """
    slide = open_slide(path)
    opened, readers = _open_with_all(path)
    with guarded():  # What cuCIM prints of damage says less than OpenSlide's errors do.
        parity, unreadable = _compare_all(opened)
    return {
        "backend": slide.backend,
        "why": slide.why,
        "vendor": slide.vendor,
        "size_l0": slide.size_l0,
        "levels": [(level.width, level.height, round(level.downsample, 4)) for level in slide.levels],
        "file_tile": (slide.levels[0].tile_w, slide.levels[0].tile_h),
        "compression": _compression(slide),
        "mpp": slide.mpp,
        "mpp_source": slide.mpp_source or f"none ({slide.scale.tried} tried)",
        "mpp_other": slide.scale.other or None,
        "readers": readers,
        "parity": parity,
        "problems": [*_scale_problems(slide, default_mpp), *_parity_problems(parity), *_damage_problems(unreadable)],
    }


def _open_with_all(path: Path) -> tuple[dict[str, Slide], dict[str, str]]:
    """The slide by every reader that opens it, and of each reader "opens" or why not."""
    opened, told = {}, {}
    for name in get_args(Backend):
        if name == "auto" or (name == "zarr") != path.is_dir():
            continue
        try:
            opened[name] = open_slide(path, name)
            told[name] = "opens"
        except TilerError as error:
            told[name] = str(error).removeprefix(f"{path.name}: ")
    return opened, told


def _compare_all(opened: Mapping[str, Slide]) -> tuple[dict[str, list[float | None]], list[str]]:
    """For each pair of readers the difference at each level, and why some could not be read."""
    parity: dict[str, list[float | None]] = {}
    unreadable = []
    for a, b in itertools.combinations(opened, 2):
        parity[f"{a}-{b}"] = differences = []
        for level in range(len(opened[a].levels)):
            try:
                differences.append(_find_difference(opened[a], opened[b], level))
            except ReadError as error:
                differences.append(None)
                unreadable.append(hide_paths(str(error), opened[a].path.stem, opened[a].path))
    return parity, unreadable


def _compression(slide: Slide) -> str:
    """Of level 0, by the TIFF's tag; "" where the file is no TIFF."""
    tiff = read_tiff(slide.path)
    page = tiff.find_page(slide.size_l0) or tiff.pages[0] if tiff is not None else None
    return page.compression_name if page is not None else ""


def _scale_problems(slide: Slide, default_mpp: float | None) -> list[str]:
    absurd = [field for field in slide.scale.tried.split(", ") if field.endswith(" is absurd")]
    sentences = [f"scale: {field}; check the slide, or give `slidegrad tile` --mpp-csv" for field in absurd]
    if slide.mpp is None and default_mpp is None:
        sentences.append(
            "the slide does not say its scale; give --default-mpp or --mpp-csv to `slidegrad tile`, and --default-mpp "
            "to `slidegrad doctor`"
        )
    if slide.mpp is not None and slide.scale.other:
        sentences.append(
            f"scale: {slide.mpp_source} says {slide.mpp[0]:.4g} mpp, another field {slide.scale.other:.4g}; "
            "the first is used; measure one cell if in doubt"
        )
    return sentences


def _parity_problems(parity: Mapping[str, Sequence[float | None]]) -> list[str]:
    return [
        f"{pair} differ by {difference:.1f} grey levels at level {level}, expected at most {_MAX_DIFFERENCE:g}: one of "
        "them shows a wrong picture; compare them by eye and force the right one with `slidegrad tile` --backend"
        for pair, differences in parity.items()
        for level, difference in enumerate(differences)
        if difference is not None and difference > _MAX_DIFFERENCE
    ]


def _damage_problems(unreadable: Sequence[str]) -> list[str]:
    return [f"it cannot be read everywhere ({why}); restore it from its source" for why in unreadable[:1]]


def _find_difference(a: Slide, b: Slide, index: int, num_tiles: int = 16, side_px: int = 224) -> float | None:
    """Mean absolute difference, grey levels, over sampled tiles of a level; None where the other has no such level."""
    level = a.levels[index]
    sizes = [(other.width, other.height) for other in b.levels]
    if (level.width, level.height) not in sizes:
        return None
    places = ((a, index), (b, sizes.index((level.width, level.height))))
    side, count = side_px, num_tiles
    if not all(slide.is_exact(at) for slide, at in places):  # It interpolates everywhere but at the origin.
        side, count = 2 * side_px, 1
    rng = np.random.default_rng(0)
    errors = []
    for i in range(count):
        corner = [0 if i == 0 else int(rng.integers(0, max(1, n - side + 1))) for n in (level.width, level.height)]
        first, second = (_read_at(slide, at, corner, side).astype(int) for slide, at in places)
        errors.append(float(np.abs(first - second).mean()))
    return round(float(np.mean(errors)), 3)


def _read_at(slide: Slide, index: int, corner: list[int], side: int) -> NDArray[np.uint8]:
    """A square whose corner is in px of the level, by the reader's own downsample: they differ in the last digits."""
    down = slide.levels[index].downsample
    x_l0, y_l0 = level_to_l0(np.array(corner), down) if any(corner) else (0, 0)
    return slide.read(int(x_l0), int(y_l0), index, side, side)
