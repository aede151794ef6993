"""Compacted sets: the manifests of many slides in few files. How they lie on disk, and reading them.

A set is `catalog.parquet`, the catalogue with two columns more (shard, row group), and `shards/<hash>.parquet`, one row
group per slide that has tiles. A shard is named by its content and never changes: whoever holds an older catalogue
finds the older shards or none, never another slide's tiles. Written by `manifests.compact`.
"""

import bisect
import io
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manifests.errors import ManifestError
from manifests.folders import Folder
from manifests.parse import Parsed
from manifests.schema import CATALOG_SCHEMA, SCHEMA_VERSION, TILE_SCHEMA, Manifest, SlideRecord

SET_KEY = b"slidegrad_set"
"""The metadata key of `catalog.parquet` that makes a folder a set."""
SET_VERSION = 1
NOWHERE = -1
"""The row group of a slide without tiles."""
_PLACES = {"shard": pa.int32(), "row_group": pa.int32(), "tiler": pa.int32()}
_MAX_FOOTERS = 32
"""Footers of shards kept parsed, about 1 MB each."""
_TAIL_BYTES = 64 * 1024
"""What pyarrow reads of a file's end before it knows how long the footer is."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Parquet file of a set."""

    name: str
    """BLAKE2b-128 of its bytes, hex."""
    num_bytes: int
    footer_bytes: int
    """What has to be read at its end to find the row groups."""

    @property
    def file(self) -> str:
        """Where it lies in the set."""
        return f"shards/{self.name}.parquet"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What `catalog.parquet` of a set says in its metadata."""

    shards: tuple[Shard, ...]
    tilers: tuple[str, ...]
    """The tiler configs that occur, JSON; the column `tiler` counts into them."""

    def describe(self, table: pa.Table) -> pa.Table:
        """The table with these contents as its metadata."""
        members = {
            "set_version": SET_VERSION,
            "schema_version": SCHEMA_VERSION,
            "tilers": self.tilers,
            "shards": [asdict(shard) for shard in self.shards],
        }
        return table.replace_schema_metadata({SET_KEY: json.dumps(members, ensure_ascii=False)})

    @classmethod
    def of(cls, table: pa.Table, where: str) -> "Contents":
        """Reads them.

        Raises:
            ManifestError: written by a newer version.
        """
        text = table.schema.metadata[SET_KEY]
        try:
            members = json.loads(text)
            if members["set_version"] > SET_VERSION or members["schema_version"] > SCHEMA_VERSION:
                raise ManifestError(f"{where}: a set written by a newer Slidegrad; update this one, or compact anew")
            shards = tuple(Shard(**shard) for shard in members["shards"])
            return cls(shards=shards, tilers=tuple(members["tilers"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ManifestError(f"{where}: not the catalogue of a set ({type(error).__name__}: {error})") from None


class CompactedManifests:
    """A compacted set, in any kind of folder. Safe to use from many threads.

    Args:
        folder: the set.
        table: its `catalog.parquet`, whole.

    Raises:
        ManifestError: of another version.
    """

    def __init__(self, folder: Folder, table: pa.Table) -> None:
        where = f"{folder.where}/catalog.parquet"
        self.folder, self.contents = folder, Contents.of(table, where)
        self._catalog = complete_catalog(table, where)
        self._places = {name: table.column(name).to_numpy() for name in _PLACES}
        self._ids = self._catalog.column("slide_id").combine_chunks()
        self._footers: OrderedDict[int, pq.FileMetaData] = OrderedDict()
        self._lock = threading.Lock()

    def catalog(self) -> pa.Table:
        """The catalogue, without the places in the set."""
        return self._catalog

    def __getitem__(self, slide_id: str) -> Manifest:
        return self.read(slide_id).manifest

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids.to_pylist())

    def read(self, slide_id: str) -> Parsed:
        """A slide's manifest, and what else its file said."""
        row = find_row(self._ids, slide_id)
        if row is None:
            raise ManifestError(f"{self.folder.where}: no slide {slide_id} in this set")
        record = SlideRecord(**self._catalog.slice(row, 1).to_pylist()[0])
        shard, row_group, tiler = (int(self._places[name][row]) for name in _PLACES)
        table = TILE_SCHEMA.empty_table() if row_group == NOWHERE else self._tiles(slide_id, shard, row_group)
        return Parsed(Manifest.from_table(record, table), self.contents.tilers[tiler])

    def slides_of(self, shard: int) -> list[str]:
        """Ids of the slides whose tiles lie in shard number `shard`."""
        rows = np.flatnonzero((self._places["shard"] == shard) & (self._places["row_group"] != NOWHERE))
        ids: list[str] = self._ids.take(pa.array(rows)).to_pylist()
        return ids

    def _tiles(self, slide_id: str, shard: int, row_group: int) -> pa.Table:
        """One row group: one read of exactly its bytes."""
        try:
            footer = self._footer(shard)
            group = footer.row_group(row_group)
            columns = [group.column(i) for i in range(group.num_columns)]
            start = min(c.dictionary_page_offset or c.data_page_offset for c in columns)
            stop = start + sum(c.total_compressed_size for c in columns)
            part = _Part(self.folder.read_range(self.contents.shards[shard].file, start, stop), start)
            with pq.ParquetFile(part, metadata=footer, page_checksum_verification=True) as opened:
                return opened.read_row_group(row_group, use_threads=False)
        except FileNotFoundError:
            raise self._missing(shard) from None
        except (pa.ArrowException, OSError, IndexError) as error:
            file = self.contents.shards[shard].file
            raise ManifestError(f"{self.folder.where}: slide {slide_id} not readable in {file} ({error})") from None

    def _footer(self, number: int) -> pq.FileMetaData:
        with self._lock:
            if number in self._footers:
                self._footers.move_to_end(number)
                return self._footers[number]
        shard = self.contents.shards[number]
        start = max(0, shard.num_bytes - max(shard.footer_bytes, _TAIL_BYTES))
        footer = pq.read_metadata(_Part(self.folder.read_range(shard.file, start, shard.num_bytes), start))
        with self._lock:
            self._footers[number] = footer
            if len(self._footers) > _MAX_FOOTERS:
                self._footers.popitem(last=False)
        return footer

    def _missing(self, number: int) -> ManifestError:
        file = self.contents.shards[number].file
        return ManifestError(f"{self.folder.where}: {file} is missing; copy the whole set again, or compact anew")


