"""The only file that talks to torch.distributed: what ranks say to each other in a step, as plain functions of tensors.

Every method is a no-op, or a copy, for one process; so there is one step for one process and for many.
"""

import os
import sys
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config import COLLECTIVES_S
from trainer.topology import AGGREGATOR_RANK, Topology

_TIMEOUT = timedelta(seconds=COLLECTIVES_S)


class Comm:
    """Rank `rank`'s end of the group.

    Args:
        topology: the ranks of the run.
        rank: this rank.
        device: where its tensors live.
    """

    def __init__(self, topology: Topology, rank: int, device: torch.device) -> None:
        self.topology, self.rank, self.device = topology, rank, device
        self._encoders: Any = None
        if topology.world_size > 1 and topology.num_encoders < topology.world_size:
            self._encoders = dist.new_group(list(topology.encoder_ranks), timeout=_TIMEOUT)

    @property
    def is_encoder(self) -> bool:
        """This rank encodes tiles."""
        return self.rank in self.topology.encoder_ranks

    @property
    def is_aggregator(self) -> bool:
        """This rank aggregates, and speaks for the run."""
        return self.rank == AGGREGATOR_RANK

    @property
    def is_first_encoder(self) -> bool:
        """This rank's encoder is the one that is written to checkpoints; all are equal."""
        return self.rank == self.topology.encoder_ranks[0]

    def agree(self, error: str, *numbers: float) -> tuple[str, list[list[float]]]:
        """Tells all ranks whether any of them failed, and some numbers of each.

        One small all-reduce while all is well.

        Returns:
            "" or one failed rank's error, and every rank's numbers, by rank; the same on all ranks.
        """
        if self.topology.world_size == 1:
            return error, [list(numbers)]
        # Each rank fills its own row, so that the sum is everybody's. float64 holds counts of bytes exactly.
        told = torch.zeros(self.topology.world_size, 1 + len(numbers), dtype=torch.float64, device=self.device)
        told[self.rank] = torch.tensor([bool(error), *numbers], dtype=torch.float64)
        dist.all_reduce(told)
        failed, *columns = told.T.tolist()
        by_rank = [list(row) for row in zip(*columns, strict=True)]
        if not any(failed):
            return "", by_rank
        errors: list[Any] = [None] * self.topology.world_size
        dist.all_gather_object(errors, error)
        return next(e for e in errors if e), by_rank

    def gather_rows(self, mine_ND: Tensor, num_rows: int, width: int) -> Tensor | None:
        """Features of all encoder ranks, in slide order, on the aggregator.

        Args:
            mine_ND: this rank's rows, (its share, width).
            num_rows: rows in all.
            width: D, which a dedicated aggregator cannot see.

        Returns:
            (num_rows, width) on the aggregator, None elsewhere.
        """
        if not self.is_aggregator:
            if len(mine_ND):
                _exchange([dist.P2POp(dist.isend, mine_ND.contiguous(), AGGREGATOR_RANK)])
            return None
        all_KD = mine_ND.new_empty(num_rows, width)
        ops = []
        for rank in self.topology.encoder_ranks:
            rows = self.topology.rows_of(rank, num_rows)
            if rank == self.rank:
                all_KD[rows] = mine_ND
            elif rows.stop > rows.start:
                ops.append(dist.P2POp(dist.irecv, all_KD[rows], rank))
        _exchange(ops)
        return all_KD

    def scatter_rows(self, all_KD: Tensor | None, mine_ND: Tensor) -> Tensor:
        """The inverse of `gather_rows`: each encoder rank's rows of the aggregator's matrix.

        Args:
            all_KD: (num_rows, width) on the aggregator, None elsewhere.
            mine_ND: this rank's features; the result has its shape.
        """
        if all_KD is None:
            received_ND = torch.empty_like(mine_ND, memory_format=torch.contiguous_format)
            if len(mine_ND):
                _exchange([dist.P2POp(dist.irecv, received_ND, AGGREGATOR_RANK)])
            return received_ND
        ops = []
        for rank in self.topology.encoder_ranks:
            rows = self.topology.rows_of(rank, len(all_KD))
            if rank != self.rank and rows.stop > rows.start:
                ops.append(dist.P2POp(dist.isend, all_KD[rows].contiguous(), rank))
        _exchange(ops)
        return all_KD[self.topology.rows_of(self.rank, len(all_KD))]

    def sum_over_encoders(self, tensors: Iterable[Tensor]) -> None:
        """Adds up tensors over the encoder ranks, in place; one all-reduce per dtype."""
        if self.topology.num_encoders == 1 or not self.is_encoder:
            return
        groups: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault(tensor.dtype, []).append(tensor)
        for group in groups.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.all_reduce(flat, group=self._encoders)
            start = 0
            for tensor in group:
                tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
                start += tensor.numel()

    def share_encoder(self, tensors: Iterable[Tensor]) -> None:
        """Copies the first encoder rank's tensors to the other encoder ranks."""
        if self.topology.num_encoders > 1 and self.is_encoder:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), self.topology.encoder_ranks[0], group=self._encoders)

    def from_aggregator(self, value: Any) -> Any:
        """The aggregator's (small, picklable) value on every rank."""
        if self.topology.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, AGGREGATOR_RANK)
        return box[0]

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.topology.world_size > 1:
            dist.barrier()


def join_group() -> tuple[int, int, torch.device]:
    """Joins the group that torchrun made, or none.

    Returns:
        (rank, world size, this rank's device).
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if 0 < torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        # NCCL wants a device for each rank: fewer devices than ranks are no use.
        if rank == 0:
            print(f"note: {torch.cuda.device_count()} GPUs for more ranks: running on the CPU", file=sys.stderr)
    elif torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    return rank, world_size, device


def leave_group() -> None:
    """Leaves the group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _exchange(ops: list[Any]) -> None:
    for work in dist.batch_isend_irecv(ops) if ops else ():
        work.wait()
