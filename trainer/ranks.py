"""A small group of gloo ranks in processes of this machine, for `slidegrad verify` and the tests."""

import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT_S = 300


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Calls `function(rank, world_size, *args)` in `world_size` processes that form a gloo group.

    Args:
        function: importable; its result must pickle.
        world_size: processes; 1 runs in a process of its own too, without a group.

    Returns:
        The results, by rank.

    Raises:
        RuntimeError: a rank failed; with its traceback.
        TimeoutError: a rank neither answered nor failed in 300 s, or was killed.
    """
    # forkserver: torch is imported once, in a process without threads, and every rank is a quick fork of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "timm", "trainer.step", "trainer.verify.comparison"])
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Or its imports answer Ctrl-C with a traceback.
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, handler)
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder, "meeting")
        ends = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(target=_rank, args=(end, function, rank, world_size, meeting, args), daemon=True)
            for rank, (_, end) in enumerate(ends)
        ]
        try:
            for process, (_, end) in zip(processes, ends, strict=True):
                process.start()
                end.close()
            until = time.monotonic() + _TIMEOUT_S
            answers = [_answer(ours, until) for ours, _ in ends]
            for process in processes:
                process.join(timeout=10)
        finally:  # After Ctrl-C, or without an answer, nobody waits for the others.
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
    if errors := [f"rank {rank} of {world_size}:\n{error}" for rank, (_, error) in enumerate(answers) if error]:
        raise RuntimeError("\n".join(errors))
    return [answer for answer, _ in answers]


def _answer(end: "Connection[Any, Any]", until: float) -> tuple[Any, str]:
    """What a rank found, and its error."""
    try:
        if end.poll(max(0.0, until - time.monotonic())):
            found: tuple[Any, str] = pickle.loads(end.recv_bytes())
            return found
    except EOFError:
        raise TimeoutError("a rank was killed") from None
    raise TimeoutError(f"a rank did not answer in {_TIMEOUT_S} s")


def _rank(
    end: "Connection[Any, Any]", function: Any, rank: int, world_size: int, meeting: Path, args: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends all ranks; what there is to say the parent says.
    if not meeting.parent.exists():  # It came before this rank was there.
        return
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        if world_size > 1:
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
        answer, error = function(rank, world_size, *args), ""
    except Exception:  # noqa: BLE001 - carried to the parent, which raises it
        answer, error = None, traceback.format_exc()
    # Pickled by value: torch would pass tensors as shared memory, which is gone when this process ends first.
    end.send_bytes(pickle.dumps((answer, error)))
    if dist.is_initialized():
        dist.destroy_process_group()
