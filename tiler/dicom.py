"""Which DICOM files make one slide: the whole-slide instances of a series. A few tags are read, never a pixel.

Source: DICOM PS3.3 A.32.8, VL Whole Slide Microscopy Image; OpenSlide opens a series from any one of its files and
looks for the others in the same folder (https://openslide.org/formats/dicom/).
"""

import functools
import os
import struct
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_partial
from pydicom.tag import Tag

_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_TAGS = [Tag(name) for name in ("ImageType", "SOPClassUID", "SeriesInstanceUID", "TotalPixelMatrixColumns")]
_LAST_TAG = 0x00480006
"""TotalPixelMatrixColumns; what follows (one item a tile) is not parsed."""
_BAD_FILE = (OSError, InvalidDicomError, ValueError, KeyError, AttributeError, TypeError, struct.error, EOFError)


@dataclass(frozen=True)
class Instance:
    """One whole-slide file: its series, whether it is a level of the pyramid, and the level's width in px."""

    series: str
    is_volume: bool
    columns: int


def read_instance(file: Path) -> Instance | None:
    """A DICOM file's place in its series; None if it is no whole-slide DICOM."""
    try:
        if not file.is_file():
            return None  # A pipe would be waited for.
        with file.open("rb") as stream:
            if stream.read(132)[128:] != b"DICM":
                return None
            stream.seek(0)
            tags = read_partial(stream, lambda tag, _vr, _length: tag > _LAST_TAG, specific_tags=_TAGS)
        if tags.SOPClassUID != _WHOLE_SLIDE:
            return None
        is_volume = "VOLUME" in tags.get("ImageType", ())
        return Instance(str(tags.SeriesInstanceUID), is_volume, int(tags.get("TotalPixelMatrixColumns", 0)))
    except _BAD_FILE:
        return None


def find_series(folder: Path, names: list[str]) -> list[list[str]]:
    """The whole-slide series among the files of a folder.

    Args:
        folder: the folder.
        names: the names to look at.

    Returns:
        For each series the names of its files. First the one that stands for it: the largest level, then by name;
        then the others by name. Series in the order of those.
    """
    series: dict[str, list[tuple[bool, int, str]]] = defaultdict(list)
    for name, found in _read_instances(folder, names).items():
        if found is not None:
            series[found.series].append((not found.is_volume, -found.columns, name))
    ranked = [[name for *_, name in sorted(files)] for files in series.values()]
    return sorted([first, *sorted(others)] for first, *others in ranked)


def list_series(file: Path) -> list[Path]:
    """All files of the series that a file belongs to, itself among them; only itself if it is no whole-slide DICOM."""
    own = _read_instances(file.parent, [file.name])[file.name]
    if own is None:
        return [file]
    instances = _read_instances(file.parent, sorted(os.listdir(file.parent)))
    return [file.parent / name for name, found in instances.items() if found and found.series == own.series]


def _read_instances(folder: Path, names: list[str]) -> dict[str, Instance | None]:
    """Name to place in its series; a file is read once for all the slides of its folder."""
    known = _known_instances(os.path.abspath(folder), folder.stat().st_mtime_ns)
    for name in names:
        if name not in known:
            known[name] = read_instance(folder / name)
    return {name: known[name] for name in names}


@functools.lru_cache(maxsize=8)
def _known_instances(folder: str, mtime_ns: int) -> dict[str, Instance | None]:  # noqa: ARG001 - they are the key
    """What is known of a folder's files, to be filled; empty again when one came, went or was replaced."""
    return {}
