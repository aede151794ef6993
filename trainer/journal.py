"""What a run leaves behind while it runs: `metrics.jsonl`, one JSON object a line, and the same for TensorBoard."""

import json
import math
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trainer.index import IndexedManifests
from trainer.job import Job
from trainer.provenance import digests, versions
from trainer.step import Engine, Outcome


class Journal:
    """Appends events; only the main rank keeps one.

    Events: run, step, epoch, skip, index (which did not give all manifests), end. A resumed run appends; of two lines
    for one step or epoch the last counts.
    """

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        run.mkdir(parents=True, exist_ok=True)
        file = run / "metrics.jsonl"
        is_torn = file.exists() and file.read_bytes()[-1:] not in (b"", b"\n")
        self._stream = file.open("a", encoding="utf-8")
        if is_torn:  # A run that was killed in the middle of a line.
            self._stream.write("\n")
        self._board = SummaryWriter(str(run / "tensorboard"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self._board.close()

    def write(self, event: str, at: int | None = None, **values: Any) -> None:
        """Writes one event.

        Args:
            event: its kind.
            at: position on TensorBoard's axis (the step or epoch); None for events that are not curves.
            values: what happened; NaN becomes null.
        """
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._stream.write(json.dumps({"event": event, **plain}, ensure_ascii=False) + "\n")
        self._stream.flush()
        for name, value in plain.items() if at is not None else ():
            if isinstance(value, float):
                self._board.add_scalar(f"{event}/{name}", value, at)


def describe_run(job: Job, engine: Engine) -> dict[str, Any]:
    """The line of a run that begins, or goes on."""
    topology, splits = engine.comm.topology, ("train", "val", "test")
    return {
        "recipe": job.config.recipe,
        "versions": versions(),
        "digests": digests(job),
        "index": isinstance(job.source, IndexedManifests),
        "device": engine.comm.device.type,
        "world_size": topology.world_size,
        "num_encoder_ranks": len(topology.encoder_ranks),
        "num_groups": topology.num_groups,
        "keep": "all" if engine.side.keep is None else engine.side.keep,
        "virtual_ranks": topology.num_virtual,
        "num_slides": {split: len(job.cohort.of(split)) for split in splits},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe_step(outcome: Outcome, *, step_s: float, num_groups: int) -> dict[str, Any]:
    """The line of one slide's step.

    Args:
        outcome: what it gave.
        step_s: seconds.
        num_groups: of ranks, which wait for tiles side by side.
    """
    reads, num_rows = outcome.reads, outcome.plan.num_rows
    return {
        "epoch": outcome.plan.epoch,
        "slide_id": outcome.plan.slide_id,
        "loss": outcome.loss,
        "gradient_norm": outcome.gradient_norm,
        "num_tiles": num_rows,
        "step_s": step_s,
        "data_wait_s": outcome.wait_s / num_groups,
        "read_tiles_per_s": reads.num_tiles / reads.seconds if reads.seconds else math.nan,
        "decoded_per_tile": reads.num_decoded / num_rows,
        "read_bytes": reads.num_bytes or math.nan,
        "reread_tiles": reads.num_reread,
    }


def read_events(run: Path, kinds: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """The events of a run; a torn last line is passed over.

    Args:
        run: its folder.
        kinds: of events that are wanted; all if empty. The steps of a long run are a hundred thousand lines.
    """
    starts = tuple(f'{{"event": "{kind}"' for kind in kinds)
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return
    for line in lines:
        if starts and not line.startswith(starts):
            continue
        try:
            yield json.loads(line)
        except ValueError:
            continue
