"""Checkpoints appear whole or not at all; the newest sound one is used, and what was there stays where one fails."""

import json
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkpoint import chosen_checkpoint, list_checkpoints, load_newest, save_checkpoint
from trainer.comm import Comm
from trainer.errors import TrainerError
from trainer.standing import Standing
from trainer.topology import Topology

HALVES = ("encoder", "aggregator")


@pytest.fixture
def alone() -> Comm:
    return Comm(Topology.make(1, "auto", 1), 0, torch.device("cpu"))


def save(run: Path, comm: Comm, epoch: int, slide: int | None = None, best: int | None = None, size: int = 4) -> str:
    halves = {half: {"model": {"w": torch.full((size,), float(epoch))}, "optimizer": None} for half in HALVES}
    return save_checkpoint(run, comm, halves, {"epoch": epoch, "slide": slide, "best_epoch": best})


def names(run: Path) -> list[str]:
    return [folder.name for folder in list_checkpoints(run)]


def test_the_two_newest_and_the_best_stay_in_the_order_of_the_run(tmp_path: Path, alone: Comm) -> None:
    assert save(tmp_path, alone, 0, best=0) == ""
    for epoch, slide in ((1, 200), (1, 1000), (1, None), (2, 200)):
        save(tmp_path, alone, epoch, slide, best=0)
    assert names(tmp_path) == ["epoch_0000", "epoch_0001", "epoch_0002_slide_000200"]
    assert chosen_checkpoint(tmp_path).name == "epoch_0000"
    folder, state, halves = load_newest(tmp_path, alone, HALVES)
    assert folder is not None
    assert (folder.name, state["epoch"], state["slide"]) == ("epoch_0002_slide_000200", 2, 200)
    assert halves["encoder"]["model"]["w"].tolist() == [2.0] * 4


def test_a_run_without_any_begins_anew(tmp_path: Path, alone: Comm) -> None:
    assert load_newest(tmp_path, alone, HALVES) == (None, {}, {})


@pytest.mark.parametrize("what", ["a bit of the weights", "torn weights", "no weights", "state"])
def test_a_damaged_one_is_set_aside_and_the_one_before_it_used(
    what: str, tmp_path: Path, alone: Comm, capfd: pytest.CaptureFixture[str]
) -> None:
    for epoch in (0, 1):
        save(tmp_path, alone, epoch, size=4_096)
    newest = list_checkpoints(tmp_path)[-1]
    file = newest / ("state.json" if what == "state" else "aggregator.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    {
        "a bit of the weights": lambda: file.write_bytes(content),
        "torn weights": lambda: file.write_bytes(content[: len(content) // 2]),
        "no weights": file.unlink,
        "state": lambda: file.write_bytes(b"{"),
    }[what]()
    folder, _, halves = load_newest(tmp_path, alone, HALVES)
    assert folder is not None
    assert folder.name == "epoch_0000"
    assert halves["aggregator"]["model"]["w"][0] == 0
    assert "epoch_0001: " in (told := capfd.readouterr().err)
    assert "set aside as damaged_epoch_0001" in told
    assert names(tmp_path) == ["epoch_0000"]


def test_where_none_is_sound_nothing_begins_anew_by_itself(tmp_path: Path, alone: Comm) -> None:
    save(tmp_path, alone, 0)
    (list_checkpoints(tmp_path)[-1] / "encoder.pt").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(TrainerError, match="all checkpoints are damaged; bring a copy back, or"):
            load_newest(tmp_path, alone, HALVES)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()])
def test_what_cannot_be_reached_now_is_no_damage(
    error: Exception, tmp_path: Path, alone: Comm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    save(tmp_path, alone, 0)
    with monkeypatch.context() as stumbling:
        stumbling.setattr(torch, "load", fail)
        with pytest.raises(type(error)):
            load_newest(tmp_path, alone, HALVES)
    assert load_newest(tmp_path, alone, HALVES)[1]["epoch"] == 0


def test_copies_beside_checkpoints_are_left_alone(tmp_path: Path, alone: Comm) -> None:
    save(tmp_path, alone, 0)
    shutil.copytree(list_checkpoints(tmp_path)[0], tmp_path / "checkpoints" / "epoch_0000.bak")
    save(tmp_path, alone, 1)
    assert names(tmp_path) == ["epoch_0000", "epoch_0001"]


@pytest.fixture
def full_disk() -> Iterator[Any]:
    """Files may not grow past 50 kB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_keeps_the_one_before(tmp_path: Path, alone: Comm, full_disk: Any) -> None:
    save(tmp_path, alone, 0, size=100_000)
    full_disk()
    error = save(tmp_path, alone, 1, size=100_000)
    assert "File too large" in error
    assert names(tmp_path) == ["epoch_0000"]
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["epoch_0000"]
    folder, _, halves = load_newest(tmp_path, alone, HALVES)
    assert folder is not None
    assert len(halves["encoder"]["model"]["w"]) == 100_000


def test_what_was_left_torn_is_cleared_away(tmp_path: Path, alone: Comm) -> None:
    torn = tmp_path / "checkpoints" / ".epoch_0007.tmp"
    torn.mkdir(parents=True)
    save(tmp_path, alone, 0)
    assert sorted(f.name for f in torn.parent.iterdir()) == ["epoch_0000"]


def test_checkpoints_from_before_there_were_digests_load(tmp_path: Path, alone: Comm) -> None:
    save(tmp_path, alone, 0)
    file = list_checkpoints(tmp_path)[-1] / "state.json"
    state = json.loads(file.read_text())
    del state["digests"]
    file.write_text(json.dumps(state))
    assert load_newest(tmp_path, alone, HALVES)[1]["epoch"] == 0


def test_what_a_run_remembers_comes_back() -> None:
    standing = Standing(best=(0.9, -0.1), best_epoch=3, skipped={"a": "why"}, loss_sum=0.1 + 0.2, num_slides=2)
    state = json.loads(json.dumps({**standing.to_dict(), "epoch": 4, "scale": [1.0, 0]}))
    assert Standing.from_dict(state) == standing
    assert Standing.from_dict({"best": None, "best_epoch": None, "skipped": {}}) == Standing()
