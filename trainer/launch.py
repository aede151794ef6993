"""Starting the ranks of a run: torchrun's launcher for the user, or the group that torchrun already made."""

import os
from collections.abc import Sequence

from trainer.errors import TrainerError

_OURS = "SLIDEGRAD_LAUNCHER"


def is_ours() -> bool:
    """This process is a rank that `launch` started, whose parent tells the result."""
    return _OURS in os.environ


def is_launched() -> bool:
    """This process is a rank that torchrun (or a compatible launcher) started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(arguments: Sequence[str], num_processes: int, threads_per_rank: int) -> None:
    """Runs `python -m trainer ARGUMENTS` in `num_processes` ranks on this machine and waits for them.

    Args:
        arguments: the command line of `slidegrad train`, without its --nproc.
        num_processes: ranks, the aggregator included.
        threads_per_rank: compute threads of each.

    Raises:
        TrainerError: a rank refused its input; its own sentence is on stderr above.
        RuntimeError: a rank died otherwise.
        KeyboardInterrupt: Ctrl-C reached the ranks.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank))
    os.environ[_OURS] = "1"
    try:
        run(parse_args(["--standalone", "--nproc-per-node", str(num_processes), "-m", "trainer", *arguments]))
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        rank, failure = min(error.failures.items(), key=lambda item: item[1].timestamp)
        sentence = f"rank {rank} of {num_processes} ended with exit code {failure.exitcode}; its message is above"
        if 130 in codes:
            raise KeyboardInterrupt from None
        raise (TrainerError if 2 in codes else RuntimeError)(sentence) from None
