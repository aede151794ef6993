"""The loader: the right pixels in the right order, within its memory, whatever the files do meanwhile."""

import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifests import LocalManifests, Manifest
from manifests.catalog import read_paths
from tiler import DamageError, ReadError, Slide, TilerError, open_slide, read_plan, read_tiles
from trainer.aggregators import build_aggregator
from trainer.cli import Train
from trainer.comm import Comm
from trainer.config import COLLECTIVES_S, Aggregator, Augment, Encoder, Machine, Tiles
from trainer.encoders.encoder import build_encoder
from trainer.errors import TrainerError
from trainer.job import auto_budget
from trainer.journal import read_events
from trainer.loading import reading as reading_module
from trainer.loading.buffers import BufferPool
from trainer.loading.demands import Demands, may_give_way
from trainer.loading.loader import TileLoader
from trainer.loading.read_ahead import Reading
from trainer.loading.reading import ShardReader
from trainer.loading.shards import Reads, Shard
from trainer.ranks import run_ranks
from trainer.sampler import ShardPlan, StepPlan, plan_scoring, shards_of
from trainer.step import Engine, SlideInput
from trainer.topology import Topology

TILE_PX, NUM_VIRTUAL = 32, 4
PLENTY = 1_000_000_000
KIB = 1024


class Cohort:
    """The small cohort as a rank of its own sees it: manifests, paths, and the plans of every slide."""

    def __init__(
        self, root: Path, *, num_virtual: int = NUM_VIRTUAL, num_slides: int = 12, num_epochs: int = 1
    ) -> None:
        self.source = LocalManifests(root)
        self.paths = read_paths(root)
        num_tiles = {s: len(self.source[s]) for s in list(self.source)[:num_slides]}
        once = plan_scoring(num_tiles, tiles=Tiles())
        self.steps = [dataclasses.replace(step, epoch=epoch) for epoch in range(num_epochs) for step in once]
        self.topology = Topology.make(1, "shared", num_virtual)

    def loader(self, *, budget_bytes: int = PLENTY, num_threads: int = 1, deadline_s: float = 60.0) -> TileLoader:
        return TileLoader(
            self.source,
            self.paths,
            tile_px=TILE_PX,
            num_threads=num_threads,
            budget_bytes=budget_bytes,
            deadline_s=deadline_s,
        )

    def plans(self) -> Iterator[ShardPlan]:
        return shards_of(self.steps, self.topology, 0, 0)

    def read_directly(self, step: StepPlan) -> NDArray[np.uint8]:
        """All tiles of a slide, by the reader alone."""
        manifest = self.source[step.slide_id]
        return read_tiles(open_slide(self.paths[step.slide_id]), manifest, np.arange(len(manifest)))


@pytest.fixture
def cohort(small_manifests: Path) -> Cohort:
    return Cohort(small_manifests)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_module, "RETRY_DELAYS_S", (0.0, 0.0, 0.0))


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not reading_threads()


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def wait_until(is_so: Callable[[], bool]) -> None:
    """Another thread does something; a minute is for machines that are busy."""
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, "it never was so"
        time.sleep(0.005)


def shard_bytes(num_tiles: int) -> int:
    return BufferPool(PLENTY, pinned=False).round_up(num_tiles * TILE_PX**2 * 3)


def copied(shards: Iterable[Shard]) -> list[tuple[int, Tensor, str]]:
    """Shards as they are when they come: their memory is used again."""
    return [(shard.virtual_rank, shard.tiles_NHWC.clone(), shard.error) for shard in shards]


# Order, content, memory


@pytest.mark.parametrize("keep", [None, 0, 1])
@pytest.mark.parametrize("budget_bytes", [1, 60 * KIB, PLENTY])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_shards_come_in_order_with_the_pixels_of_the_reader(
    cohort: Cohort, keep: int | None, budget_bytes: int, num_threads: int
) -> None:
    loader = cohort.loader(budget_bytes=budget_bytes, num_threads=num_threads)
    with loader.read(cohort.plans(), keep) as reading:
        for step in cohort.steps:
            tiles = reading.slide(step)
            first, again = copied(tiles.first()), copied(tiles.again())
            assert [number for number, _, _ in first] == list(range(NUM_VIRTUAL))
            num_again = 0 if keep is None else NUM_VIRTUAL - keep
            assert [number for number, _, _ in again] == list(reversed(range(num_again)))
            whole = torch.cat([part for _, part, _ in first])
            assert np.array_equal(whole.numpy(), cohort.read_directly(step))
            for number, part, error in again:
                assert not error
                assert torch.equal(part, first[number][1])


