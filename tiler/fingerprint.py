"""A slide's fingerprint: changes when the slide does, costs milliseconds, knows no clock and no file name.

Sizes, heads and tails of all files that make the slide, and a TIFF's tables of tile offsets and byte counts: whoever
writes a pyramid anew changes them. Where tiles are not compressed, the tables of all slides of one size are alike:
there, and in a zarr, pixels are sampled, 64 pieces of 4 KiB or both ends of 64 chunks. Sampling tells slides apart, but
a change of bytes inside one tile alone is not seen; tiler/integrity looks there.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tiler.dicom import list_series
from tiler.tiff import TiffFacts, read_tiff

_END_BYTES = 64 * 1024
_NUM_PIECES, _PIECE_BYTES = 64, 4 * 1024
"""What is looked at where tables say nothing of the pixels: 256 KiB."""
_UNCOMPRESSED = 1
"""TIFF Compression."""
_ZARR_METADATA = (".zattrs", ".zarray", ".zgroup", ".zmetadata", "zarr.json")


def fingerprint(path: Path) -> str:
    """32 hex digits over all that makes up a slide.

    Raises:
        OSError: a file that cannot be read.
    """
    return fingerprint_with(path, read_tiff(path))


def fingerprint_with(path: Path, tiff: TiffFacts | None) -> str:
    """As `fingerprint`, where the TIFF's directories are known already."""
    digest = hashlib.blake2b(digest_size=16)
    if path.is_dir():
        entries = dict(_walk(path))
        listed = sorted(text for place, entry in entries.items() for text in _describe(place, entry))
        digest.update("".join(listed).encode(errors="surrogateescape"))
        chunks = (place for place, entry in entries.items() if entry.name not in _ZARR_METADATA and entry.is_file())
        for place in _spread(sorted(chunks)):
            digest.update(_hash_pieces(path / place, 2))
        return digest.hexdigest()
    if path.exists() and not path.is_file():
        raise OSError(f"{path.name}: not a file")  # A pipe would be waited for.
    for part in sorted(_hash_ends(file) for file in list_files(path)):
        digest.update(part)
    if tiff is not None:
        digest.update(tiff.tables)
        if any(page.compression == _UNCOMPRESSED for page in tiff.pyramid):
            digest.update(_hash_pieces(path, _NUM_PIECES))
    return digest.hexdigest()


def list_files(path: Path) -> list[Path]:
    """The files that make up a slide, `path` among them: an MRXS's data, a VMS's parts, a DICOM's series."""
    suffix = path.suffix.lower()
    if suffix == ".mrxs":
        data = path.with_suffix("")
        return [path, *(sorted(file for file in data.iterdir() if file.is_file()) if data.is_dir() else [])]
    if suffix in (".vms", ".vmu"):
        return [path, *_named_parts(path)]
    return list_series(path)


def _named_parts(index: Path) -> list[Path]:
    """The pictures that a Hamamatsu index names, the photograph of the slide's label left out."""
    parts = set()
    for line in index.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, name = (text.strip() for text in line.partition("="))
        if name and key != "MacroImage" and "/" not in name and (index.parent / name).is_file():
            parts.add(index.parent / name)
    return sorted(parts)


def _hash_ends(file: Path) -> bytes:
    """Digest of a file's size and its first and last 64 KiB."""
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        size = _size(stream)
        digest.update(size.to_bytes(8, "little"))
        digest.update(stream.read(_END_BYTES))
        stream.seek(max(0, size - _END_BYTES))
        digest.update(stream.read(_END_BYTES))
    return digest.digest()


def _hash_pieces(file: Path, num_pieces: int) -> bytes:
    """Digest of pieces of 4 KiB evenly spread over a file, the first at its start, the last at its end."""
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        last = max(0, _size(stream) - _PIECE_BYTES)
        for i in range(num_pieces):
            stream.seek(i * last // (num_pieces - 1))
            digest.update(stream.read(_PIECE_BYTES))
    return digest.digest()


def _size(stream: BinaryIO) -> int:
    """Bytes of an open file."""
    return os.fstat(stream.fileno()).st_size


def _spread(places: list[str]) -> list[str]:
    """At most 64 of them, evenly spread, the first and the last among them."""
    if len(places) <= _NUM_PIECES:
        return places
    return [places[i * (len(places) - 1) // (_NUM_PIECES - 1)] for i in range(_NUM_PIECES)]


def _describe(place: str, entry: "os.DirEntry[str]") -> Iterator[str]:
    """Place and size of a file of a zarr folder; its content, where it is metadata."""
    yield f"{place}\0{entry.stat().st_size}\0"
    if entry.name in _ZARR_METADATA:
        yield f"{place}\0{Path(entry).read_bytes().hex()}\0"


def _walk(folder: Path) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    """Every file below a folder, and its place there."""
    todo = [""]
    while todo:
        place = todo.pop()
        with os.scandir(folder / place) as entries:
            for entry in entries:
                if entry.is_dir():
                    todo.append(f"{place}{entry.name}/")
                else:
                    yield f"{place}{entry.name}", entry
