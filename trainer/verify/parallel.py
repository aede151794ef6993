"""P and H, the parallel sides of the paper's Fig. 3: the real engine, on one of the ranks of a case.

A rank compares the halves that it holds with what the single process left, and hands back sums alone. Each way of being
wrong that such a step knows can be put in on purpose, to see that the comparison notices.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from manifests import part_bounds
from trainer.comm import Comm
from trainer.sampler import StepPlan
from trainer.step import Engine, Shard, SlideInput
from trainer.topology import Topology
from trainer.verify.cases import Case, Fault, build_halves, build_optimizer, draw_slide, plan_step
from trainer.verify.errors import Distance, Named, Trace, compare
from trainer.verify.single import named_gradients, named_state


def compare_rank(rank: int, world_size: int, cases: list[tuple[Case, Path]]) -> list[Distance]:  # noqa: ARG001
    """Runs each case on this rank, and compares it with the single process's `Trace` in its file."""
    torch.use_deterministic_algorithms(True)
    return [compare(run_rank(case, rank), Trace(**torch.load(file, mmap=True))) for case, file in cases]


def run_rank(case: Case, rank: int) -> Trace:
    """The case's steps on this rank: the trace of the halves that it holds; losses are the main rank's alone."""
    mode: Literal["shared", "dedicated"] = "shared" if case.is_shared else "dedicated"
    topology = Topology.make(case.world_size, mode, case.num_virtual, case.num_groups)
    comm = _FaultyComm(topology, rank, case.fault)
    encoder, aggregator, width = build_halves(case)
    engine = Engine(
        comm,
        encoder if comm.is_encoder else None,
        aggregator if comm.is_aggregator else None,
        num_features=width,
        seed=0,
        keep=case.keep,
        autocast=case.autocast,
        batchnorm=case.batchnorm,
    )
    engine.set_training(True)
    named = {"encoder": engine.encoder, "aggregator": engine.aggregator}
    halves = {name: half for name, half in named.items() if half is not None}
    optimizer = build_optimizer(halves.values(), case)
    losses: list[float] = []
    gradients: Named = {}
    for step in range(case.num_steps):
        optimizer.zero_grad()
        mine = [plan for plan in plan_step(case, step) if topology.group_of_slide(plan.index) == comm.group]
        losses += [outcome.loss for outcome in engine.step(_slide(case, plan, topology, rank) for plan in mine)]
        gradients = gradients or named_gradients(halves)
        optimizer.step()
    told = {"": torch.tensor(losses, dtype=torch.float64)} if comm.is_main else {}
    return Trace(losses=told, gradients=gradients, **named_state(halves))


def _slide(case: Case, plan: StepPlan, topology: Topology, rank: int) -> SlideInput:
    """A slide with this rank's virtual ranks' tiles."""
    tiles_KHWC, cells_K2, label = draw_slide(case, plan)
    shards = []
    for virtual_rank in topology.virtual_of(rank):
        begin, end = part_bounds(plan.num_rows, virtual_rank, topology.num_virtual)
        shards.append(Shard(virtual_rank, tiles_KHWC[begin:end], cells_K2[begin:end]))
    return SlideInput(plan, shards, (label,))


class _FaultyComm(Comm):
    """A `Comm` that does one thing wrong."""

    def __init__(self, topology: Topology, rank: int, fault: Fault) -> None:
        super().__init__(topology, rank, torch.device("cpu"))
        self._fault, self._factor = fault, 1

    def scatter_rows(self, all_KD: Tensor | None, mine_ND: Tensor) -> Tensor:
        """Drops the last encoder rank's gradient, or hands every row's gradient to the opposite row."""
        if all_KD is not None and self._fault == "drop":
            last = self.topology.encoders_of(self.group)[-1]
            all_KD[self.topology.rows_of(last, len(all_KD))] = 0
        if all_KD is not None and self._fault == "swap":
            all_KD = all_KD.flip(0)
        return super().scatter_rows(all_KD, mine_ND)

    def sum_over_encoders(self, tensors: Iterable[Tensor]) -> None:
        """Loses the last group's gradients, or makes DDP's factor N a factor of N + 1 that nothing undoes.

        It is there once more at each step: to a factor that stays the same AdamW is blind.
        """
        listed = self._without_last_group(tensors)
        super().sum_over_encoders(listed)
        self._factor *= self.topology.num_encoders + 1
        for tensor in listed if self._fault == "scale" else ():
            tensor *= self._factor

    def sum_over_aggregators(self, tensors: Iterable[Tensor]) -> None:
        """Loses the last group's gradients."""
        super().sum_over_aggregators(self._without_last_group(tensors))

    def _without_last_group(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        listed = list(tensors)
        for tensor in listed if self._fault == "group" and self.group == self.topology.num_groups - 1 else ():
            tensor.zero_()
        return listed