@pytest.mark.parametrize("keep", [None, 0])
def test_memory_stays_within_the_budget_and_is_used_again(small_manifests: Path, keep: int | None) -> None:
    cohort = Cohort(small_manifests, num_epochs=3)
    budget_bytes = 3 * shard_bytes(7)
    loader = cohort.loader(budget_bytes=budget_bytes)
    with loader.read(cohort.plans(), keep) as reading:
        for step in cohort.steps:
            tiles = reading.slide(step)
            assert all(not error for _, _, error in [*copied(tiles.first()), *copied(tiles.again())])
    assert shard_bytes(7) < loader.pool.peak_bytes <= budget_bytes
    assert loader.pool.used_bytes == 0
    num_shards = sum(min(NUM_VIRTUAL, step.num_rows) for step in cohort.steps)
    assert loader.pool.num_made < num_shards / 4


def test_buffers_of_about_the_same_size_are_one_buffer() -> None:
    pool = BufferPool(2_000_000, pinned=False)
    first = pool.take(1_000_000)
    assert 1_000_000 <= first.num_bytes <= 1_125_000
    pool.give_back(first)
    assert pool.take(950_000) is first
    assert not pool.has_room(1_000_000)
    assert pool.has_room(1_000_000, freed_bytes=first.num_bytes)
    pool.give_back(first)
    small = pool.take(100_000)
    assert small is not first
    assert pool.take(900_000) is first
    assert pool.num_made == 2
    pool.give_back(first)
    larger = pool.take(1_600_000)  # The idle one is dropped for it.
    assert pool.peak_bytes <= 2_000_000
    pool.give_back(larger)
    pool.lose(small)
    assert pool.used_bytes == 0
    assert pool.take(100_000) is not small


def test_locked_memory_is_counted_as_torch_rounds_it() -> None:
    pool = BufferPool(PLENTY, pinned=True)
    assert [pool.round_up(n) for n in (1, 4096, 4097, 1 << 20, (1 << 20) + 1)] == [4096, 4096, 8192, 1 << 20, 1 << 21]


def test_a_shard_larger_than_the_budget_is_read_and_told_once(
    cohort: Cohort, capfd: pytest.CaptureFixture[str]
) -> None:
    loader = cohort.loader(budget_bytes=10_000)
    for _ in range(2):
        with loader.read(cohort.plans(), 0) as reading:
            for step in cohort.steps[:3]:
                tiles = reading.slide(step)
                assert all(not error for _, _, error in [*copied(tiles.first()), *copied(tiles.again())])
    notes = capfd.readouterr().err.splitlines()
    assert len(notes) == 1
    assert notes[0].startswith(f"note: slide {cohort.steps[0].slide_id}: ")
    assert "give more --virtual-ranks, or a larger --machine.read-ahead-gb" in notes[0]


