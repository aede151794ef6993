"""What the runs of a sweep left, one row a run and one row an epoch, as Parquet and CSV.

Reads and computes no more than sums; what rows say together is `summary`'s to find. One thing to know before changing
it: a run that is not done has a row too, with its state and reason, so that no table can hide it.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from manifests.files import atomic_path, write_text
from manifests.privacy import without_paths
from trainer.journal import read_events
from trainer.measures.merits import Merit
from trainer.sweep.grid import Point
from trainer.sweep.states import State, find_state, read_ended, run_folder


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run of a sweep. Numbers that are not known are None."""

    run: str
    method: str
    k: int | None
    """Tiles of a slide in a training step; None where `tiles` says more."""
    tiles: str
    """fixed (k of them), all, or own, as the method chooses."""
    precision: str
    nproc: int
    split: str
    """Empty where the labels settled it."""
    seed: int | None = None
    state: State
    reason: str = ""
    """Why it failed, without paths."""
    num_train: int | None = None
    """Slides."""
    num_val: int | None = None
    num_test: int | None = None
    num_skipped: int | None = None
    test: float | None = None
    """The measure on the test slides, by the checkpoint that validation chose: AUC, or R2 of numbers."""
    test_low: float | None = None
    """Of its 95 % interval over slides."""
    test_high: float | None = None
    val_best: float | None = None
    """The best validation measure of all epochs, which the paper reports; it is biased upwards, having been chosen."""
    final_train_loss: float | None = None
    """Mean over the slides of the last epoch."""
    best_epoch: int | None = None
    num_epochs: int = 0
    seconds: float | None = None
    """Of all epochs, validation included; what was done again after a kill counts once."""
    tiles_per_s: float | None = None
    """In training."""
    peak_rss_gb: float | None = None
    """The most memory of the machine that one of its processes held, 1e9 bytes; of GPUs nothing is known."""
    device_hours: float | None = None
    """Seconds times processes."""
    device: str = ""
    version: str = ""
    torch: str = ""
    config_digest: str = ""
    """Of its config.yaml without the section machine, 12 hex digits."""

    @property
    def overlap(self) -> float:
        """Test slides / training slides."""
        return self.num_test / self.num_train if self.num_test and self.num_train else math.nan

    @property
    def val_overlap(self) -> float:
        """Validation slides / training slides."""
        return self.num_val / self.num_train if self.num_val and self.num_train else math.nan


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """One epoch of one run."""

    run: str
    method: str
    k: int | None
    tiles: str
    precision: str
    nproc: int
    split: str
    epoch: int
    train_loss: float | None = None
    val_loss: float | None = None
    val: float | None = None
    """The measure on the validation slides."""


def read_rows(
    sweep: Path, points: Iterable[Point], merit: Merit, advance: Callable[[], None] = lambda: None
) -> tuple[list[Row], list[EpochRow]]:
    """Reads all runs of a sweep.

    Args:
        sweep: its folder.
        points: its runs.
        merit: the measure.
        advance: called once for each run.
    """
    rows, epoch_rows = [], []
    for point in points:
        row, epochs = _read_run(sweep, point, merit)
        rows.append(row)
        epoch_rows += epochs
        advance()
    return rows, epoch_rows


def write_rows(sweep: Path, rows: Sequence[Row], epoch_rows: Sequence[EpochRow], merit: Merit) -> None:
    """Writes `results.parquet`, `results.csv` and `curves.parquet`, with the measure's name in the columns'."""
    table = _to_table(Row, rows, merit)
    _write_parquet(sweep / "results.parquet", table)
    write_text(sweep / "results.csv", to_csv(table.column_names, (row.values() for row in table.to_pylist())))
    _write_parquet(sweep / "curves.parquet", _to_table(EpochRow, epoch_rows, merit))