def find_row(ids: pa.Array, slide_id: str) -> int | None:
    """Where `slide_id` is in `ids`, sorted; None where it is not."""
    row = bisect.bisect_left(range(len(ids)), slide_id, key=lambda i: ids[i].as_py())
    return row if row < len(ids) and ids[row].as_py() == slide_id else None


def complete_catalog(table: pa.Table, where: str) -> pa.Table:
    """A catalogue in today's schema: columns that an older version did not know get their defaults.

    Args:
        table: a catalogue, with or without further columns.
        where: its file, for errors.

    Raises:
        ManifestError: not a catalogue.
    """
    columns = []
    for field in CATALOG_SCHEMA:
        default: Any = getattr(SlideRecord, field.name, None)
        if field.name in table.column_names:
            columns.append(table.column(field.name))
        elif default is None:
            raise ManifestError(f"{where}: no column {field.name}; not a catalogue of manifests")
        else:
            columns.append(pa.repeat(pa.scalar(default, field.type), len(table)))
    try:
        return pa.Table.from_arrays(columns, names=CATALOG_SCHEMA.names).cast(CATALOG_SCHEMA)
    except (pa.ArrowException, ValueError) as error:
        raise ManifestError(f"{where}: not a catalogue of manifests ({error})") from None


class _Part(io.RawIOBase):
    """A file of which only the bytes from `start` are here; Parquet asks for no others."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data, self._start, self._at = memoryview(data), start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        end = self._start + len(self._data)
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: end}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        if len(buffer) and self._at < self._start:  # pyarrow reads 0 bytes at first, to see that they are bytes.
            raise OSError(f"byte {self._at} asked for, only those from {self._start} were read")
        part = self._data[self._at - self._start :][: len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)
