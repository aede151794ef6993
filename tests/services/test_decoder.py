"""Processes that decode: what one does to itself costs one answer, and the next is given all the same."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.decoder import Decoder
from services.errors import BusyError, SlideFileError, TooSlowError
from tests.services import misbehaving


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    decoder = Decoder(num_processes=1, time_s=60, memory_bytes=900_000_000)
    yield decoder
    decoder.close()


def test_work_is_done_in_another_process_and_its_refusals_come_back(decoder: Decoder) -> None:
    number, process = decoder.run("s", misbehaving.answer, 5)
    assert number == 5
    assert process != os.getpid()
    with pytest.raises(SlideFileError, match=r"^slide s: no$"):
        decoder.run("s", misbehaving.refuse)
    assert decoder.run("s", misbehaving.answer, 6) == (6, process)


def test_after_a_crash_the_next_is_answered(decoder: Decoder) -> None:
    with pytest.raises(SlideFileError, match="slide s: reading it ended the reader's process"):
        decoder.run("s", misbehaving.die)
    assert decoder.run("t", misbehaving.answer, 1)[0] == 1


def test_what_takes_too_long_is_ended_and_the_next_is_answered(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "_time_s", 1)
    with pytest.raises(TooSlowError, match="slide s: reading took longer than 1 s"):
        decoder.run("s", misbehaving.hang)
    monkeypatch.undo()
    assert decoder.run("t", misbehaving.answer, 2)[0] == 2


def test_what_takes_too_much_memory_is_ended_and_the_next_is_answered(decoder: Decoder) -> None:
    with pytest.raises(SlideFileError, match=r"more memory than 0\.9 GB"):
        decoder.run("s", misbehaving.swell)
    assert decoder.run("t", misbehaving.answer, 3)[0] == 3


def test_only_a_few_wait(decoder: Decoder, tmp_path: Path) -> None:
    decoder.run("s", misbehaving.answer, 0)
    with ThreadPoolExecutor(5) as pool:
        waiting = [pool.submit(decoder.run, "s", misbehaving.wait_for, tmp_path / "go") for _ in range(5)]
        deadline = time.monotonic() + 20
        while decoder._room._value and time.monotonic() < deadline:  # type: ignore[attr-defined]
            time.sleep(0.01)
        with pytest.raises(BusyError, match="ask again"):
            decoder.run("s", misbehaving.answer, 0)
        (tmp_path / "go").touch()
        for one in waiting:
            one.result()
    assert decoder.run("s", misbehaving.answer, 4)[0] == 4


def test_closed_processes_are_gone_and_a_new_question_starts_others() -> None:
    decoder = Decoder(num_processes=1, time_s=30, memory_bytes=900_000_000)
    _, first = decoder.run("s", misbehaving.answer, 1)
    decoder.close()
    assert not Path(f"/proc/{first}").exists()
    _, second = decoder.run("s", misbehaving.answer, 1)
    assert second != first
    decoder.close()
