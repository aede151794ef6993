"""Runs that keep features: the answers of runs that do not, computed once, whatever ends them and whoever shares it."""

import contextlib
import dataclasses
import errno
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr

from manifests import read_manifest, write_manifest
from manifests.errors import SlidegradError
from manifests.files import tiles_path
from tests.trainer.test_faults import ROOT, run_faulty
from tests.trainer.test_train import arguments, losses, weights
from trainer.checkpoint import chosen_checkpoint, list_checkpoints
from trainer.cli import Train
from trainer.evaluation.cli import Evaluate
from trainer.features.cache import drawn, serve_split
from trainer.features.filling import Filler, Share, share_of, tell_counts
from trainer.features.key import hash_read_plan
from trainer.features.serving import FeatureLoader, FeatureReading
from trainer.features.store import FeatureStore
from trainer.heatmaps.cli import Heatmap
from trainer.job import Job
from trainer.loading.shards import Reads
from trainer.model import load_alone
from trainer.prepare import open_run
from trainer.sampler import SlideSampler, plan_scoring, shards_of
from trainer.step import Engine
from trainer.topology import Topology

NUM_SLIDES = 12
FROZEN = ("--optim.epochs", "2", "--tiles.k", "8", "--encoder.freeze", "all", "--augment.no-flips")
FIXED = ("--encoder.batchnorm", "frozen")
"""Nothing is measured: without features to compute, the encoder has nothing to do."""

Words = Callable[..., list[str]]
"""The command line of a run, by its folder."""


@pytest.fixture(scope="module")
def words(small_manifests: Path, small_cohort: Path) -> Words:
    return lambda out, *more: arguments(small_manifests, small_cohort / "labels.csv", out, *FROZEN, *map(str, more))


@contextlib.contextmanager
def without_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.outcome.write_report", lambda run: run / "report.html")
        patch.setattr("trainer.outcome.draw_attention", lambda job, *_: job.run)
        yield


def train(words: list[str], code: int = 0) -> dict[str, Any]:
    """A whole run in this process, but for the pictures and the page at its end, which take most of its time."""
    with without_pictures():
        result, ended = Train.parse(words).run()
    assert ended == code, result
    return result


@pytest.fixture(scope="module")
def uncached(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that reads and encodes every tile in every epoch."""
    run = tmp_path_factory.mktemp("features") / "uncached"
    train(words(run))
    return run


@pytest.fixture(scope="module")
def cached(words: Words, uncached: Path) -> Path:
    """The same run with features, in the folder `store` beside it."""
    run = uncached.with_name("cached")
    train(words(run, "--machine.features", run.with_name("store")))
    return run


def predictions(run: Path) -> dict[str, list[float]]:
    return {row["slide_id"]: row["probs"] for row in pq.read_table(run / "scores.parquet").to_pylist()}


def assert_same(run: Path, other: Path, rtol: float = 1e-5) -> None:
    """Losses and scores of two runs; weights where that says something: AdamW makes much of a gradient's rounding."""
    assert [slide for slide, _ in losses(run)] == [slide for slide, _ in losses(other)]
    np.testing.assert_allclose([x for _, x in losses(run)], [x for _, x in losses(other)], rtol=rtol)
    true = weights(other)
    for name, value in weights(run).items() if rtol < 1e-6 else ():
        torch.testing.assert_close(value, true[name], rtol=rtol, atol=rtol, msg=name)
    assert predictions(run).keys() == predictions(other).keys()
    for slide_id, probs in predictions(run).items():
        np.testing.assert_allclose(probs, predictions(other)[slide_id], rtol=rtol)


def kept(store: Path) -> dict[str, bytes]:
    """slide_id to the bytes of its shard, of all keys."""
    return {f"{file.parts[-6]}/{file.parts[-4]}": file.read_bytes() for file in store.glob("*/??/[!.]*/c/0/0")}


def leftovers(store: Path) -> list[Path]:
    return list(store.rglob("*.tmp"))


@pytest.fixture
def no_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, a tile that is decoded or encoded fails the test."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a tile was read or encoded")

    monkeypatch.setattr("trainer.encode.EncoderSide._forward", never)
    monkeypatch.setattr("trainer.loading.loader.TileLoader.read", never)


def test_a_run_with_kept_features_is_the_run_without(cached: Path, uncached: Path) -> None:
    assert_same(cached, uncached)
    assert len(kept(cached.with_name("store"))) == NUM_SLIDES
    assert not leftovers(cached.with_name("store"))


