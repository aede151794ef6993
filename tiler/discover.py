"""Which files of an archive are slides, and what they are called.

Looks at names alone, opens no slide; of DICOM files it reads the few tags that say which of them are one slide, and of
a zarr folder whether it is a picture.
"""

import csv
import glob
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tiler.dicom import find_series
from tiler.errors import TilerError

SLIDE_SUFFIXES = (
    *(".ome.tiff", ".ome.tif", ".ome.zarr"),
    *(".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm", ".zarr"),
)
"""A longer suffix stands before those that end it: `x.ome.tif` is called `x`."""
_SUFFIX = re.compile(rf"({'|'.join(map(re.escape, SLIDE_SUFFIXES))})\Z", re.IGNORECASE)
_FILE_SUFFIXES = tuple(suffix for suffix in SLIDE_SUFFIXES if not suffix.endswith(".zarr"))


@dataclass(frozen=True)
class Found:
    """The slides of an archive.

    `base`: the folder that paths are relative to; `slides`: slide_id to path, sorted by path; `unreadable`: folders
    that could not be listed, relative; `joined`: ids that got their folders or suffix, because the stem alone is not
    unique; `num_unnamed`: slides passed over because their names are not UTF-8.
    """

    base: Path
    slides: dict[str, str]
    unreadable: list[str] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)
    num_unnamed: int = 0


def find_slides(archive: str) -> Found:
    """The slides of an archive.

    Args:
        archive: a folder, one slide, a glob, a text file (.txt) with one path a line, or a CSV with a column `path`
            (else the first is taken).

    Raises:
        TilerError: nothing found, or the archive or something that its list names cannot be looked at.
    """
    try:
        given = Path(archive).expanduser()
    except RuntimeError:
        raise TilerError(f"{archive}: no such user; write the folder out") from None
    try:
        return _find_slides(archive, given)
    except OSError as error:
        raise TilerError(f"{archive}: {error.strerror}") from None


def _find_slides(archive: str, given: Path) -> Found:
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
    all_paths, names = _join_dicom(base, set(paths), named)
    paths = [path for path in all_paths if _is_utf8(path)]
    num_unnamed = len(all_paths) - len(paths)
    if not paths:
        shown = " ".join(suffix for suffix in SLIDE_SUFFIXES if suffix.count(".") == 1)
        not_listed = f", and {len(unreadable)} folders cannot be read" if unreadable else ""
        not_named = f", and {num_unnamed} files have names that are not UTF-8; rename them" if num_unnamed else ""
        raise TilerError(f"{archive}: no slides found (looked for {shown}){not_listed}{not_named}")
    slides = name_slides(paths, names)
    joined = [slide_id for slide_id, path in slides.items() if slide_id != names.get(path, _stem(path))]
    return Found(base.resolve(), slides, sorted(unreadable), joined, num_unnamed)


def _is_utf8(name: str) -> bool:
    """Python keeps the bytes of other names as lone surrogates, which no file of ours can hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _matches(pattern: str) -> tuple[Path, list[Path]]:
    """The slides that a glob matches, and the folder that holds them all."""
    matches = [Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)]
    files = [file for file in matches if (_is_zarr(file) if os.path.isdir(file) else _is_slide(file.name))]
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
            name = os.path.basename(os.path.realpath(folder))
            if len(all_series) == 1 and _is_utf8(name):
                names[files[0]] = unicodedata.normalize("NFC", name)
    return sorted(kept | (dicom & named)), names


def _suffix(path: str) -> str:
    found = _SUFFIX.search(path)
    return found[0].lower() if found else ""


def _stem(path: str) -> str:
    name = os.path.basename(path)
    return unicodedata.normalize("NFC", name[: len(name) - len(_suffix(name))])


def name_slides(paths: Iterable[str | Path], names: Mapping[str, str] | None = None) -> dict[str, str]:
    """slide_id to path, sorted by path: the file's stem, NFC.

    A stem that several folders hold gets its folders before it. Ids that are still the same all get their suffix
    (a.svs beside a.tif), and what that does not tell apart (a.svs beside a.SVS) a hash of the path. No order counts:
    else a file that comes later could take another's id.

    Args:
        paths: relative paths.
        names: path to the name to use instead of the stem: that of its folder.
    """
    given = names or {}

    def folder(path: str) -> str:
        return os.path.dirname(os.path.dirname(path) if path in given else path)

    stems = {path: given.get(path) or _stem(path) for path in sorted(map(str, paths))}
    holders: dict[str, set[str]] = {stem: set() for stem, count in Counter(stems.values()).items() if count > 1}
    for path, stem in stems.items():
        if stem in holders:
            holders[stem].add(folder(path))
    several = {stem for stem, folders in holders.items() if len(folders) > 1}
    ids = {path: _join(folder(path), stem) if stem in several else stem for path, stem in stems.items()}
    ids = _tell_apart(ids, lambda path: (_suffix(path) or os.path.splitext(path)[1])[1:])
    while len(set(ids.values())) < len(ids):  # More than once only where a file is called like another's new id.
        ids = _tell_apart(ids, lambda path: hashlib.blake2b(os.fsencode(path), digest_size=6).hexdigest())
    return {slide_id: path for path, slide_id in ids.items()}


def _join(folder: str, stem: str) -> str:
    parts = [unicodedata.normalize("NFC", part) for part in folder.split("/") if part not in ("", ".", "..")]
    return "__".join([*parts, stem])


def _tell_apart(ids: dict[str, str], mark: Callable[[str], str]) -> dict[str, str]:
    """Path to id; every id that several paths have gets the mark of its path behind it."""
    if len(set(ids.values())) == len(ids):
        return ids
    counts = Counter(ids.values())
    return {path: f"{known}__{mark(path)}" if counts[known] > 1 else known for path, known in ids.items()}


def _listed(file: Path) -> list[Path]:
    """Paths that a list names, relative ones from the list's folder."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            names = _csv_column(file, stream) if file.suffix.lower() == ".csv" else [line.strip() for line in stream]
    except UnicodeDecodeError:
        raise TilerError(f"{file}: this list is not UTF-8; save it as UTF-8") from None
    except csv.Error as error:
        raise TilerError(f"{file}: not readable as CSV ({error})") from None
    names = [name for name in names if name]
    missing = []
    for name in names:
        try:
            if not (file.parent / name).exists():
                missing.append(name)
        except OSError as error:
            raise TilerError(f"{file}: {name!r} cannot be looked at: {error.strerror}") from None
    if missing:
        raise TilerError(f"{file}: {len(missing)} of {len(names)} listed slides are not there, first {missing[0]}")
    return [file.parent / name for name in names]


def _csv_column(file: Path, stream: Iterable[str]) -> list[str]:
    """The column `path` of a CSV, or its first."""
    rows = [row for row in csv.reader(stream) if any(cell.strip() for cell in row)]
    header = [cell.strip() for cell in rows[0]] if rows else []
    column = header.index("path") if "path" in header else 0
    if short := sum(len(row) <= column or not row[column].strip() for row in rows):
        raise TilerError(f"{file}: {short} of {len(rows)} lines have no path in column {column + 1}")
    return [row[column].strip() for row in rows["path" in header :]]