@pytest.mark.parametrize("num_held", [1, 2, 3, 5, 6])
def test_the_second_pass_reads_only_what_was_dropped(small_manifests: Path, num_held: int) -> None:
    """Six shards in reversed order, the last `num_held` of them still in memory: no policy reads fewer."""
    cohort = Cohort(small_manifests, num_virtual=6)
    step = max(cohort.steps, key=lambda step: step.num_rows)
    assert step.num_rows >= 18
    step = dataclasses.replace(step, num_rows=step.num_rows // 6 * 6)
    cohort.steps = [step]
    loader = cohort.loader(budget_bytes=num_held * shard_bytes(step.num_rows // 6))
    with loader.read(cohort.plans(), 0) as reading:
        tiles = reading.slide(step)
        copied(tiles.first())
        assert tiles.will_reread() == (num_held < 6)
        copied(tiles.again())
        per_shard = step.num_rows // 6
        assert tiles.reads.num_reread == (6 - num_held) * per_shard
        assert tiles.reads.num_tiles == (12 - num_held) * per_shard
        assert tiles.reads.num_decoded > 0
        assert tiles.reads.num_bytes > 1000
        assert tiles.reads.seconds > 0


def test_what_is_kept_is_not_held() -> None:
    """Three shards, the last one's graph kept: it is needed once, the others in reversed order once more."""
    step = StepPlan(0, 0, "slide", 3, 3)
    plans = [ShardPlan(step, v, np.array([v])) for v in range(3)]
    demands = Demands(iter(plans), 1)
    needs, _ = demands.begin(step)
    order = []
    while demands.at_hand is not None:
        order.append(demands.pop().plan.virtual_rank)
    assert order == [0, 1, 2, 1, 0]
    assert [need.plan.virtual_rank for need in needs.again] == [1, 0]


def test_what_is_needed_last_gives_way_first_and_nothing_that_is_needed_sooner() -> None:
    """Four shards, needed as 0 1 2 3 3 2 1 0, the first two used: 3 may take the place of 0, else of 1, never of 2."""
    step = StepPlan(0, 0, "slide", 4, 4)
    demands = Demands((ShardPlan(step, v, np.array([v])) for v in range(4)), 0)
    needs, _ = demands.begin(step)
    demands.pop()
    demands.pop()
    giving = [need.plan.virtual_rank for need in may_give_way(needs.first[:3], needs.first[3])]
    assert giving == [0, 1]


def test_reading_ahead_goes_on_while_the_caller_works(cohort: Cohort) -> None:
    """The caller holds the first shard until the last slide but one is read."""
    loader = cohort.loader()
    with loader.read(cohort.plans()) as reading:
        next(reading.slide(cohort.steps[0]).first())
        wait_until(lambda: loader.pool.used_bytes >= shard_bytes(2) * 40)


def test_a_rank_without_virtual_ranks_reads_nothing(cohort: Cohort) -> None:
    with cohort.loader().read(iter(())) as reading:
        for step in cohort.steps:
            tiles = reading.slide(step)
            assert copied(tiles.first()) == copied(tiles.again()) == []
            assert not tiles.will_reread()
        assert not reading_threads()


@pytest.mark.parametrize("num_taken", [0, 1, 3])
def test_no_thread_is_left_when_a_reading_is_closed_midway(cohort: Cohort, num_taken: int) -> None:
    loader = cohort.loader(budget_bytes=60 * KIB)
    with loader.read(cohort.plans(), 0) as reading:
        shards = reading.slide(cohort.steps[0]).first()
        for _ in range(num_taken):
            next(shards)
    assert not reading_threads()
    assert loader.pool.used_bytes == 0


def test_a_slide_that_is_left_midway_is_dropped(cohort: Cohort) -> None:
    """As after a failure on another rank: the next slide comes, whole."""
    loader = cohort.loader(budget_bytes=60 * KIB)
    with loader.read(cohort.plans(), 0) as reading:
        for step in cohort.steps[:-1]:
            for _ in itertools.islice(reading.slide(step).first(), 3):
                pass
        last = reading.slide(cohort.steps[-1])
        whole = torch.cat([part for _, part, _ in copied(last.first())])
    assert np.array_equal(whole.numpy(), cohort.read_directly(cohort.steps[-1]))
    assert loader.pool.used_bytes == 0


@pytest.mark.torture
def test_memory_stays_flat_over_many_slides(small_manifests: Path, times: Callable[[int, int], int]) -> None:
    """Resident memory after 100 slides is what it is at the end, within 5 %."""
    cohort = Cohort(small_manifests, num_epochs=-(-times(160, 1_000) // 12))
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    resident = []
    with cohort.loader(budget_bytes=200 * KIB, num_threads=2).read(cohort.plans(), 0) as reading:
        for step in cohort.steps:
            tiles = reading.slide(step)
            copied(tiles.first())
            copied(tiles.again())
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * page_bytes)
    print(f"{len(resident)} slides: {resident[99] / 1e6:.1f} MB after 100, {max(resident[100:]) / 1e6:.1f} MB at most")
    assert max(resident[100:]) < 1.05 * resident[99]


# Trouble


def reading_that(monkeypatch: pytest.MonkeyPatch, fails: Mapping[str, list[Exception]]) -> list[str]:
    """Lets the reader raise a slide's errors one after another; returns the slides of all calls, as they come."""
    calls: list[str] = []

    def read(slide: Slide, manifest: Manifest, *rest: Any) -> NDArray[np.uint8]:
        slide_id = manifest.slide.slide_id
        calls.append(slide_id)
        if fails.get(slide_id):
            raise fails[slide_id].pop(0)
        return read_plan(slide, manifest, *rest)

    monkeypatch.setattr(reading_module, "read_plan", read)
    return calls


@pytest.mark.parametrize("error", [ReadError("once"), OSError(116, "Stale file handle"), OSError(5, "I/O")], ids=repr)
def test_trouble_that_passes_is_waited_out(cohort: Cohort, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    step = cohort.steps[0]
    calls = reading_that(monkeypatch, {step.slide_id: [error] * 3})
    with cohort.loader(budget_bytes=1).read(cohort.plans()) as reading:
        whole = torch.cat([part for _, part, _ in copied(reading.slide(step).first())])
    assert calls.count(step.slide_id) == 3 + NUM_VIRTUAL
    assert np.array_equal(whole.numpy(), cohort.read_directly(step))


@pytest.mark.parametrize(
    ("error", "num_attempts", "told"),
    [
        (ReadError("region 5x5: timed out"), 4, "slide {}: region 5x5: timed out"),
        (OSError(5, "Input/output error", "/archive/Doe Jane.svs"), 4, "its file cannot be read (Input/output error)"),
        (DamageError("slide {}: damaged"), 1, "slide {}: damaged"),
        (TilerError("not a slide"), 1, "slide {}: not a slide"),
        (TilerError("/archive/Doe Jane/Slidedat.ini: cut"), 1, "slide {}: [path]: cut"),
        (IndexError("odd"), 1, "slide {}: IndexError: odd"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_trouble_that_stays_is_an_error_of_that_slide_alone(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch, error: Exception, num_attempts: int, told: str
) -> None:
    bad, good = cohort.steps[:2]
    error.args = tuple(a.format(bad.slide_id) if isinstance(a, str) else a for a in error.args)
    calls = reading_that(monkeypatch, {bad.slide_id: [error] * 99})
    with cohort.loader().read(cohort.plans(), 0) as reading:
        errors = [e for _, tiles, e in copied(reading.slide(bad).first())]
        assert len(set(errors)) == 1
        assert told.format(bad.slide_id) in errors[0]
        assert "Doe" not in errors[0]
        assert not any(e for _, _, e in copied(reading.slide(good).first()))
    assert calls.count(bad.slide_id) == num_attempts


def test_a_slide_that_fails_while_a_shard_is_in_use_leaves_that_shard_alone_and_then_nothing(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = cohort.steps[0]
    is_taken, true = threading.Event(), ShardReader.read

    def read(reader: ShardReader, plan: ShardPlan, out: NDArray[np.uint8]) -> tuple[Reads, Tensor]:
        if plan.step == bad and plan.virtual_rank == 1:
            is_taken.wait()
            raise DamageError(f"slide {bad.slide_id}: damaged")
        return true(reader, plan, out)

    monkeypatch.setattr(ShardReader, "read", read)
    loader = cohort.loader()
    with loader.read(cohort.plans(), 0) as reading:
        tiles = reading.slide(bad)
        shards = tiles.first()
        in_use = next(shards)
        before = in_use.tiles_NHWC.clone()
        is_taken.set()
        wait_until(lambda: loader.pool.used_bytes >= shard_bytes(2) * 20)  # Later slides are read meanwhile.
        assert torch.equal(in_use.tiles_NHWC, before)
        assert next(shards).error == f"slide {bad.slide_id}: damaged"
        assert all(e for _, _, e in [*copied(shards), *copied(tiles.again())])
        for step in cohort.steps[1:]:
            tiles = reading.slide(step)
            assert not any(e for _, _, e in [*copied(tiles.first()), *copied(tiles.again())])
    assert loader.pool.used_bytes == 0


def _read_one(cohort: Cohort, path: Path, pause: Callable[[float], bool]) -> NDArray[np.uint8]:
    step = cohort.steps[0]
    rows = np.arange(step.num_rows)
    out = np.zeros((len(rows), TILE_PX, TILE_PX, 3), np.uint8)
    ShardReader(cohort.source, {step.slide_id: path}, 1, pause).read(ShardPlan(step, 0, rows), out)
    return out


def test_a_file_that_is_away_for_a_while_is_read_when_it_is_back(cohort: Cohort, tmp_path: Path) -> None:
    """One that was never there is not waited for."""
    step = cohort.steps[0]
    path, away = tmp_path / "case.svs", tmp_path / "away"
    shutil.copy(cohort.paths[step.slide_id], away)
    pauses: list[float] = []

    def pause(seconds: float) -> bool:
        pauses.append(seconds)
        if len(pauses) == 2:
            away.rename(path)
        return True

    reader = ShardReader(cohort.source, {step.slide_id: path}, 1, pause)
    (plan,) = shards_of([step], Topology.make(1, "auto", 1), 0, 0)
    out = np.zeros((len(plan.rows), *cohort.read_directly(step).shape[1:]), np.uint8)
    with pytest.raises(FileNotFoundError):
        reader.read(plan, out)
    assert not pauses
    shutil.copy(away, path)
    reader.read(plan, out)
    path.unlink()
    reader._open.clear()  # As when others were open meanwhile.
    out.fill(0)
    reader.read(plan, out)
    assert np.array_equal(out, cohort.read_directly(step))
    assert len(pauses) == 2


def test_a_file_that_stays_away_is_told_without_its_folder(cohort: Cohort, tmp_path: Path) -> None:
    slide_id = cohort.steps[0].slide_id
    cohort.paths[slide_id] = tmp_path / "Doe Jane.svs"
    with cohort.loader().read(cohort.plans()) as reading:
        (error,) = {e for _, _, e in copied(reading.slide(cohort.steps[0]).first())}
    assert error.startswith(f"slide {slide_id}: its file cannot be read (No such file or directory)")
    assert str(tmp_path) not in error
    assert "Doe" not in error


def test_another_file_in_its_place_is_refused_at_once(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put there between two attempts: the second opens the file anew."""
    own, other = (cohort.paths[step.slide_id] for step in cohort.steps[:2])
    path = tmp_path / "case.svs"
    shutil.copy(own, path)
    pauses: list[float] = []
    reading_that(monkeypatch, {cohort.steps[0].slide_id: [ReadError("stale")]})

    def pause(seconds: float) -> bool:
        pauses.append(seconds)
        shutil.copy(other, path)
        return True

    with pytest.raises(TilerError, match="the file changed since it was tiled, or is another slide's; tile it again"):
        _read_one(cohort, path, pause)
    assert len(pauses) == 1


def test_a_damaged_slide_is_an_error_and_the_next_goes_on(cohort: Cohort, tmp_path: Path) -> None:
    bad, good = cohort.steps[:2]
    manifest = cohort.source[bad.slide_id]
    path = tmp_path / "case.svs"
    shutil.copy(cohort.paths[bad.slide_id], path)
    with tifffile.TiffFile(path) as tiff:
        level = [p for p in tiff.pages if p.is_tiled][manifest.slide.level]
        places = list(zip(level.dataoffsets, level.databytecounts, strict=True))
    with path.open("r+b") as stream:
        for offset, num_bytes in places:
            stream.seek(offset + num_bytes // 2)
            stream.write(bytes(num_bytes - num_bytes // 2))
    record = dataclasses.replace(manifest.slide, fingerprint=open_slide(path).fingerprint)
    changed = dataclasses.replace(manifest, slide=record)
    loader = TileLoader(
        {bad.slide_id: changed, good.slide_id: cohort.source[good.slide_id]},  # type: ignore[arg-type]
        {**cohort.paths, bad.slide_id: path},
        tile_px=TILE_PX,
        num_threads=2,
        budget_bytes=PLENTY,
    )
    cohort.steps = [bad, good]
    with loader.read(cohort.plans()) as reading:
        errors = {e for _, _, e in copied(reading.slide(bad).first())}
        assert all(f"slide {bad.slide_id}: damaged" in error for error in errors)
        whole = torch.cat([part for _, part, _ in copied(reading.slide(good).first())])
    assert np.array_equal(whole.numpy(), cohort.read_directly(good))


# Reads that hang


@pytest.fixture
def hanging(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[StepPlan, threading.Event]]:
    """A slide whose reads do not come back before the event; which slide, and the event."""
    step, let_go, true = cohort.steps[1], threading.Event(), Slide.read

    def read(slide: Slide, *region: int) -> NDArray[np.uint8]:
        if slide.path == cohort.paths[step.slide_id]:
            let_go.wait()
        return true(slide, *region)

    monkeypatch.setattr(Slide, "read", read)
    monkeypatch.setattr(Slide, "jpeg_tiles", lambda *_: None)  # All by the slide's reader.
    yield step, let_go
    let_go.set()
    for thread in reading_threads():
        thread.join(60)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_slide_that_hangs_is_an_error_at_the_deadline_and_the_next_goes_on(
    cohort: Cohort, hanging: tuple[StepPlan, threading.Event], num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: dict[str, set[int]] = {}

    def read(slide: Slide, manifest: Manifest, plan: Any, out: NDArray[np.uint8], num_threads: int) -> None:
        places.setdefault(manifest.slide.slide_id, set()).add(out.ctypes.data)
        read_plan(slide, manifest, plan, out, num_threads)

    monkeypatch.setattr(reading_module, "read_plan", read)
    step, let_go = hanging
    loader = cohort.loader(deadline_s=0.3, num_threads=num_threads, budget_bytes=60 * KIB)
    with loader.read(cohort.plans(), 0) as reading:
        assert not any(e for _, _, e in copied(reading.slide(cohort.steps[0]).first()))
        errors = [e for _, _, e in copied(reading.slide(step).first())]
        assert len(errors) == NUM_VIRTUAL
        assert set(errors) == {
            f"slide {step.slide_id}: its tiles were not read in 0.3 s (machine.read_deadline_s); "
            "look at the storage it lies on"
        }
        for following in cohort.steps[2:4]:
            whole = torch.cat([part for _, part, _ in copied(reading.slide(following).first())])
            assert np.array_equal(whole.numpy(), cohort.read_directly(following))
        (left,) = places.pop(step.slide_id)
        later = set().union(*(places[s.slide_id] for s in cohort.steps[2:4]))
        assert left not in later
        tiles = reading.slide(cohort.steps[4])
        taken = next(tiles.first()).tiles_NHWC
        before = taken.clone()
        let_go.set()
        wait_until(lambda: len(reading_threads()) == 1)
        assert torch.equal(taken, before)
    assert loader.pool.used_bytes == 0


def test_a_hanging_read_of_what_is_needed_no_more_holds_up_nobody(
    cohort: Cohort, hanging: tuple[StepPlan, threading.Event]
) -> None:
    """Other ranks had the slide skipped: the next one does not wait for this one's reads."""
    hangs, _ = hanging
    before, after = cohort.steps[0], cohort.steps[2]
    cohort.steps = [hangs, after, before]
    with cohort.loader(deadline_s=0.5).read(cohort.plans()) as reading:
        reading.slide(hangs)
        wait_until(lambda: reading._being_read is not None)
        whole = torch.cat([part for _, part, _ in copied(reading.slide(after).first())])
        assert np.array_equal(whole.numpy(), cohort.read_directly(after))


_HANG = """
import sys, threading
from pathlib import Path
import test_loader
from tiler import Slide
cohort = test_loader.Cohort(Path(sys.argv[1]))
Slide.read = lambda *_: threading.Event().wait()
Slide.jpeg_tiles = lambda *_: None
with cohort.loader(deadline_s=0.2, num_threads=2).read(cohort.plans()) as reading:
    print(next(reading.slide(cohort.steps[0]).first()).error)
"""


@pytest.mark.slow
def test_a_process_ends_though_a_read_hangs(small_manifests: Path) -> None:
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{here}:{here.parents[2]}"}
    script = "import trainer.loading.read_ahead; trainer.loading.read_ahead._CLOSE_S = 0.2\n" + _HANG
    done = subprocess.run(
        [sys.executable, "-c", script, str(small_manifests)], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "its tiles were not read in 0.2 s" in done.stdout


# With the step


def halves(dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Module, torch.nn.Module, int]:
    """A real encoder, with its normalisation, BatchNorm and drop-path."""
    torch.manual_seed(0)
    encoder = build_encoder(Encoder(name="test_resnet", drop_path=0.2), TILE_PX)
    aggregator = build_aggregator(Aggregator(hidden=8, dropout=0.2), encoder.num_features, 2)
    return encoder.to(dtype), aggregator.to(dtype), encoder.num_features


def found_in(engine: Engine) -> dict[str, Tensor]:
    """Gradients and buffers of what the rank holds."""
    found: dict[str, Tensor] = {}
    for name, half in (("encoder", engine.encoder), ("aggregator", engine.aggregator)):
        if half is not None:
            found |= {f"{name}.{k}": p.grad.clone() for k, p in half.named_parameters() if p.grad is not None}
            found |= {f"{name}.{k}": b.clone() for k, b in half.named_buffers()}
    return found


def step_from_files(
    rank: int,
    world_size: int,
    root: Path,
    which: tuple[int, ...],
    *,
    keep: int | None = 0,
    budget_bytes: int = PLENTY,
    num_threads: int = 1,
    fails_again: str = "",
) -> tuple[dict[str, Tensor], list[Any]]:
    """One step over slides of the small cohort; rank 2 cannot read the slide `fails_again` a second time."""
    cohort = Cohort(root, num_virtual=5)
    topology = Topology.make(world_size, "shared" if world_size == 1 else "dedicated", 5)
    comm = Comm(topology, rank, torch.device("cpu"))
    encoder, aggregator, width = halves()
    engine = Engine(
        comm,
        encoder if comm.is_encoder else None,
        aggregator if comm.is_aggregator else None,
        num_features=width,
        seed=5,
        keep=keep,
        augment=Augment(stain=0.05, blur=0.3),
    )
    engine.set_training(True)
    steps = [cohort.steps[i] for i in which]
    num_compute = torch.get_num_threads()
    torch.set_num_threads(1)  # Small matrices: more of them only wait for each other.
    patch = pytest.MonkeyPatch()
    seen: set[tuple[str, int]] = set()
    true = ShardReader.read

    def read(reader: ShardReader, plan: ShardPlan, out: NDArray[np.uint8]) -> tuple[Reads, Tensor]:
        key = (plan.step.slide_id, plan.virtual_rank)
        if rank == 2 and key in seen and key[0] == fails_again:
            raise DamageError(f"slide {key[0]}: gone bad")
        seen.add(key)
        return true(reader, plan, out)

    patch.setattr(ShardReader, "read", read)
    loader = cohort.loader(budget_bytes=budget_bytes, num_threads=num_threads)
    with loader.read(shards_of(steps, topology, rank, 0), keep) as reading:

        def inputs() -> Iterator[SlideInput]:
            for i, step in zip(which, steps, strict=True):
                tiles = reading.slide(step)
                yield SlideInput(step, tiles.first(), (i % 2,), tiles)

        outcomes = engine.step(inputs())
    patch.undo()
    torch.set_num_threads(num_compute)
    return found_in(engine), [(o.error, o.loss, o.reads) for o in outcomes]


def test_gradients_are_bit_equal_whatever_the_memory_and_the_threads(small_manifests: Path) -> None:
    """Graphs not kept, drop-path, dropout and augmentation on."""
    true, (outcome, _) = step_from_files(0, 1, small_manifests, (0, 1))
    assert outcome[2].num_reread == 0
    for budget_bytes, num_threads in ((1, 1), (1, 2), (40 * KIB, 1), (PLENTY, 2)):
        found, (outcome, _) = step_from_files(
            0, 1, small_manifests, (0, 1), budget_bytes=budget_bytes, num_threads=num_threads
        )
        assert (outcome[2].num_reread > 0) == (budget_bytes < PLENTY)
        assert found.keys() == true.keys()
        assert all(torch.equal(found[name], value) for name, value in true.items())


def test_kept_graphs_do_not_need_the_memory_of_their_tiles(small_manifests: Path) -> None:
    """With room for one shard the next one is read into it, while the graphs of all wait for their gradient."""
    true, _ = step_from_files(0, 1, small_manifests, (0,), keep=None)
    found, _ = step_from_files(0, 1, small_manifests, (0,), keep=None, budget_bytes=1)
    assert all(torch.equal(found[name], value) for name, value in true.items())


def test_a_second_reading_that_fails_skips_the_slide_on_all_ranks(small_manifests: Path) -> None:
    """The slide leaves no trace: gradients and BatchNorm's statistics are those of the step without it."""
    bad = Cohort(small_manifests).steps[1].slide_id
    broken = run_ranks(_step_of_rank, 3, small_manifests, (0, 1, 2), bad)
    clean = run_ranks(_step_of_rank, 3, small_manifests, (0, 2), "")
    for rank, ((found, outcomes), (true, expected)) in enumerate(zip(broken, clean, strict=True)):
        assert [error for error, _, _ in outcomes] == ["", f"slide {bad}: gone bad", ""]
        if rank == 0:
            assert [outcomes[i][1] for i in (0, 2)] == [loss for _, loss, _ in expected]
        assert found.keys() == true.keys()
        assert all(torch.equal(found[name], value) for name, value in true.items())
        assert outcomes[0][2].num_reread == expected[0][2].num_reread > 0


def _step_of_rank(rank: int, world_size: int, root: Path, which: tuple[int, ...], fails_again: str) -> Any:
    return step_from_files(rank, world_size, root, which, budget_bytes=1, fails_again=fails_again)


@pytest.mark.slow
def test_a_step_line_says_what_reading_took(small_manifests: Path, small_cohort: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["demo", "--manifests", small_manifests, "--labels", small_cohort / "labels.csv", "--out", run]
    flags = ["--optim.epochs", "1", "--tiles.k", "8", "--virtual-ranks", "2", "--machine.keep", "0"]
    Train.parse([str(word) for word in [*words, *flags, "--machine.read-ahead-gb", "1e-9"]]).run()
    steps = [event for event in read_events(run) if event["event"] == "step"]
    assert len(steps) > 3
    for line in steps:
        assert line["read_tiles_per_s"] > 0
        assert line["data_wait_s"] > 0
        assert line["read_bytes"] > 1000
        assert line["reread_tiles"] == 4  # Of two virtual ranks the second is still in memory.
        assert 0 < line["decoded_per_tile"] < 20


def test_a_deadline_comes_before_other_ranks_give_up() -> None:
    assert Machine().read_deadline_s < COLLECTIVES_S
    with pytest.raises(TrainerError, match=r"machine\.read_deadline_s is 21600: expected above 0 and below 21600 s"):
        Machine(read_deadline_s=21_600)
    with pytest.raises(TrainerError, match=r"machine\.read_ahead_gb is 0: expected above 0"):
        Machine(read_ahead_gb=0)


def test_the_budget_is_a_quarter_of_a_ranks_share_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.job.share_memory", lambda num_ranks: 24_000_000_000 // num_ranks)
    budgets = [auto_budget(Topology.make(world_size, "dedicated", None)) for world_size in (2, 3, 13)]
    assert budgets == [6_000_000_000, 3_000_000_000, 500_000_000]
    monkeypatch.setattr("trainer.job.share_memory", lambda _: 256_000_000_000)
    assert auto_budget(Topology.make(1, "shared", 1)) == 8_000_000_000


# On a GPU, and with copies as slow as they may be


class LateCopies:
    """A stream that copies nothing before somebody waits for it, and then all up to there, in order."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._num_begun = self._num_done = 0

    def enter_thread(self) -> None:
        pass

    def start(self, tiles_NHWC: Tensor) -> tuple[Tensor, Any]:
        copy_NHWC = torch.zeros_like(tiles_NHWC)
        self._waiting.append((copy_NHWC, tiles_NHWC))
        self._num_begun += 1
        return copy_NHWC, Event(self, self._num_begun)

    def join(self, copy_NHWC: Tensor, copied: Any) -> None:
        """The model's stream waits, later than the caller asks for more."""

    def catch_up(self, number: int) -> None:
        while self._num_done < number:
            copy_NHWC, tiles_NHWC = self._waiting.pop(0)
            copy_NHWC.copy_(tiles_NHWC)
            self._num_done += 1


class Event(NamedTuple):
    """That the first `number` copies are done."""

    stream: LateCopies
    number: int

    def synchronize(self) -> None:
        self.stream.catch_up(self.number)


@pytest.mark.parametrize("budget_bytes", [1, 60 * KIB, PLENTY])
@pytest.mark.parametrize("keep", [None, 0])
def test_a_buffer_is_not_read_into_before_its_copy_is_done(cohort: Cohort, budget_bytes: int, keep: int | None) -> None:
    pool, copies = BufferPool(budget_bytes, pinned=False), LateCopies()
    with Reading(
        Demands(cohort.plans(), keep),
        pool,
        lambda pause: ShardReader(cohort.source, cohort.paths, 1, pause),
        tile_px=TILE_PX,
        deadline_s=60,
        copies=copies,  # type: ignore[arg-type]
    ) as reading:
        shards = []
        for step in cohort.steps:
            tiles = reading.slide(step)
            shards.append((step, list(tiles.first()), list(tiles.again())))
        _, last = copies.start(torch.zeros(1))
        last.synchronize()
        for step, first, again in shards:
            whole = torch.cat([shard.tiles_NHWC for shard in first])
            assert np.array_equal(whole.numpy(), cohort.read_directly(step))
            for shard in again:
                assert torch.equal(shard.tiles_NHWC, first[shard.virtual_rank].tiles_NHWC)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_sees_the_tiles_that_a_cpu_sees(cohort: Cohort) -> None:
    gpu = torch.device("cuda", torch.cuda.current_device())
    for budget_bytes, keep in ((1, 0), (PLENTY, 0), (PLENTY, None)):
        features: dict[str, list[Tensor]] = {"cpu": [], "cuda": []}
        for device in (torch.device("cpu"), gpu):
            encoder, _, _ = halves()
            encoder = encoder.eval().to(device)
            loader = TileLoader(
                cohort.source,
                cohort.paths,
                tile_px=TILE_PX,
                num_threads=2,
                budget_bytes=budget_bytes,
                device=device,
            )
            with loader.read(cohort.plans(), keep) as reading, torch.no_grad():
                for step in cohort.steps:
                    tiles = reading.slide(step)
                    for shard in itertools.chain(tiles.first(), tiles.again()):
                        assert shard.tiles_NHWC.device == device
                        features[device.type].append(encoder(shard.tiles_NHWC).cpu())
        for ours, theirs in zip(features["cuda"], features["cpu"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
