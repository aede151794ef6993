"""Guards against damage that cuCIM does not raise: it gives back memory that was never written, or half a picture.

Two traces are left, and both are looked at after every read. What its C code prints (JPEG's on stdout, LZW's and JPEG
2000's on stderr): while the guard is on, the C library's two streams are a file of ours, so that a line more is
noticed. And the memory itself: the allocator fills what it hands out with `POISON`, so that a compressed tile that was
not decoded is a rectangle of it. Neither is proof: a read under suspicion is checked by its bytes and made again
(tiler/reader.py).

Descriptors 1 and 2 are left alone, and with them what Python prints and logs, what other processes print, and what
becomes of a descriptor that was closed. What C code prints as it ends the process meanwhile is lost.
"""

import atexit
import contextlib
import ctypes
import os
import re
import threading
import warnings
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

POISON = 77
"""Grey level of memory that was never written: no tissue, no glass and no edge of a slide is this grey throughout."""
_RUN_PX = 16
"""So many px of it at the end of a compressed tile's last row are no picture; one alone may be ink."""
_M_PERTURB = -6
"""mallopt's name for what the variable MALLOC_PERTURB_ sets at start: https://man7.org/linux/man-pages/man3/mallopt.3.html."""
_CUCIM_SAYS = re.compile(
    rb"ERROR in line \d+ while [^\n]*\n[^\n]*\n?|\[(?:Error|Warning)\] [^\n]*\n+|"
    rb"(?:Corrupted LZW|Wrong length|Not enough data)[^\n]*? at scanline \d+(?: \([^)\n]*\))?|"
    rb"Old-style LZW codes not supported"
)
"""What is not shown: the reader says it in a sentence, with the slide's id."""
_MEANS_NOTHING = re.compile(rb"[^\n]* compression support is not configured\.\n")
"""What cuCIM says of every Deflate file that it opens, with its path, before it reads it: neither shown nor heard."""
_libc = ctypes.PyDLL(None)
"""Holds the interpreter's lock: a call takes a microsecond, letting the lock go and taking it back more."""
_patient_libc = ctypes.CDLL(None)
"""Lets it go: for what may have to wait."""


class _Watch:
    """One of the C library's streams, turned to a file in memory and back.

    Source: The GNU C Library manual, 12.2 Standard Streams: they are variables that can be set like any others. Ours is
    never closed: another thread may be about to print to it.
    """

    def __init__(self, name: str) -> None:
        _libc.fdopen.restype = ctypes.c_void_p
        self._caught, self._told, self._noise, self._lock = os.memfd_create(name), 0, 0, threading.Lock()
        self._ours = _libc.fdopen(self._caught, b"a")
        self._variable = ctypes.c_void_p.in_dll(_libc, name)
        self._theirs: int | None = None

    def begin(self) -> None:
        self._theirs, self._variable.value = self._variable.value, self._ours

    def noise(self) -> int:
        """Bytes that were printed so far. What is not cuCIM's is passed on."""
        with self._lock:
            _libc.fflush(ctypes.c_void_p(self._ours))
            if more := os.fstat(self._caught).st_size - self._told:
                text = os.pread(self._caught, more, self._told)
                self._told += len(text)
                text = _MEANS_NOTHING.sub(b"", text)
                self._noise += len(text)
                if text := _CUCIM_SAYS.sub(b"", text):
                    _patient_libc.fwrite(text, 1, ctypes.c_size_t(len(text)), ctypes.c_void_p(self._theirs))
            return self._noise

    def end(self) -> None:
        self._variable.value = self._theirs
        self.noise()
        with self._lock:
            os.ftruncate(self._caught, 0)
            self._told = 0


