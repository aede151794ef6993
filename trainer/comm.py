"""The only file that talks to torch.distributed: what ranks say to each other in a step, as plain functions of tensors.

Every method is a no-op, or a copy, for one process; so there is one step for one process and for many. A slide is a
matter of its group of ranks (`agree`, `gather_rows`, `scatter_rows`); a step, with the slides of all groups, of all.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from trainer.config import COLLECTIVES_S
from trainer.topology import MAIN_RANK, Topology

_TIMEOUT = timedelta(seconds=COLLECTIVES_S)
_MEETING = timedelta(minutes=10)
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "connectFullMesh failed")
"""What gloo says when a rank is gone."""


class Comm:
    """Rank `rank`'s end of the run's processes.

    Args:
        topology: the ranks of the run.
        rank: this rank.
        device: where its tensors live.

    Attributes:
        group: this rank's group, by number.
        aggregator_rank: the rank that aggregates for it.
    """

    def __init__(self, topology: Topology, rank: int, device: torch.device) -> None:
        self.topology, self.rank, self.device = topology, rank, device
        self.group = topology.group_of(rank)
        self.aggregator_rank = topology.aggregator_ranks[self.group]
        self._group: Any = None
        for group in range(topology.num_groups):  # All ranks make all groups, in one order: torch asks for that.
            made = self._make(topology.ranks_of(group))
            self._group = made if group == self.group else self._group
        self._encoders = self._make(topology.encoder_ranks)
        self._aggregators = self._make(topology.aggregator_ranks)

    def _make(self, ranks: Sequence[int]) -> Any:
        """A group of processes; None stands for all of them, and for none where nobody has anything to say."""
        if len(ranks) in (1, self.topology.world_size):
            return None
        return dist.new_group(list(ranks), timeout=_TIMEOUT)

    @property
    def is_encoder(self) -> bool:
        """This rank encodes tiles."""
        return self.rank in self.topology.encoder_ranks

    @property
    def is_aggregator(self) -> bool:
        """This rank aggregates, for its group."""
        return self.rank == self.aggregator_rank

    @property
    def is_main(self) -> bool:
        """This rank speaks for the run; its aggregator is the one that is written to checkpoints, all are equal."""
        return self.rank == MAIN_RANK

    @property
    def is_first_encoder(self) -> bool:
        """This rank's encoder is the one that is written to checkpoints; all are equal."""
        return self.rank == self.topology.encoder_ranks[0]

    @property
    def encoder_group(self) -> Any:
        """torch's group of all encoder ranks; None for all ranks."""
        return self._encoders

    def encoder_mesh(self) -> DeviceMesh:
        """The encoder ranks as torch's mesh of one dimension, for what it spreads over them."""
        group = self._encoders or dist.group.WORLD
        assert group is not None, "one encoder rank makes no mesh"
        return DeviceMesh.from_group(group, self.device.type)

    def agree(self, error: str, *numbers: float) -> tuple[str, list[list[float]]]:
        """Tells the ranks of a group whether any of them failed, and some numbers of each.

        One small all-reduce while all is well.

        Returns:
            "" or one failed rank's error, and every rank's numbers, by rank; the same on all ranks of the group.
        """
        size = self.topology.group_size
        if size == 1:
            return error, [list(numbers)]
        # Each rank fills its own row, so that the sum is everybody's. float64 holds counts of bytes exactly.
        told = torch.zeros(size, 1 + len(numbers), dtype=torch.float64, device=self.device)
        told[self.rank % size] = torch.tensor([bool(error), *numbers], dtype=torch.float64)
        dist.all_reduce(told, group=self._group)
        failed, *columns = told.T.tolist()
        by_rank = [list(row) for row in zip(*columns, strict=True)]
        if not any(failed):
            return "", by_rank
        errors: list[Any] = [None] * size
        dist.all_gather_object(errors, error, group=self._group)
        return next(e for e in errors if e), by_rank

    def gather_rows(self, mine_ND: Tensor, num_rows: int) -> Tensor | None:
        """Rows of all encoder ranks of the group, in slide order, on its aggregator.

        Args:
            mine_ND: this rank's rows, (its share, width); of the same width and dtype on all ranks.
            num_rows: rows in all.

        Returns:
            (num_rows, width) on the aggregator, None elsewhere.
        """
        if not self.is_aggregator:
            if len(mine_ND):
                self._exchange([(dist.isend, mine_ND.contiguous(), self.aggregator_rank)])
            return None
        all_KD = mine_ND.new_empty(num_rows, mine_ND.shape[1])
        messages: list[tuple[Any, Tensor, int]] = []
        for rank in self.topology.encoders_of(self.group):
            rows = self.topology.rows_of(rank, num_rows)
            if rank == self.rank:
                all_KD[rows] = mine_ND
            elif rows.stop > rows.start:
                messages.append((dist.irecv, all_KD[rows], rank))
        self._exchange(messages)
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
                self._exchange([(dist.irecv, received_ND, self.aggregator_rank)])
            return received_ND
        messages: list[tuple[Any, Tensor, int]] = []
        for rank in self.topology.encoders_of(self.group):
            rows = self.topology.rows_of(rank, len(all_KD))
            if rank != self.rank and rows.stop > rows.start:
                messages.append((dist.isend, all_KD[rows].contiguous(), rank))
        self._exchange(messages)
        return all_KD[self.topology.rows_of(self.rank, len(all_KD))]

    def _exchange(self, messages: Sequence[tuple[Any, Tensor, int]]) -> None:
        """Sends and receives, all at once, within the group."""
        ops = [dist.P2POp(what, tensor, rank, group=self._group) for what, tensor, rank in messages]
        for work in dist.batch_isend_irecv(ops) if ops else ():
            work.wait()

    def sum_over_encoders(self, tensors: Iterable[Tensor]) -> None:
        """Adds up tensors over all encoder ranks, in place; one all-reduce per dtype."""
        if self.is_encoder:
            _sum(tensors, self.topology.encoder_ranks, self._encoders)

    def sum_over_aggregators(self, tensors: Iterable[Tensor]) -> None:
        """Adds up tensors over the groups' aggregators, in place."""
        if self.is_aggregator:
            _sum(tensors, self.topology.aggregator_ranks, self._aggregators)

    def share_encoder(self, tensors: Iterable[Tensor]) -> None:
        """Copies the first encoder rank's tensors to the other encoder ranks."""
        if len(self.topology.encoder_ranks) > 1 and self.is_encoder:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), self.topology.encoder_ranks[0], group=self._encoders)

    def from_main(self, value: Any) -> Any:
        """The main rank's (small, picklable) value on every rank."""
        if self.topology.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, MAIN_RANK)
        return box[0]

    def from_groups(self, value: Any) -> list[Any]:
        """Each group's aggregator's (small, picklable) value, by group, on every rank."""
        if self.topology.num_groups == 1:
            return [self.from_main(value)]
        values: list[Any] = [None] * self.topology.world_size
        dist.all_gather_object(values, value if self.is_aggregator else None)
        return [values[rank] for rank in self.topology.aggregator_ranks]

    def to_main(self, value: Any) -> list[Any]:
        """Each group's aggregator's (picklable) value, by group, on the main rank; nothing elsewhere."""
        values: list[Any] | None = [None] * self.topology.world_size if self.is_main else None
        if self.topology.world_size == 1:
            return [value]
        dist.gather_object(value if self.is_aggregator else None, values, MAIN_RANK)
        return [values[rank] for rank in self.topology.aggregator_ranks] if values else []

    def from_all(self, value: Any) -> list[Any]:
        """Each rank's (small, picklable) value, by rank, on every rank."""
        values: list[Any] = [value] * self.topology.world_size
        if self.topology.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def total(self, *numbers: float) -> list[float]:
        """Each number's sum over all ranks, on every rank."""
        if self.topology.world_size == 1:
            return list(numbers)
        box = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(box)
        found: list[float] = box.tolist()
        return found

    def any_error(self, error: str) -> str:
        """One failed rank's error, or "" if none failed, on every rank of the run."""
        if not any(self.total(bool(error))):
            return ""
        errors = [error] * self.topology.world_size
        if self.topology.world_size > 1:
            dist.all_gather_object(errors, error)
        return next(e for e in errors if e)

    def least(self, number: int) -> int:
        """The least of all ranks' numbers, on every rank."""
        if self.topology.world_size == 1:
            return number
        box = torch.tensor([number], dtype=torch.int64, device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MIN)
        return int(box.item())

    def most(self, number: int) -> int:
        """The most of all ranks' numbers, on every rank."""
        return -self.least(-number)

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
    device = choose_device(int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif torch.cuda.is_available() and rank == MAIN_RANK:
        print(f"note: {torch.cuda.device_count()} GPUs for more ranks: running on the CPU", file=sys.stderr)
    if world_size > 1:
        # The launcher has the store: where that died meanwhile, nobody waits for hours.
        store, *_ = next(rendezvous("env://", timeout=_MEETING))
        store.set_timeout(_TIMEOUT)
        if world_size == int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
            # torchrun may keep its store over restarts, with addresses of the dead. Only one node's ranks all know how
            # often they were started; on several, trainer/launch/torchrun.sh asks for a store each time.
            name = f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
            store = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    return rank, world_size, device


def choose_device(local_rank: int, num_local: int) -> torch.device:
    """The device of one of `num_local` ranks of this machine: a GPU of its own, else the CPU for all of them.

    NCCL wants a device for each rank: fewer devices than ranks are no use.
    """
    if torch.cuda.is_available() and num_local <= torch.cuda.device_count():
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone."""
    network = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    return isinstance(error, network) or any(sign in str(error) for sign in _LOST)


def leave_group() -> None:
    """Leaves the group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _sum(tensors: Iterable[Tensor], ranks: Sequence[int], group: Any) -> None:
    if len(ranks) == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for alike in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        dist.all_reduce(flat, group=group)
        start = 0
        for tensor in alike:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()