@pytest.mark.parametrize(("precision", "dtype"), [("float64", "float64"), ("bf16", "float32")])
def test_in_other_precisions_too(precision: str, dtype: str, words: Words, tmp_path: Path) -> None:
    more = ("--optim.precision", precision, "--optim.epochs", "1", "--virtual-ranks", "3")
    train(words(tmp_path / "plain", *more))
    train(words(tmp_path / "run", *more, "--machine.features", tmp_path / "F"))
    assert_same(tmp_path / "run", tmp_path / "plain", rtol=1e-9 if precision == "float64" else 1e-2)
    arrays = [zarr.open_array(file.parent, mode="r") for file in (tmp_path / "F").glob("*/??/*/zarr.json")]
    assert {array.dtype for array in arrays} == {np.dtype(dtype)}


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--nproc", "3"), ("--nproc", "4", "--machine.groups", "2")])
def test_many_ranks_share_the_work_and_give_the_answer_of_one(
    more: tuple[str, ...],
    words: Words,
    uncached: Path,
    tmp_path: Path,
    slidegrad: Callable[..., Any],
) -> None:
    ended = slidegrad("train", *words(tmp_path / "run", "--machine.features", tmp_path / "F", *more))
    assert ended.code == 0, ended.stderr
    assert ended.stderr.count("computing features of 12 slides: none are kept for these weights") == 1
    assert_same(tmp_path / "run", uncached, rtol=1e-4)
    assert len(kept(tmp_path / "F")) == NUM_SLIDES


def test_another_aggregator_of_the_same_encoder_encodes_nothing(
    words: Words, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    features = ("--machine.features", tmp_path / "F", *FIXED)
    train(words(tmp_path / "gma", *features))
    before = kept(tmp_path / "F")
    request.getfixturevalue("no_encoding")
    capsys.readouterr()
    train(words(tmp_path / "transmil", *features, "--aggregator.name", "transmil"))
    assert "the features of all 12 slides are kept" in capsys.readouterr().err
    assert kept(tmp_path / "F") == before
    run = tmp_path / "transmil"
    train(words(run, *features, "--aggregator.name", "transmil", "--resume"))
    with without_pictures():
        found, code = Evaluate(run_folder=run).run()
    assert (code, found["num_slides"]) == (0, 4)


def test_other_weights_are_another_key(words: Words, cached: Path, tmp_path: Path) -> None:
    store = tmp_path / "F"
    shutil.copytree(cached.with_name("store"), store)
    before = kept(store)
    train(words(tmp_path / "run", "--machine.features", store, "--seed", "1"))
    after = kept(store)
    assert len(after) == 2 * NUM_SLIDES
    assert before.items() <= after.items()


def test_weights_that_are_averaged_find_the_same_features_when_they_are_evaluated(
    words: Words, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    train(words(tmp_path / "run", "--machine.features", tmp_path / "F", "--optim.ema", "0.9"))
    request.getfixturevalue("no_encoding")
    with without_pictures():
        Evaluate(run_folder=tmp_path / "run").run()
    assert len({name.partition("/")[0] for name in kept(tmp_path / "F")}) == 1


def test_evaluation_reads_tiles_where_the_store_is_gone_or_cannot_be_used(
    cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, store = tmp_path / "run", tmp_path / "F"
    shutil.copytree(cached, run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(cached.with_name("store")), str(store)))
    for note in ("is not there any more: tiles are read", "holds other things than features"):
        with without_pictures():
            result, code = Evaluate(run_folder=run).run()
        assert code == 0
        assert result["auc"] == json.loads((cached / "result.json").read_text())["auc"]
        for slide_id, probs in predictions(run).items():
            np.testing.assert_allclose(probs, predictions(cached)[slide_id], rtol=1e-6)
        assert note in capsys.readouterr().err
        store.mkdir(exist_ok=True)
        (store / "notes.txt").touch()
    assert Heatmap(run_folder=run, slide_ids=("synth_0001",)).run()[1] == 0


def test_evaluation_computes_what_is_missing(cached: Path, tmp_path: Path) -> None:
    run, store = tmp_path / "run", tmp_path / "F"
    shutil.copytree(cached, run)
    store.mkdir()
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(cached.with_name("store")), str(store)))
    with without_pictures():
        Evaluate(run_folder=run).run()
    whole = kept(cached.with_name("store"))
    assert len(kept(store)) == 4
    assert kept(store).items() <= whole.items()  # Under the same key, bit for bit.


