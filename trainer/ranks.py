"""A small group of gloo ranks in processes of this machine, for `slidegrad verify` and the tests."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
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
        queue.Empty: a rank neither answered nor failed in 300 s.
    """
    # forkserver: torch is imported once, in a process without threads, and every rank is a quick fork of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "timm", "trainer.step", "trainer.verify"])
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder, "meeting")
        processes = [
            context.Process(target=_rank, args=(results, function, rank, world_size, meeting, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            answers = dict(pickle.loads(results.get(timeout=_TIMEOUT_S)) for _ in processes)
        finally:
            for process in processes:
                process.join(timeout=10)
                if process.is_alive():
                    process.kill()
    if errors := [f"rank {rank} of {world_size}:\n{error}" for rank, (_, error) in sorted(answers.items()) if error]:
        raise RuntimeError("\n".join(errors))
    return [answers[rank][0] for rank in range(world_size)]


def _rank(results: Any, function: Any, rank: int, world_size: int, meeting: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        if world_size > 1:
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
        answer, error = function(rank, world_size, *args), ""
    except Exception:  # noqa: BLE001 - carried to the parent, which raises it
        answer, error = None, traceback.format_exc()
    # Pickled by value: torch would pass tensors as shared memory, which is gone when this process ends first.
    results.put(pickle.dumps((rank, (answer, error))))
    if dist.is_initialized():
        dist.destroy_process_group()
