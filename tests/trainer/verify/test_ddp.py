"""The paper's way through DDP and ours give the same gradients; and the trap in DDP that our way has not.

The paper wraps the encoder in DDP, and each of N encoder ranks calls backward on the pseudo-loss N * sum(f * g), f its
features and g their gradients from the aggregator. DDP averages over the ranks; the factor N makes the average a sum.
"""

import contextlib
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from manifests import part_bounds
from trainer.comm import Comm
from trainer.heads import Head
from trainer.ranks import run_ranks
from trainer.topology import Topology
from trainer.verify.cases import Case, build_halves, draw_slide, plan_step
from trainer.verify.errors import Named, relative, sum_up, worst_tensor
from trainer.verify.parallel import run_rank
from trainer.verify.single import as_single, named_gradients, run_single

Way = Literal["paper", "no factor", "kept", "last pair", "ours"]
"""paper: one chunk a rank. no factor: so, without N. kept: several chunks, all graphs from DDP's forward. last pair: of
several chunks only the last one's forward and backward synchronised, one after the other. ours: the engine."""


def a_case(num_ranks: int, num_chunks: int, num_tiles: int) -> Case:
    """One slide, `num_chunks` virtual ranks on each encoder rank, float64."""
    num_virtual = num_ranks * num_chunks
    return Case(
        encoder="conv",
        dtype="float64",
        num_tiles=(num_tiles,),
        num_steps=1,
        num_ranks=num_ranks,
        num_virtual=num_virtual,
    )


def encoder_gradients(rank: int, world_size: int, case: Case, ways: list[Way]) -> list[Named]:  # noqa: ARG001
    """The encoder's gradients on this rank, by each of the ways; nothing on the aggregator."""
    torch.use_deterministic_algorithms(True)
    return [ours(case, rank) if way == "ours" else by_ddp(case, rank, way) for way in ways]


def ours(case: Case, rank: int) -> Named:
    gradients = run_rank(case, rank).gradients
    return {name: value for name, value in gradients.items() if name.startswith("encoder.")}


def by_ddp(case: Case, rank: int, way: Way) -> Named:
    topology = Topology.make(case.world_size, "dedicated", case.num_virtual)
    comm = Comm(topology, rank, torch.device("cpu"))
    encoder, aggregator, width = build_halves(case)
    encoder.eval()  # BatchNorm frozen: chunks are no part of the answer.
    (plan,) = plan_step(case, 0)
    tiles_KHWC, cells_K2, label = draw_slide(case, plan)
    if not comm.is_encoder:
        features_KD = comm.gather_rows(torch.zeros(0, width, dtype=torch.float64), len(tiles_KHWC))
        assert features_KD is not None
        features_KD.requires_grad_()
        Head.of_classes(2).loss(aggregator(features_KD, cells_K2)[0], (label,)).backward()
        comm.scatter_rows(features_KD.grad, torch.zeros(0, width, dtype=torch.float64))
        return {}
    ddp = DistributedDataParallel(encoder, process_group=comm.encoder_group)
    bounds = [part_bounds(len(tiles_KHWC), part, case.num_virtual) for part in topology.virtual_of(rank)]
    chunks = [tiles_KHWC[begin:end] for begin, end in bounds]
    factor = 1 if way == "no factor" else case.num_ranks
    with ddp.no_sync() if way == "last pair" else contextlib.nullcontext():
        passes = [ddp(chunk) for chunk in chunks]
    mine_ND = torch.cat([features_ND.detach() for features_ND in passes])
    gradient_ND = comm.scatter_rows(comm.gather_rows(mine_ND, len(tiles_KHWC)), mine_ND)
    pieces = gradient_ND.split([len(chunk) for chunk in chunks])
    if way == "last pair":
        for features_ND, piece_ND in list(zip(passes, pieces, strict=True))[:-1]:
            pseudo_loss(features_ND, piece_ND, factor).backward()
        passes, pieces = [ddp(chunks[-1])], pieces[-1:]
    for features_ND, piece_ND in zip(passes, pieces, strict=True):
        pseudo_loss(features_ND, piece_ND, factor).backward()
    dist.barrier(comm.encoder_group)
    return named_gradients({"encoder": ddp.module})


def pseudo_loss(features_ND: Tensor, gradient_ND: Tensor, factor: int) -> Tensor:
    """Its gradient by the features is `factor` times the one that is given."""
    return factor * (features_ND * gradient_ND).sum()


def errors_of(case: Case, *ways: Way) -> dict[Way, list[tuple[float, float]]]:
    """(whole encoder, worst tensor) of each encoder rank against one process, by way."""
    true = run_single(as_single(case)).gradients
    by_rank = run_ranks(encoder_gradients, case.world_size, case, list(ways))[1:]
    return {
        way: [(relative(sums), worst_tensor(sums)) for sums in (sum_up(found[i], true) for found in by_rank)]
        for i, way in enumerate(ways)
    }


@pytest.mark.parametrize(("num_ranks", "num_tiles"), [(2, 24), (2, 23), (3, 24), (3, 23), (3, 4)])
def test_the_papers_ddp_with_its_factor_gives_our_sum(num_ranks: int, num_tiles: int) -> None:
    """With equal shards, 12 or 8 tiles each, and with uneven ones."""
    errors = errors_of(a_case(num_ranks, 1, num_tiles), "paper", "ours")
    assert max(max(e) for of_ranks in errors.values() for e in of_ranks) <= 1e-12


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_without_the_factor_ddps_gradients_are_n_times_too_small(num_ranks: int) -> None:
    case = a_case(num_ranks, 1, 23)
    true = run_single(as_single(case)).gradients
    for (found,) in run_ranks(encoder_gradients, case.world_size, case, ["no factor"])[1:]:
        assert relative(sum_up({name: num_ranks * value for name, value in found.items()}, true)) <= 1e-12
        assert relative(sum_up(found, true)) == pytest.approx(1 - 1 / num_ranks, rel=1e-9)


@pytest.mark.parametrize(("num_ranks", "num_chunks"), [(2, 2), (2, 3), (3, 2)])
def test_chunks_whose_graphs_ddp_keeps_are_wrong_without_a_word_and_ours_are_right(
    num_ranks: int, num_chunks: int
) -> None:
    """The last forward arms DDP's reducer; the first backward, of another chunk, sets it off."""
    errors = errors_of(a_case(num_ranks, num_chunks, 23), "kept", "last pair", "ours")
    trapped = min(whole for whole, _ in errors["kept"])
    assert trapped > 0.05, (
        f"DDP of torch {torch.__version__} shows the trap no longer: gradients of several kept chunks are off by "
        f"{trapped:.1e}; what is written about it, and the reason for an explicit sum, is to be written anew"
    )
    assert max(max(e) for way in ("last pair", "ours") for e in errors[way]) <= 1e-12
