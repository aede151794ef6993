"""A slide's fingerprint: changes when the slide does, costs milliseconds, knows no clock and no file name.

Sizes, heads and tails of all files that make the slide, and a TIFF's tables of tile offsets and byte counts: whoever
writes a pyramid anew changes them. A change of bytes inside one tile alone is not seen; tiler/integrity.py looks there.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from tiler.dicom import list_series
from tiler.tiff import TiffFacts, read_tiff

_END_BYTES = 64 * 1024
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
        digest.update("".join(sorted(_list_folder(path))).encode(errors="surrogateescape"))
        return digest.hexdigest()
    if path.exists() and not path.is_file():
        raise OSError(f"{path.name}: not a file")  # A pipe would be waited for.
    for part in sorted(_hash_ends(file) for file in list_files(path)):
        digest.update(part)
    if tiff is not None:
        digest.update(tiff.tables)
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
        size = os.fstat(stream.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        digest.update(stream.read(_END_BYTES))
        stream.seek(max(0, size - _END_BYTES))
        digest.update(stream.read(_END_BYTES))
    return digest.digest()


def _list_folder(folder: Path) -> Iterator[str]:
    """A zarr folder's metadata, and place and size of every chunk."""
    todo = [""]
    while todo:
        place = todo.pop()
        with os.scandir(folder / place) as entries:
            for entry in entries:
                relative = f"{place}{entry.name}"
                if entry.is_dir():
                    todo.append(f"{relative}/")
                    continue
                yield f"{relative}\0{entry.stat().st_size}\0"
                if entry.name in _ZARR_METADATA:
                    yield f"{relative}\0{Path(entry).read_bytes().hex()}\0"
