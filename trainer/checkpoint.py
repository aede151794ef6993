"""Checkpoints: both halves, their optimisers and where the run stands, in one folder that appears whole or not at all.

`encoder.pt` is written by the first encoder rank, `aggregator.pt` and `state.json` by the main rank; the folder gets
its name only when all are on disk. Loading runs no code from the files (`weights_only=True`).
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from manifests.files import write_text
from trainer.comm import Comm
from trainer.errors import TrainerError

_NUM_KEPT = 2


def save_checkpoint(run: Path, comm: Comm, halves: dict[str, dict[str, Any]], state: dict[str, Any]) -> None:
    """Writes a checkpoint; called by all ranks together.

    Args:
        run: the run's folder.
        comm: this rank's end of the group.
        halves: "encoder" and/or "aggregator" to what this rank has to save of it.
        state: JSON-ready position of the run; with "epoch", from 0, and "best_epoch", the best on validation so far
            or None, which is kept until a better one comes.
    """
    final = _folder(run, state["epoch"])
    partial = final.with_name(f".{final.name}.tmp")
    if comm.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    comm.barrier()
    writes = {"encoder": comm.is_first_encoder, "aggregator": comm.is_main}
    for half, content in halves.items():
        if writes[half]:
            with (partial / f"{half}.pt").open("wb") as stream:
                torch.save(content, stream)
                stream.flush()
                os.fsync(stream.fileno())
    comm.barrier()
    if comm.is_main:
        write_text(partial / "state.json", json.dumps(state))
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
        best = chosen_checkpoint(run)
        for old in list_checkpoints(run)[:-_NUM_KEPT]:
            if old != best:
                shutil.rmtree(old, ignore_errors=True)
    comm.barrier()


def list_checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(f.parent for f in (run / "checkpoints").glob("epoch_*/state.json"))


def read_best_state(run: Path) -> dict[str, Any]:
    """The state of the checkpoint that `chosen_checkpoint` gives."""
    return read_state(chosen_checkpoint(run))


def chosen_checkpoint(run: Path) -> Path:
    """The checkpoint to evaluate: the best on validation, else the newest.

    Raises:
        TrainerError: the run has none.
    """
    whole = list_checkpoints(run)
    if not whole:
        raise TrainerError(f"{run}: no checkpoint here; train first, or go on with --resume")
    best = read_state(whole[-1])["best_epoch"]
    return _folder(run, best) if best is not None and _folder(run, best) in whole else whole[-1]


def _folder(run: Path, epoch: int) -> Path:
    return run / "checkpoints" / f"epoch_{epoch:04d}"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Where the run stood.

    Raises:
        TrainerError: not readable.
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError):
        raise TrainerError(f"{checkpoint.name}: state.json is damaged; remove this checkpoint") from None
    return state


def load_half(checkpoint: Path, half: str) -> dict[str, Any]:
    """What was saved of one half, on the CPU.

    Raises:
        TrainerError: not readable.
    """
    try:
        content: dict[str, Any] = torch.load(checkpoint / f"{half}.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - whatever a damaged file raises, the user gets one sentence
        raise TrainerError(f"{checkpoint.name}: {half}.pt is damaged ({type(error).__name__}); remove it") from None
    return content
