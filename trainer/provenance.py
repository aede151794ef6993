"""Where a run's numbers come from: digests of its cohort, manifests and starting weights, and the versions that ran.

Two runs with equal digests had the same slides with the same labels and splits, the same tiles, and started alike. No
name of a file or patient is in them.
"""

import contextlib
import hashlib
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from tiler.version import VERSION
from trainer.encoders.blueprint import find_weights
from trainer.errors import TrainerError

if TYPE_CHECKING:
    from trainer.job import Job

_PACKAGES = ("torch", "timm", "numpy", "cucim-cu13", "cucim-cu12", "openslide-python")
_MANIFEST = ("slide_id", "fingerprint", "config_hash", "num_tiles")
"""What of a catalogue's row says which tiles of which file a slide has."""


def versions() -> dict[str, str]:
    """Of Slidegrad, Python and the packages whose results are in a run's, as far as they are installed."""
    found = {"slidegrad": VERSION, "python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def digests(job: "Job") -> dict[str, str | None]:
    """Of the cohort with its labels and splits, of its slides' manifests, and of the encoder's weights to start from.

    Returns:
        SHA-256 by "cohort", "manifests" and "weights"; None for random weights, or ones that are gone since.
    """
    wanted = {case.slide_id for case in job.cohort.cases}
    rows = [tuple(row[name] for name in _MANIFEST) for row in job.source.catalog().to_pylist()]
    manifests = "\n".join(repr(row) for row in sorted(row for row in rows if row[0] in wanted))
    weights = None
    with contextlib.suppress(TrainerError):
        weights = find_weights(job.config.encoder)
    return {
        "cohort": _digest((job.run / "cohort.csv").read_bytes()),
        "manifests": _digest(manifests.encode()),
        "weights": digest_file(weights) if weights is not None else None,
    }


def digest_file(file: Path) -> str:
    """SHA-256 of a file's bytes, as sha256sum tells it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
