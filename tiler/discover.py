"""Which files of an archive are slides, and what they are called. Looks at names alone, opens no slide."""

import csv
import glob
import os
import unicodedata
from collections import Counter
from pathlib import Path

from tiler.errors import TilerError

SLIDE_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm")


def find_slides(archive: str) -> tuple[Path, dict[str, str]]:
    """The slides of an archive.

    Args:
        archive: a folder, one slide, a glob, or a CSV/text file with one path (or a column `path`) a line.

    Returns:
        The folder that the paths are relative to, and slide_id to path under it, sorted.

    Raises:
        TilerError: nothing found.
    """
    given = Path(archive).expanduser()
    named: set[Path] = set()  # What the user named is tried whatever its suffix.
    if given.is_dir():
        base, files = given, _walk(given)
    elif given.is_file() and given.suffix.lower() in (".csv", ".txt"):
        base, files = given.parent, _listed(given)
        named = set(files)
    elif given.is_file():
        base, files = given.parent, [given]
        named = {given}
    else:
        files = [Path(name) for name in glob.glob(archive, recursive=True)]
        base = Path(os.path.commonpath([f.parent for f in files])) if files else given
    slides = sorted({_under(base, f) for f in files if f.suffix.lower() in SLIDE_SUFFIXES or f in named})
    if not slides:
        raise TilerError(f"{archive}: no slides found (looked for {' '.join(SLIDE_SUFFIXES)})")
    for slide in slides:
        if slide != Path(os.fsencode(slide).decode(errors="replace")):
            raise TilerError(f"{archive}: file name {os.fsencode(slide)!r} is not UTF-8; rename it")
    return base.resolve(), name_slides(slides)


def _under(base: Path, file: Path) -> Path:
    """`file` as seen from the real `base`; a link in the way to `base` itself does not show in it."""
    given, absolute = Path(os.path.abspath(base)), Path(os.path.abspath(file))
    return (
        absolute.relative_to(given) if absolute.is_relative_to(given) else Path(os.path.relpath(file, base.resolve()))
    )


def name_slides(paths: list[Path]) -> dict[str, str]:
    """slide_id to path: the file's stem, NFC; a stem that several folders hold gets its folders before it."""

    def stem(path: Path) -> str:
        name = path.name
        suffix = next((s for s in SLIDE_SUFFIXES if name.lower().endswith(s)), "")
        return unicodedata.normalize("NFC", name[: len(name) - len(suffix)])

    stems = Counter(stem(path) for path in paths)
    named: dict[str, str] = {}
    for path in paths:
        slide_id = stem(path)
        if stems[slide_id] > 1:
            slide_id = "__".join([*(p for p in path.parent.parts if p != ".."), slide_id])
        while slide_id in named:  # a.svs beside a.tif: the suffix tells them apart.
            slide_id = f"{slide_id}__{path.suffix[1:].lower()}"
        named[slide_id] = str(path)
    return named


def _walk(root: Path) -> list[Path]:
    """Files below `root`, each real folder once, so that a loop of links ends; not in an MRXS's data folder."""
    found: list[Path] = []
    seen: set[str] = set()
    for folder, names, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        mrxs = {file[:-5] for file in files if file.lower().endswith(".mrxs")}
        names[:] = sorted(n for n in names if n not in mrxs and not n.startswith("."))
        found.extend(Path(folder, file) for file in files if not file.startswith("."))
    return found


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
