"""A folder that cannot be written to is the user's matter, not a fault: told in one sentence."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from manifests.errors import SlidegradError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def told_as(kind: type[SlidegradError], out: Path) -> Iterator[None]:
    """Turns what the operating system says against writing under `out` into an error of that kind.

    A full disk goes through as it is: the front door has a sentence of its own for it.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise
        # By the number: HDF5 repeats the whole path in its own text.
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        raise kind(f"{out}: cannot write here ({reason}); give another folder") from None
