"""`python -m tests.trainer.faulty_rank …`: the trainer, with things that go wrong at given places, each once.

The environment says what: FAULTS are `ACTION:PLACE:RANK:COUNT`, with commas between, to be done by rank RANK at its
COUNT-th visit of PLACE; FAULTS_DONE is a folder with a file for each that was done, so that a process that is started
again lives. INDEX_PID is the process that is killed as the index. READ_LOG, if it is there, is a folder where each
process writes down what it reads, for each shard a line of (epoch, slide, virtual rank, rows).
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slidegrad import main
from trainer import checkpoint
from trainer.comm import Comm
from trainer.encode import EncoderSide
from trainer.loading import reading
from trainer.sampler import ShardPlan
from trainer.update import Update

PLACES: dict[str, tuple[Any, str]] = {
    "forward": (EncoderSide, "encode"),
    "gather": (Comm, "gather_rows"),
    "backward": (EncoderSide, "second_pass"),
    "optimizer": (Update, "finish"),
    "checkpoint": (checkpoint, "_error_of"),
    "validation": (EncoderSide, "score_pass"),
    "read": (reading, "read_plan"),
}
ACTIONS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "crash": lambda: signal.pthread_kill(threading.get_ident(), signal.SIGSEGV),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "usr1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "lose_index": lambda: os.kill(int(os.environ["INDEX_PID"]), signal.SIGKILL),
    "stall": lambda: time.sleep(float(os.environ["STALL_S"])),
}


def arm(fault: str, done: Path) -> None:
    """Puts the fault in its place."""
    action, place, rank, count = fault.split(":")
    owner, name = PLACES[place]
    whole, visits = getattr(owner, name), 0

    def around(*args: Any, **kwargs: Any) -> Any:
        nonlocal visits
        visits += 1
        if os.environ.get("RANK", "0") == rank and visits == int(count) and not done.exists():
            done.touch()
            ACTIONS[action]()
        return whole(*args, **kwargs)

    setattr(owner, name, around)


def log_reads(folder: Path) -> None:
    """Has every shard written down that is read."""
    whole = reading.ShardReader.read

    def read(self: Any, plan: ShardPlan, out_NHWC: Any) -> Any:
        line = f"{plan.step.epoch}\t{plan.step.slide_id}\t{plan.virtual_rank}\t{plan.rows.tolist()}\n"
        with (folder / str(os.getpid())).open("a") as stream:
            stream.write(line)
        return whole(self, plan, out_NHWC)

    reading.ShardReader.read = read  # type: ignore[method-assign]


if __name__ == "__main__":
    if "READ_LOG" in os.environ:
        log_reads(Path(os.environ["READ_LOG"]))
    for each in os.environ["FAULTS"].split(",") if "FAULTS" in os.environ else ():
        arm(each, Path(os.environ["FAULTS_DONE"], each))
    sys.exit(main(["train", *sys.argv[1:]]))
