"""The guards: what C code prints is noticed, what Python prints is left alone, memory is filled while they are on."""

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.conftest import ROOT
from tiler import guard
from tiler.guard import POISON, guarded, is_poisoned, missing_guards, noise

_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
_FRESH_BYTES = 64 << 20
"""More than glibc ever keeps: it comes from the system, which gives zeros."""
_PRELUDE = """
import contextlib, ctypes, io, logging, os, subprocess, sys, threading, warnings
from tiler.guard import guarded, noise
libc = ctypes.CDLL(None)
say = lambda text: libc.printf(b"%s", text)
complain = lambda text: libc.fputs(text, ctypes.c_void_p.in_dll(libc, "stderr"))
def tell(text): os.write(2, text.encode())
"""


def _run(body: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own, its stdout and stderr pipes."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([sys.executable, "-c", _PRELUDE + body], cwd=ROOT, text=True, timeout=60, **streams)  # type: ignore[call-overload, no-any-return]


def _fresh_grey() -> set[int]:
    """The values of some bytes of fresh memory."""
    place = _libc.malloc(_FRESH_BYTES)
    try:
        return set(ctypes.string_at(place + (1 << 20), 64))
    finally:
        _libc.free(place)


# Memory.


def test_memory_is_filled_inside_and_not_after() -> None:
    assert _fresh_grey() == {0}
    with guarded():
        assert _fresh_grey() == {POISON}
        with guarded():
            assert _fresh_grey() == {POISON}
        assert _fresh_grey() == {POISON}
    assert _fresh_grey() == {0}


def test_it_nests_across_threads() -> None:
    is_inside, may_leave = threading.Event(), threading.Event()

    def stay() -> None:
        with guarded():
            is_inside.set()
            may_leave.wait(60)

    thread = threading.Thread(target=stay)
    with guarded():
        thread.start()
        assert is_inside.wait(60)
    assert _fresh_grey() == {POISON}  # The other one is still in it.
    before = noise()
    _libc.printf(b"[Error] of a test\n")
    assert noise() > before
    may_leave.set()
    thread.join()
    assert _fresh_grey() == {0}
    assert noise() == 0


def test_an_error_inside_turns_it_off() -> None:
    with pytest.raises(ZeroDivisionError), guarded():
        1 / 0  # noqa: B018
    assert _fresh_grey() == {0}
    assert noise() == 0


@pytest.mark.parametrize(("told", "filled"), [("100", 155), ("0x10", 239), ("256", 0), ("many", 0), ("", 0)])
def test_what_the_user_has_memory_filled_with_is_so_again(told: str, filled: int) -> None:
    body = f"""
libc.malloc.restype = ctypes.c_void_p
grey = lambda: ctypes.string_at(libc.malloc({_FRESH_BYTES}) + 5_000_000, 1)[0]
first = grey()
with guarded():
    inside = grey()
print(first, inside, grey())
"""
    done = _run(body, env={**os.environ, "MALLOC_PERTURB_": told})
    assert done.stdout == f"{filled} {POISON} {filled}\n", done.stderr


# What is printed.


def test_noise_grows_with_what_c_code_prints_and_with_nothing_else() -> None:
    body = """
log = logging.getLogger("test")
log.addHandler(logging.StreamHandler(sys.stdout))
assert noise() == 0
with guarded():
    before = noise()
    log.warning("logged")
    print("printed")
    print("complained", file=sys.stderr)
    warnings.warn("warned")
    os.write(1, b"written\\n")
    subprocess.run(["echo", "of a child"])
    assert noise() == before
    said = []
    for speak in (say, complain):
        for _ in range(2):
            speak(b"C speaks\\n")
            said.append(noise())
    assert before < said[0] < said[1] < said[2] < said[3] == noise()
assert noise() == 0
say(b"later\\n")
assert noise() == 0
with guarded():
    assert noise() >= said[3]
"""
    done = _run(body)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sorted(lines) == sorted(["logged", "printed", "written", "of a child", "C speaks", "C speaks", "later"])
    assert done.stderr.count("C speaks\n") == 2
    assert "complained\n" in done.stderr
    assert "UserWarning: warned" in done.stderr


def test_what_python_prints_arrives_at_once() -> None:
    body = """
with guarded():
    print("at once", flush=True)
    say(b"later\\n")
    sys.stdin.readline()
"""
    command = [sys.executable, "-c", _PRELUDE + body]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "at once\n"
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stdout.read() == "later\n"
    assert process.returncode == 0


def test_what_cucim_says_of_damage_is_noticed_but_not_shown() -> None:
    body = """
with guarded():
    for speak, text in (
        (say, b"ERROR in line 183 while reading JPEG header:\\nNot a JPEG file: starts with 0x00 0x00\\n"),
        (complain, b"[Warning] Stream does not end with EOC\\n\\n"),
        (complain, b"Corrupted LZW table at scanline 0"),
        (complain, b"Not enough data at scanline 0 (short 63 bytes)"),
        (complain, b"Old-style LZW codes not supported"),
    ):
        before = noise()
        speak(text)
        assert noise() > before
        speak(b"(something else)")
    before = noise()
    complain(b"/home/case_17.tif: AdobeDeflate compression support is not configured.\\n")
    assert noise() == before, "said of every Deflate file that is opened"
"""
    done = _run(body)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(something else)"
    assert done.stderr == "(something else)" * 4


def test_nothing_is_lost_or_told_twice_among_threads() -> None:
    body = """
def work(k):
    with guarded():
        for i in range(500):
            say(b"%d.%d\\n" % (k, i))
            noise()
threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    done = _run(body)
    assert done.stderr == ""
    assert sorted(done.stdout.split()) == sorted(f"{k}.{i}" for k in range(4) for i in range(500))


@pytest.mark.parametrize("how", ["closed", "a broken pipe", "closed by the script"])
def test_a_stdout_that_takes_nothing_is_no_error(how: str) -> None:
    body = f"""
if {how == "closed by the script"}:
    sys.stdout.close()
    os.close(1)
some_file = os.open(os.devnull, os.O_RDONLY)
for _ in range(2):
    with guarded():
        before = noise()
        say(b"C speaks, to nobody\\n" * 1000)
        assert noise() > before
os.fstat(some_file)
tell("done")
sys.stdout = None
os._exit(0)
"""
    reading, writing = os.pipe()
    os.close(reading)
    options: dict[str, object] = {"stdout": writing}
    if how == "closed":
        options["preexec_fn"] = lambda: os.close(1)
    try:
        done = _run(body, **options)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "done")


def test_a_stdout_that_is_no_file_as_in_a_notebook() -> None:
    body = """
real, sys.stdout = sys.stdout, io.StringIO()
with guarded():
    print("shown in the notebook")
    say(b"C speaks\\n")
    assert noise() > 0
told, sys.stdout = sys.stdout.getvalue(), real
assert told == "shown in the notebook\\n"
"""
    done = _run(body)
    assert (done.returncode, done.stdout) == (0, "C speaks\n"), done.stderr


def test_a_redirection_that_ends_after_the_guard() -> None:
    body = """
guard, caught = guarded(), io.StringIO()
with contextlib.ExitStack() as stack:
    with guard:
        stack.enter_context(contextlib.redirect_stdout(caught))
        print("into the redirection")
    print("still")
print("as before")
tell(caught.getvalue())
"""
    done = _run(body)
    assert (done.stdout, done.stderr) == ("as before\n", "into the redirection\nstill\n")


def test_it_works_under_capture(capfd: pytest.CaptureFixture[str]) -> None:
    with guarded():
        before = noise()
        print("printed")
        assert noise() == before
        _libc.printf(b"C speaks\n")
        assert noise() > before
    _libc.fflush(None)
    assert sorted(capfd.readouterr().out.splitlines()) == ["C speaks", "printed"]


def test_no_descriptor_is_left_behind() -> None:
    with guarded():
        pass
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(1000):
        with guarded():
            noise()
    assert len(os.listdir("/proc/self/fd")) == before


# What does not work.


def test_no_guard_is_missing_here() -> None:
    assert missing_guards() == []


def test_another_allocator_is_told(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make another allocator with")
    source, library = tmp_path / "zeros.c", tmp_path / "zeros.so"
    source.write_text(
        "#include <stddef.h>\nvoid *__libc_calloc(size_t, size_t);\n"
        "void *malloc(size_t size) { return __libc_calloc(1, size); }\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    body = "from tiler.guard import guarded, missing_guards; print(*missing_guards())\nwith guarded(): pass"
    done = _run(body, env={**os.environ, "LD_PRELOAD": str(library)})
    assert done.stdout.startswith("memory is not filled before use here"), done.stderr
    assert "run without LD_PRELOAD" in done.stdout
    assert done.stderr.count("RuntimeWarning: memory is not filled") == 1


def test_another_c_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_watches", [])
    monkeypatch.setattr(guard, "_turn_aside", lambda: None)
    (sentence,) = missing_guards()
    assert sentence.startswith("what cuCIM prints is not heard here")


# Regions.


def _whole(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """A picture without a px of the grey that tells."""
    picture = rng.integers(0, 256, (height, width, 3), np.uint8)
    picture[picture == POISON] = POISON + 1
    return picture


@given(
    corner=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    file_tile=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    data=st.data(),
)
def test_any_file_tile_that_was_not_written_is_noticed_wherever_the_region_lies(
    corner: tuple[int, int], file_tile: tuple[int, int], size: tuple[int, int], data: st.DataObject
) -> None:
    region = _whole(np.random.default_rng(0), size[1], size[0])
    assert not is_poisoned(region, corner, file_tile)
    columns, rows = ((np.arange(n) + at) // step for at, step, n in zip(corner, file_tile, size, strict=True))
    column, row = data.draw(st.sampled_from(columns.tolist())), data.draw(st.sampled_from(rows.tolist()))
    unwritten = np.ix_(rows == row, columns == column)
    region[unwritten] = POISON
    assert is_poisoned(region, corner, file_tile)


def test_a_file_tile_whose_end_was_not_written_is_noticed() -> None:
    region = _whole(np.random.default_rng(0), 20, 24)
    region[7, 4:12] = POISON  # The last row of the tile in row 1, column 1, of tiles of 8 x 8 px; the corner is (4, 8).
    assert is_poisoned(region, (4, 8), (8, 8))
    region[7, 11, 2] = 0
    assert not is_poisoned(region, (4, 8), (8, 8))


def test_a_px_of_that_grey_is_no_sign() -> None:
    region = _whole(np.random.default_rng(0), 64, 64)
    region[31, 31 - 14 : 32] = POISON
    assert not is_poisoned(region, (0, 0), (32, 32))
    region[31, 31 - 15] = POISON
    assert is_poisoned(region, (0, 0), (32, 32))


def test_ordinary_pictures_are_not_poisoned() -> None:
    rng = np.random.default_rng(0)
    assert not is_poisoned(np.full((64, 64, 3), 255, np.uint8), (3, 3), (16, 16))
    assert not is_poisoned(np.full((64, 64, 3), (205, 110, 165), np.uint8), (3, 3), (16, 16))
    grey = np.repeat(_whole(rng, 64, 64)[..., :1], 3, axis=2)
    assert not is_poisoned(grey, (3, 3), (16, 16))
    assert not is_poisoned(np.zeros((0, 5, 3), np.uint8), (3, 3), (16, 16))
    assert is_poisoned(np.full((64, 64, 3), POISON, np.uint8), (3, 3), (16, 16))
