"""The service as a process, as a user starts it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOME = Path(__file__).parents[2]
COMMAND = [sys.executable, str(HOME / "slidegrad.py"), "serve"]


def environment_of(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLIDEGRAD_")}
    return {**kept, "PYTHONPATH": str(HOME), **more}


@contextmanager
def serving(*arguments: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The running command and its address; killed at the end if it still runs."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [*COMMAND, "--port", "0", *arguments]
    with subprocess.Popen(command, text=True, env=environment_of(**variables), **pipes) as process:  # type: ignore[call-overload]
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert " at http://" in line, line + process.stderr.read()
            yield process, line.split(" at ")[1].split()[0]
        finally:
            process.kill()
