"""Runs as processes: how they fail, who has them, what of the machine they get, and that none is left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from manifests.errors import Stopped
from trainer.errors import TrainerError
from trainer.sweep.running import Share, Task, divide, run_all
from trainer.sweep.states import (
    Ended,
    epochs_done,
    find_state,
    holding,
    is_held,
    last_sentence,
    log_file,
    read_ended,
    run_folder,
    write_ended,
)

SHARE = Share(cores=(min(os.sched_getaffinity(0)),), gpus=None)


class Told:
    """A watch that remembers."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: dict[str, Ended | None] = {}
        self.said: list[str] = []

    def begin(self, name: str, epochs: int) -> None:  # noqa: ARG002
        self.begun.append(name)

    def look(self, epochs: dict[str, int]) -> None:
        pass

    def end(self, name: str, ended: Ended | None) -> None:
        self.ended[name] = ended

    def tell(self, sentence: str) -> None:
        self.said.append(sentence)


def failing(name: str, recipe: str = "no_such_recipe") -> Task:
    """A run that ends at once: its recipe is none."""
    return Task(name=name, arguments=(recipe, "--out", "x"), nproc=1, epochs=1)


def test_a_machine_is_divided_evenly() -> None:
    shares = divide(2, range(9), ["0", "1", "2", "3"])
    assert [share.cores for share in shares] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [share.gpus for share in shares] == [("0", "1"), ("2", "3")]
    # More runs than there are cores, or GPUs: they share.
    assert [share.cores for share in divide(3, [4, 5], [])] == [(4,), (5,), (4,)]
    assert [share.gpus for share in divide(2, [0], ["7"])] == [("7",), ("7",)]
    assert divide(1, [0, 1], ["0", "1"]) == [Share(cores=(0, 1), gpus=None)]
    assert divide(2, [0, 1], [])[0].gpus is None


def test_a_run_that_fails_is_kept_with_its_last_sentence_and_the_others_go_on(tmp_path: Path) -> None:
    told = Told()
    run_all(tmp_path, [failing("a", "first_recipe"), failing("b", "second_recipe")], [SHARE, SHARE], told)
    assert sorted(told.begun) == ["a", "b"]
    for name, recipe in (("a", "first_recipe"), ("b", "second_recipe")):
        ended = read_ended(tmp_path, name)
        assert ended is not None
        assert ended == told.ended[name]
        assert ended.code == 2
        assert ended.reason.startswith(f"unknown recipe '{recipe}'; one of demo, ")
        assert ended.peak_rss_bytes > 1_000_000
        assert find_state(tmp_path, name) == "failed"
        assert f"unknown recipe '{recipe}'" in log_file(tmp_path, name).read_text()
        assert not is_held(tmp_path, name)


def test_when_the_first_fail_alike_the_others_are_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.sweep.running._ALIKE", 2)
    told = Told()
    with pytest.raises(
        TrainerError, match=r"the first 2 runs all failed alike, so the other 3 were not tried: unknown"
    ):
        run_all(tmp_path, [failing(f"r{i}") for i in range(5)], [SHARE], told)
    assert list(told.ended) == ["r0", "r1"]


def test_a_run_that_another_process_has_is_left_to_it(tmp_path: Path) -> None:
    told = Told()
    with holding(tmp_path, "a") as lock:
        assert lock is not None
        assert find_state(tmp_path, "a") == "running"
        with holding(tmp_path, "a") as again:
            assert again is None
        run_all(tmp_path, [failing("a"), failing("b")], [SHARE], told)
    assert told.ended["a"] is None
    assert told.begun == ["b"]
    assert find_state(tmp_path, "a") == "open"


def test_a_lock_lives_as_long_as_the_last_process_that_holds_it(tmp_path: Path) -> None:
    with holding(tmp_path, "a") as lock:
        assert lock is not None
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    assert is_held(tmp_path, "a")
    child.communicate(b"\n", timeout=60)
    assert not is_held(tmp_path, "a")


