"""Big CSV files with the tiles of many slides, written and read slide by slide without holding the whole."""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc

from manifests.errors import ManifestError

_SPECIAL = set(',"\r\n')
_PARSE = pc.ParseOptions(newlines_in_values=True)


def csv_line(*values: object) -> str:
    """One line, with its end; quoted where it must be, by RFC 4180.

    Python's writer leaves a lone carriage return unquoted where lines end with a line feed, and no reader takes that.
    """
    fields = map(str, values)
    return ",".join(f'"{f.replace(chr(34), chr(34) * 2)}"' if set(f) & _SPECIAL else f for f in fields) + "\n"


def csv_columns(file: Path) -> list[str]:
    """The names in the first line.

    Raises:
        ManifestError: no such file, or no CSV.
    """
    with readable(file), pc.open_csv(file, parse_options=_PARSE) as reader:
        return list(reader.schema.names)


def read_groups(file: Path, key: str, columns: Mapping[str, pa.DataType]) -> Iterator[tuple[str, pa.Table]]:
    """The rows of each slide, as soon as they are complete.

    The file is read twice: first it is counted how many rows a slide has. Where the rows of a slide lie together, as
    all tools write them, one slide is in memory at a time; where they are mixed, the slides that are not complete.

    Args:
        file: a CSV with a header.
        key: the column that names the slide; text, whatever it looks like.
        columns: the other columns wanted.

    Raises:
        ManifestError: no such file, not a CSV, a column missing, or a value of another type.
    """
    if missing := sorted({key, *columns} - set(csv_columns(file))):
        raise ManifestError(f"{file.name}: no column {', '.join(missing)}; expected {key}, {', '.join(columns)}")
    counts: Counter[str] = Counter()
    for batch in _batches(file, {key: pa.string()}):
        for entry in batch.column(key).value_counts().to_pylist():
            counts[entry["values"]] += entry["counts"]
    pending: defaultdict[str, list[pa.RecordBatch]] = defaultdict(list)
    for batch in _batches(file, {key: pa.string(), **columns}):
        for name, rows in _split(batch, key):
            pending[name].append(rows)
            counts[name] -= len(rows)
            if not counts[name]:
                yield name, pa.Table.from_batches(pending.pop(name))


def _split(batch: pa.RecordBatch, key: str) -> Iterator[tuple[str, pa.RecordBatch]]:
    encoded = batch.column(key).dictionary_encode()
    codes = encoded.indices.to_numpy()
    for code, name in enumerate(encoded.dictionary.to_pylist()):
        yield name, batch.take(pa.array(np.flatnonzero(codes == code))).drop_columns(key)


def _batches(file: Path, columns: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    convert = pc.ConvertOptions(column_types=dict(columns), include_columns=list(columns))
    with readable(file), pc.open_csv(file, parse_options=_PARSE, convert_options=convert) as reader:
        yield from reader


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turns what goes wrong with a CSV into a ManifestError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise ManifestError(f"{file.name}: no such file") from None
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"{file.name}: not readable as CSV ({' '.join(str(error).split())})") from None
