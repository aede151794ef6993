"""Starting the ranks of a run: torchrun's launcher for the user, or the group that torchrun already made."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Sequence

from manifests.errors import Stopped
from trainer.errors import TrainerError
from trainer.stopping import SIGNALS

_OURS = "SLIDEGRAD_LAUNCHER"
_PR_SET_PDEATHSIG = 1
_SAVE_S = 900
"""Seconds that ranks have to end a step and save, before they are killed."""


def is_ours() -> bool:
    """This process is a rank that `launch` started, whose parent tells the result."""
    return _OURS in os.environ


def is_launched() -> bool:
    """This process is a rank that torchrun (or a compatible launcher) started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def end_with_launcher() -> None:
    """Has this rank told to stop, by SIGTERM, when its launcher dies: it saves, and waits for nobody (Linux alone)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def launch_id() -> str:
    """What torchrun calls this launch, the same after it has started ranks again; empty if it has no name."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if name == "none" else name


def launch(arguments: Sequence[str], num_processes: int, threads_per_rank: int, num_restarts: int = 0) -> None:
    """Runs `python -m trainer ARGUMENTS` in `num_processes` ranks on this machine and waits for them.

    SIGTERM and SIGUSR1 are passed on to the ranks, which end when they have saved.

    Args:
        arguments: the command line of `slidegrad train`, without its --nproc.
        num_processes: ranks, the aggregator included.
        threads_per_rank: compute threads of each.
        num_restarts: how often all ranks are started again after one has died.

    Raises:
        TrainerError: a rank refused its input, or died; its own sentence is on stderr above.
        RuntimeError: a fault of ours in a rank.
        Stopped: a signal ended the ranks.
        KeyboardInterrupt: Ctrl-C reached the ranks.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAVE_S))
    os.environ[_OURS] = "1"
    # The flag --signals-to-handle, for versions of torch that know it.
    os.environ.setdefault(
        "PET_SIGNALS_TO_HANDLE", ",".join(("SIGINT", "SIGHUP", "SIGQUIT", *(s.name for s in SIGNALS)))
    )
    flags = ["--standalone", "--nproc-per-node", str(num_processes), "--max-restarts", str(num_restarts)]
    try:
        run(parse_args([*flags, "-m", "trainer", *arguments]))
    except SignalException as error:
        if error.sigval in SIGNALS:
            raise Stopped from None
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        rank, failure = min(error.failures.items(), key=lambda item: item[1].timestamp)
        which = f"rank {rank} of {num_processes}"
        if 130 in codes:
            raise KeyboardInterrupt from None
        if 75 in codes:
            raise Stopped from None
        if failure.exitcode < 0:
            raise TrainerError(
                f"{which} was killed by {signal.Signals(-failure.exitcode).name}, which ended all; look for it in the "
                "system's log (memory?), then give --resume, and --restarts to have that done"
            ) from None
        sentence = f"{which} ended with exit code {failure.exitcode}; its message is above"
        raise (TrainerError if failure.exitcode == 2 else RuntimeError)(sentence) from None
