"""The page about an archive: one HTML file that loads nothing but the pictures beside it.

Numbers are prepared here, layout and the table's script are in `page.html`. One thing to know before changing it:
slide ids, vendors and errors come from files of strangers. The template escapes them, the table's data travels as JSON
made safe for a script tag, and a content security policy runs no script but the page's own.
"""

import base64
import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa

from manifests.files import write_text
from manifests.schema import REASONS
from tiler.preview.album import State, picture_path
from tiler.preview.histogram import tile_histogram
from tiler.preview.picture import KEPT, NAMES, REJECTED
from tiler.version import VERSION

_MAX_GROUPS, _MAX_LISTED = 100, 200

CODES = ("status", "vendor", "backend", "picture")
"""Columns with few different values: sent as those and a number per row."""


@dataclass(frozen=True)
class Column:
    """A column of the slides table; `digits` after the point, None for text."""

    key: str
    title: str
    digits: int | None
    about: str = ""


COLUMNS = (
    Column("slide_id", "Slide", None),
    Column("status", "Status", None),
    Column("num_tiles", "Tiles", 0),
    *(Column(f"rejected_{r}", NAMES[r], 0, f"places of the grid left out: {NAMES[r]}") for r in REASONS),
    Column("num_bad_tiles", "Bad tiles", 0, "left out because their bytes are damaged"),
    Column("tissue_mm2", "Tissue mm²", 2),
    Column("mpp_x", "µm/px", 3, "microns per level-0 px, across"),
    Column("vendor", "Vendor", None),
    Column("backend", "Reader", None),
    Column("level", "Level", 0, "the level of the pyramid that tiles are read from"),
)


def write_page(file: Path, catalog: pa.Table, state: Mapping[str, State]) -> None:
    """Writes the page.

    Args:
        file: where to; pictures lie in `pictures/` beside it.
        catalog: every slide, in `CATALOG_SCHEMA`.
        state: what became of each slide's picture.
    """
    rows: dict[str, list[Any]] = {name: catalog.column(name).to_pylist() for name in catalog.column_names}
    statuses = Counter(rows["status"])
    num_tiles = sum(rows["num_tiles"])
    rejected = {reason: sum(rows[f"rejected_{reason}"]) for reason in REASONS}
    usable = [n for n, status in zip(rows["num_tiles"], rows["status"], strict=True) if status != "failed"]
    context = {
        "version": VERSION,
        "made": datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        "num_slides": catalog.num_rows,
        "statuses": {status: statuses[status] for status in ("ok", "empty", "failed")},
        "num_tiles": num_tiles,
        "tissue_mm2": sum(rows["tissue_mm2"]),
        "pictures": Counter(state.values()),
        "places": _places(num_tiles, sum(rows["num_bad_tiles"]), rejected),
        "histogram": tile_histogram(usable),
        "num_without": usable.count(0),
        "scales": _scales(rows),
        "checks": _checks(rows),
        "failures": _failures(rows["slide_id"], rows["error"], rows["status"]),
        "max_groups": _MAX_GROUPS,
        "max_listed": _MAX_LISTED,
        "columns": COLUMNS,
        "num_reasons": len(REASONS),
        "data": _table_data(rows, state),
    }
    write_text(file, _environment().get_template("page.html").render(context))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, csp_hash=_csp_hash)
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False,
        "separators": (",", ":"),
        "allow_nan": False,  # A NaN would be no JSON, and the page would stay empty.
    }
    return environment


def _number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}"


def _csp_hash(script: str) -> str:
    """The hash by which a content security policy knows an inline script (W3C, CSP level 2)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _places(num_tiles: int, num_bad: int, rejected: Mapping[str, int]) -> list[dict[str, Any]]:
    """What became of the places of all grids: name, number, share in %, colour as in the pictures."""
    found = [("kept", num_tiles, _hex(KEPT)), ("damaged", num_bad, "#000000")]
    found += [(NAMES[reason], num, _hex(REJECTED[reason])) for reason, num in rejected.items()]
    total = max(1, sum(num for _, num, _ in found))
    return [{"name": name, "num": num, "share": 100 * num / total, "colour": colour} for name, num, colour in found]


def _scales(rows: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Slides by vendor, reader and mpp (3 digits), the most frequent first; failed slides are in none."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, status in enumerate(rows["status"]):
        if status != "failed":
            x, y = (f"{_finite(rows[name][i]):.3f}" for name in ("mpp_x", "mpp_y"))
            mpp = x if x == y else f"{x} × {y}"
            groups[rows["vendor"][i], rows["backend"][i], mpp, rows["mpp_source"][i]].append(i)
    found = []
    for (vendor, backend, mpp, source), members in groups.items():
        conflicts = [i for i in members if rows["mpp_conflict"][i]]
        others = Counter(f"{_finite(rows['mpp_other'][i]):.3f}" for i in conflicts if rows["mpp_other"][i])
        about = {"vendor": vendor, "backend": backend, "mpp": mpp, "source": source, "num": len(members)}
        found.append({**about, "conflicts": len(conflicts), "others": [value for value, _ in others.most_common(3)]})
    return sorted(found, key=lambda group: (-group["num"], group["vendor"], group["mpp"]))


def _checks(rows: Mapping[str, Sequence[Any]]) -> list[tuple[str, int]]:
    """How slides were looked at for damage, the most frequent first; failed slides are in none."""
    pairs = zip(rows["check"], rows["status"], strict=True)
    return Counter(check for check, status in pairs if status != "failed").most_common()


def _failures(slide_ids: Sequence[str], errors: Sequence[str], status: Sequence[str]) -> list[dict[str, Any]]:
    """Failed slides by reason, the most frequent first. Reasons that differ in numbers alone are one, with N there."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for slide_id, error, outcome in zip(slide_ids, errors, status, strict=True):
        if outcome == "failed":
            reason = error.removeprefix(f"slide {slide_id}: ") or "no reason kept"
            groups[re.sub(r"\d+(?:[.,]\d+)*", "N", reason)].append((slide_id, reason))
    found = []
    for pattern, slides in groups.items():
        is_one = len({reason for _, reason in slides}) == 1
        found.append({"reason": slides[0][1] if is_one else pattern, "is_one": is_one, "slides": slides})
    return sorted(found, key=lambda group: -len(group["slides"]))


def _table_data(rows: Mapping[str, Sequence[Any]], state: Mapping[str, State]) -> dict[str, Any]:
    """The slides table, column by column; numbers rounded to what is shown: 100,000 slides are 7 MB."""
    slide_ids = rows["slide_id"]
    columns: dict[str, Any] = {column.key: rows[column.key] for column in COLUMNS if column.key not in CODES}
    for column in COLUMNS:
        if column.digits:
            columns[column.key] = [round(_finite(value), column.digits) for value in rows[column.key]]
    states = [state[slide_id] for slide_id in slide_ids]
    codes = {name: _encoded(states if name == "picture" else rows[name]) for name in CODES}
    files = {i: picture_path(Path(), s).name for i, s in enumerate(slide_ids) if states[i] == "drawn"}
    errors = {i: error for i, error in enumerate(rows["error"]) if error}
    return {"num": len(slide_ids), "columns": columns, "codes": codes, "files": files, "errors": errors}


def _encoded(values: Sequence[str]) -> dict[str, Any]:
    """Distinct values, sorted, and for each row which one it is: sorting by the number sorts by the value."""
    names = sorted(set(values))
    place = {name: i for i, name in enumerate(names)}
    return {"names": names, "rows": [place[value] for value in values]}


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
