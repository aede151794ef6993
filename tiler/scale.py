"""A slide's true scale: microns per level-0 px, and where the number came from. Never snapped to 20x or 40x."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tifffile

from tiler.errors import TilerError

_MAX_MPP = 100.0
_CONFLICT = 0.02
_UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0}
"""TIFF ResolutionUnit: 2 is inch, 3 is centimetre."""


@dataclass(frozen=True)
class MppReading:
    """What a slide says of its scale.

    `mpp` is (x, y) or None; `source` vendor | tiff | ""; `tried` names the fields looked at; `conflict` is set where
    vendor field and TIFF resolution disagree by more than 2 %.
    """

    mpp: tuple[float, float] | None
    source: str
    tried: str
    conflict: bool = False


def read_mpp(path: Path, vendor: str, properties: Mapping[str, str]) -> MppReading:
    """Looks for the scale in OpenSlide's properties, then in the TIFF resolution.

    An absurd value (not a number, not in (0, 100]) counts as none, and is named in `tried` with the value.
    """
    tried: list[str] = []
    field = "MPP" if vendor == "aperio" else "openslide.mpp-x"
    # For TIFF files without a vendor OpenSlide computes its mpp from the resolution tags: then that is the source.
    source = "tiff" if vendor == "generic-tiff" else "vendor"
    from_vendor = _sane(properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y"), field, tried)
    from_tiff = _sane(*_tiff_mpp(path), "XResolution", tried)
    conflict = (
        from_vendor is not None
        and from_tiff is not None
        and any(abs(a / b - 1) > _CONFLICT for a, b in zip(from_vendor, from_tiff, strict=True))
    )
    if from_vendor is not None:
        return MppReading(from_vendor, source, ", ".join(tried), conflict)
    if from_tiff is not None:
        return MppReading(from_tiff, "tiff", ", ".join(tried))
    return MppReading(None, "", ", ".join(tried))


def resolve_mpp(
    slide_id: str, vendor: str, reading: MppReading, csv_mpp: tuple[float, float] | None, default: float | None
) -> tuple[tuple[float, float], str]:
    """The scale to use and its source (vendor | tiff | csv | default), in that order.

    Raises:
        TilerError: nobody knows it; says what was tried.
    """
    if reading.mpp is not None:
        return reading.mpp, reading.source
    if csv_mpp is not None:
        return csv_mpp, "csv"
    if default is not None:
        return (default, default), "default"
    raise TilerError(
        f"slide {slide_id}: no microns-per-pixel ({vendor or 'unknown vendor'}; {reading.tried} tried); "
        "give --default-mpp or --mpp-csv"
    )


def _sane(x: str | float | None, y: str | float | None, name: str, tried: list[str]) -> tuple[float, float] | None:
    tried.append(name)
    if x is None or y is None:
        return None
    try:
        values = float(x), float(y)
    except ValueError:
        values = (math.nan, math.nan)
    if all(math.isfinite(v) and 0 < v <= _MAX_MPP for v in values):
        return values
    tried[-1] = f"{name} = {x} is absurd"
    return None


def _tiff_mpp(path: Path) -> tuple[float | None, float | None]:
    """Microns per px by the TIFF resolution tags of the first page, where they state a length."""
    try:
        with tifffile.TiffFile(path) as tiff:
            tags = tiff.pages.first.tags
            unit = _UM_PER_UNIT.get(int(tags["ResolutionUnit"].value))
            (xn, xd), (yn, yd) = tags["XResolution"].value, tags["YResolution"].value
    except (tifffile.TiffFileError, KeyError, ValueError, OSError, TypeError):
        return None, None
    if unit is None or 0 in (xn, xd, yn, yd):
        return None, None
    if (xn / xd, yn / yd) in ((72.0, 72.0), (96.0, 96.0), (1.0, 1.0)):
        return None, None  # A screen's resolution or a writer's placeholder, not a scanner's.
    return unit * xd / xn, unit * yd / yn


def read_mpp_csv(path: Path) -> dict[str, tuple[float, float]]:
    """slide_id to mpp (x, y) from a CSV with the columns slide_id, mpp.

    Raises:
        TilerError: no such file, missing columns, or an absurd value.
    """
    import csv

    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except OSError as error:
        raise TilerError(f"--mpp-csv {path}: {error.strerror}") from None
    except csv.Error as error:
        raise TilerError(f"--mpp-csv {path}: not readable as CSV ({error})") from None
    except UnicodeDecodeError:
        raise TilerError(f"--mpp-csv {path}: not UTF-8; save it as UTF-8") from None
    if not rows or not {"slide_id", "mpp"} <= set(rows[0]):
        raise TilerError(f"--mpp-csv {path}: expected the columns slide_id, mpp and at least one row")
    out: dict[str, tuple[float, float]] = {}
    for row in rows:
        good = _sane(row["mpp"], row["mpp"], "mpp", [])
        if good is None:
            raise TilerError(f"--mpp-csv {path}: slide {row['slide_id']} has mpp {row['mpp']!r}, expected (0, 100]")
        out[row["slide_id"]] = good
    return out