def test_a_run_that_was_done_meanwhile_is_not_done_again(tmp_path: Path) -> None:
    run_folder(tmp_path, "a").mkdir(parents=True)
    (run_folder(tmp_path, "a") / "result.json").write_text("{}")
    told = Told()
    run_all(tmp_path, [failing("a")], [SHARE], told)
    assert told.ended == {"a": None}
    assert read_ended(tmp_path, "a") is None


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped), (signal.SIGHUP, Stopped)],
)
def test_a_signal_stops_all_runs_and_leaves_none_behind(number: int, error: type, tmp_path: Path) -> None:
    """Runs that are still importing torch: they have nothing to save, and end at once."""
    told = Told()
    tasks = [Task(name=name, arguments=("demo", "--help"), nproc=1, epochs=1) for name in "abc"]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # Whatever the tests were started under.
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    def send_once_begun() -> None:
        while len(told.begun) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send_once_begun, daemon=True).start()
    with pytest.raises(error):
        run_all(tmp_path, tasks, [SHARE, SHARE], told)
    assert sorted(told.begun) == sorted(told.ended) == ["a", "b"]
    assert "2 runs end a step and save" in told.said[0]
    assert not any(is_held(tmp_path, name) for name in "abc")
    assert "failed" not in [find_state(tmp_path, name) for name in "abc"]
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_a_hangup_under_nohup_stops_nothing(tmp_path: Path) -> None:
    told, before = Told(), signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def hang_up_once_begun() -> None:
        while not told.begun:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGHUP)

    threading.Thread(target=hang_up_once_begun, daemon=True).start()
    try:
        run_all(tmp_path, [failing("a")], [SHARE], told)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert told.said == []
    assert find_state(tmp_path, "a") == "failed"


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("note: x\nslidegrad: --nproc 0: expected at least 1\n", "--nproc 0: expected at least 1"),
        (
            "slidegrad: [rank 1/2 encoder] no memory\n"
            "slidegrad: rank 1 of 2 ended with exit code 2; its message is above\n",
            "[rank 1/2 encoder] no memory",
        ),
        (
            "slidegrad: old\nTraceback (most recent call last):\n  File x\nValueError: odd\n"
            "slidegrad: unexpected error (above); this is a fault of Slidegrad's, please report it\n",
            "ValueError: odd",
        ),
        ("slidegrad: /data/Doe Jane.svs: no such file\n", "[path]: no such file"),
        ("Fatal Python error: Aborted\n", "Fatal Python error: Aborted"),
        ("", "it said nothing"),
    ],
)
def test_the_reason_is_the_last_sentence_that_says_one(log: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "a.log"
    file.write_text("slidegrad: of the time before\n" + log)
    assert last_sentence(file, file.stat().st_size - len(log)) == reason


def test_epochs_are_read_from_the_end_of_the_journal(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert epochs_done(tmp_path) == 0
    lines = [{"event": "step", "epoch": 0, "step": i, "slide_id": "s" * 40} for i in range(2000)]
    lines += [{"event": "epoch", "epoch": 0}, {"event": "step", "epoch": 1, "step": 2000}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "epo')
    assert epochs_done(tmp_path) == 1
    file.write_text('{"event": "epoch", "epoch": 4}\n{"event": "end", "seconds": 1.0}\n')
    assert epochs_done(tmp_path) == 5


def test_states(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "a")
    assert find_state(tmp_path, "a") == "open"
    run.mkdir(parents=True)
    assert find_state(tmp_path, "a") == "open"
    (run / "config.yaml").write_text("")
    assert find_state(tmp_path, "a") == "begun"
    for code, reason, state in (
        (75, "stopped", "begun"),
        (70, "odd", "failed"),
        (-9, "killed", "failed"),
        (0, "", "begun"),
    ):
        write_ended(tmp_path, "a", Ended(code=code, reason=reason))
        assert find_state(tmp_path, "a") == state
    (run / "result.json").write_text("{}")
    assert find_state(tmp_path, "a") == "done"
