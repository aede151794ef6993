"""A slide's true scale: microns per level-0 px, and where the number came from. Never snapped to 20x or 40x."""

import csv
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tiler.errors import TilerError

_MAX_MPP = 100.0
_ABSURD = " is absurd"
_CONFLICT = 0.02


@dataclass(frozen=True)
class MppReading:
    """What a slide says of its scale.

    `mpp` is (x, y) or None; `source` vendor | tiff | ""; `tried` names the fields looked at; `conflict` is set where
    vendor field and TIFF resolution disagree by more than 2 %, and `other` is then the x of the one not taken, else 0.
    """

    mpp: tuple[float, float] | None
    source: str
    tried: str
    conflict: bool = False
    other: float = 0.0


@dataclass(frozen=True)
class Stated:
    """A field of a file that states microns per px, (x, y) as written there, None where it does not."""

    field: str
    mpp: tuple[str | float, str | float] | None
    source: str = "vendor"


def vendor_field(vendor: str, properties: Mapping[str, str], *, is_tiff: bool) -> Stated:
    """The scale among OpenSlide's properties.

    Args:
        vendor: as OpenSlide names it.
        properties: OpenSlide's.
        is_tiff: the file is a TIFF: for some vendors OpenSlide then reads the resolution tags, and they are the source.
    """
    x, y = properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y")
    if vendor == "aperio":  # OpenSlide passes over what is no number: look at the field itself.
        x = y = x or properties.get("aperio.MPP")
    from_tags = vendor in ("generic-tiff", "leica") or (vendor == "hamamatsu" and is_tiff)
    mpp = None if x is None or y is None else (x, y)
    return Stated("MPP" if vendor == "aperio" else "openslide.mpp-x", mpp, "tiff" if from_tags else "vendor")


def read_mpp(first: Stated | None, second: Stated | None = None) -> MppReading:
    """The scale from a vendor's field, else from the TIFF resolution.

    An absurd value (not a number, not in (0, 100]) counts as none, is named in `tried` with the value, and is a
    conflict with whatever is used instead.

    Args:
        first: the vendor's field, None where the format has none.
        second: the resolution tags of level 0, None where the file is no TIFF.
    """
    tried: list[str] = []
    readings = [(stated, mpp) for stated in (first, second) if stated and (mpp := _sane(stated, tried))]
    is_absurd = any(text.endswith(_ABSURD) for text in tried)
    if not readings:
        return MppReading(None, "", ", ".join(tried), is_absurd)
    (stated, mpp), *others = readings
    # Where both are the same tags there is no second source.
    other = others[0][1] if others and others[0][0].source != stated.source else mpp
    conflict = any(abs(a / b - 1) > _CONFLICT for a, b in zip(mpp, other, strict=True))
    return MppReading(mpp, stated.source, ", ".join(tried), conflict or is_absurd, other[0] if conflict else 0.0)


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


def _sane(stated: Stated, tried: list[str]) -> tuple[float, float] | None:
    """What a field states, as numbers, if it can be a scale; its name, and an absurd value, are added to `tried`."""
    tried.append(stated.field)
    if stated.mpp is None:
        return None
    for value in stated.mpp:
        try:
            is_sane = 0 < float(value) <= _MAX_MPP
        except ValueError:
            is_sane = False
        if not is_sane:
            tried[-1] = f"{stated.field} = {value}{_ABSURD}"
            return None
    return float(stated.mpp[0]), float(stated.mpp[1])


def read_mpp_csv(path: Path) -> dict[str, tuple[float, float]]:
    """slide_id to mpp (x, y) from a CSV with the columns slide_id, mpp or slide_id, mpp_x, mpp_y.

    Ids are taken without white space around them and in NFC, as slide ids are.

    Raises:
        TilerError: no such file, missing columns, a row without an id, a slide named twice, or an absurd value.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except OSError as error:
        raise TilerError(f"--mpp-csv {path}: {error.strerror}") from None
    except csv.Error as error:
        raise TilerError(f"--mpp-csv {path}: not readable as CSV ({error})") from None
    except UnicodeDecodeError:
        raise TilerError(f"--mpp-csv {path}: not UTF-8; save it as UTF-8") from None
    found = set(rows[0]) if rows else set()
    columns = ("mpp", "mpp") if "mpp" in found else ("mpp_x", "mpp_y")
    if not {"slide_id", *columns} <= found:
        raise TilerError(
            f"--mpp-csv {path}: expected the columns slide_id, mpp (or slide_id, mpp_x, mpp_y) and at least one row"
        )
    out: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(rows, 1):
        slide_id = unicodedata.normalize("NFC", (row["slide_id"] or "").strip())
        if not slide_id:
            raise TilerError(f"--mpp-csv {path}: row {number} has no slide_id")
        x, y = (row[column] or "" for column in columns)
        good = _sane(Stated("mpp", (x, y)), [])
        if good is None:
            value = x if columns[0] == columns[1] else f"{x}, {y}"
            raise TilerError(f"--mpp-csv {path}: slide {slide_id} has mpp {value!r}, expected (0, 100]")
        if out.setdefault(slide_id, good) != good:
            raise TilerError(f"--mpp-csv {path}: slide {slide_id} stands there twice, with {out[slide_id]} and {good}")
    return out
