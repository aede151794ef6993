"""Finding slides in the catalogue: filters, orders, pages. Pure; knows no file and no HTTP.

Orders and filters are worked out once for a catalogue and kept: a further page of 100,000 slides costs a millisecond.
One thing to know before changing it: a cursor holds the last slide's place in the order, not its number, so that slides
which come and go between two pages neither repeat nor hide others.
"""

import base64
import json
import threading
import unicodedata
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from manifests.sets import find_row
from services.errors import BadQueryError

SortColumn = Literal[
    "slide_id", "status", "num_tiles", "num_bad_tiles", "num_rejected", "tissue_mm2", "mpp_x", "width_l0", "height_l0"
]
SORTS = tuple(f"{sign}{column}" for column in get_args(SortColumn) for sign in ("", "-"))
"""What `sort` may be; `-` is descending. Equals follow by slide_id."""
_MAX_KEPT = 64
"""Filters kept per catalogue, a byte a slide each."""
_FEW = 5_000
"""So many slides are ordered and filtered in a millisecond or two."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """Which slides, in which order."""

    status: str | None = None
    q: str = ""
    """Only slides whose id holds this text, whatever its case."""
    prefix: str = ""
    """Only slides whose id begins so."""
    labels: tuple[tuple[str, str], ...] = ()
    """Only slides with all of these (column, value)."""
    sort: str = "slide_id"

    @property
    def filter(self) -> "Search":
        """The same slides in no order."""
        return replace(self, sort="slide_id")


@dataclass(frozen=True, kw_only=True, eq=False)
class SlidePage:
    """One page of the slide list."""

    slides: pa.Table
    labels: pa.Table
    """Of the same slides, in the same order; no columns where the service has no labels."""
    num_matched: int
    """Slides that match, on all pages."""
    next_cursor: str | None
    """What to ask for the next page with; None at the end."""


class CatalogSearch:
    """Answers searches over one catalogue. Safe to use from many threads.

    Args:
        table: in `manifests.schema.CATALOG_SCHEMA`, sorted by slide_id.
        labels: see `services.labels.align_labels`.
    """

    def __init__(self, table: pa.Table, labels: pa.Table | None = None) -> None:
        self.table = table.combine_chunks()
        self.labels = pa.table({}) if labels is None else labels
        self._lock = threading.Lock()
        self._masks: OrderedDict[Search, NDArray[np.bool_]] = OrderedDict()
        self._orders: dict[str, NDArray[np.int32]] = {}
        self._keys: dict[str, NDArray[Any]] = {}

    @cached_property
    def ids(self) -> pa.Array:
        """Slide ids, sorted."""
        return self.table["slide_id"].combine_chunks()

    def page(self, search: Search, *, limit: int, cursor: str | None = None) -> SlidePage:
        """One page of what matches.

        Args:
            search: which slides.
            limit: slides per page.
            cursor: `next_cursor` of the page before.

        Raises:
            BadQueryError: a column that the labels do not have, or a cursor that is none of this order's.
        """
        matched = self._matched(search)
        start = 0 if cursor is None else self._place_after(matched, search.sort, cursor)
        rows = matched[start : start + limit]
        is_last = start + limit >= len(matched)
        return SlidePage(
            slides=self.table.take(rows),
            labels=self.labels.take(rows) if self.labels.num_columns else self.labels,
            num_matched=len(matched),
            next_cursor=None if is_last else self._cursor(search.sort, int(rows[-1])),
        )

    def labels_of(self, slide_id: str) -> dict[str, str]:
        """One slide's labels, those that are known."""
        row = find_row(self.ids, slide_id)
        return {} if row is None else labels_as_dicts(self.labels.slice(row, 1))[0]

    def is_quick(self, search: Search) -> bool:
        """Whether a page takes no more than a few milliseconds: there are few slides, or it was asked for before."""
        has_mask = search.filter == Search() or search.filter in self._masks
        return len(self.table) <= _FEW or (has_mask and search.sort in self._orders)

    def _matched(self, search: Search) -> NDArray[np.int32]:
        """Rows that match, in order."""
        if (order := self._orders.get(search.sort)) is None:
            order = self._orders[search.sort] = self._order(search.sort)
        if search.filter == Search():
            return order
        with self._lock:
            mask = self._masks.get(search.filter)
        if mask is None:
            mask = self._mask(search)
        with self._lock:
            self._masks[search.filter] = mask
            self._masks.move_to_end(search.filter)
            if len(self._masks) > _MAX_KEPT:
                self._masks.popitem(last=False)
        return order[mask[order]]

    def _mask(self, search: Search) -> NDArray[np.bool_]:
        """Which rows match."""
        masks = []
        if search.status is not None:
            masks.append(pc.equal(self.table["status"], search.status))
        if search.q:
            text = unicodedata.normalize("NFC", search.q)
            masks.append(pc.match_substring(self.ids, text, ignore_case=True))
        if search.prefix:
            masks.append(pc.starts_with(self.ids, unicodedata.normalize("NFC", search.prefix)))
        for column, value in search.labels:
            if column not in self.labels.column_names:
                known = ", ".join(self.labels.column_names) or "none"
                raise BadQueryError(f"label names no column of the labels; there are: {known}")
            masks.append(pc.fill_null(pc.equal(self.labels[column].cast(pa.string()), value), False))
        found: NDArray[np.bool_] = np.logical_and.reduce([np.asarray(mask) for mask in masks])
        return found

    def _order(self, sort: str) -> NDArray[np.int32]:
        """All rows in order; equals by slide_id, which is the order of the rows."""
        column, is_descending = sort.removeprefix("-"), sort.startswith("-")
        num_rows = len(self.table)
        if column == "slide_id":
            rows = np.arange(num_rows, dtype=np.int32)
            return rows[::-1] if is_descending else rows
        if column == "status":  # Three words: their order is that of few, not of 100,000 strings.
            encoded = self.table["status"].combine_chunks().dictionary_encode()
            values = np.argsort(np.argsort(encoded.dictionary.to_pylist()))[encoded.indices.to_numpy()]
        else:
            values = self._values(column)
        return np.argsort(-values if is_descending else values, kind="stable").astype(np.int32)

    def _values(self, column: str) -> NDArray[Any]:
        """What a column is sorted by; NaN, which is no place in an order, counts as below everything."""
        if column not in self._keys:
            values = np.asarray(self.table[column].to_numpy())
            if values.dtype.kind == "f":
                values = np.nan_to_num(values, nan=-np.finfo(np.float64).max)
            elif values.dtype.kind in "iu":
                values = values.astype(np.int64)
            self._keys[column] = values
        return self._keys[column]

    def _cursor(self, sort: str, row: int) -> str:
        column = sort.removeprefix("-")
        value = None if column == "slide_id" else self._values(column)[row]
        value = value.item() if isinstance(value, np.generic) else value
        text = json.dumps([sort, value, self.ids[row].as_py()], ensure_ascii=False)
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    def _place_after(self, matched: NDArray[np.int32], sort: str, cursor: str) -> int:
        """How many of `matched` come before, or at, the cursor's slide."""
        column, is_descending = sort.removeprefix("-"), sort.startswith("-")
        value, slide_id = _read_cursor(cursor, sort)
        low, high = 0, len(matched)
        while low < high:
            middle = (low + high) // 2
            row = int(matched[middle])
            here, its_id = (None if column == "slide_id" else self._values(column)[row]), self.ids[row].as_py()
            if column == "slide_id":
                is_after = its_id < slide_id if is_descending else its_id > slide_id
            elif here == value:
                is_after = its_id > slide_id
            else:
                is_after = bool(here < value) if is_descending else bool(here > value)
            low, high = (low, middle) if is_after else (middle + 1, high)
        return low


def labels_as_dicts(labels: pa.Table) -> list[dict[str, str]]:
    """One dict per slide, without what is unknown."""
    return [{name: cell for name, cell in row.items() if cell is not None} for row in labels.to_pylist()]


def _read_cursor(cursor: str, sort: str) -> tuple[Any, str]:
    """The last value and slide id of the page before."""
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        of_sort, value, slide_id = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise BadQueryError("cursor is none that this service gave; begin at the first page again") from None
    column = sort.removeprefix("-")
    if column == "slide_id":
        is_good = value is None
    elif column == "status":
        is_good = isinstance(value, str)
    else:
        is_good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    if of_sort != sort or not is_good or not isinstance(slide_id, str):
        raise BadQueryError("cursor belongs to another order; begin at the first page again, or keep sort as it was")
    return value, slide_id
