"""A run's settings: frozen, checked, saved with the run, and enough to run it again.

Flags, defaults and help texts of `slidegrad train` come from these classes. Fields that change the result are the
run's identity; those of `Machine` only say how this machine does the work, and may change on resume.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import tyro
import yaml

from tiler.version import VERSION
from trainer.config_file import VERSION_KEY, build, flat, parse, plain
from trainer.errors import TrainerError


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Which slides are used for what."""

    fraction_per_epoch: float = 1.0
    """Share of the training slides drawn in each epoch, (0, 1]."""
    val_fraction: float = 0.15
    """Share of patients for validation, where no split is given."""
    test_fraction: float = 0.2
    """Share of patients for the test, where no split is given."""
    balance: Literal["none", "once", "epoch"] = "none"
    """Training slides drawn so that every class has as many as the rarest (head.task classes): once, the same in all
    epochs, as the paper did with its breast cohort; or anew in each epoch."""
    max_skipped: float = 0.1
    """Share of an epoch's slides, [0, 1]: if more of them cannot be read the run ends. One slide never ends it."""

    def __post_init__(self) -> None:
        _check(0 < self.fraction_per_epoch <= 1, "cohort.fraction_per_epoch", self.fraction_per_epoch, "(0, 1]")
        _check(0 <= self.val_fraction < 1, "cohort.val_fraction", self.val_fraction, "[0, 1)")
        _check(0 <= self.test_fraction < 1, "cohort.test_fraction", self.test_fraction, "[0, 1)")
        _check(0 <= self.max_skipped <= 1, "cohort.max_skipped", self.max_skipped, "[0, 1]")
        both = self.val_fraction + self.test_fraction
        _check(both < 1, "cohort.val_fraction + cohort.test_fraction", both, "below 1, some patients must train")


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Which tiles of a slide, and how many of them, one step uses."""

    tiles: Literal["all", "fixed", "top"] = "all"
    """all: every tile once, up to max_tiles; fixed: k tiles, with replacement where a slide has fewer; top: the k tiles
    that the model, as it is at the start of the epoch, ranks highest. For that it scores every slide of the epoch."""
    k: int | None = None
    """Tiles per slide in all (tiles=fixed and tiles=top)."""
    k_per_rank: int | None = None
    """Sugar for k = k_per_rank x virtual_ranks, resolved once at the start of the run."""
    max_tiles: int = 45_056
    """A slide with more gives this many, drawn without replacement: in training if tiles=all, in scoring always.
    45,056 = 11 x 4,096, the paper's."""
    regions: Path | None = None
    """Folder of annotations, SLIDE_ID.geojson as QuPath exports them (polygons in level-0 px): a training slide uses
    the tiles whose centre lies inside one, and where there is none all of its tiles. Read once, when the run begins."""
    region_class: str | None = None
    """Of the annotations, those of this class alone (QuPath's classification name); all if not given."""

    def __post_init__(self) -> None:
        given = (self.k is not None) + (self.k_per_rank is not None)
        out = f"; k is {self.k}, give --tiles.k None" if self.k is not None else ""
        one = f"exactly one of tiles.k, tiles.k_per_rank{out}"
        _check(self.tiles == "all" or given == 1, "tiles.tiles", self.tiles, one)
        _check(self.tiles != "all" or given == 0, "tiles.tiles", "all", f"neither tiles.k nor tiles.k_per_rank{out}")
        for name in ("k", "k_per_rank", "max_tiles"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"tiles.{name}", value, "at least 1")
        in_vain = self.region_class is not None and self.regions is None
        _check(not in_vain, "tiles.region_class", self.region_class, "None, or tiles.regions with it")


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How training tiles are changed at random."""

    flips: bool = True
    """Each tile flipped, mirrored, turned by quarters: one of the eight symmetries of the square."""
    stain: float = 0.0
    """Stain jitter, one draw per slide: most that a stain's factor leaves 1 and that its optical density (natural
    logarithm) is shifted by, [0, 0.2]; 0 is off, 0.05 what Tellez et al. 2019 call HED-light."""
    blur: float = 0.0
    """Share of tiles that are blurred, [0, 1]; by a Gaussian of 0.5 to 1.5 px."""

    def __post_init__(self) -> None:
        # From 0.23 on, a large negative shift would make dark tissue lighter than pale tissue (see augment.py).
        _check(0 <= self.stain <= 0.2, "augment.stain", self.stain, "[0, 0.2]")
        _check(0 <= self.blur <= 1, "augment.blur", self.blur, "[0, 1]")


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Tile to feature vector."""

    name: str = "resnet18"
    """Any timm model; or a foundation model, as hf-hub:OWNER/MODEL or by its short name (uni, virchow2, ...)."""
    weights: str | None = None
    """What to start from: a .safetensors or .pth file, a downloaded model's folder, or "pretrained": the model's own,
    from this machine's cache of downloads. Random weights if not given."""
    pooling: Literal["auto", "token", "mean", "token+mean"] = "auto"
    """Of a vision transformer's tokens: the class token, the mean of the patches' tokens, or both beside each other;
    auto is the model's own way."""
    batchnorm: Literal["running", "virtual", "frozen", "calibrated", "sync"] = "running"
    """running: trained by the statistics of each virtual rank, scored by running ones; virtual: each virtual rank's own
    in scoring too; frozen: running statistics, never changed; calibrated: measured on training slides before the first
    step, then frozen, so that a tile's features never depend on the tiles beside it; sync: trained by the statistics of
    the whole slide, on GPUs, one for each virtual rank."""
    drop_path: float = 0.0
    """Stochastic depth rate, [0, 1)."""
    freeze: Literal["none", "all"] | int = "none"
    """all: the encoder is not trained; a number: neither are its stem and its first so many blocks. What is frozen
    runs as in scoring, without dropout, BatchNorm by its running statistics."""
    layer_decay: float = 1.0
    """Factor on the learning rate from one block to the block below it, (0, 1]; 1 is the same rate everywhere."""

    def __post_init__(self) -> None:
        _check(0 <= self.drop_path < 1, "encoder.drop_path", self.drop_path, "[0, 1)")
        _check(0 < self.layer_decay <= 1, "encoder.layer_decay", self.layer_decay, "(0, 1]")
        is_number = isinstance(self.freeze, int)
        _check(not is_number or int(self.freeze) >= 1, "encoder.freeze", self.freeze, "none, all, or a number from 1")
        if self.freeze == "all":
            _check(self.drop_path == 0, "encoder.drop_path", self.drop_path, "0, as encoder.freeze is all")
            _check(self.layer_decay == 1, "encoder.layer_decay", self.layer_decay, "1, as encoder.freeze is all")
            in_vain = self.batchnorm in ("virtual", "sync")
            _check(not in_vain, "encoder.batchnorm", self.batchnorm, "frozen or calibrated, as encoder.freeze is all")


