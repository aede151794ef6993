"""`machine.keep=auto`: as many graphs are kept as fit, what one takes is measured truly, measuring leaves no trace."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import trainer.memory
from trainer.aggregators import build_aggregator
from trainer.cli import Train
from trainer.comm import Comm
from trainer.config import Aggregator, Augment, Encoder
from trainer.encoders.encoder import build_encoder
from trainer.errors import TrainerError
from trainer.journal import read_events
from trainer.loading.shards import Shard, SlideInput
from trainer.memory import (
    Cost,
    Line,
    count_kept,
    measure_aggregator,
    measure_cost,
    most_tiles,
    settle_keep,
    states_bytes,
)
from trainer.ranks import run_ranks
from trainer.sampler import StepPlan
from trainer.step import Engine
from trainer.topology import Topology

NUM_VIRTUAL, PER_RANK = 4, 24
MODELS = {"test_resnet": 32, "test_vit": 160}
"""Encoder to the side of its tiles, px."""

LINES = st.builds(Line, st.integers(0, 10**9), st.integers(1, 10**8))
COSTS = st.builds(Cost, LINES, LINES)
TILES = st.integers(1, 5_000)
BYTES = st.integers(-(10**9), 10**12)


@given(sizes=st.tuples(st.integers(1, 50), st.integers(51, 200)), line=LINES)
def test_a_line_goes_through_what_was_measured(sizes: tuple[int, int], line: Line) -> None:
    values = (line.at(sizes[0]), line.at(sizes[1]))
    found = Line.through(sizes, values)
    assert (found.at(sizes[0]), found.at(sizes[1])) == values
    assert found.at(1_000) == line.at(1_000)


@given(sizes=st.tuples(st.integers(1, 50), st.integers(51, 200)), values=st.tuples(BYTES, BYTES))
def test_no_line_falls_or_begins_below_zero(sizes: tuple[int, int], values: tuple[int, int]) -> None:
    found = Line.through(sizes, values)
    assert found.at(0) >= 0
    assert found.at(1_000) >= found.at(sizes[0])


@given(cost=COSTS, num_tiles=TILES, num_bytes=BYTES)
def test_the_graphs_that_are_kept_fit_and_one_more_would_not(cost: Cost, num_tiles: int, num_bytes: int) -> None:
    def most_ever(kept: int) -> int:
        return cost.peak.at(num_tiles) + (kept - 1) * cost.graph.at(num_tiles)

    kept = count_kept(cost, num_tiles, num_bytes)
    assert kept == 0 or most_ever(kept) <= num_bytes
    assert most_ever(kept + 1) > num_bytes


@given(cost=COSTS, num_bytes=BYTES)
def test_the_largest_virtual_rank_fits_and_a_larger_one_does_not(cost: Cost, num_bytes: int) -> None:
    most = most_tiles(cost, num_bytes)
    assert most == 0 or count_kept(cost, most, num_bytes) >= 1
    assert count_kept(cost, most + 1, num_bytes) == 0


def make_engine(
    encoder: str = "test_resnet",
    num_virtual: int = NUM_VIRTUAL,
    topology: Topology | None = None,
    rank: int = 0,
    **more: Any,
) -> Engine:
    """In training mode, the same weights at each call; alone unless a topology says otherwise."""
    torch.manual_seed(0)
    half = build_encoder(Encoder(name=encoder), MODELS[encoder])
    aggregator = build_aggregator(Aggregator(hidden=8, dropout=0.1), half.num_features, 2)
    comm = Comm(topology or Topology.make(1, "shared", num_virtual), rank, torch.device("cpu"))
    engine = Engine(
        comm,
        half if comm.is_encoder else None,
        aggregator if comm.is_aggregator else None,
        num_features=half.num_features,
        seed=0,
        **more,
    )
    engine.set_training(True)
    return engine


def make_shard(num_tiles: int, tile_px: int, virtual_rank: int = 0) -> Shard:
    tiles_NHWC = torch.randint(0, 256, (num_tiles, tile_px, tile_px, 3), dtype=torch.uint8)
    return Shard(virtual_rank, tiles_NHWC, torch.zeros(num_tiles, 2, dtype=torch.int32))


@pytest.mark.parametrize("encoder", MODELS)
@pytest.mark.parametrize("num_tiles", [7, 20])
@pytest.mark.parametrize("more", [{}, {"augment": Augment(blur=0.5)}, {"autocast": torch.bfloat16}])
def test_a_graph_takes_what_autograd_saves_for_it(encoder: str, num_tiles: int, more: dict[str, Any]) -> None:
    """Neither number of tiles was measured: both lie on the line through those that were."""
    engine = make_engine(encoder, **more)
    cost = measure_cost(engine.side, MODELS[encoder])
    assert engine.encoder is not None
    # Tensors live as long as the hook holds them: no storage is counted in another's place.
    of_model = {parameter.untyped_storage().data_ptr() for parameter in engine.encoder.parameters()}
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        plan = StepPlan(0, 0, "slide", num_tiles, num_tiles)
        features_ND = engine.side.encode(plan, make_shard(num_tiles, MODELS[encoder]), moves_stats=False)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    true = sum(num_bytes for pointer, num_bytes in storages.items() if pointer not in of_model)
    assert features_ND.requires_grad
    assert cost.graph.at(num_tiles) == pytest.approx(true, rel=0.03)


@pytest.mark.parametrize("keep", [0, 1, 2, 4])
def test_a_step_takes_what_was_predicted(keep: int) -> None:
    """Counted in tensors; beside the graphs lie the gradients, and the features of all tiles, which are small here."""
    engine = make_engine("test_vit", keep=keep)
    cost = measure_cost(engine.side, MODELS["test_vit"])
    shards = [make_shard(PER_RANK, MODELS["test_vit"], v) for v in range(NUM_VIRTUAL)]
    plan = StepPlan(0, 0, "slide", NUM_VIRTUAL * PER_RANK, NUM_VIRTUAL * PER_RANK)
    with trainer.memory.LiveBytes() as live:
        engine.step([SlideInput(plan, shards, (1,))])
    graphs = cost.peak.at(PER_RANK) + (max(1, keep) - 1) * cost.graph.at(PER_RANK)
    gradients = states_bytes(engine.encoder, engine.aggregator) // 3
    assert live.most == pytest.approx(graphs + gradients, rel=0.05)


def trace(engine: Engine) -> list[Tensor]:
    """All that a measurement could leave behind in the model and in torch."""
    halves = [half for half in (engine.encoder, engine.aggregator) if half is not None]
    buffers = [buffer.clone() for half in halves for buffer in half.state_dict().values()]
    modes = torch.tensor([module.training for half in halves for module in half.modules()])
    return [*buffers, modes, torch.get_rng_state()]


@pytest.mark.parametrize("has_gradients", [False, True])
@pytest.mark.parametrize("batchnorm", ["running", "frozen"])
def test_measuring_leaves_no_trace(has_gradients: bool, batchnorm: str) -> None:
    """Parameters, BatchNorm's statistics and counts, training modes, gradients, random state."""
    engine = make_engine(batchnorm=batchnorm, augment=Augment())
    assert engine.encoder is not None
    assert engine.aggregator is not None
    parameters = [*engine.encoder.parameters(), *engine.aggregator.parameters()]
    if has_gradients:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
    before, gradients = trace(engine), [parameter.grad for parameter in parameters]
    measure_cost(engine.side, 32)
    measure_aggregator(engine.aggregator, engine.side.num_features, torch.float32, engine.comm.device)
    assert all(torch.equal(a, b) for a, b in zip(trace(engine), before, strict=True))
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is gradient
        assert gradient is None or bool((gradient == 1).all())


