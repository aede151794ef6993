"""Who is accused of a crash: the slide in hand, once for each crash, and only where its reader crashed."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.errors import TrainerError
from trainer.loading.quarantine import InHand, collect_crashes, quarantined

CRASH = """
import ctypes, sys, threading
from pathlib import Path
from trainer.loading import reading
from trainer.loading.quarantine import InHand
in_hand = InHand(Path(sys.argv[1]))
in_hand.hold("slide_a")
crash = lambda *_: ctypes.string_at(0)
if sys.argv[2] == "reader":
    exec(compile("def read(crash): crash()", reading.__file__, "exec"))
    thread = threading.Thread(target=read, args=(crash,))
    thread.start()
    thread.join()
else:
    crash()
"""


def crash(run: Path, who: str) -> None:
    died = subprocess.run([sys.executable, "-c", CRASH, str(run), who], capture_output=True, check=False)
    assert died.returncode == -signal.SIGSEGV, died.stderr


def test_a_reader_that_crashed_in_two_starts_accuses_its_slide(tmp_path: Path) -> None:
    for _ in range(2):  # Two ranks of one start count once.
        crash(tmp_path, "reader")
    assert collect_crashes(tmp_path) == frozenset()
    crash(tmp_path, "reader")
    assert collect_crashes(tmp_path) == quarantined(tmp_path) == {"slide_a"}
    assert collect_crashes(tmp_path) == {"slide_a"}


def test_a_crash_elsewhere_accuses_nobody(tmp_path: Path) -> None:
    for _ in range(3):
        crash(tmp_path, "another")
        assert collect_crashes(tmp_path) == frozenset()


@pytest.mark.parametrize("slide_id", ["slide_a", ""])
def test_who_ends_well_leaves_no_trace(slide_id: str, tmp_path: Path) -> None:
    with InHand(tmp_path) as in_hand:
        in_hand.hold(slide_id)
    assert list((tmp_path / "in_hand").iterdir()) == []


@pytest.mark.parametrize("text", ["", "[1]", '{"slide_a": []}'])
def test_a_damaged_count_is_told_in_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "in_hand").mkdir()
    (tmp_path / "in_hand" / "crashes.json").write_text(text)
    with pytest.raises(TrainerError, match="damaged; remove it"):
        collect_crashes(tmp_path)
