"""`labels.csv` beside the catalogue: what slides can be filtered by. Never who they belong to.

The columns `patient_id` and `specimen_id` are not kept, whatever their case, nor is one whose cells look like paths.
"""

import csv
import logging
from collections.abc import Container
from pathlib import Path

import pyarrow as pa

from manifests.privacy import without_paths
from services.errors import ServiceError

_log = logging.getLogger(__name__)
_NEVER = frozenset({"patient_id", "specimen_id"})

Labels = dict[str, dict[str, str]]
"""Column to slide id, as the file has it, to cell; empty cells are left out."""


def read_labels(file: Path) -> Labels:
    """Reads the columns that may be served.

    Raises:
        ServiceError: not readable as CSV, without the column slide_id, or a slide listed twice.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = [{k.strip(): (v or "").strip() for k, v in row.items() if k} for row in csv.DictReader(stream)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ServiceError(f"--labels {file}: not readable as CSV ({error})") from None
    rows = [row for row in rows if row.get("slide_id")]
    if not rows:
        raise ServiceError(f"--labels {file}: expected the column slide_id and at least one row")
    names = [row["slide_id"] for row in rows]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ServiceError(f"--labels {file}: slide {twice} is listed twice; keep one row per slide")
    columns = [name for name in rows[0] if name != "slide_id" and name.lower() not in _NEVER]
    found = {column: {row["slide_id"]: row[column] for row in rows if row.get(column)} for column in columns}
    for column in columns:
        if any(without_paths(cell) != cell for cell in set(found[column].values())):
            _log.warning("the labels' column %s holds paths and is not served", column)
            del found[column]
    return found


def align_labels(labels: Labels, slide_ids: list[str]) -> pa.Table:
    """One row per slide, in the order of `slide_ids`, one dictionary-encoded column per label, null where unknown."""
    known = set(slide_ids)
    columns = {}
    for column, cells in labels.items():
        by_id = {_match(name, known): cell for name, cell in cells.items()}
        columns[column] = pa.array([by_id.get(slide_id) for slide_id in slide_ids], pa.string()).dictionary_encode()
    return pa.table(columns)


def _match(name: str, known: Container[str]) -> str:
    """A slide's id from what the labels call it, which may be its file: up to two suffixes are dropped."""
    stem = name
    for _ in range(2):
        if stem in known:
            return stem
        stem = stem.rpartition(".")[0]
    return stem if stem in known else name
