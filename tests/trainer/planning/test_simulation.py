"""The simulation is the sum of its docstring, in cases that are worked out by hand."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.planning.rates import Rates
from trainer.planning.simulation import PLACE_BYTES, Work, all_reduce_s, simulate
from trainer.topology import Topology

WORK = Work(num_tiles=1_200, feature_bytes=992, gradient_bytes=1_000_000)
QUICK = Rates(forward_s=0.001, backward_s=0.002, aggregate_s=1e-4)
"""A network and a disc without end."""


def on(num_encoders: int, num_virtual: int | None = None) -> Topology:
    return Topology.make(num_encoders + 1, "dedicated", num_virtual)


def test_one_rank_encodes_and_aggregates() -> None:
    slow = dataclasses.replace(QUICK, link_bytes_per_s=1.0, latency_s=1.0)  # Nobody to talk to.
    step = simulate(WORK, slow, Topology.make(1, "auto", None))
    assert step.seconds == {
        "reading": 0.0,
        "encoding": pytest.approx(3.6),
        "gather": 0.0,
        "aggregation": pytest.approx(0.12),
        "scatter": 0.0,
        "sum": 0.0,
        "update": 0.0,
    }
    assert (step.slide_s, step.limit) == (pytest.approx(3.72), "encoding")
    assert (step.efficiency, step.aggregator_idle) == (pytest.approx(3.6 / 3.72), 0.0)


@pytest.mark.parametrize(("num_encoders", "encoding_s"), [(1, 3.6), (2, 1.8), (7, 172 * 0.003), (1_200, 0.003)])
def test_with_a_network_without_end_encoding_is_shared_out(num_encoders: int, encoding_s: float) -> None:
    step = simulate(WORK, QUICK, on(num_encoders))
    assert step.seconds["encoding"] == pytest.approx(encoding_s)
    assert step.slide_s == pytest.approx(encoding_s + 0.12)
    assert step.aggregator_idle == pytest.approx(encoding_s / step.slide_s)


def test_a_slow_network_is_the_limit() -> None:
    slow = dataclasses.replace(QUICK, link_bytes_per_s=100_000.0, latency_s=0.01)
    step = simulate(WORK, slow, on(4))
    # The agreement of 5 ranks, 3 rounds up and down; 8 messages; 1,000 bytes a tile through one link.
    assert step.seconds["gather"] == pytest.approx(6 * 0.01 + 8 * 0.01 + 1_200 * (992 + PLACE_BYTES) / 100_000)
    assert step.seconds["scatter"] == pytest.approx(4 * 0.01 + 1_200 * 992 / 100_000)
    assert step.seconds["sum"] == pytest.approx(2 * 3 / 4 * 1_000_000 / 100_000 + 6 * 0.01)
    assert step.limit == "sum"
    assert simulate(dataclasses.replace(WORK, gradient_bytes=0), slow, on(4)).limit == "gather"


def test_a_shared_aggregator_sends_itself_nothing() -> None:
    slow = dataclasses.replace(QUICK, link_bytes_per_s=1e5)
    step = simulate(WORK, slow, Topology.make(4, "shared", None))
    assert step.seconds["gather"] == pytest.approx(900 * 1_000 / 1e5)
    assert step.seconds["scatter"] == pytest.approx(900 * 992 / 1e5)


def test_reading_hides_behind_the_rest_or_the_rest_behind_reading() -> None:
    hidden = simulate(WORK, dataclasses.replace(QUICK, read_s=0.002), on(4))
    assert (hidden.seconds["reading"], hidden.limit) == (pytest.approx(0.6), "encoding")
    assert hidden.slide_s == simulate(WORK, QUICK, on(4)).slide_s
    # Cores come with ranks, the storage does not.
    slow = dataclasses.replace(QUICK, read_s=0.008)
    assert [simulate(WORK, slow, on(n)).slide_s for n in (4, 8)] == [pytest.approx(2.4), pytest.approx(1.2)]
    far = dataclasses.replace(QUICK, storage_s=0.01)
    steps = [simulate(WORK, far, on(n)) for n in (4, 8)]
    assert [(step.slide_s, step.limit) for step in steps] == [(pytest.approx(12.0), "reading")] * 2


@pytest.mark.parametrize(("kept", "again"), [(None, 0), (6, 0), (3, 0), (1, 2), (0, 3)])
def test_what_is_not_kept_is_encoded_twice(kept: int | None, again: int) -> None:
    rates = dataclasses.replace(QUICK, forward_pass_s=0.5, backward_pass_s=0.25)
    step = simulate(dataclasses.replace(WORK, kept=kept), rates, on(4, 12))  # Three virtual ranks of 100 on each.
    passes_s = 0.5 * (3 + again) + 0.25 * 3
    assert step.seconds["encoding"] == pytest.approx(0.9 + 100 * again * 0.001 + passes_s)


def test_ranks_share_a_cpus_cores() -> None:
    """Two cores: two ranks are twice as fast as one, four are no faster; decoding takes its time from them."""
    shared = dataclasses.replace(QUICK, num_cores=2)
    assert [simulate(WORK, shared, on(n)).seconds["encoding"] for n in (1, 2, 3, 4)] == pytest.approx(
        [3.6, 1.8, 1.8, 1.8]
    )
    reads = simulate(WORK, dataclasses.replace(shared, read_s=0.001), on(2))
    assert reads.slide_s == pytest.approx(1.8 + 0.12 + 0.6)


def test_a_ring_waits_for_each_rank_and_a_tree_for_each_level() -> None:
    rates = Rates(forward_s=1, backward_s=1, link_bytes_per_s=100.0, latency_s=1.0)
    assert all_reduce_s(800, 1, rates) == 0
    assert all_reduce_s(800, 8, rates, "ring") == pytest.approx(2 * 7 / 8 * 8 + 14)
    assert all_reduce_s(800, 8, rates, "tree") == pytest.approx(2 * 8 + 6)
    assert all_reduce_s(800, 8, rates) == all_reduce_s(800, 8, rates, "tree")
    assert all_reduce_s(80_000, 8, rates) == all_reduce_s(80_000, 8, rates, "ring")
    assert all_reduce_s(800, 8, dataclasses.replace(rates, sum_bytes_per_s=50.0), "tree") == pytest.approx(38)


RATES = st.builds(
    Rates,
    forward_s=st.floats(1e-6, 1e-2),
    backward_s=st.floats(1e-6, 1e-2),
    aggregate_s=st.floats(0, 1e-4),
    read_s=st.floats(0, 1e-3),
    storage_s=st.floats(0, 1e-4),
    link_bytes_per_s=st.floats(1e6, 1e12),
    latency_s=st.floats(0, 1e-3),
)


@given(rates=RATES, num_encoders=st.integers(1, 1_024), factor=st.floats(1, 100))
def test_better_hardware_is_never_slower_and_nothing_beats_the_ideal(
    rates: Rates, num_encoders: int, factor: float
) -> None:
    topology = on(num_encoders)
    slide_s = simulate(WORK, rates, topology).slide_s
    for better in (
        {"forward_s": rates.forward_s / factor},
        {"link_bytes_per_s": rates.link_bytes_per_s * factor},
        {"latency_s": rates.latency_s / factor},
        {"storage_s": rates.storage_s / factor},
        {"read_s": rates.read_s / factor},
    ):
        assert simulate(WORK, dataclasses.replace(rates, **better), topology).slide_s <= slide_s * (1 + 1e-12)
    step = simulate(WORK, rates, topology)
    assert 0 < step.efficiency <= 1 + 1e-12
    assert slide_s * num_encoders >= WORK.num_tiles * (rates.forward_s + rates.backward_s) * (1 - 1e-12)
    assert 0 <= step.aggregator_idle <= 1


@given(rates=RATES)
def test_more_ranks_encode_faster_and_talk_longer(rates: Rates) -> None:
    steps = [simulate(WORK, rates, on(2**exponent)) for exponent in range(11)]
    for fewer, more in itertools.pairwise(steps):
        assert more.seconds["encoding"] <= fewer.seconds["encoding"]
        assert more.seconds["reading"] <= fewer.seconds["reading"]
        assert all(more.seconds[phase] >= fewer.seconds[phase] for phase in ("gather", "scatter", "sum"))
