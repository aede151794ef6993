"""A slide's values, tile by tile, and RUN/heatmaps/SLIDE.parquet, which keeps them for pictures to come.

    row           int32    the tile, an index into the slide's manifest: all of its tiles, in order
    x_l0, y_l0    int32    its top-left corner, level-0 px
    attention     float32  share of the slide's attention; NaN for tiles that the model did not see
    contribution  float32  the tile's part of the slide's output (`goal.Goal`); NaN likewise, and where there is none

The Parquet metadata's key `slidegrad` is JSON with all other fields of `SlideValues`. One thing to know before changing
it: values whose `Origin` is that of the run and manifest at hand are not computed again, so whatever they depend on
must be in it.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from manifests import Manifest
from manifests.files import atomic_path
from trainer.checkpoint import read_state

_KEY = b"slidegrad"
_VERSION = 1
_SCHEMA = pa.schema(
    [
        *((name, pa.int32()) for name in ("row", "x_l0", "y_l0")),
        *((name, pa.float32()) for name in ("attention", "contribution")),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a slide's values follow from."""

    manifest_hash: str
    """As the tile service tells it."""
    checkpoint: str
    """The name of the checkpoint's folder."""
    weights_hash: str
    """Of the checkpoint's files; empty for one that keeps none, which nothing can be compared with."""
    output: str
    """The class or column that contributions go to."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SlideValues:
    """Attention and contribution of every tile of a slide's manifest, (n,) float32; NaN for tiles not seen."""

    slide_id: str
    origin: Origin
    aggregator: str
    outputs: tuple[str, ...]
    """Classes, or columns."""
    predictions: tuple[float | None, ...]
    """As `heads.Head.predict` has them; None where a model that diverged gives no number."""
    what: str = ""
    """The number that the contributions and `base` add up to, in words; empty if the aggregator tells none."""
    base: float | None = None
    """The share of the number that is no tile's."""
    total: float | None = None
    """The number."""
    attention: NDArray[np.float32]
    contribution: NDArray[np.float32]

    @property
    def has_contributions(self) -> bool:
        """The aggregator told them."""
        return bool(self.what)

    @property
    def leading(self) -> NDArray[np.float32]:
        """What tiles are sorted by: contributions, or attention where there are none."""
        return self.contribution if self.has_contributions else self.attention


def origin_of(checkpoint: Path, output: str) -> Origin:
    """The origin of values that are computed now; of no slide yet, so without its manifest's hash."""
    digests = read_state(checkpoint).get("digests", {})
    text = json.dumps(digests, sort_keys=True).encode()
    weights_hash = hashlib.blake2b(text, digest_size=16).hexdigest() if digests else ""
    return Origin(manifest_hash="", checkpoint=checkpoint.name, weights_hash=weights_hash, output=output)


def write_values(file: Path, manifest: Manifest, values: SlideValues) -> None:
    """Writes a slide's values atomically."""
    facts = {f.name: getattr(values, f.name) for f in dataclasses.fields(values)}
    del facts["attention"], facts["contribution"]
    frame = {"width_l0": manifest.slide.width_l0, "height_l0": manifest.slide.height_l0}
    facts |= {"origin": dataclasses.asdict(values.origin), "footprint_l0": manifest.footprint_l0, **frame}
    text = json.dumps({"schema_version": _VERSION, **facts}, ensure_ascii=False)
    rows = np.arange(len(manifest), dtype=np.int32)
    columns: list[Any] = [rows, manifest.x_l0, manifest.y_l0, values.attention, values.contribution]
    table = pa.Table.from_arrays(columns, schema=_SCHEMA.with_metadata({_KEY: text.encode()}))
    with atomic_path(file) as partial:
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)


def read_values(file: Path, origin: Origin) -> SlideValues | None:
    """The values that a file keeps, if they have this origin; None else, and where there is no sound file."""
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            table = opened.read()
        facts = json.loads((table.schema.metadata or {})[_KEY])
        if not table.schema.remove_metadata().equals(_SCHEMA) or facts["schema_version"] != _VERSION:
            return None
        found = _parse(table, facts)
    except (OSError, pa.ArrowException, LookupError, TypeError, ValueError):
        return None
    return found if found.origin == origin and origin.weights_hash else None


def _parse(table: pa.Table, facts: dict[str, Any]) -> SlideValues:
    attention, contribution = (table.column(name).to_numpy() for name in ("attention", "contribution"))
    return SlideValues(
        slide_id=facts["slide_id"],
        origin=Origin(**facts["origin"]),
        aggregator=facts["aggregator"],
        outputs=tuple(facts["outputs"]),
        predictions=tuple(facts["predictions"]),
        what=facts["what"],
        base=facts["base"],
        total=facts["total"],
        attention=attention,
        contribution=contribution,
    )


def finite(value: float) -> float | None:
    """The number in six digits, as results tell it; None if it is none."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
