"""The runs of a sweep as a product of axes, their names, and one job's share of them. Pure.

One thing to know before changing it: a run's name is where its folder lies. Another spelling of an axis makes all runs
of earlier sweeps look undone.
"""

import hashlib
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from tiler.errors import TilerError
from tiler.shards import Shard, parse_shard
from trainer.errors import TrainerError

END_TO_END = "end_to_end"
FROZEN = "frozen_"
"""How methods begin whose encoder is not trained: its features are computed once for all runs."""
K = int | Literal["all", "own"]
"""Tiles of a slide in a training step: a number; all, every tile; own, as a method chooses them itself."""
Precision = Literal["float32", "tf32", "bf16", "fp16", "float64"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep."""

    k: K
    precision: str
    nproc: int
    """Processes, the aggregator included."""
    split: str = ""
    """As s003, of split_003.csv; empty where the labels settle who trains."""
    method: str = END_TO_END

    @property
    def name(self) -> str:
        """The run's folder, as k350_float32_n1_s003_end_to_end."""
        parts = (f"k{self.k}", self.precision, f"n{self.nproc}", self.split, self.method)
        return "_".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A product of axes."""

    ks: tuple[K, ...]
    precisions: tuple[str, ...]
    nprocs: tuple[int, ...]
    splits: tuple[str, ...] = ("",)
    methods: tuple[str, ...] = (END_TO_END,)

    def points(self, choosing: Collection[str] = ()) -> list[Point]:
        """Its runs, all of a split before the next one's, so that methods can be compared before all has ended.

        Args:
            choosing: methods that choose a slide's tiles themselves; for them K is no axis.
        """
        return [
            Point(k=k, precision=precision, nproc=nproc, split=split, method=method)
            for split, method in itertools.product(self.splits, self.methods)
            for k, precision, nproc in itertools.product(
                ("own",) if method in choosing else self.ks, self.precisions, self.nprocs
            )
        ]

    def to_dict(self) -> dict[str, list[Any]]:
        """Fit for YAML."""
        return {name: list(values) for name, values in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Sequence[Any]]) -> Self:
        """From what `to_dict` gave."""
        return cls(**{name: tuple(value) for name, value in values.items()})


def all_points(grids: Iterable[Grid], choosing: Collection[str] = ()) -> list[Point]:
    """The runs of several grids, each once, those of the first grid first."""
    return list(dict.fromkeys(point for grid in grids for point in grid.points(choosing)))


def with_grid(grids: Sequence[Grid], new: Grid, choosing: Collection[str] = ()) -> tuple[Grid, ...]:
    """The grids, with the new one if it has a run that they have not."""
    known = set(all_points(grids, choosing))
    return tuple(grids) if known.issuperset(new.points(choosing)) else (*grids, new)


def parse_ks(text: str) -> tuple[K, ...]:
    """`--k 50,350,all`."""
    return tuple("all" if word == "all" else _count("--k", word, text, " or all") for word in words("--k", text))


def parse_counts(flag: str, text: str) -> tuple[int, ...]:
    """Numbers from 1, separated by commas."""
    return tuple(_count(flag, word, text) for word in words(flag, text))


def parse_precisions(text: str) -> tuple[str, ...]:
    """`--precision float32,bf16`."""
    known = get_args(Precision)
    if unknown := [word for word in words("--precision", text) if word not in known]:
        raise TrainerError(f"--precision {text}: {unknown[0]!r} is none of {', '.join(known)}")
    return words("--precision", text)


def words(flag: str, text: str) -> tuple[str, ...]:
    """What commas separate, each once.

    Raises:
        TrainerError: nothing between two commas, or a word twice.
    """
    found = tuple(word.strip() for word in text.split(","))
    if not all(found) or len(set(found)) < len(found):
        raise TrainerError(f"{flag} {text}: expected values separated by commas, each once")
    return found


def find_splits(folder: Path, num_splits: int | None = None) -> dict[str, Path]:
    """The split files of `slidegrad splits`: s000 to DIR/split_000.csv, and so on; the first `num_splits` of them.

    Raises:
        TrainerError: there are none, or not so many.
    """
    files = {f"s{match[1]}": file for file in folder.glob("*.csv") if (match := _SPLIT_FILE.fullmatch(file.name))}
    if not files:
        raise TrainerError(f"--splits {folder}: no split_000.csv here; slidegrad splits makes such files")
    if num_splits is not None and not 1 <= num_splits <= len(files):
        raise TrainerError(f"--num-splits {num_splits}: expected 1 to {len(files)}, as {folder} holds {len(files)}")
    return {name: files[name] for name in sorted(files, key=lambda name: int(name[1:]))[:num_splits]}


def parse_part(text: str | None, environment: Mapping[str, str]) -> Shard:
    """The share of the runs that is this job's.

    Args:
        text: "I/N", I from 1; "auto" reads the array variables of SLURM or LSF; None is all.
        environment: the process's variables.

    Raises:
        TrainerError: not of that form, out of range, or no array variables.
    """
    if text is None or text == "auto":
        try:
            return parse_shard(text, environment)
        except TilerError as error:
            raise TrainerError(str(error).replace("--shard", "--part")) from None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise TrainerError(f"--part {text}: expected I/N with I from 1 to N, or auto")
    return Shard(int(match[1]) - 1, int(match[2]))


def share(points: Sequence[Point], part: Shard) -> list[Point]:
    """The runs of one part: shares differ by one run at most, and each has its fill of quick and of slow ones."""
    mixed = sorted(points, key=lambda point: hashlib.blake2b(point.name.encode()).digest())
    mine = set(mixed[part.index :: part.count])
    return [point for point in points if point in mine]


_SPLIT_FILE = re.compile(r"split_(\d+)\.csv")


def _count(flag: str, word: str, text: str, or_else: str = "") -> int:
    if not word.isascii() or not word.isdigit() or int(word) < 1:
        raise TrainerError(f"{flag} {text}: expected numbers from 1{or_else}, separated by commas")
    return int(word)
