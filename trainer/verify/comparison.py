"""Gradient equivalence: ranks, virtual ranks and groups against one process, over some optimiser steps.

As the paper's Fig. 3: S is the single process (`single`), P the parallel one (`parallel`), H the parallel
one in half precision, whose single process is in half precision too.
"""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from trainer.batchnorm import BatchNorm
from trainer.config import AggregatorName
from trainer.errors import TrainerError
from trainer.ranks import run_ranks
from trainer.verify.cases import Case, DType, Fault, build_halves
from trainer.verify.errors import Result, merge, relative, sum_up
from trainer.verify.parallel import compare_rank
from trainer.verify.single import as_single, named_state, run_single

DEFAULT_ENCODERS = {
    "frozen": ("linear", "conv", "test_resnet", "vit_tiny_patch16_224"),
    "virtual": ("conv", "test_resnet"),
}
"""By what BatchNorm does; virtual: those that have any."""
DEFAULT_DTYPES: dict[str, tuple[DType, ...]] = {
    "frozen": ("float64", "float32", "bf16"),
    "virtual": ("float64", "float32"),
}
"""By what BatchNorm does; virtual: over a few values it makes so much of bf16's rounding that nothing else is seen."""
DEFAULT_TILES = {"frozen": "23,2,9", "virtual": "95,40,1"}
"""By what BatchNorm does. 23 seldom split evenly, 2 leave virtual ranks without any; virtual: no virtual rank has few
tiles but a single one, which the running statistics normalise."""
_MOST_SINGLES = 4
"""Processes that work out what is true; each holds a model, its optimiser and its gradients."""


def plan_cases(
    *,
    encoders: Sequence[str],
    aggregators: Sequence[AggregatorName],
    dtypes: Sequence[DType],
    ranks: Sequence[int],
    virtual_ranks: Sequence[int],
    groups: Sequence[int],
    num_tiles: Sequence[int],
    num_steps: int,
    batchnorm: Literal["frozen", "virtual"] = "frozen",
    fault: Fault = "none",
) -> list[Case]:
    """Every model with every way to spread it over processes.

    The ways are, for each number of groups and of encoder ranks: the numbers of virtual ranks in turn with all graphs
    kept and an aggregator of its own, and with no graph kept and an aggregator that encodes too; one number both ways.

    Args:
        encoders: linear, conv or any that `build_encoder` knows.
        aggregators: by name.
        dtypes: bf16 is the encoder in autocast.
        ranks: encoder ranks of a group.
        virtual_ranks: that each encoder rank runs.
        groups: of ranks, each at a slide of its own.
        num_tiles: of each slide of a step.
        num_steps: optimiser steps.
        batchnorm: frozen, or by the tiles of a virtual rank.
        fault: what to do wrong.

    Raises:
        TrainerError: an encoder that cannot be built, or numbers that make no case.
    """
    if not (encoders and aggregators and dtypes):
        raise TrainerError("--encoder, --aggregator and --dtype: expected at least one of each")
    if num_steps < 1:
        raise TrainerError(f"--steps {num_steps}: expected at least 1")
    if max(groups) > len(num_tiles):
        raise TrainerError(
            f"--groups {max(groups)} with slides of --tiles {','.join(map(str, num_tiles))}: expected a slide for each "
            "group at least; give fewer --groups or more --tiles"
        )
    if fault == "group" and max(groups) == 1:
        raise TrainerError("--inject-fault group: expected --groups above 1, whose gradients can be lost")
    if fault == "swap" and "mean" in aggregators:
        raise TrainerError(
            "--inject-fault swap: expected an --aggregator other than mean, which gives all tiles the same gradient"
        )
    in_turn = virtual_ranks if len(virtual_ranks) > 1 else (*virtual_ranks, *virtual_ranks)
    cases = [
        Case(
            encoder=encoder,
            aggregator=aggregator,
            dtype=dtype,
            num_tiles=tuple(num_tiles),
            num_steps=num_steps,
            batchnorm=batchnorm,
            num_groups=num_groups,
            num_ranks=num_ranks,
            num_virtual=num_ranks * virtual,
            is_shared=is_shared,
            keep=keep,
            fault=fault,
        )
        for encoder in encoders
        for aggregator in aggregators
        for dtype in dtypes
        for num_groups in groups
        for num_ranks in ranks
        for virtual, (keep, is_shared) in zip(in_turn, itertools.cycle(((None, False), (0, True))), strict=False)
        if fault != "group" or num_groups > 1  # One group has no other to be lost beside.
    ]
    for case in {(case.encoder, case.aggregator): case for case in cases}.values():
        try:
            encoder, *_ = build_halves(case)
        except TrainerError as error:
            told = str(error).removeprefix(f"encoder.name {case.encoder!r}: ")
            raise TrainerError(f"--encoder {case.encoder}: {told}") from None
        if batchnorm == "virtual" and not any(isinstance(module, BatchNorm) for module in encoder.modules()):
            raise TrainerError(
                f"--bn virtual with --encoder {case.encoder}: it has no BatchNorm; give another, or no --bn"
            )
    return list(dict.fromkeys(cases))


def verify(cases: Sequence[Case]) -> Iterator[Result]:
    """Runs the cases, those of one model with the same number of processes in one group of processes.

    Raises:
        TrainerError: processes that are too slow, or were killed.
    """
    for model in dict.fromkeys((case.encoder, case.aggregator) for case in cases):
        yield from _verify_model([case for case in cases if (case.encoder, case.aggregator) == model])


def _verify_model(cases: Sequence[Case]) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as folder:
        files = {single: Path(folder, f"{i}.pt") for i, single in enumerate(dict.fromkeys(map(as_single, cases)))}
        num_cores = len(os.sched_getaffinity(0))
        shared_out = _run_ranks(run_singles, min(_MOST_SINGLES, num_cores, len(files)), list(files.items()))
        moved = {single: far for part in shared_out for single, far in part.items()}
        for size in sorted({case.world_size for case in cases}):
            alike = [case for case in cases if case.world_size == size]
            by_rank = _run_ranks(compare_rank, size, [(case, files[as_single(case)]) for case in alike])
            for case, distances in zip(alike, zip(*by_rank, strict=True), strict=True):
                yield Result(case, merge(distances).errors, moved[as_single(case)])


def run_singles(rank: int, world_size: int, singles: list[tuple[Case, Path]]) -> dict[Case, float]:
    """Writes every so-many-th single process's trace to its file; processes share the work, and nothing else.

    Returns:
        How far the steps moved each one's parameters, relative L1.
    """
    moved: dict[Case, float] = {}
    for case, file in singles[rank::world_size]:
        trace = run_single(case)
        torch.save(vars(trace), file)
        encoder, aggregator, _ = build_halves(case)
        start = named_state({"encoder": encoder, "aggregator": aggregator})["parameters"]
        moved[case] = relative(sum_up(trace.parameters, start))
    return moved


def _run_ranks(function: Callable[..., Any], world_size: int, work: list[tuple[Case, Path]]) -> list[Any]:
    try:
        return run_ranks(function, world_size, work)
    except TimeoutError:
        raise TrainerError(
            f"{world_size} processes did not all answer within their time: too slow, or killed for memory; give fewer "
            "--ranks, --groups or --steps, or one smaller --encoder"
        ) from None