AggregatorName = Literal["gma", "transmil", "mean", "max", "tile_mean", "tile_max"]


@dataclass(frozen=True, kw_only=True)
class Aggregator:
    """Feature vectors to what is predicted of the slide."""

    name: AggregatorName = "gma"
    """gma is gated-attention MIL; transmil a transformer that knows where each tile lies; mean and max are of features.
    tile_mean and tile_max classify each tile: all learn the slide's label, and the slide's prediction is the mean of
    the tiles', or that of the tile where what is looked for is most probable."""
    hidden: int = 128
    """Width of GMA's attention layer, or of TransMIL's tokens (512 in its paper)."""
    dropout: float = 0.0
    """On the features, [0, 1)."""

    def __post_init__(self) -> None:
        _check(self.hidden >= 1, "aggregator.hidden", self.hidden, "at least 1")
        _check(0 <= self.dropout < 1, "aggregator.dropout", self.dropout, "[0, 1)")


@dataclass(frozen=True, kw_only=True)
class Head:
    """What is predicted of a slide."""

    task: Literal["classes", "multilabel", "regression"] = "classes"
    """classes: one of several; multilabel: yes or no for each column; regression: a number for each column."""
    columns: tuple[str, ...] = ("label",)
    """Columns of the labels file: one for classes; one or more of 0 and 1, or of numbers, where empty ones do not
    count."""
    class_weights: Literal["none", "balanced"] | tuple[float, ...] = "none"
    """How much a slide's loss counts: balanced, so that every class has the same weight among the training slides; or
    a number for each class, in alphabetical (of numbers, numerical) order, or for a yes in each column."""

    def __post_init__(self) -> None:
        columns, weights = self.columns, self.class_weights
        _check(len(columns) >= 1 and len(set(columns)) == len(columns), "head.columns", columns, "one or more, once")
        is_one = len(columns) == 1
        _check(self.task != "classes" or is_one, "head.columns", columns, "one column, as head.task is classes")
        is_known = self.task != "regression" or weights == "none"
        _check(is_known, "head.class_weights", weights, "none, as head.task is regression")
        given = weights if isinstance(weights, tuple) else (1.0,)
        _check(bool(given) and all(0 < w < math.inf for w in given), "head.class_weights", weights, "all above 0")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW with warm-up and cosine decay."""

    epochs: int = 30
    slides_per_step: int = 1
    """Slides whose gradients are averaged for one optimiser step."""
    lr: float = 5e-5
    """Peak learning rate."""
    aggregator_lr: float | None = None
    """Peak learning rate of the aggregator; lr if not given."""
    weight_decay: float = 0.01
    final_weight_decay: float | None = None
    """Weight decay at the end, reached along half a cosine; weight_decay all the time if not given."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up."""
    clip: float | None = None
    """Longest gradient, by its norm over both halves together; a longer one is shortened to it."""
    ema: float | None = None
    """Decay of a moving average of the weights, (0, 1), by which slides are then scored; none if not given."""
    patience: int | None = None
    """Epochs without a better validation after which the run stops; it goes through all epochs if not given."""
    precision: Literal["float32", "tf32", "bf16", "fp16", "float64"] = "float32"
    """tf32: matrix products of float32 in a GPU's 19-bit format. bf16, fp16: the encoder runs under autocast, weights
    stay float32; with fp16 the loss of both halves is scaled, and a step that overflows on any rank is left out."""

    def __post_init__(self) -> None:
        _check(self.epochs >= 1, "optim.epochs", self.epochs, "at least 1")
        _check(self.slides_per_step >= 1, "optim.slides_per_step", self.slides_per_step, "at least 1")
        _check(0 < self.lr < math.inf, "optim.lr", self.lr, "above 0, and not without end")
        _check(
            self.aggregator_lr is None or self.aggregator_lr > 0, "optim.aggregator_lr", self.aggregator_lr, "above 0"
        )
        _check(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "at least 0")
        last = self.final_weight_decay
        _check(last is None or last >= 0, "optim.final_weight_decay", last, "at least 0")
        _check(0 <= self.warmup_epochs <= self.epochs, "optim.warmup_epochs", self.warmup_epochs, "[0, epochs]")
        _check(self.clip is None or self.clip > 0, "optim.clip", self.clip, "above 0")
        _check(self.ema is None or 0 < self.ema < 1, "optim.ema", self.ema, "(0, 1)")
        _check(self.patience is None or self.patience >= 1, "optim.patience", self.patience, "at least 1")


