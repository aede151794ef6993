"""What this machine, and one slide, can and cannot do; every finding is a fact a user can act on."""

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import numpy as np

from tiler.slide import Slide, open_slide
from tiler.version import VERSION

_OURS = ("manifests", "tiler", "trainer", "services")


def examine_machine() -> dict[str, Any]:
    """Versions, readers, devices; `problems` lists what will not work, each with the way out."""
    problems = find_shadows()
    if importlib.util.find_spec("cucim") is None:
        problems.append(
            "cucim is not installed: OpenSlide reads all slides, several times slower; pip install 'slidegrad[cu13]'"
        )
    both = [name for name in ("cucim-cu12", "cucim-cu13") if _version(name)]
    if len(both) == 2:
        problems.append("cucim-cu12 and cucim-cu13 are both installed and overwrite each other; uninstall one")
    return {
        "slidegrad": VERSION,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": _version("torch"),
        "gpus": _gpus(),
        "cucim": _version("cucim-cu13") or _version("cucim-cu12"),
        "openslide": _version("openslide-python"),
        "problems": problems,
    }


def find_shadows() -> list[str]:
    """Sentences on our import packages that another distribution also provides, or that Python finds elsewhere."""
    sentences = []
    owners = packages_distributions()
    for package in _OURS:
        others = sorted(set(owners.get(package, [])) - {"slidegrad"})
        if others:
            sentences.append(f"package {package!r} is also installed by {', '.join(others)}; pip uninstall {others[0]}")
        spec = importlib.util.find_spec(package)
        home = Path(__file__).resolve().parent.parent
        if spec is None or spec.origin is None or Path(spec.origin).resolve().parent.parent != home:
            found = spec.origin if spec else None
            sentences.append(
                f"package {package!r} is found at {found}, not beside the tiler in {home}; mend PYTHONPATH"
            )
    return sentences


def examine_slide(path: Path) -> dict[str, Any]:
    """What the readers see in a slide, and whether they see the same pixels.

    Returns:
        backend, vendor, size, levels, mpp and its source, and `parity`: mean absolute grey-level difference between
        cuCIM and OpenSlide over sampled tiles per level, where both can read it.
    """
    slide = open_slide(path)
    return {
        "backend": slide.backend,
        "vendor": slide.vendor,
        "size_l0": slide.size_l0,
        "levels": [(level.width, level.height, round(level.downsample, 4)) for level in slide.levels],
        "mpp": slide.mpp,
        "mpp_source": slide.mpp_source or f"none ({slide.scale.tried} tried)",
        "parity": _parity(slide, open_slide(path, "openslide")) if slide.backend == "cucim" else None,
    }


def _parity(slide: Slide, other: Slide, num_tiles: int = 16, side_px: int = 224) -> list[float]:
    rng = np.random.default_rng(0)
    differences = []
    for index, level in enumerate(slide.levels):
        side, count = side_px, num_tiles
        if not other.is_exact(index):  # OpenSlide interpolates everywhere but at the origin: compare there.
            side, count = 2 * side_px, 1
        errors = []
        for i in range(count):
            x, y = (int(rng.integers(0, max(1, extent - side + 1))) for extent in (level.width, level.height))
            x_l0, y_l0 = (0, 0) if i == 0 else (round(x * level.downsample), round(y * level.downsample))
            ours = slide.read(x_l0, y_l0, index, side, side).astype(int)
            errors.append(float(np.abs(ours - other.read(x_l0, y_l0, index, side, side)).mean()))
        differences.append(round(float(np.mean(errors)), 3))
    return differences


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    """Names of the NVIDIA devices, by the driver's own list: torch is not imported for this."""
    root = Path("/proc/driver/nvidia/gpus")
    if not root.is_dir():
        return []
    lines = [line for info in sorted(root.glob("*/information")) for line in info.read_text().splitlines()]
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
