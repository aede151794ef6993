"""The front door: `slidegrad COMMAND …`.

Every command is a frozen dataclass in some package's `cli.py` whose fields are its flags and whose `run()` returns
(result, exit code). This file alone knows the exit codes, prints the result as one JSON object on the last line of
stdout, and keeps everybody else, cuCIM's C code included, off that stdout. It imports a package only when its command
is called, so that `--help` is quick.
"""

import errno
import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, Protocol, cast

EXIT_OK, EXIT_SOME_FAILED, EXIT_USAGE, EXIT_UNEXPECTED, EXIT_STOPPED, EXIT_INTERRUPTED = 0, 1, 2, 70, 75, 130

COMMANDS = {
    "tile": ("tiler.cli", "Tile", "build a manifest of tissue tiles for every slide of an archive"),
    "synth": ("tiler.cli", "Synth", "make a labelled synthetic cohort of slides"),
    "manifest": (
        "tiler.manifest_cli",
        "ManifestCommand",
        "look into manifests: inspect, validate, stats, compact, export, import",
    ),
    "preview": ("tiler.preview", "Preview", "pictures of slides with their tiles, and one page about the archive"),
    "serve": ("services.cli", "Serve", "answer tile coordinate queries over HTTP"),
    "splits": ("trainer.splits.cli", "Splits", "draw splits by patient: cross-validation for train --split"),
    "train": ("trainer.cli", "Train", "train a recipe on whole slides, end to end"),
    "evaluate": (
        "trainer.evaluation.cli",
        "Evaluate",
        "score a run's slides: measures, intervals, subgroups, pictures",
    ),
    "heatmap": ("trainer.heatmaps.cli", "Heatmap", "where a run looks in slides, and what each tile adds"),
    "verify": ("trainer.cli", "Verify", "show that ranks and virtual ranks give one process's gradients"),
    "plan": ("trainer.planning.cli", "Plan", "what a job would take: memory, seconds of a slide, where scaling ends"),
    "sweep": ("trainer.sweep.cli", "Sweep", "train a recipe over K, precision, ranks, splits, methods; one table"),
    "bench": ("tiler.bench.cli", "Bench", "read: tiles per second by reader, beside the limit that decoding sets"),
    "doctor": ("trainer.doctor", "Doctor", "what this machine, and a slide, can and cannot do"),
}


_FREE, _ALLOW, _MEND = "free some space", "make it readable and writable for you", "see to the disk or its mount"
_TROUBLE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _FREE),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _ALLOW),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENOTCONN), _MEND),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG), "give another path"),
    errno.EPIPE: "whoever reads its output went away; let it read to the end",
}
"""What the machine, not Slidegrad, did wrong, and what the user can do about it."""


_KEPT = {
    "tile": "; what was finished is kept: run it again to go on",
    "heatmap": "; slides that were finished are kept: run it again to go on",
    "train": "; checkpoints are kept, if there are some: run it again with --resume to go on from the last one",
    "sweep": "; what was finished is kept: run it again to go on",
}
"""What Ctrl-C leaves."""

_AGAIN = {"train": "it again with --resume, if it had begun"}


class Command(Protocol):
    """What every command answers."""

    def run(self) -> tuple[dict[str, Any], int]:
        """Does it; returns (JSON-ready result, exit code 0 or 1)."""


def main(argv: Sequence[str]) -> int:
    """Runs one command line (without the program's name) and returns its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if argv else sys.stderr)
        return EXIT_OK if argv else EXIT_USAGE
    if argv[0] == "--version":
        from tiler.version import VERSION

        print(VERSION)
        return EXIT_OK
    if argv[0] not in COMMANDS:
        _complain(f"unknown command {argv[0]!r}; one of {', '.join(COMMANDS)}")
        return EXIT_USAGE
    stdout = 1 if {"-h", "--help"} & set(argv) else _keep_stdout()
    from manifests.errors import SlidegradError, Stopped

    try:
        result, code = _parse(argv[0], argv[1:]).run()
        if result:  # None of a rank that does not speak for its run.
            os.write(stdout, (json.dumps(result, ensure_ascii=False) + "\n").encode())
        return code
    except SlidegradError as error:
        _complain(str(error))
        return EXIT_USAGE
    except Stopped as stopped:
        if str(stopped):
            _complain(str(stopped))
        return EXIT_STOPPED
    except KeyboardInterrupt:
        _complain("interrupted" + _KEPT.get(argv[0], ""))
        return EXIT_INTERRUPTED
    except OSError as error:
        if error.errno not in _TROUBLE:
            return _unexpected()
        place = f"{error.filename}: " if error.filename else ""
        again = _AGAIN.get(argv[0], "the same command again")
        _complain(f"{place}{error.strerror}; {_TROUBLE[error.errno]}, then run {again}")
        return EXIT_USAGE
    except Exception:  # noqa: BLE001 - the outermost boundary: told in full, exit code 70
        return _unexpected()


def console() -> None:
    """Entry point of the installed script."""
    sys.exit(main(sys.argv[1:]))


def _parse(name: str, arguments: Sequence[str]) -> Command:
    """The command's dataclass, filled from its flags. Wrong flags end the process with exit code 2."""
    module, attribute, _ = COMMANDS[name]
    try:
        command = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        from manifests.errors import SlidegradError

        extra = {"trainer": "train", "services": "serve"}.get(module.split(".")[0], "cu13")
        raise SlidegradError(f"{name} needs {error.name}; pip install 'slidegrad[{extra}]'") from None
    if hasattr(command, "parse"):  # A command whose flags depend on its first word, as a recipe's do.
        return cast(Command, command.parse(arguments))
    import tyro

    return cast(Command, tyro.cli(command, args=list(arguments), prog=f"slidegrad {name}"))


def _keep_stdout() -> int:
    """Moves the real stdout aside and points fd 1 at stderr; returns the descriptor for the result."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    return kept


def _usage() -> str:
    lines = [f"  {name:<10} {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: slidegrad COMMAND …", "", *lines, "", "slidegrad COMMAND --help tells a command's flags."]
    )


def _complain(sentence: str) -> None:
    print(f"slidegrad: {sentence}", file=sys.stderr)


def _unexpected() -> int:
    traceback.print_exc(file=sys.stderr)
    _complain("unexpected error (above); this is a fault of Slidegrad's, please report it")
    return EXIT_UNEXPECTED


if __name__ == "__main__":
    console()