COLLECTIVES_S = 6 * 3600
"""How long ranks wait for each other, s (`trainer.comm`): an aggregator for a slide's features, a group for another's
slides. A rank that ends is noticed at once, so this ends only what hangs for a reason that nobody knew."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How this machine does the work; changes nothing in the result beyond rounding."""

    aggregator: Literal["auto", "dedicated", "shared"] = "auto"
    """dedicated: rank 0 only aggregates; shared: it encodes too; auto: shared if there is one process."""
    groups: int = 1
    """Groups of ranks, each at a slide of its own: --nproc is groups x (encoder ranks + aggregator). At most
    optim.slides_per_step."""
    keep: Literal["auto", "all"] | int = "auto"
    """Virtual ranks of a rank whose graph is kept for the backward pass; the others are encoded twice. auto: as many as
    fit into memory, by a short probe at the start."""
    compile: bool = False
    """torch.compile on the encoder: the first steps take a minute more, those after them less; it rounds otherwise."""
    recompute: bool = False
    """Of a transformer's kept graphs hold what lies between blocks alone, and work out the rest again: a third more
    time, for a small part of the memory. Not for encoders with BatchNorm."""
    fsdp: bool = False
    """Spread the encoder's weights, gradients and moments over the encoder ranks, for one that does not fit a device;
    slower. For transformers, in one group, without --optim.ema."""
    read_ahead_gb: float | None = None
    """Memory of each rank for tiles that are read ahead or used twice, GB; if not given a quarter of its share of the
    machine's, at most 8."""
    read_deadline_s: float = 300.0
    """How long a step waits for one slide's tiles in all, s, before it skips the slide; below six hours."""
    reader_threads: int | None = None
    """Threads that read tiles, per rank; this rank's share of the cores if not given."""
    save_every: int = 500
    """Optimiser steps from one checkpoint to the next within an epoch; 0 for none but after each epoch, and when a
    signal ends the run."""
    manifests: Annotated[Path | None, tyro.conf.Suppress] = None
    """The manifests folder, as the run was started with."""
    archive: Path | None = None
    """Where the slides are mounted here, if not where they were when they were tiled."""
    features: Path | None = None
    """A folder to keep the features of a frozen encoder in: what is not there is computed before the first epoch, then
    no tile is read or encoded any more. Runs of the same weights and tiles share it, also at the same time."""

    def __post_init__(self) -> None:
        is_number = isinstance(self.keep, int)
        _check(not is_number or int(self.keep) >= 0, "machine.keep", self.keep, "auto, all, or a number from 0")
        _check(self.groups >= 1, "machine.groups", self.groups, "at least 1")
        budget_gb = self.read_ahead_gb
        is_size = budget_gb is None or 0 < budget_gb < math.inf
        _check(is_size, "machine.read_ahead_gb", budget_gb, "above 0, and not without end")
        is_below = 0 < self.read_deadline_s < COLLECTIVES_S
        until = f"above 0 and below {COLLECTIVES_S} s, when the other ranks give up"
        _check(is_below, "machine.read_deadline_s", self.read_deadline_s, until)
        _check(self.save_every >= 0, "machine.save_every", self.save_every, "at least 0")
        threads = self.reader_threads
        _check(threads is None or threads >= 1, "machine.reader_threads", threads, "at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    recipe: Annotated[str, tyro.conf.Suppress] = ""
    """The recipe that it started from, with its method: RECIPE+METHOD."""
    seed: int = 0
    """Everything random follows from it: split, order, tiles, weights, dropout."""
    virtual_ranks: int | None = None
    """Shards of a slide, each what one GPU is in the paper; if not given, the number of encoder ranks at the start."""
    cohort: Cohort = field(default_factory=Cohort)
    tiles: Tiles = field(default_factory=Tiles)
    augment: Augment = field(default_factory=Augment)
    encoder: Encoder = field(default_factory=Encoder)
    aggregator: Aggregator = field(default_factory=Aggregator)
    head: Head = field(default_factory=Head)
    optim: Optim = field(default_factory=Optim)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        v = self.virtual_ranks
        _check(v is None or v >= 1, "virtual_ranks", v, "at least 1")
        _check(0 <= self.seed < 2**63, "seed", self.seed, "[0, 2^63)")
        if self.machine.fsdp:
            _check(self.optim.ema is None, "optim.ema", self.optim.ema, "None, as machine.fsdp is on")
            given = self.encoder.batchnorm
            _check(given == "running", "encoder.batchnorm", given, "running, as machine.fsdp is on")
            _check(not self.machine.compile, "machine.compile", True, "False, as machine.fsdp is on")
            _check(self.machine.groups == 1, "machine.groups", self.machine.groups, "1, as machine.fsdp is on")
        in_vain = self.optim.ema is not None and self.encoder.batchnorm == "sync"
        _check(not in_vain, "optim.ema", self.optim.ema, "None, as encoder.batchnorm is sync")
        self._check_features()
        is_meant = self.cohort.balance == "none" or self.head.task == "classes"
        _check(is_meant, "cohort.balance", self.cohort.balance, f"none, as head.task is {self.head.task}")
        aggregator, task = self.aggregator.name, self.head.task
        has_highest = aggregator != "tile_max" or task != "regression"
        _check(has_highest, "aggregator.name", aggregator, "tile_mean or another, as head.task is regression")
        ranks = self.tiles.tiles != "top" or aggregator != "mean"
        _check(ranks, "aggregator.name", aggregator, "one that ranks tiles, such as tile_max, as tiles.tiles is top")

    def _check_features(self) -> None:
        """Raises where features would change from epoch to epoch, and are to be kept."""
        if self.machine.features is None:
            return
        _check(not self.machine.fsdp, "machine.fsdp", True, "False, as machine.features is given")
        asked = {
            "--encoder.freeze all": self.encoder.freeze != "all",
            "--augment.no-flips": self.augment.flips,
            "--augment.stain 0": self.augment.stain > 0,
            "--augment.blur 0": self.augment.blur > 0,
        }
        if missing := [flag for flag, holds in asked.items() if holds]:
            raise TrainerError(
                "machine.features keeps what a frozen encoder makes of unchanged tiles; give "
                f"{' '.join(missing)} too, or leave machine.features away"
            )

    def resolved(self, num_encoder_ranks: int) -> Self:
        """The config with `virtual_ranks` and `k` settled, as it is saved and kept on resume."""
        num_virtual = self.virtual_ranks or num_encoder_ranks
        tiles = self.tiles
        if tiles.k_per_rank is not None:
            tiles = dataclasses.replace(tiles, k=tiles.k_per_rank * num_virtual, k_per_rank=None)
        return dataclasses.replace(self, virtual_ranks=num_virtual, tiles=tiles)

    def differences(self, other: Self) -> list[str]:
        """Names of the fields that make another run of it; `machine` and `cohort.max_skipped` do not count."""
        ours, theirs = flat(self.to_dict()), flat(other.to_dict())
        return sorted(name for name in ours if ours[name] != theirs[name] and not _may_change(name))

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, fit for YAML."""
        values: dict[str, Any] = plain(dataclasses.asdict(self))
        return values

    def to_yaml(self) -> str:
        """The file `config.yaml`, with the version that writes it."""
        return yaml.safe_dump({VERSION_KEY: VERSION, **self.to_dict()}, sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str, where: str) -> Self:
        """Parses `config.yaml`; what another version did not write has its default.

        Raises:
            TrainerError: no config; or fields that this version does not know or take, by name.
        """
        values, version = parse(text, where)
        faults: list[str] = []
        config = cast(Self, build(cls, values, "", faults))
        if faults:
            written = f", written by Slidegrad {version}" if version not in (None, VERSION) else ""
            way_out = "go on with that version, or give another --out" if written else "mend the file"
            raise TrainerError(f"{where}{written}: {'; '.join(faults)}; {way_out}")
        return config

    def added_to(self, text: str, where: str) -> list[str]:
        """Fields that a `config.yaml` from before they were there lacks, each with the default that it gets."""
        values, _ = parse(text, where)
        ours, theirs = flat(self.to_dict()), flat(values)
        return [f"{name} ({ours[name]})" for name in ours if name not in theirs]


def _check(good: bool, name: str, value: object, expected: str) -> None:
    if not good:
        raise TrainerError(f"{name} is {value}: expected {expected}")


def _may_change(name: str) -> bool:
    """It says how the work is done, or when it ends, not what it gives."""
    return name.startswith("machine.") or name == "cohort.max_skipped"
