"""Splits on disk: `split_000.csv` (slide_id,split), one a split, and `splits.json`, how they were drawn.

One thing to know before changing it: a folder of splits appears whole, under its own name, by one rename, and is never
changed after. Whoever finds `splits.json` finds all that it names.
"""

import csv
import errno
import io
import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manifests.files import write_text
from trainer.errors import TrainerError
from trainer.labelled import Labelled, match_name
from trainer.splits.grouping import Split, refuse_leak, side_of
from trainer.splits.sides import Side
from trainer.targets import few

SUMMARY = "splits.json"
SCHEMA_VERSION = 1
_COLUMNS = ["slide_id", "split"]
_ELSEWHERE = "give another --out"


def split_name(number: int) -> str:
    """The name of a split, and the stem of its file."""
    return f"split_{number:03d}"


def to_csv(splits: Mapping[str, Split]) -> str:
    """The file of one split, sorted by slide_id."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([_COLUMNS, *sorted(splits.items())])
    return out.getvalue()


def read_split(file: Path) -> dict[str, Split]:
    """slide_id, as the file has it, to its side.

    Raises:
        TrainerError: not readable, not these columns, an unknown word, or a slide twice.
    """
    where = f"--split {file}"
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = [{k: (v or "").strip() for k, v in row.items() if k} for row in csv.DictReader(stream)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise TrainerError(f"{where}: not readable as CSV ({reason}); give a file of `slidegrad splits`") from None
    if not rows or not set(_COLUMNS) <= set(rows[0]):
        found = list(rows[0]) if rows else "no rows"
        raise TrainerError(f"{where}: expected the columns {', '.join(_COLUMNS)} and at least one row, got {found}")
    if nameless := sum(not row["slide_id"] for row in rows):
        raise TrainerError(f"{where}: {nameless} of {len(rows)} rows have no slide_id; name the slide, or drop the row")
    splits: dict[str, Split] = {}
    for row in rows:
        if row["slide_id"] in splits:
            raise TrainerError(f"{where}: slide {row['slide_id']} is listed twice; list it once")
        splits[row["slide_id"]] = side_of(row["split"], f"{where}: slide {row['slide_id']}")
    return splits


def fit_split(file: Path, slides: Labelled) -> tuple[dict[str, Split], list[str]]:
    """The sides of the cohort's slides, as a file gives them.

    Args:
        file: see `read_split`; slides may be named by their files, as in the labels.
        slides: the cohort.

    Returns:
        slide_id to its side in the order of the cohort, and sentences to tell the user.

    Raises:
        TrainerError: as `read_split`; or the labels name splits too, a slide is not in the file, or a leak.
    """
    where = f"--split {file}"
    if slides.has_split:
        raise TrainerError(
            f"{where}: the labels have a column split already; take it out of them, or leave --split out"
        )
    known = slides.targets.keys() | slides.left_out
    given: dict[str, Split] = {}
    for name, side in read_split(file).items():
        slide_id = match_name(name, known)
        if slide_id in given:
            raise TrainerError(f"{where}: slide {slide_id} is listed twice, with and without its suffix; list it once")
        given[slide_id] = side
    if missing := [slide_id for slide_id in slides.targets if slide_id not in given]:
        raise TrainerError(
            f"{where}: {len(missing)} of {len(slides.targets)} slides of the labels are not in it: {few(missing)}; "
            "draw splits of these labels by `slidegrad splits`"
        )
    splits = {slide_id: given[slide_id] for slide_id in slides.targets}
    refuse_leak(splits, slides.group_of)
    extra = sorted(given.keys() - known)
    return splits, [f"{len(extra)} slides of --split are not in the labels: {few(extra)}"] if extra else []


def read_summary(out: Path) -> dict[str, Any] | None:
    """What the folder's `splits.json` says; None if there is no folder, or nothing in it.

    Raises:
        TrainerError: something else is there.
    """
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            if out.resolve() in (Path.cwd(), *Path.cwd().parents):
                raise TrainerError(f"--out {out}: expected a folder to make, got the one at hand; name one in it")
            return None
        if not (out / SUMMARY).exists():
            raise TrainerError(f"--out {out}: something other than splits is there (no {SUMMARY}); {_ELSEWHERE}")
        summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainerError(f"--out {out}: cannot be read ({error.strerror}); {_ELSEWHERE}") from None
    except ValueError:
        summary = None
    if not isinstance(summary, dict) or summary.get("schema_version") != SCHEMA_VERSION:
        raise TrainerError(f"--out {out}: its {SUMMARY} is none of this version of Slidegrad's; {_ELSEWHERE}")
    return summary


def refuse_others(out: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises TrainerError if a folder's splits were drawn with other settings, or of another cohort."""
    others = [name for name in settings if found.get(name) != settings[name]]
    if "cohort" in others and len(others) == 1:
        raise TrainerError(
            f"--out {out}: its splits are of another cohort, as slides, labels or patients have changed since; "
            f"{_ELSEWHERE}"
        )
    if others := [name for name in others if name != "cohort"]:
        named = ", ".join(f"{name} {found.get(name)} there and {settings[name]} here" for name in others)
        raise TrainerError(f"--out {out}: its splits were drawn otherwise, with {named}; {_ELSEWHERE}")


def refuse_altered(out: Path, name: str, splits: Mapping[str, Split]) -> None:
    """Raises TrainerError if a folder's split is not the one that its settings give."""
    file = out / f"{name}.csv"
    try:
        if file.read_text(encoding="utf-8") == to_csv(splits):
            return
        state = "was changed"
    except FileNotFoundError:
        state = "is missing"
    except (OSError, UnicodeDecodeError):
        state = "cannot be read"
    raise TrainerError(f"--out {out}: {file.name} {state} since it was drawn; {_ELSEWHERE}")


def summarise(settings: Mapping[str, Any], sides_of: Mapping[str, Mapping[Split, Side]]) -> dict[str, Any]:
    """What `splits.json` says: the settings, and what each side of each split holds."""
    drawn = [
        {"file": f"{name}.csv", **{side: held.to_dict() for side, held in sides.items()}}
        for name, sides in sides_of.items()
    ]
    return {"schema_version": SCHEMA_VERSION, **settings, "splits": drawn}


class SplitFolder:
    """A folder of splits in the making, beside its place; `finish` gives it its name, else nothing is left of it.

    Raises:
        TrainerError: nothing can be written there.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._final = out, out.resolve()
        self._partial = self._final.with_name(f".{self._final.name[:80]}.{uuid.uuid4().hex}.tmp")

    def __enter__(self) -> "SplitFolder":
        try:
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise self._cannot(error) from None
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, name: str, splits: Mapping[str, Split]) -> None:
        """Writes one split."""
        self._write(f"{name}.csv", to_csv(splits))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes `splits.json` and puts the folder into its place."""
        self._write(SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        try:
            self._partial.replace(self._final)
        except OSError as error:
            raise self._cannot(error) from None

    def _write(self, name: str, text: str) -> None:
        try:
            write_text(self._partial / name, text)
        except OSError as error:
            raise self._cannot(error) from None

    def _cannot(self, error: OSError) -> TrainerError:
        reason = "another run has filled it" if error.errno in (errno.ENOTEMPTY, errno.EEXIST) else error.strerror
        return TrainerError(f"--out {self._out}: cannot write there ({reason}); free the place, or {_ELSEWHERE}")
