"""Which slides of an archive are this job's: `--shard I/N` of an array job, by a hash of the slide id. Pure."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tiler.errors import TilerError


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 0) of `count`; `source` tells where the numbers came from."""

    index: int = 0
    count: int = 1
    source: str = ""

    def holds(self, slide_id: str) -> bool:
        """The slide is this shard's. Independent of what else is in the archive: new slides move no old ones."""
        if self.count == 1:
            return True
        digest = hashlib.blake2b(slide_id.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def parse_shard(text: str | None, environment: Mapping[str, str]) -> Shard:
    """The shard that a user named.

    Args:
        text: "I/N", I from 0; "auto" reads the array variables of SLURM or LSF; None is all.
        environment: the process's variables.

    Raises:
        TilerError: not of that form, out of range, or no array variables.
    """
    if text is None:
        return Shard()
    if text == "auto":
        return _from_scheduler(environment)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise TilerError(f"--shard {text}: expected I/N with I from 0 to N-1, or auto")
    return Shard(int(match[1]), int(match[2]))


def _from_scheduler(environment: Mapping[str, str]) -> Shard:
    """The array's variables: SLURM_ARRAY_TASK_ID, _MIN, _MAX, _STEP, _COUNT, or LSB_JOBINDEX, _END, _STEP (from 1)."""
    slurm, lsf = "SLURM_ARRAY_TASK_", "LSB_JOBINDEX"
    if f"{slurm}ID" in environment:
        names = [f"{slurm}{part}" for part in ("ID", "MIN", "MAX", "STEP")]
        at, first, last, step = (_number(environment, name) for name in names)
        count = _number(environment, f"{slurm}COUNT")
    elif environment.get(lsf, "0") != "0":  # Outside an array LSF sets it to 0.
        names = [lsf, f"{lsf}_END", f"{lsf}_STEP"]
        (at, last, step), first = (_number(environment, name) for name in names), 1
        count = (last - first) // step + 1
    else:
        raise TilerError(
            f"--shard auto: neither {slurm}ID nor {lsf} is set; start this as a job array, or give --shard I/N"
        )
    told = " ".join(f"{name}={environment[name]}" for name in names if name in environment)
    if count != (last - first) // step + 1 or not first <= at <= last:
        raise TilerError(f"--shard auto: an array with gaps ({told}) does not say which part this is; give --shard I/N")
    return Shard((at - first) // step, count, told)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "1" if name.endswith("_STEP") else "")
    if not text.isdigit() or (name.endswith("_STEP") and text == "0"):
        raise TilerError(f"--shard auto: {name} is {text!r}, expected a number; give --shard I/N")
    return int(text)
