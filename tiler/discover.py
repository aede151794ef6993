"""Which files of an archive are slides, and what they are called.

Looks at names alone, opens no slide; of DICOM files it reads the few tags that say which of them are one slide, and of
a zarr folder whether it is a picture.
"""

import csv
import glob
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tiler.dicom import find_series
from tiler.errors import TilerError

SLIDE_SUFFIXES = (
    *(".ome.tiff", ".ome.tif", ".ome.zarr"),
    *(".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm", ".zarr"),
)
"""A longer suffix stands before those that end it: `x.ome.tif` is called `x`."""
_FILE_SUFFIXES = tuple(suffix for suffix in SLIDE_SUFFIXES if not suffix.endswith(".zarr"))


@dataclass(frozen=True)
class Found:
    """The slides of an archive.

    `base`: the folder that paths are relative to; `slides`: slide_id to path, sorted by path; `unreadable`: folders
    that could not be listed, relative; `joined`: ids joined with their folders, because the stem alone is not unique.
    """

    base: Path
    slides: dict[str, str]
    unreadable: list[str] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)


def find_slides(archive: str) -> Found:
    """The slides of an archive.

    Args:
        archive: a folder, one slide, a glob, or a CSV/text file with one path (or a column `path`) a line.

    Raises:
        TilerError: nothing found.
    """
    given = Path(archive).expanduser()
    unreadable: list[str] = []
    named: set[str] = set()  # What the user named one by one is tried, whatever it looks like.
    if given.is_dir() and not _is_zarr(given):
        base, paths = given, _walk(given, unreadable)
    elif given.exists():
        base, files = given.parent, _listed(given) if given.suffix.lower() in (".csv", ".txt") else [given]
        paths = [_under(base, file) for file in files]
        named = set(paths)
    else:
        base, files = _matches(archive)
        paths = [_under(base, file) for file in files]
    paths, names = _join_dicom(base, set(paths), named)
    if not paths:
        shown = " ".join(suffix for suffix in SLIDE_SUFFIXES if suffix.count(".") == 1)
        not_listed = f", and {len(unreadable)} folders cannot be read" if unreadable else ""
        raise TilerError(f"{archive}: no slides found (looked for {shown}){not_listed}")
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise TilerError(f"{archive}: file name {os.fsencode(path)!r} is not UTF-8; rename it") from None
    slides = name_slides(paths, names)
    joined = [slide_id for slide_id, path in slides.items() if slide_id != names.get(path, _stem(path))]
    return Found(base.resolve(), slides, sorted(unreadable), joined)


def _matches(pattern: str) -> tuple[Path, list[Path]]:
    """The slides that a glob matches, and the folder that holds them all."""
    matches = [Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)]
    files = [file for file in matches if (_is_zarr(file) if file.is_dir() else _is_slide(file.name))]
    return Path(os.path.commonpath([file.parent for file in files])) if files else Path(pattern), files


def _under(base: Path, file: Path) -> str:
    """`file` as seen from the real `base`; a link in the way to `base` itself does not show in it."""
    given, absolute = Path(os.path.abspath(base)), Path(os.path.abspath(file))
    inside = absolute.is_relative_to(given)
    return str(absolute.relative_to(given)) if inside else os.path.relpath(file, base.resolve())


def _is_slide(name: str) -> bool:
    return name.lower().endswith(_FILE_SUFFIXES)


