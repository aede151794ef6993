"""Checkpoints: both halves, their optimisers and where the run stands, in one folder that appears whole or not at all.

`encoder.pt` is written by the first encoder rank, `aggregator.pt` and `state.json` by the main rank; the folder gets
its name only when all are on disk. `epoch_0003` is from after an epoch, `epoch_0003_slide_001200` from within it. Each
file's digest is in `state.json`, so that damage is noticed. Loading runs no code from the files (`weights_only=True`).
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from manifests.files import write_text
from trainer.comm import Comm
from trainer.errors import TrainerError

_NUM_KEPT = 2
_EPOCH, _SLIDE, _DAMAGED = "epoch_", "_slide_", "damaged_"
_NAME = re.compile(rf"{_EPOCH}\d+({_SLIDE}\d+)?")


def save_checkpoint(run: Path, comm: Comm, halves: Mapping[str, dict[str, Any]], state: dict[str, Any]) -> str:
    """Writes a checkpoint; called by all ranks together. Of those before it the two newest and the best stay.

    Args:
        run: the run's folder.
        comm: this rank's end of the group.
        halves: "encoder" and/or "aggregator" to what this rank has to save of it.
        state: JSON-ready position of the run; with "epoch", from 0, "slide", how many of its slides are done, or None
            after the whole epoch, and "best_epoch", the best on validation so far or None.

    Returns:
        Why it was not written, on every rank; then all is as before. Empty if it was.
    """
    within = "" if state["slide"] is None else f"{_SLIDE}{state['slide']:06d}"
    final = run / "checkpoints" / f"{_EPOCH}{state['epoch']:04d}{within}"
    partial = final.with_name(f".{final.name}.tmp")
    writes = {"encoder": comm.is_first_encoder, "aggregator": comm.is_main}

    def begin() -> None:
        for torn in final.parent.glob(".*.tmp"):
            shutil.rmtree(torn, ignore_errors=True)
        partial.mkdir(parents=True)

    def write_halves() -> None:
        for half, content in halves.items():
            if writes[half]:
                with _file(partial, half).open("wb") as stream:
                    torch.save(content, stream)
                    stream.flush()
                    os.fsync(stream.fileno())

    def finish() -> None:
        digests = {half: _digest(_file(partial, half)) for half in writes}
        write_text(partial / "state.json", json.dumps({**state, "digests": digests}))
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)

    error = comm.any_error(_error_of(begin) if comm.is_main else "")
    error = error or comm.any_error(_error_of(write_halves))
    error = error or comm.any_error(_error_of(finish) if comm.is_main else "")
    if comm.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        for old in _superfluous(run) if not error else ():
            shutil.rmtree(old, ignore_errors=True)
    return error


def _error_of(write: Callable[[], None]) -> str:
    try:
        write()
    except OSError as error:
        return error.strerror or type(error).__name__
    except RuntimeError as error:  # What torch makes of a stream that fails.
        return str(error.__cause__ or error.__context__ or error).partition("\n")[0]
    return ""


def _superfluous(run: Path) -> list[Path]:
    best = chosen_checkpoint(run)
    return [old for old in list_checkpoints(run)[:-_NUM_KEPT] if old != best]


def list_checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    whole = (f.parent for f in (run / "checkpoints").glob(f"{_EPOCH}*/state.json"))
    return sorted((folder for folder in whole if _NAME.fullmatch(folder.name)), key=_position)


def _position(checkpoint: Path) -> tuple[int, float]:
    """(epoch, slides of it that were done); without end after the epoch."""
    epoch, _, slide = checkpoint.name.removeprefix(_EPOCH).partition(_SLIDE)
    return int(epoch), float(slide or "inf")


def load_newest(
    run: Path, comm: Comm, halves: Iterable[str]
) -> tuple[Path | None, dict[str, Any], dict[str, dict[str, Any]]]:
    """The newest checkpoint that every rank can load; called by all ranks together. Damaged ones are set aside.

    Args:
        run: the run's folder.
        comm: this rank's end of the group.
        halves: "encoder" and/or "aggregator": what this rank needs of it.

    Returns:
        Its folder, its state, and what was saved of each half, on the CPU; None and nothing if the run has none.

    Raises:
        TrainerError: there are some, or were, and none is sound.
        OSError: they cannot be reached now, which is no damage.
    """
    names: list[str] = comm.from_main([f.name for f in list_checkpoints(run)] if comm.is_main else [])
    for name in reversed(names):
        checkpoint, state, loaded, mine = run / "checkpoints" / name, {}, {}, ""
        try:
            state = read_state(checkpoint)
            loaded = {half: load_half(checkpoint, half) for half in halves}
        except TrainerError as damage:
            mine = str(damage)
        if not (error := comm.any_error(mine)):
            return checkpoint, state, loaded
        if comm.is_main:
            aside = checkpoint.with_name(f"{_DAMAGED}{name}")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.replace(aside)
            print(f"note: {error}; set aside as {aside.name}, looking at the one before it", file=sys.stderr)
    if comm.from_main(comm.is_main and any((run / "checkpoints").glob(f"{_DAMAGED}*"))):
        raise TrainerError(
            f"{run}: all checkpoints are damaged; bring a copy back, or remove checkpoints/ to begin anew"
        )
    return None, {}, {}


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
    folder = run / "checkpoints" / f"{_EPOCH}{best or 0:04d}"
    return folder if best is not None and folder in whole else whole[-1]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Where the run stood.

    Raises:
        TrainerError: damaged.
        OSError: it cannot be reached.
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    except (FileNotFoundError, ValueError):
        raise TrainerError(f"{checkpoint.name}: state.json is damaged; remove this checkpoint") from None
    return state


def load_half(checkpoint: Path, half: str) -> dict[str, Any]:
    """What was saved of one half, on the CPU.

    Raises:
        TrainerError: not what was written.
        OSError, MemoryError: it cannot be reached, or held: no damage.
    """
    file = _file(checkpoint, half)
    digest = read_state(checkpoint).get("digests", {}).get(half)  # None in checkpoints from before there were any.
    try:
        if digest not in (None, _digest(file)):
            raise ValueError("not what was written")
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError) as error:
        if not isinstance(error, FileNotFoundError):
            raise
        raise TrainerError(f"{checkpoint.name}: {file.name} is missing; remove it") from None
    except Exception as error:  # noqa: BLE001 - whatever a damaged file raises, the user gets one sentence
        raise TrainerError(f"{checkpoint.name}: {file.name} is damaged ({type(error).__name__}); remove it") from None
    return content


def _file(checkpoint: Path, half: str) -> Path:
    return checkpoint / f"{half}.pt"


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()[:32]