def settle(engine: Engine, most_rows: int = NUM_VIRTUAL * PER_RANK, num_graphs: float = 1e6) -> str:
    """`settle_keep` where memory holds so many graphs of a virtual rank, beside all that does not depend on `keep`."""
    assert engine.encoder is not None
    assert engine.aggregator is not None
    side = engine.side
    cost = measure_cost(side, 32)
    rest = measure_aggregator(engine.aggregator, side.num_features, side.dtype, engine.comm.device).at(most_rows)
    rest += states_bytes(engine.encoder, engine.aggregator)
    graphs = cost.peak.at(PER_RANK) + (num_graphs - 1) * cost.graph.at(PER_RANK)
    cpu_bytes = (graphs + rest) / trainer.memory._SHARE
    return settle_keep(engine, most_rows=most_rows, tile_px=32, cpu_bytes=round(cpu_bytes))


@pytest.fixture
def holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is as good as empty: its share of memory is all free."""
    monkeypatch.setattr("trainer.memory._resident_bytes", lambda: 0)


@pytest.mark.usefixtures("holds_nothing")
def test_all_graphs_are_kept_where_memory_is_large() -> None:
    engine = make_engine(keep=1)
    note = settle(engine)
    assert engine.side.keep is None
    assert note.startswith("machine.keep=auto: 4 of a rank's 4 graphs are kept, ")


@pytest.mark.usefixtures("holds_nothing")
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_some_graphs_are_kept_where_memory_is_small(kept: int) -> None:
    engine = make_engine()
    note = settle(engine, num_graphs=kept + 0.5)
    assert engine.side.keep == kept
    assert note.startswith(f"machine.keep=auto: {kept} of a rank's 4 graphs are kept, ")


@pytest.mark.usefixtures("holds_nothing")
def test_virtual_ranks_that_cannot_fit_are_refused_with_the_number_that_can() -> None:
    def settle_in_little(num_virtual: int) -> str:
        return settle(make_engine(num_virtual=num_virtual), num_graphs=0.6)

    with pytest.raises(TrainerError, match="virtual_ranks=4 makes virtual ranks of 24 tiles, memory holds") as caught:
        settle_in_little(NUM_VIRTUAL)
    given_number = re.search(r"with --virtual-ranks (\d+) or more", str(caught.value))
    assert given_number is not None
    enough = int(given_number[1])
    assert f"of a rank's {enough} graphs are kept" in settle_in_little(enough)
    with pytest.raises(TrainerError, match=f"virtual_ranks={enough - 1} makes"):
        settle_in_little(enough - 1)


@pytest.mark.usefixtures("holds_nothing")
def test_memory_that_holds_not_one_tile_is_refused() -> None:
    with pytest.raises(TrainerError, match="memory holds the graph of 0; not even one fits"):
        settle_keep(make_engine(), most_rows=96, tile_px=32, cpu_bytes=1_000)


def test_nothing_is_measured_of_an_encoder_that_is_not_trained() -> None:
    assert settle_keep(make_engine(is_frozen=True), most_rows=96, tile_px=32, cpu_bytes=0) == ""


def settled_by_rank(rank: int, world_size: int) -> tuple[int | None, str]:
    """Memory is scarce on the last rank alone."""
    engine = make_engine(topology=Topology.make(world_size, "dedicated", 2 * NUM_VIRTUAL), rank=rank)
    cpu_bytes = 10**13
    if rank == world_size - 1:
        cost = measure_cost(engine.side, 32)
        room = cost.peak.at(PER_RANK) + 1.5 * cost.graph.at(PER_RANK) + states_bytes(engine.encoder)
        cpu_bytes = round(room / trainer.memory._SHARE) + trainer.memory._resident_bytes()
    note = settle_keep(engine, most_rows=2 * NUM_VIRTUAL * PER_RANK, tile_px=32, cpu_bytes=cpu_bytes)
    return engine.side.keep, note


@pytest.mark.slow
def test_the_rank_with_least_memory_decides_for_all() -> None:
    found = run_ranks(settled_by_rank, 3)
    assert [keep for keep, _ in found] == [2, 2, 2]
    assert all("2 of a rank's 4 graphs are kept" in note for _, note in found)


def test_a_run_says_what_it_keeps(
    small_cohort: Path, small_manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"--manifests": small_manifests, "--labels": small_cohort / "labels.csv", "--out": tmp_path / "run"}
    words = [str(word) for pair in flags.items() for word in pair]
    Train.parse(["demo", *words, "--optim.epochs", "1", "--tiles.k", "8"]).run()
    assert "note: machine.keep=auto: 2 of a rank's 2 graphs are kept" in capsys.readouterr().err
    assert next(iter(read_events(tmp_path / "run")))["keep"] == "all"


def test_a_run_without_the_memory_ends_before_its_first_step(
    small_cohort: Path, small_manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.loop.rank_memory", lambda _: 1_000_000)
    flags = {"--manifests": small_manifests, "--labels": small_cohort / "labels.csv", "--out": tmp_path / "run"}
    words = [str(word) for pair in flags.items() for word in pair]
    with pytest.raises(TrainerError, match="virtual_ranks=2 makes virtual ranks of 4 tiles, memory holds"):
        Train.parse(["demo", *words, "--optim.epochs", "1", "--tiles.k", "8"]).run()
    assert not list(read_events(tmp_path / "run"))