def to_csv(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A CSV file's text; None is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()


def _read_run(sweep: Path, point: Point, merit: Merit) -> tuple[Row, list[EpochRow]]:
    run, state, ended = run_folder(sweep, point.name), find_state(sweep, point.name), read_ended(sweep, point.name)
    is_number = isinstance(point.k, int)
    axes: dict[str, Any] = {
        "run": point.name,
        "method": point.method,
        "k": point.k if is_number else None,
        "tiles": "fixed" if is_number else str(point.k),
        "precision": point.precision,
        "nproc": point.nproc,
        "split": point.split,
    }
    start, epochs = _read_journal(run)
    versions = start.get("versions") or {}
    known: dict[str, Any] = {
        "device": start.get("device") or "",
        "version": versions.get("slidegrad", ""),
        "torch": versions.get("torch", ""),
    }
    if counts := start.get("num_slides"):
        known |= {f"num_{split}": counts.get(split) for split in ("train", "val", "test")}
    if epochs:
        seconds = sum(line["seconds"] for line in epochs)
        rates = [line["tiles_per_s"] for line in epochs if line.get("tiles_per_s")]
        known |= {
            "final_train_loss": epochs[-1]["train_loss"],
            "num_epochs": len(epochs),
            "seconds": seconds,
            "device_hours": seconds * point.nproc / 3600,
            "tiles_per_s": sum(rates) / len(rates) if rates else None,
        }
    if ended and ended.peak_rss_bytes:
        known["peak_rss_gb"] = ended.peak_rss_bytes / 1e9
    if state == "failed" and ended:
        known["reason"] = without_paths(ended.reason)
    known |= _read_config(run) | (_read_result(run, merit) if state == "done" else {})
    curve = [
        EpochRow(
            **axes,
            epoch=line["epoch"],
            train_loss=line["train_loss"],
            val_loss=line["val_loss"],
            val=line.get(f"val_{merit}"),
        )
        for line in epochs
    ]
    return Row(**axes, state=state, **known), curve


def _read_journal(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The last start of a run, and each of its epochs once, the last line for it."""
    start: dict[str, Any] = {}
    epochs: dict[int, dict[str, Any]] = {}
    for event in read_events(run, {"run", "epoch"}):
        if event["event"] == "run":
            start = event
        else:
            epochs[event["epoch"]] = event
    return start, [epochs[epoch] for epoch in sorted(epochs)]


def _read_config(run: Path) -> dict[str, Any]:
    try:
        config = yaml.load((run / "config.yaml").read_text(encoding="utf-8"), _LOADER)
        kept = {name: value for name, value in config.items() if name != "machine"}
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]
        return {"seed": config["seed"], "config_digest": digest}
    except (OSError, KeyError, AttributeError, TypeError, yaml.YAMLError):
        return {}


def _read_result(run: Path, merit: Merit) -> dict[str, Any]:
    try:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        low, high = result.get(f"{merit}_ci") or (None, None)
        return {
            "test": result.get(merit),
            "test_low": low,
            "test_high": high,
            "val_best": result.get(f"val_{merit}"),
            "best_epoch": result.get("best_epoch"),
            "num_skipped": result.get("num_skipped"),
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return {"reason": f"result.json is not readable ({without_paths(str(error))}); move it away and run it again"}


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Ten times as fast, where the library has it."""
_TYPES = {"int": pa.int64(), "float": pa.float64()}


def _to_table(kind: type[Row] | type[EpochRow], rows: Sequence[Row] | Sequence[EpochRow], merit: Merit) -> pa.Table:
    names = {"test": f"test_{merit}", "test_low": f"test_{merit}_low", "test_high": f"test_{merit}_high"}
    names |= {"val_best": f"best_val_{merit}", "val": f"val_{merit}"}
    schema = pa.schema([(f.name, _TYPES.get(_type_name(f.type), pa.string())) for f in fields(kind)])
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=schema)
    return table.rename_columns([names.get(name, name) for name in table.column_names])


def _type_name(annotation: object) -> str:
    """int of `int | None`, and so on."""
    given = annotation if isinstance(annotation, type) else next(iter(getattr(annotation, "__args__", ())), str)
    return given.__name__ if isinstance(given, type) else "str"


def _write_parquet(file: Path, table: pa.Table) -> None:
    with atomic_path(file) as partial:
        pq.write_table(table, partial)
