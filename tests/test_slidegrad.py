"""The front door: exit codes, one JSON object as the last line of stdout, nobody else on it, and quick help."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import slidegrad as front
from manifests import SlidegradError

HEAVY = {"torch", "cucim", "fastapi", "timm", "sklearn", "matplotlib"}


@pytest.fixture
def own_stdout() -> Iterator[None]:
    """`main` points fd 1 at stderr for the rest of its process; here the process lives on."""
    kept = os.dup(1)
    yield
    os.dup2(kept, 1)
    os.close(kept)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, own_stdout: None) -> Callable[[Callable[[], Any]], int]:  # noqa: ARG001
    """The exit code of a command that does what it is given."""

    def call(do: Callable[[], Any]) -> int:
        @dataclass(frozen=True)
        class Command:
            def run(self) -> Any:
                return do()

        module = ModuleType("fake_command")
        module.Command = Command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fake_command", module)
        monkeypatch.setitem(front.COMMANDS, "fake", ("fake_command", "Command", "for tests"))
        return front.main(["fake"])

    return call


def _raise(error: BaseException) -> Callable[[], Any]:
    def do() -> None:
        raise error

    return do


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_result_is_one_json_object_and_the_code_is_the_commands(
    code: int, answers: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    result = {"slide": "schnitt_ä", "auc": 0.5, "none": None}
    assert answers(lambda: (result, code)) == code
    out, _ = capfd.readouterr()
    assert out.count("\n") == 1
    assert out.endswith("\n")
    assert json.loads(out) == result
    assert "schnitt_ä" in out


_CHATTY = """
import ctypes, subprocess, sys
import slidegrad

class Chatty:
    @classmethod
    def parse(cls, arguments):
        return cls()

    def run(self):
        print("from Python")
        ctypes.CDLL(None).puts(b"from C code")
        subprocess.run(["echo", "from a child"])
        return {"num_slides": 1}, 0

sys.modules["chatty"] = sys.modules["__main__"]
slidegrad.COMMANDS["chatty"] = ("chatty", "Chatty", "")
sys.exit(slidegrad.main(["chatty"]))
"""


def test_what_others_print_does_not_land_in_stdout() -> None:
    command = [sys.executable, "-c", _CHATTY]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(front.__file__).parent, check=True)
    assert done.stdout == '{"num_slides": 1}\n'
    # C's own buffer, still full at the end, included.
    assert sorted(done.stderr.splitlines()) == ["from C code", "from Python", "from a child"]


def test_a_command_without_a_result_says_nothing(
    answers: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert answers(lambda: ({}, 0)) == 0
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (SlidegradError("slide a: cut file"), 2, "slidegrad: slide a: cut file\n"),
        (KeyboardInterrupt(), 130, "slidegrad: interrupted"),
        (ZeroDivisionError("by zero"), 70, "slidegrad: unexpected error (above); this is a fault of Slidegrad's"),
        (OSError(errno.EBADF, "our fault"), 70, "slidegrad: unexpected error"),
        (OSError(errno.EIO, "broken disk"), 2, "slidegrad: broken disk; see to the disk or its mount, then run"),
        (OSError(errno.ENOSPC, "full", "run/x.pt"), 2, "slidegrad: run/x.pt: full; free some space, then run"),
        (OSError(errno.EACCES, "no", "M"), 2, "slidegrad: M: no; make it readable and writable for you, then run"),
        (OSError(errno.ENOTDIR, "no", "M"), 2, "slidegrad: M: no; give another path, then run"),
    ],
)
def test_each_kind_of_end_has_its_code(
    error: BaseException, code: int, sentence: str, answers: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert answers(_raise(error)) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert sentence in err
    assert ("Traceback" in err) == (code == 70)


def test_a_package_that_is_not_installed_names_its_extra(
    monkeypatch: pytest.MonkeyPatch,
    own_stdout: None,  # noqa: ARG001
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(front.COMMANDS, "train", ("trainer.no_such_module", "Train", ""))
    assert front.main(["train"]) == 2
    assert "pip install 'slidegrad[train]'" in capfd.readouterr().err


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert front.main([flag]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: slidegrad COMMAND")
    for name, (_, _, text) in front.COMMANDS.items():
        assert any(line.split(None, 1) == [name, text] for line in lines)


def test_no_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert front.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage:")


def test_an_unknown_command_is_told_the_known_ones(slidegrad: Callable[..., Any]) -> None:
    ended = slidegrad("tyle")
    assert (ended.code, ended.result) == (2, None)
    assert "unknown command 'tyle'; one of tile, synth, manifest" in ended.stderr


def test_an_unknown_flag_is_wrong_usage(slidegrad: Callable[..., Any]) -> None:
    ended = slidegrad("tile", "archive", "--out", "x", "--tyle-px", "3")
    assert (ended.code, ended.result) == (2, None)
    assert "--tyle-px" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--tile-px", "0"), "--tile-px 0: expected 1 to 65,536 px"),
        (("--mpp", "-1"), "--mpp -1.0: expected microns"),
        (("--overlap", "224"), "--overlap 224: expected px"),
        (("--min-tissue", "1.5"), "--min-tissue 1.5: expected a share"),
        (("--workers", "-1"), "--workers -1: expected 0 or more"),
        ((), "nowhere: no slides found"),
    ],
)
def test_a_setting_out_of_range_is_one_sentence(
    flags: tuple[str, ...],
    sentence: str,
    tmp_path: Path,
    own_stdout: None,  # noqa: ARG001
    capfd: pytest.CaptureFixture[str],
) -> None:
    try:
        code: object = front.main(["tile", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"), *flags])
    except SystemExit as ended:
        code = ended.code
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert sentence in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def _imported(*arguments: str) -> set[str]:
    """Top-level packages that `slidegrad …` imports."""
    command = [sys.executable, "-X", "importtime", "-m", "slidegrad", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(front.__file__).parent, check=True)
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}


def test_help_imports_nothing_but_the_standard_library() -> None:
    assert not _imported("--help") & (HEAVY | {"numpy", "pyarrow", "tyro", "cv2", "manifests", "tiler", "trainer"})


@pytest.mark.slow  # starts nine processes
@pytest.mark.parametrize("command", front.COMMANDS)
def test_the_help_of_a_command_imports_nothing_heavy(command: str) -> None:
    assert not _imported(command, "--help") & HEAVY


@pytest.mark.slow  # starts three processes
def test_a_package_answers_for_its_command(small_cohort: Path, tmp_path: Path, slidegrad: Callable[..., Any]) -> None:
    tile = (small_cohort / "slides" / "synth_0000.svs", "--tile-px", 32, "--mpp", 2, "--out")
    by_name = slidegrad("tile", *tile, tmp_path / "by_name")
    by_package = slidegrad(*tile, tmp_path / "by_package", module="tiler")
    assert by_name.code == by_package.code == 0
    assert by_name.result["num_tiles"] == 26
    assert by_name.result | {"manifests": ""} == by_package.result | {"manifests": ""}
    stats = slidegrad("stats", tmp_path / "by_package", module="manifests")
    assert (stats.code, stats.result["num_tiles"]) == (0, 26)


def test_the_version_is_that_of_the_distribution(slidegrad: Callable[..., Any]) -> None:
    assert slidegrad("--version").code == 0