def test_a_slide_that_was_tiled_anew_is_computed_anew(
    words: Words, small_manifests: Path, cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of the test slides: what BatchNorm measures, and so the key, stays as it was."""
    manifests, store = tmp_path / "M", tmp_path / "F"
    shutil.copytree(small_manifests, manifests)
    shutil.copytree(cached.with_name("store"), store)
    slide_id = min(predictions(cached))
    file = tiles_path(manifests, slide_id)
    manifest = read_manifest(file)
    x_l0 = manifest.x_l0.copy()
    x_l0[0] += 8
    write_manifest(file, dataclasses.replace(manifest, x_l0=x_l0))
    (shard,) = store.glob(f"*/??/{slide_id}")
    before, files = np.asarray(zarr.open_array(shard, mode="r")[:]), kept(store)
    line = words(tmp_path / "run", "--machine.features", store)
    train([str(manifests) if word == str(small_manifests) else word for word in line])
    assert "computing features of 1 of 12 slides: 11 are kept, 1 are of other manifests" in capsys.readouterr().err
    assert [name.partition("/")[2] for name in files if kept(store)[name] != files[name]] == [slide_id]
    moved = (np.asarray(zarr.open_array(shard, mode="r")[:]) != before).any(axis=1)
    assert moved[0]
    assert not moved[1:].any()


def test_a_slide_that_cannot_be_read_is_skipped_as_without_features(
    words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import trainer.loading.reading as reading

    whole = reading.read_plan

    def read_plan(slide: Any, manifest: Any, *args: Any) -> Any:
        if manifest.slide.slide_id in bad:
            raise IndexError("odd")
        return whole(slide, manifest, *args)

    monkeypatch.setattr(reading, "read_plan", read_plan)
    bad = {"synth_0000", "synth_0002"}  # One trains.
    features = ("--machine.features", tmp_path / "F", *FIXED)
    plain = train(words(tmp_path / "plain", *FIXED), 1)
    found = train(words(tmp_path / "run", *features), 1)
    assert sorted(found["skipped"]) == sorted(plain["skipped"]) != []
    assert all(reason.endswith("IndexError: odd") for reason in found["skipped"])
    assert "skipped: slide synth_0000: IndexError: odd" in capsys.readouterr().err
    assert_same(tmp_path / "run", tmp_path / "plain")
    assert len(kept(tmp_path / "F")) == NUM_SLIDES - 2
    bad = {"synth_0000", "synth_0001", "synth_0004"}
    with pytest.raises(
        SlidegradError, match=r"of 6 training slides could not be read, more than cohort\.max_skipped=0\.1"
    ):
        train(words(tmp_path / "other", "--machine.features", tmp_path / "G", *FIXED))
    assert not leftovers(tmp_path / "G")
    bad = set()  # They are there again.
    train(words(tmp_path / "again", *features))
    assert len(kept(tmp_path / "F")) == NUM_SLIDES


def test_a_full_disk_ends_the_run_in_a_sentence_and_keeps_what_is_whole(
    words: Words, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, num_calls = zarr.create_array, 0

    def create_array(**arguments: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(**arguments)

    line = words(tmp_path / "run", "--machine.features", tmp_path / "F")
    with monkeypatch.context() as patch:
        patch.setattr(zarr, "create_array", create_array)
        with pytest.raises(
            SlidegradError, match=r"features cannot be kept there \(No space left on device\); mend"
        ) as told:
            train(line)
    assert "\n" not in str(told.value)
    before = kept(tmp_path / "F")
    assert len(before) == 3
    assert not leftovers(tmp_path / "F")
    train([*line, "--resume"])
    assert before.items() <= kept(tmp_path / "F").items()
    assert kept(tmp_path / "F") == kept(cached.with_name("store"))
    assert_same(tmp_path / "run", cached, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("action", "code"), [("kill", -9), ("term", 75)])
def test_a_run_that_is_ended_while_it_computes_goes_on(
    action: str, code: int, words: Words, cached: Path, tmp_path: Path
) -> None:
    line = words(tmp_path / "run", "--machine.features", tmp_path / "F")
    ended = run_faulty(line, f"{action}:validation:0:6", tmp_path / "done", num_ranks=1)
    assert ended.returncode == code, ended.stderr
    before = kept(tmp_path / "F")
    assert len(before) == (5 if action == "kill" else 6)
    assert bool(leftovers(tmp_path / "F")) == (action == "kill")
    # What BatchNorm measured is not measured again, by other ranks perhaps.
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["epoch_0000_slide_000000"]
    ended = run_faulty([*line, "--resume"], "", tmp_path / "done", num_ranks=1)
    assert ended.returncode == 0, ended.stderr
    assert f"computing features of {NUM_SLIDES - len(before)} of 12 slides: {len(before)} are kept" in ended.stderr
    assert kept(tmp_path / "F") == kept(cached.with_name("store"))
    assert_same(tmp_path / "run", cached, rtol=0)


@pytest.mark.slow
def test_two_runs_fill_one_store_at_once(words: Words, cached: Path, tmp_path: Path) -> None:
    def start(name: str) -> subprocess.Popen[str]:
        line = words(tmp_path / name, "--machine.features", tmp_path / "F", "--aggregator.name", name)
        command = [sys.executable, "-m", "trainer", *line]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    both = [start("gma"), start("mean")]
    for process in both:
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told
    assert kept(tmp_path / "F") == kept(cached.with_name("store"))
    assert not leftovers(tmp_path / "F")
    assert_same(tmp_path / "gma", cached, rtol=0)


def test_features_that_were_damaged_are_removed_and_computed_again(words: Words, cached: Path, tmp_path: Path) -> None:
    store = tmp_path / "F"
    shutil.copytree(cached.with_name("store"), store)
    slide_id = losses(cached)[0][0]
    (shard,) = store.glob(f"*/??/{slide_id}/c/0/0")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:40] + b"!" + whole[41:])
    result = train(words(tmp_path / "run", "--machine.features", store), 1)
    (reason,) = result["skipped"]
    assert reason.startswith(f"slide {slide_id}: its features ")
    assert str(tmp_path) not in reason
    train(words(tmp_path / "again", "--machine.features", store))
    assert shard.read_bytes() == whole
    assert_same(tmp_path / "again", cached, rtol=0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--encoder.freeze", "none"],
            "unchanged tiles; give --encoder.freeze all too, or leave machine.features away",
        ),
        (["--augment.flips", "--augment.blur", "0.1"], "give --augment.no-flips --augment.blur 0 too"),
        (["--augment.stain", "0.05"], "give --augment.stain 0 too"),
        (["--machine.features", "/dev/null"], "--machine.features /dev/null: cannot be used as a folder"),
        (["--machine.features", str(ROOT)], "holds other things than features"),
    ],
)
def test_what_cannot_work_is_refused_at_once(more: list[str], message: str, words: Words, tmp_path: Path) -> None:
    with pytest.raises(SlidegradError) as caught:
        Train.parse(words(tmp_path / "run", "--machine.features", tmp_path / "F", *more)).run()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.fixture
def alone(cached: Path) -> tuple[Engine, Job]:
    """The cached run's model and job, in this process."""
    job = open_run(cached)
    engine = load_alone(job, chosen_checkpoint(job.run))
    engine.set_training(False)
    return engine, job


def open_store(root: Path, engine: Engine) -> FeatureStore:
    store = FeatureStore(root, {"weights": "w"}, engine.side.num_features)
    store.begin()
    return store


def silent(**_: object) -> None:
    """No progress."""


def test_two_fillers_side_by_side_compute_hardly_a_slide_twice(
    alone: tuple[Engine, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One goes on whenever the other is at a slide, and they begin where it is worst: at the same place."""
    engine, job = alone
    monkeypatch.setattr("secrets.randbelow", lambda _: 0)
    monkeypatch.setattr("trainer.features.filling._AT_ONCE", 2)
    slides = {case.slide_id: case.num_tiles for case in job.cohort.cases}
    hashes = {slide_id: hash_read_plan(job.source[slide_id]) for slide_id in share_of(slides, (0,), 0)}
    computed: list[str] = []
    whole, is_first = engine.side.score_pass, True

    def score_pass(slide: Any, num_mine: int, clock: Any) -> Any:
        nonlocal is_first
        computed.append(slide.plan.slide_id)
        if is_first:
            is_first = False
            next(both[1], None)
            is_first = True
        return whole(slide, num_mine, clock)

    monkeypatch.setattr(engine.side, "score_pass", score_pass)
    store = open_store(tmp_path, engine)
    both = [
        Filler(engine, job, store, job.loader(engine.comm), silent)._work(store, Share(hashes), slides)
        for _ in range(2)
    ]
    for work in both:
        list(work)
    assert set(computed) == set(slides)
    assert len(computed) <= NUM_SLIDES + 2
    assert not leftovers(tmp_path)


def test_a_claim_of_a_run_that_was_killed_keeps_nobody_from_a_slide(alone: tuple[Engine, Job], tmp_path: Path) -> None:
    engine, job = alone
    store = open_store(tmp_path, engine)
    slides = {case.slide_id: case.num_tiles for case in job.cohort.cases}
    claims = [store.claim(slide_id) for slide_id in slides]
    for claim in claims:
        claim.__enter__()
    assert Filler(engine, job, store, job.loader(engine.comm), silent).fill(slides) == {}
    assert len(kept(tmp_path)) == NUM_SLIDES


def test_shards_bring_the_features_of_their_rows_and_where_their_tiles_lie(
    alone: tuple[Engine, Job],
) -> None:
    """Bit for bit what was computed; tiles that are drawn twice are there twice."""
    engine, job = alone
    loader = serve_split(engine, job, "test", silent)
    assert isinstance(loader, FeatureLoader)
    tiles = dataclasses.replace(job.config.tiles, k=40)
    sampler = SlideSampler(job.cohort.num_tiles("test"), engine.comm.topology, 0, seed=0, tiles=tiles)
    with loader.read(sampler) as reading:
        for step in sampler.steps():
            (folder,) = [file.parent for file in cache_of(job).glob(f"*/??/{step.slide_id}/zarr.json")]
            stored = np.asarray(zarr.open_array(folder, mode="r")[:])
            plans = [plan for plan in sampler if plan.step == step]
            slide = reading.slide(step)
            shards = list(slide.first())
            for plan, shard in zip(plans, shards, strict=True):
                assert (shard.virtual_rank, shard.error, shard.num_tiles) == (plan.virtual_rank, "", len(plan.rows))
                np.testing.assert_array_equal(shard.features_ND, stored[plan.rows])
                np.testing.assert_array_equal(shard.cells_N2, job.source[step.slide_id].cells[plan.rows])
            assert slide.reads.num_tiles == 40
            assert (list(slide.again()), slide.will_reread()) == ([], False)
    with loader.read([]) as reading:  # A rank without shards.
        assert list(reading.slide(step).first()) == []


def cache_of(job: Job) -> Path:
    assert job.config.machine.features is not None
    return job.config.machine.features


def test_a_read_that_hangs_is_given_up(alone: tuple[Engine, Job]) -> None:
    engine, job = alone
    steps = plan_scoring(job.cohort.num_tiles("val"), tiles=job.config.tiles)
    plans = list(shards_of(steps, engine.comm.topology, 0, 0))
    hung = torch.multiprocessing.get_context("spawn").Event()

    def load(those: list[Any]) -> tuple[list[Any], Reads]:
        if those[0].step == steps[0]:
            hung.wait()
        return [], Reads()

    with FeatureReading(plans, load, 0.05) as reading:
        first = list(reading.slide(steps[0]).first())
        assert all("its features were not read in 0.05 s (machine.read_deadline_s)" in shard.error for shard in first)
        assert len(first) == 2
        assert list(reading.slide(steps[1]).first()) == []
    hung.set()


def test_only_slides_that_an_epoch_draws_are_computed() -> None:
    num_tiles = {f"s{i}": 5 for i in range(40)}
    topology, tiles = Topology.make(1, "auto", 1), open_tiles()
    labels = {slide_id: int(i < 4) for i, slide_id in enumerate(num_tiles)}
    once = SlideSampler(num_tiles, topology, 0, seed=0, tiles=tiles, balance="once", labels=labels)
    assert len(drawn(once, 5, 40)) == 8
    some = SlideSampler(num_tiles, topology, 0, seed=0, tiles=tiles, fraction=0.1)
    some.set_epoch(3)
    some.advance()
    expected = set()
    for epoch in (3, 4):
        probe = SlideSampler(num_tiles, topology, 0, seed=0, tiles=tiles, fraction=0.1)
        probe.set_epoch(epoch)
        expected |= {step.slide_id for step in probe.steps()}
    assert drawn(some, 5, 40).keys() == expected
    assert (some.epoch, some.next_step) == (3, 1)
    assert drawn(some, 3, 40) == {}


def open_tiles() -> Any:
    from trainer.config import Tiles

    return Tiles()


def test_every_slide_is_one_ranks_and_the_order_every_runs() -> None:
    slides = [f"s{i}" for i in range(50)]
    shares = [share_of(slides, (1, 2, 3), rank) for rank in (1, 2, 3)]
    assert sorted(itertools.chain(*shares)) == sorted(slides)
    assert {len(share) for share in shares} == {16, 17}
    assert share_of(slides[::-1], (0,), 0) == share_of(slides, (0,), 0) != sorted(slides)


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ((5, 0, 0), "computing features of 5 slides: none are kept for these weights"),
        ((5, 7, 2), "computing features of 5 of 12 slides: 7 are kept, 2 are of other manifests or damaged"),
        ((5, 7, 0), "computing features of 5 of 12 slides: 7 are kept"),
        ((0, 12, 0), "the features of all 12 slides are kept"),
    ],
)
def test_the_user_is_told_what_is_kept(counts: tuple[int, int, int], sentence: str) -> None:
    assert tell_counts(*counts) == sentence