_begin_or_end = threading.Lock()
_num_inside = 0
_is_told = False
_watches: list[_Watch] = []
"""One for each stream, made when first needed; none where the C library is not GNU's."""


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Turns the guards on for the process while it is inside, here or in another thread.

    Python's own output goes where it went; what C code prints arrives a little later. What does not work here is told
    in a warning, once.
    """
    global _num_inside, _is_told
    with _begin_or_end:
        if _num_inside == 0:
            _turn_aside()
            _poison(POISON)
        _num_inside += 1
        is_first, _is_told = not _is_told, True
    for sentence in missing_guards() if is_first else ():
        warnings.warn(sentence, RuntimeWarning, stacklevel=3)
    try:
        yield
    finally:
        with _begin_or_end:
            _num_inside -= 1
            if _num_inside == 0:
                _poison(None)
                for watch in _watches:
                    watch.end()


def noise() -> int:
    """A number that grows when C code prints while the guard is on, whoever did."""
    return sum(watch.noise() for watch in _watches) if _num_inside else 0


def is_poisoned(region: NDArray[np.uint8], corner: tuple[int, int], file_tile: tuple[int, int]) -> bool:
    """Whether the end of a compressed tile's part in a region was never written, by a few px of its last row.

    Args:
        region: RGB (h, w, 3).
        corner: where it begins (x, y), px of its level.
        file_tile: px (width, height) of a compressed tile.
    """
    if not region.size:
        return False
    last_rows, last_columns = (
        np.append(np.arange(step - 1 - start % step, size - 1, step), size - 1)
        for start, step, size in zip(corner[::-1], file_tile[::-1], region.shape, strict=False)
    )
    starts = np.maximum(np.append(0, last_columns[:-1] + 1), last_columns + 1 - _RUN_PX)
    is_end = (region[last_rows[:, None], last_columns] == POISON).all(axis=2)
    return any(
        bool((region[last_rows[i], starts[k] : last_columns[k] + 1] == POISON).all()) for i, k in np.argwhere(is_end)
    )


def missing_guards() -> list[str]:
    """What does not work here, each in a sentence with the way out; empty where all guards work."""
    with guarded():
        is_heard, is_filled = _is_heard(), _is_filled()
    way_out = "tile with --backend openslide"
    missing = []
    if not is_heard:
        missing.append(
            "what cuCIM prints is not heard here (the C library is not GNU's): tiles that it decodes in part are not "
            f"noticed; {way_out}"
        )
    if not is_filled:
        missing.append(
            "memory is not filled before use here (the allocator is not glibc's): tiles that cuCIM leaves undecoded "
            f"are noticed by what it prints alone; run without LD_PRELOAD of another allocator, or {way_out}"
        )
    return missing


def _turn_aside() -> None:
    if not _watches and hasattr(_libc, "gnu_get_libc_version"):
        _watches.extend(_Watch(name) for name in ("stdout", "stderr"))
        for (
            watch
        ) in _watches:  # A read that hangs never leaves the guard: what was printed meanwhile comes out at last.
            atexit.register(watch.noise)
    for watch in _watches:
        watch.begin()


def _is_heard() -> bool:
    before = noise()
    _libc.printf(b"ERROR in line 0 while testing:\n\n")
    return noise() > before


def _is_filled() -> bool:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    place = libc.malloc(1 << 20)
    try:
        return ctypes.string_at(place + 4096, 64) == bytes([POISON]) * 64
    finally:
        libc.free(place)


def _poison(value: int | None) -> None:
    """What new memory is filled with; None leaves it to the user's MALLOC_PERTURB_, nothing by default."""
    if hasattr(_libc, "mallopt"):
        # glibc fills with the complement of what it is told.
        _libc.mallopt(_M_PERTURB, 255 - value if value is not None else _users_own())


def _users_own() -> int:
    """MALLOC_PERTURB_ as glibc reads it: what is no number from 0 to 255 counts for nothing."""
    try:
        told = int(os.environ.get("MALLOC_PERTURB_", "0"), 0)
    except ValueError:
        return 0
    return told if 0 <= told <= 255 else 0
