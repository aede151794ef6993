"""Work that ends its process in every way a reader can; imported by worker processes, so it is no test module."""

import ctypes
import os
import time
from pathlib import Path

from tiler.build import Done, Task, tile_slide
from tiler.config import TilerConfig


def work(task: Task, out: Path, config: TilerConfig) -> Done:
    """Tiles the slide unless its id names a fault: `segfault_3`, `once_0` …"""
    fault = task.slide_id.split("_")[0]
    if fault == "segfault" or (fault == "once" and _is_first(task, out)):
        ctypes.string_at(0)
    elif fault == "abort":
        os.abort()
    elif fault == "exit":
        os._exit(3)
    elif fault == "hang":
        time.sleep(1_000)
    elif fault == "stuck":  # Holds the interpreter's lock, as a careless C library does.
        ctypes.PyDLL(None).sleep(1_000)
    elif fault == "leak":
        hoard = []
        while True:
            hoard.append(b"x" * 50_000_000)
            time.sleep(0.01)
    return tile_slide(task, out, config)


def _is_first(task: Task, out: Path) -> bool:
    try:
        (out / f"{task.slide_id}.tried").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
