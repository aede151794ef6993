"""Runs whose heatmaps are shown: one run's folder, or a folder of several. Plain Python; knows no web framework.

The values are those that `slidegrad heatmap` leaves as RUN/heatmaps/SLIDE.parquet: a column each of row, x_l0, y_l0,
attention and contribution, and under the metadata key `slidegrad` the rest as JSON. Names that come from outside are
compared with what lies in the folder, never made into a path; what a symlink leads out of it is not there.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from manifests.files import disk_name
from services.errors import ServiceError, StaleValuesError, UnknownRunError, UnreadableValuesError
from services.index import HashedManifest

_log = logging.getLogger(__name__)
_VERSION = 1
_FACTS = ("aggregator", "outputs", "predictions", "what", "base", "total")


@dataclass(frozen=True, kw_only=True, eq=False)
class RunValues:
    """A run's values of every tile of a slide's manifest, (n,) float32; NaN for tiles that the model did not see."""

    run: str
    slide_id: str
    hash: str
    """BLAKE2b-128 of the file, in hex."""
    facts: dict[str, Any]
    """Whose values they are and what was predicted, ready for JSON."""
    attention: NDArray[np.float32]
    contribution: NDArray[np.float32]

    def to_record(self) -> dict[str, Any]:
        """The answer: facts, and equal-length columns by tile row, with None for NaN."""
        columns = {
            "row": list(range(len(self.attention))),
            "attention": _numbers(self.attention),
            "contribution": _numbers(self.contribution),
        }
        return {"run": self.run, "slide_id": self.slide_id, **self.facts, "columns": columns}


class RunShelf:
    """The runs under a folder.

    Args:
        root: a run's folder, or one that holds runs; None for no runs at all.

    Raises:
        ServiceError: there is no such folder.
    """

    def __init__(self, root: Path | None) -> None:
        if root is not None and not root.is_dir():
            raise ServiceError(f"--runs {root}: no folder; give a run's folder, or one that holds runs")
        self._root = None if root is None else root.resolve()

    def names(self, slide_id: str | None = None) -> list[str]:
        """Runs that have heatmaps, or that have one of this slide."""
        if slide_id is None:
            return sorted(name for name, _ in self._runs())
        wanted = disk_name(slide_id) + ".parquet"
        return sorted(name for name, heatmaps in self._runs() if self._is_here(heatmaps / wanted))

    def values(self, run: str, source: HashedManifest) -> RunValues:
        """A run's values of a slide.

        Raises:
            UnknownRunError: no such run, or none of this slide's in it.
            StaleValuesError: they belong to another manifest of the slide.
            UnreadableValuesError: they are damaged.
        """
        slide_id = source.manifest.slide.slide_id
        heatmaps = dict(self._runs()).get(run)
        if heatmaps is None:
            raise UnknownRunError(f"no run {run[:200]!r} with heatmaps")
        file = heatmaps / f"{disk_name(slide_id)}.parquet"
        nothing = UnknownRunError(f"run {run} has no heatmap of slide {slide_id}; `slidegrad heatmap` makes one")
        if not self._is_here(file):
            raise nothing
        try:
            content = file.read_bytes()
            table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
            facts = json.loads((table.schema.metadata or {})[b"slidegrad"])
            origin = facts["origin"]
            found_id, hash_then, version = facts["slide_id"], origin["manifest_hash"], facts["schema_version"]
            told = {"manifest_hash": hash_then, "checkpoint": origin["checkpoint"], "output": origin["output"]}
            told |= {name: facts[name] for name in _FACTS}
            attention, contribution = (table[name].to_numpy() for name in ("attention", "contribution"))
            is_sound = version == _VERSION and (hash_then != source.hash or len(table) == len(source.manifest))
            json.dumps(told, allow_nan=False)
        except FileNotFoundError:
            raise nothing from None
        except (OSError, pa.ArrowException, LookupError, TypeError, ValueError) as error:
            _log.warning("run %s, slide %s: heatmap not readable (%s)", run, slide_id, type(error).__name__)
            is_sound = False
        if not is_sound:
            text = f"the values of slide {slide_id} in run {run} cannot be read; run `slidegrad heatmap` again"
            raise UnreadableValuesError(text)
        if found_id != slide_id:  # Another id may lead to the same file, on disk or by its case.
            raise nothing
        if hash_then != source.hash:
            raise StaleValuesError(
                f"the values of slide {slide_id} in run {run} belong to an earlier manifest: the slide was tiled again "
                "since; run `slidegrad heatmap` again"
            )
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        return RunValues(
            run=run, slide_id=slide_id, hash=digest, facts=told, attention=attention, contribution=contribution
        )

    def _runs(self) -> Iterator[tuple[str, Path]]:
        """Name and heatmaps of every run."""
        if self._root is None:
            return
        if (self._root / "heatmaps").is_dir():
            folders = [self._root]
        else:
            folders = [folder for folder in self._root.iterdir() if not folder.name.startswith(".")]
        for folder in folders:
            heatmaps = folder / "heatmaps"
            if heatmaps.is_dir() and self._is_inside(heatmaps):
                yield folder.name, heatmaps

    def _is_here(self, file: Path) -> bool:
        return file.is_file() and self._is_inside(file)

    def _is_inside(self, path: Path) -> bool:
        assert self._root is not None, "or there are no paths"
        return path.resolve().is_relative_to(self._root)


def _numbers(values: NDArray[np.float32]) -> list[float | None]:
    """The values for JSON: nine digits tell every float32 apart, and are half as long as a float's seventeen."""
    return [float(f"{value:.9g}") if math.isfinite(value) else None for value in values.tolist()]
