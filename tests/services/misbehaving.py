"""What a reader may do to its process; a module, so that the decoder's processes can import it."""

import os
import time
from pathlib import Path

import numpy as np

from services.errors import SlideFileError


def answer(number: int) -> tuple[int, int]:
    """The number back, and the process that answered."""
    return number, os.getpid()


def die() -> None:
    """As a reader does that runs into memory that is not its own."""
    os.abort()


def hang() -> None:
    """As a reader does that waits for storage."""
    time.sleep(600)


def swell() -> None:
    """Takes memory until it is ended."""
    kept = []
    while True:
        kept.append(np.ones(2**26, np.uint8))
        time.sleep(0.02)


def refuse() -> None:
    """Raises what clients are told."""
    raise SlideFileError("slide s: no")


def wait_for(file: Path) -> None:
    """Waits until the file is there."""
    while not file.exists():
        time.sleep(0.01)
