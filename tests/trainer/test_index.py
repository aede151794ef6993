"""Training with tile coordinates from a service: the same run as from the folder, also when the service goes away."""

import csv
import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
import torch

from manifests import Manifest, ManifestError, SlidegradError, open_manifests, read_manifest, write_manifest
from manifests.answers import ServiceClient
from manifests.files import read_hashed, tiles_path
from manifests.service import ServiceManifests, open_service
from services.app import create_app
from services.settings import Settings
from tests.serving import Answer, Meddling, closed_address, serving, serving_process
from tests.trainer.test_faults import run_faulty
from tests.trainer.test_train import QUICK, arguments, losses, weights
from trainer.checkpoint import list_checkpoints
from trainer.cli import Train
from trainer.index import IndexedManifests, describe_manifests, read_record
from trainer.journal import read_events
from trainer.loading.reading import ShardReader
from trainer.prepare import prepare_run, read_config
from trainer.sampler import ShardPlan
from trainer.topology import Topology
from trainer.update import Update

TOKEN = "sixteen-characters-or-more"
AT_HAND = ("--machine.read-ahead-gb", "0.00001")
"""Nothing is read ahead: manifests are asked for one by one, as the steps need them."""
Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def labels(small_cohort: Path) -> Path:
    return small_cohort / "labels.csv"


@pytest.fixture
def folder(small_manifests: Path, tmp_path: Path) -> Folder:
    """Copies the manifests, or only what no service gives: where slides lie, and their thumbnails."""

    def copy(name: str, *, without_tiles: bool = False) -> Path:
        ignored = shutil.ignore_patterns("tiles", "catalog.parquet") if without_tiles else None
        return Path(shutil.copytree(small_manifests, tmp_path / name, ignore=ignored))

    return copy


def train_logged(*args: Any) -> tuple[dict[str, Any], int, list[str]]:
    """A run in this process: its result, exit code, and which rows were read of what, sorted."""
    whole, reads = ShardReader.read, set[str]()

    def read(self: ShardReader, plan: ShardPlan, out: Any) -> Any:
        reads.add(f"{plan.step.epoch}\t{plan.step.slide_id}\t{plan.virtual_rank}\t{plan.rows.tolist()}")
        return whole(self, plan, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardReader, "read", read)
        result, code = Train.parse(arguments(*args)).run()
    return result, code, sorted(reads)


def assert_same(run: Path, expected: Path) -> None:
    """Weights, losses and measures are those of the other run, bit for bit."""
    true, found = weights(expected), weights(run)
    assert [name for name in true if not torch.equal(true[name], found[name])] == []
    assert losses(run) == losses(expected)
    results = [json.loads((each / "result.json").read_text()) for each in (run, expected)]
    assert results[0]["auc"] == results[1]["auc"]
    digests = [next(iter(read_events(each)))["digests"] for each in (run, expected)]
    assert digests[0] == digests[1]


def index_events(run: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["event"] == "index"]


def held_out(run: Path) -> list[str]:
    """The slides of the test."""
    return [row["slide_id"] for row in csv.DictReader((run / "cohort.csv").open()) if row["split"] == "test"]


def replace_manifest(root: Path, slide_id: str) -> None:
    """Another file with the same tiles, as another version of the tiler would write it."""
    manifest = read_manifest(tiles_path(root, slide_id))
    slide = dataclasses.replace(manifest.slide, version="another")
    write_manifest(tiles_path(root, slide_id), dataclasses.replace(manifest, slide=slide))


class Served(NamedTuple):
    """A finished run, and what was asked for."""

    run: Path
    reads: list[str]
    asked: list[str]
    """Addresses that the index was asked for and gave."""


