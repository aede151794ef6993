"""From a file's bytes to what it holds, or to the sentence that says it is damaged.

Pure; knows no file. Parquet's page checksums cover the columns, not the metadata in the footer, where the record is.
But pyarrow writes that metadata twice, as it is and inside the Arrow schema: where the two differ, one was changed.
"""

import base64
import json
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.errors import ManifestError
from manifests.schema import TILE_SCHEMA, Manifest, SlideRecord

METADATA_KEY = b"slidegrad"
_ARROW_KEY = b"ARROW:schema"
_MEMBERS = {"schema_version", "slide", "tiler"}


@dataclass(frozen=True, eq=False)
class Parsed:
    """A manifest and, as JSON with sorted keys, the tiler's config it was made with."""

    manifest: Manifest
    tiler_json: str


def parse_manifest(data: bytes | pa.Buffer, where: str) -> Parsed:
    """Reads one manifest out of its file's bytes.

    Args:
        data: the whole file.
        where: its name, for errors.

    Raises:
        ManifestError: torn, damaged, or of another schema.
    """
    table = parse_table(data, where)
    if not table.schema.remove_metadata().equals(TILE_SCHEMA):
        raise ManifestError(f"{where}: columns {table.schema.names}, expected {TILE_SCHEMA.names}")
    text = (table.schema.metadata or {}).get(METADATA_KEY, b"")
    manifest = Manifest.from_table(SlideRecord.from_json(text, where), table)
    members = json.loads(text)
    if unknown := set(members) - _MEMBERS:
        raise ManifestError(f"{where}: unknown members {sorted(unknown)} in its metadata; tile the slide again")
    return Parsed(manifest, json.dumps(members.get("tiler", {}), sort_keys=True, ensure_ascii=False))


def parse_table(data: bytes | pa.Buffer, where: str) -> pa.Table:
    """Reads a whole Parquet file out of its bytes, checksums and both copies of the metadata compared.

    Raises:
        ManifestError: torn or damaged.
    """
    try:
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as opened:
            table, plain = opened.read(), opened.metadata.metadata or {}
        _ = table.schema.names  # A damaged name cannot be decoded.
        if _ARROW_KEY in plain:  # Other writers than pyarrow leave it out.
            copy = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(plain.pop(_ARROW_KEY), validate=True)))
            if (copy.metadata or {}) != plain or not copy.remove_metadata().equals(table.schema.remove_metadata()):
                raise ManifestError(f"{where}: damaged (the two copies of its metadata differ); make it again")
    except (pa.ArrowException, OSError, ValueError) as error:  # The last: bad base64, bad UTF-8.
        raise ManifestError(f"{where}: not a readable Parquet file ({error})") from None
    return table