def _is_zarr(folder: str | Path) -> bool:
    """A zarr folder that holds a picture, by its name or by its NGFF multiscales (or bioformats2raw's layout)."""
    name = os.fspath(folder).lower()
    if name.endswith(".ome.zarr") or not name.endswith(".zarr"):
        return name.endswith(".zarr")
    for name in (".zattrs", "zarr.json"):
        try:
            text = Path(folder, name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if '"multiscales"' in text or '"bioformats2raw.layout"' in text:
            return True
    return False


def _walk(root: Path, unreadable: list[str]) -> list[str]:
    """Slides below `root`, relative; each real folder once, so that a loop of links ends; not in an MRXS's folder.

    An archive may hold half a million files: strings all the way, one listing a folder.
    """
    found: list[str] = []
    seen: set[str] = set()
    todo = [""]
    while todo:
        place = todo.pop()
        folder = os.path.join(root, place)
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(folder) as listing:
                entries = sorted((entry.name, _is_folder(entry)) for entry in listing if entry.name[0] != ".")
        except OSError:
            unreadable.append(place.rstrip("/") or ".")
            continue
        data = {name[:-5] for name, is_folder in entries if not is_folder and name.lower().endswith(".mrxs")}
        below = []
        for name, is_folder in entries:
            if not is_folder:
                if _is_slide(name):
                    found.append(place + name)
            elif not name.lower().endswith(".zarr"):
                if name not in data:
                    below.append(f"{place}{name}/")
            elif _is_zarr(os.path.join(folder, name)):
                found.append(place + name)
        todo.extend(reversed(below))  # The first by name is walked first.
    return found


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link to itself.
        return False


def _join_dicom(base: Path, paths: set[str], named: set[str]) -> tuple[list[str], dict[str, str]]:
    """Each DICOM series as the one file that stands for it; other DICOM files are passed over unless `named`.

    Returns:
        The paths, sorted, and path to name for series that have their folder for themselves.
    """
    names: dict[str, str] = {}
    dicom = {path for path in paths if path.lower().endswith(".dcm")}
    kept = paths - dicom
    for place in {os.path.dirname(path) for path in dicom}:
        folder = base / place
        all_series = find_series(folder, [name for name in os.listdir(folder) if name.lower().endswith(".dcm")])
        for files in ([os.path.join(place, name) for name in series] for series in all_series):
            if dicom.isdisjoint(files):
                continue
            kept.add(files[0])
            dicom.difference_update(files)
            if len(all_series) == 1:
                names[files[0]] = unicodedata.normalize("NFC", os.path.basename(os.path.realpath(folder)))
    return sorted(kept | (dicom & named)), names


def _stem(path: str) -> str:
    name = os.path.basename(path)
    suffix = next((s for s in SLIDE_SUFFIXES if name.lower().endswith(s)), "")
    return unicodedata.normalize("NFC", name[: len(name) - len(suffix)])


def name_slides(paths: Iterable[str | Path], names: Mapping[str, str] | None = None) -> dict[str, str]:
    """slide_id to path: the file's stem, NFC; a stem that several folders hold gets its folders before it.

    Args:
        paths: relative paths.
        names: path to the name to use instead of the stem: that of its folder.
    """
    given = {str(path): (names or {}).get(str(path)) for path in paths}
    stems = {path: name or _stem(path) for path, name in given.items()}
    counts = Counter(stems.values())
    named: dict[str, str] = {}
    for path, stem in stems.items():
        slide_id = stem
        if counts[stem] > 1:
            folders = [part for part in os.path.dirname(path).split("/") if part not in ("", ".", "..")]
            slide_id = "__".join([*(folders[:-1] if given[path] else folders), stem])
        while slide_id in named:  # a.svs beside a.tif: the suffix tells them apart.
            slide_id = f"{slide_id}__{os.path.splitext(path)[1][1:].lower()}"
        named[slide_id] = path
    return named


def _listed(file: Path) -> list[Path]:
    """Paths named in a CSV (column `path`, or the first) or a text file, relative ones from the file's folder."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = [row for row in csv.reader(stream) if any(cell.strip() for cell in row)]
    except UnicodeDecodeError:
        raise TilerError(f"{file}: this list is not UTF-8; save it as UTF-8") from None
    column = rows[0].index("path") if rows and "path" in rows[0] else 0
    if short := sum(len(row) <= column or not row[column].strip() for row in rows):
        raise TilerError(f"{file}: {short} of {len(rows)} lines have no path in column {column + 1}")
    names = [row[column].strip() for row in rows if row[column].strip() != "path"]
    missing = [name for name in names if not (file.parent / name).exists()]
    if missing:
        raise TilerError(f"{file}: {len(missing)} of {len(names)} listed slides are not there, first {missing[0]}")
    return [file.parent / name for name in names]