@pytest.fixture(scope="module")
def local(small_manifests: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A run from the folder, in this process."""
    run = tmp_path_factory.mktemp("runs") / "local"
    _, code, reads = train_logged(small_manifests, labels, run, *QUICK)
    assert code == 0
    return Served(run, reads, [])


@pytest.fixture(scope="module")
def served(small_manifests: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """The same from an index that wants a token; no manifest lies in the run's own folder."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "token").write_text(TOKEN)
    asked: list[str] = []

    def note(path: str, answer: Answer) -> Answer:
        asked.extend([path] * (answer.status == 200))
        return answer

    app = Meddling(create_app(Settings(manifests=small_manifests, token_file=folder / "token")), note)
    paths = shutil.copytree(small_manifests, folder / "M", ignore=shutil.ignore_patterns("tiles", "catalog.parquet"))
    with serving(app) as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIDEGRAD_TOKEN", TOKEN)
        _, code, reads = train_logged(paths, labels, folder / "run", *QUICK, "--index", address)
    assert code == 0
    return Served(folder / "run", reads, asked)


@pytest.fixture
def half_done(served: Served, tmp_path: Path) -> Path:
    """That run as it was after its first epoch."""
    run = Path(shutil.copytree(served.run, tmp_path / "half_done"))
    shutil.rmtree(list_checkpoints(run)[-1])
    return run


def test_a_run_from_an_index_is_the_run_from_the_folder(local: Served, served: Served) -> None:
    run = served.run
    assert_same(run, local.run)
    assert served.reads == local.reads
    assert (next(iter(read_events(run)))["index"], index_events(run)) == (True, [])
    assert "from an index</td>" in (run / "report.html").read_text()
    assert Path(json.loads((run / "result.json").read_text())["heatmap"]).is_file()


def test_each_manifest_is_asked_for_once_after_its_hash(served: Served) -> None:
    tiles = [path for path in served.asked if "/tiles?" in path]
    assert len(tiles) == len(set(tiles)) == 24


def test_the_token_is_nowhere_in_the_run(served: Served) -> None:
    files = [file for file in served.run.rglob("*") if file.is_file()]
    assert len(files) > 10
    assert [file for file in files if TOKEN.encode() in file.read_bytes()] == []


THREE = (*QUICK, *AT_HAND, "--optim.epochs", "1", "--optim.slides-per-step", "1")


@pytest.fixture(scope="module")
def local_three(
    small_manifests: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory, slidegrad: Callable[..., Any]
) -> Path:
    """A run of three processes from the folder."""
    run = tmp_path_factory.mktemp("runs") / "three"
    ended = slidegrad("train", *arguments(small_manifests, labels, run, *THREE, "--nproc", "3"))
    assert ended.code == 0, ended.stderr
    return run


@pytest.mark.slow
def test_three_processes_that_are_launched_here_have_the_index_too(
    local_three: Path,
    small_manifests: Path,
    folder: Folder,
    labels: Path,
    tmp_path: Path,
    slidegrad: Callable[..., Any],
) -> None:
    run = tmp_path / "run"
    with serving(create_app(Settings(manifests=small_manifests))) as address:
        words = arguments(folder("M", without_tiles=True), labels, run, *THREE, "--index", address)
        ended = slidegrad("train", *words, "--nproc", "3")
    assert ended.code == 0, ended.stderr
    assert "meanwhile the run goes on" not in ended.stderr
    assert_same(run, local_three)


@pytest.mark.slow
def test_an_index_that_is_killed_in_the_middle_of_an_epoch_changes_nothing(
    local_three: Path, small_manifests: Path, labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three processes; the aggregator, which reads nothing, writes it into the journal, an encoder rank says it."""
    run = tmp_path / "run"
    with serving_process(small_manifests) as (process, address):
        monkeypatch.setenv("INDEX_PID", str(process.pid))
        words = arguments(small_manifests, labels, run, *THREE, "--index", address)
        ended = run_faulty(words, "lose_index:optimizer:0:2", tmp_path / "done")
        assert ended.returncode == 0, ended.stderr
        assert process.wait(10) == -signal.SIGKILL
    assert_same(run, local_three)
    assert ended.stderr.count(f"note: {address}: does not answer (") == 1
    (event,) = index_events(run)
    assert event["num_ranks"] == 2
    assert event["num_local"] >= 2
    assert address not in event["reason"]
    assert f"did not give {event['num_local']} manifests" in (run / "report.html").read_text()


def test_a_slide_whose_manifest_was_replaced_is_refused_once_the_index_is_gone(
    half_done: Path, small_manifests: Path, folder: Folder, labels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, replaced = folder("M"), held_out(half_done)[1]
    replace_manifest(paths, replaced)
    whole = Update.finish
    with serving_process(small_manifests) as (process, address):

        def finish(*args: Any) -> Any:
            os.kill(process.pid, signal.SIGKILL)
            return whole(*args)

        monkeypatch.setattr(Update, "finish", finish)
        monkeypatch.setattr("manifests.answers.time.sleep", lambda _: None)
        result, code, _ = train_logged(paths, labels, half_done, *AT_HAND, "--resume", "--index", address)
    assert code == 1
    (told,) = result["skipped"]
    assert told.startswith(f"slide {replaced}: its manifest is another than when the run began; bring that one back")
    assert [event["epoch"] for event in index_events(half_done)] == [1]


def test_a_run_that_goes_on_keeps_to_the_manifests_that_it_began_with(
    local: Served,
    half_done: Path,
    small_manifests: Path,
    folder: Folder,
    labels: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    newer, replaced = folder("newer"), held_out(half_done)[0]
    replace_manifest(newer, replaced)
    with serving(create_app(Settings(manifests=newer))) as address:
        _, code, _ = train_logged(small_manifests, labels, half_done, "--resume", "--index", address)
    assert code == 0
    assert_same(half_done, local.run)
    told = f"note: the index has another manifest of slide {replaced} than when the run began"
    assert capfd.readouterr().err.count(told) == 1


def test_ranks_that_are_started_again_do_not_need_the_index(
    half_done: Path, small_manifests: Path, labels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manifests.answers.time.sleep", lambda _: None)
    topology = Topology.make(1, "auto", 2)
    given = {"manifests": small_manifests, "labels": labels, "topology": topology, "resume": True}
    prepare = partial(prepare_run, half_done, read_config(half_done), **given, index=closed_address())
    prepare(is_restart=True)
    with pytest.raises(SlidegradError, match=r"^--index .*: does not answer"):
        prepare()


def test_the_record_of_a_run_holds_the_hashes_of_its_manifests(
    served: Served, half_done: Path, small_manifests: Path, labels: Path
) -> None:
    record = read_record(served.run)
    assert record is not None
    for slide_id, found in zip(record["slide_id"].to_pylist(), record["manifest_hash"].to_pylist(), strict=True):
        assert found == read_hashed(tiles_path(small_manifests, slide_id))[1]
    (half_done / "manifests.parquet").write_bytes(b"PAR1")
    with pytest.raises(SlidegradError, match=r"manifests\.parquet, the manifests that the run began with, is damaged"):
        train_logged(small_manifests, labels, half_done, "--resume", "--index", closed_address())


@pytest.fixture
def state() -> dict[str, Any]:
    """What stands between the index and a rank: `meddle(answer)` if there is one."""
    return {"meddle": None, "asked": []}


@pytest.fixture
def root(folder: Folder) -> Path:
    return folder("M")


@pytest.fixture
def indexed(
    root: Path, small_manifests: Path, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[IndexedManifests]:
    """The manifests of a run of all slides."""
    monkeypatch.setattr("manifests.answers.time.sleep", lambda _: None)

    def pass_on(path: str, answer: Answer) -> Answer:
        state["asked"].append(path)
        return state["meddle"](answer) if state["meddle"] else answer

    with serving(Meddling(create_app(Settings(manifests=small_manifests)), pass_on)) as address:
        record = describe_manifests(open_service(address), list(open_manifests(small_manifests)))
        state["asked"].clear()
        yield IndexedManifests(ServiceManifests(ServiceClient(address)), root, record, tells=True)


def same(manifest: Manifest, expected: Manifest) -> bool:
    return manifest.slide == expected.slide and manifest.to_table().equals(expected.to_table())


def test_an_index_that_comes_back_is_used_again(
    indexed: IndexedManifests,
    state: dict[str, Any],
    small_manifests: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    expected, slides = open_manifests(small_manifests), list(indexed)
    assert indexed.catalog().equals(expected.catalog())
    state["meddle"] = lambda _: Answer(503, {}, b"")
    assert all(same(indexed[slide_id], expected[slide_id]) for slide_id in slides[:3])
    assert len(state["asked"]) == 4, "it is not waited for at each slide"
    trouble = indexed.take_trouble()
    assert trouble.num_local == 3
    assert "does not answer (HTTP 503)" in trouble.reason
    monkeypatch.setattr("trainer.index.time.monotonic", lambda: float("inf"))
    assert same(indexed[slides[3]], expected[slides[3]])
    assert len(state["asked"]) == 5, "once"
    state["meddle"] = None
    assert same(indexed[slides[4]], expected[slides[4]])
    assert (indexed.take_trouble().num_local, indexed.take_trouble().reason) == (1, "")
    assert len(state["asked"]) == 6
    assert all(same(indexed[slide_id], expected[slide_id]) for slide_id in slides[:5])
    assert len(state["asked"]) == 6, "what is known is not asked for"
    assert capfd.readouterr().err.count("; meanwhile the run goes on with the same manifests from its folder") == 1


def _outside(answer: Answer) -> Answer:
    """The right form, with tiles that cannot be."""
    table = pa.ipc.open_stream(answer.body).read_all()
    table = table.set_column(1, table.schema.field(1), pa.array([2**30] * len(table), pa.int32()))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return answer._replace(body=bytes(sink.getvalue()))


@pytest.mark.parametrize(
    ("meddle", "reason"),
    [
        (lambda answer: answer._replace(body=answer.body[:200]), "is damaged"),
        (_outside, "the index's answer is damaged (slide synth_0000: "),
        (lambda _: Answer(200, {"content-type": "text/html"}, b"Log in"), "no tile-index service answers here"),
        (lambda _: Answer(401, {"content-type": "application/problem+json"}, b"{}"), "asks for a token"),
    ],
)
def test_what_an_index_answers_wrongly_comes_from_the_folder(
    indexed: IndexedManifests,
    state: dict[str, Any],
    small_manifests: Path,
    meddle: Callable[[Answer], Answer],
    reason: str,
) -> None:
    expected = open_manifests(small_manifests)
    state["meddle"] = meddle
    slide_id = next(iter(indexed))
    assert same(indexed[slide_id], expected[slide_id])
    trouble = indexed.take_trouble()
    assert trouble.num_local == 1
    assert reason in trouble.reason
    with pytest.raises(ManifestError, match="slide nobody: not one of the run's slides"):
        indexed["nobody"]


def test_memory_for_manifests_is_bounded(
    indexed: IndexedManifests, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    slides = list(indexed)
    monkeypatch.setattr("trainer.index._KEPT_BYTES", 12 * (len(indexed[slides[0]]) + len(indexed[slides[1]])))
    for slide_id in (slides[1], slides[0], slides[2], slides[0]):
        indexed[slide_id]
    assert len(state["asked"]) == 3, "the one that was not asked for longest makes room"
    indexed[slides[1]]
    assert len(state["asked"]) == 4


def test_a_slide_of_which_nobody_has_the_runs_version_is_refused(
    indexed: IndexedManifests, root: Path, state: dict[str, Any]
) -> None:
    state["meddle"] = lambda _: Answer(503, {}, b"")
    replaced, gone, *_ = indexed
    replace_manifest(root, replaced)
    tiles_path(root, gone).unlink()
    with pytest.raises(ManifestError, match=rf"^slide {replaced}: its manifest is another than when the run began"):
        indexed[replaced]
    with pytest.raises(ManifestError, match=rf"^slide {gone}: no manifest from the index \(.*\) nor here \(.*\)$"):
        indexed[gone]
    assert indexed.take_trouble().num_local == 0


def test_an_index_that_cannot_be_used_ends_the_command_before_it_begins(
    small_manifests: Path,
    folder: Folder,
    labels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    slidegrad: Callable[..., Any],
) -> None:
    nowhere, token, run = closed_address(), tmp_path / "token", tmp_path / "run"
    ended = slidegrad("train", *arguments(small_manifests, labels, run, "--index", nowhere))
    assert ended.code == 2
    (sentence,) = ended.stderr.splitlines()
    assert sentence.startswith(f"slidegrad: --index {nowhere}: does not answer (")
    assert sentence.endswith(f"; or leave --index out, if {small_manifests} holds the manifests")
    parsed = Train.parse(arguments(small_manifests, labels, run))
    token.write_text(TOKEN)
    fewer = folder("fewer")
    tiles_path(fewer, "synth_0003").unlink()
    monkeypatch.setattr("manifests.answers.time.sleep", lambda _: None)
    closed = create_app(Settings(manifests=small_manifests, token_file=token))
    with serving(closed) as asking, serving(create_app(Settings(manifests=fewer))) as lacking:
        for index, given, message in (
            (asking, "", "asks for a token; set SLIDEGRAD_TOKEN"),
            (asking, "not-the-token-that-is-asked-for", "does not take the token; set SLIDEGRAD_TOKEN"),
            (f"{asking}/deeper", TOKEN, "Not Found (HTTP 404); give the address that `slidegrad serve` tells"),
            ("127.0.0.1:8080", "", "expected http://HOST:PORT"),
            (lacking, "", "1 of 12 slides have no manifest: synth_0003"),
        ):
            monkeypatch.setenv("SLIDEGRAD_TOKEN", given)
            with pytest.raises(SlidegradError) as caught:
                dataclasses.replace(parsed, index=index).run()
            assert message in str(caught.value)
            assert "\n" not in str(caught.value)
            assert not given or given not in str(caught.value)
        without = shutil.copytree(small_manifests, tmp_path / "bare", ignore=shutil.ignore_patterns("paths"))
        monkeypatch.setenv("SLIDEGRAD_TOKEN", TOKEN)
        with pytest.raises(SlidegradError, match="training needs the folder that `slidegrad tile` wrote"):
            dataclasses.replace(parsed, index=asking, manifests=without).run()
        with pytest.raises(SlidegradError, match="that of a service is given as --index"):
            dataclasses.replace(parsed, manifests=Path(asking)).run()
    assert not (run / "config.yaml").exists()
