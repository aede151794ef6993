"""The command `preview`."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from manifests.source import open_manifests
from tiler import progress
from tiler.errors import TilerError
from tiler.preview.album import draw_album, plan_album
from tiler.preview.page import write_page

_MAX_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Draw slides with their tissue and tiles, and write one offline page about all of them."""

    manifests: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MANIFESTS")]
    """The manifests folder."""
    out: Path
    """Where to; index.html and pictures/ appear there."""
    slides: tuple[str, ...] = ()
    """Slide ids to draw; all by default. The page lists every slide either way."""
    max_slides: int = 200
    """Pictures at most, evenly spread over the slides; those named by --slides are all drawn."""
    workers: int | None = None
    """Processes; all cores by default."""

    def run(self) -> tuple[dict[str, Any], int]:
        if self.max_slides < 0:
            raise TilerError(f"--max-slides {self.max_slides}: expected 0 or more")
        if self.workers is not None and self.workers < 1:
            raise TilerError(f"--workers {self.workers}: expected at least 1")
        catalog = open_manifests(self.manifests).catalog()
        _make_out(self.out, self.manifests)
        pictures = self.out / "pictures"
        album = plan_album(self.manifests, pictures, catalog, self.slides, self.max_slides)
        with progress.Counter("drawing slides") as drawing:
            drawing.start(len(album.todo))
            unreadable = draw_album(self.manifests, pictures, album.todo, self.workers, drawing.advance)
        for sentence in list(unreadable.values())[:_MAX_LISTED]:
            print(f"no picture: {sentence}", file=sys.stderr)
        if len(unreadable) > _MAX_LISTED:
            print(
                f"… and {len(unreadable) - _MAX_LISTED} more; on the page, choose Picture: unreadable", file=sys.stderr
            )
        state = album.after(unreadable)
        counts = Counter(state.values())
        if counts["no mask"]:
            print(f"listed without picture, for want of a mask and thumbnail: {counts['no mask']}", file=sys.stderr)
        page = self.out / "index.html"
        write_page(page, catalog, state)
        statuses = Counter(catalog.column("status").to_pylist())
        result = {
            "page": str(page),
            "num_slides": catalog.num_rows,
            "num_pictures": counts["drawn"],
            **{status: statuses[status] for status in ("ok", "empty", "failed")},
        }
        return result, 1 if unreadable else 0


def _make_out(out: Path, root: Path) -> None:
    """Makes the folder; it must not lie where the manifests' own files are."""
    for name in ("tiles", "masks", "paths"):
        if out.resolve().is_relative_to((root / name).resolve()):
            raise TilerError(f"--out {out}: inside {name}/ of the manifests; give a folder outside it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TilerError(f"--out {out}: cannot make this folder ({error.strerror})") from None
