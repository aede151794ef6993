"""How long an epoch of a recipe would take here: a projection from measured rates, not a promise.

Let T be the tiles that an epoch's training steps encode, U those of them that are read (k drawn from fewer tiles are
read once), and V the tiles of validation, which scores whole slides after every epoch. Measured are D, tiles per second
that all cores decode; S, tiles per second that storage gives: bytes per second, cold, by the same threads, through
bytes of the file per tile; b and f, seconds per tile of one forward and backward pass and of a forward pass alone.
A thread of the reader waits for bytes, then decodes them: a tile takes 1/R = 1/S + 1/D.

    on a GPU   epoch = max(U / R, c T (b + a f)) + max(V / R, c V f)
    on a CPU   epoch = max(U / R, U / D + T (b + a f)) + max(V / R, V / D + V f)

c is the share of the virtual ranks that the busiest encoder rank runs: each has a device to itself. CPU ranks share the
cores instead, and decoding takes its time from encoding. a is the share of tiles whose graph is not kept
(`machine.keep`) and that are encoded twice; their second reading, from memory where it is large enough, is not counted.

Not counted either: the aggregator, gathering and summing between ranks, checkpoints, opening slides, and that storage
may be slower when all ranks and other users ask at once. So the truth is longer, perhaps by two times.
"""

import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tiler.doctor.words import count, duration
from trainer.batchnorm import set_mode
from trainer.config import RunConfig
from trainer.encoders.encoder import build_encoder
from trainer.sampler import count_rows
from trainer.topology import Topology

_ENOUGH_S, _FEW_S = 0.5, 2.0
"""A batch that takes so long is large enough to be measured; one of few tiles must take longer for that."""
_FEW_TILES = 16
_MOST_S = 10.0
_NUM_ROUNDS = 3
_MOST_TILES, _MOST_BYTES = 1_024, 256_000_000


@dataclass(frozen=True, kw_only=True)
class EpochTiles:
    """Tiles of one epoch: encoded and read by training steps, and scored in validation and to rank them."""

    num_encoded: int
    num_read: int
    num_scored: int


@dataclass(frozen=True, kw_only=True)
class ReadingRate:
    """Tiles per second: `decode` by all cores, `storage` cold, None where that is not known."""

    decode: float
    storage: float | None = None

    @property
    def is_bound_by_storage(self) -> bool:
        """Waiting for bytes takes longer than decoding them."""
        return self.storage is not None and self.storage < self.decode

    @property
    def tile_s(self) -> float:
        """Seconds per tile, waiting for its bytes and decoding them."""
        return 1 / self.decode + (1 / self.storage if self.storage else 0)


@dataclass(frozen=True, kw_only=True)
class EncodingRate:
    """Seconds per tile on one device, and with how many tiles at once they were measured."""

    both_s: float
    """Forward and backward."""
    forward_s: float
    num_tiles: int
    is_gpu: bool


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One epoch on `num_processes`; `reading_s` is None where reading was not measured."""

    num_processes: int
    num_encoders: int
    reading_s: float | None
    encoding_s: float
    epoch_s: float
    bottleneck: str
    """encoding | decoding | storage; "" where reading was not measured."""


def count_epoch(num_tiles: Sequence[int], config: RunConfig) -> EpochTiles:
    """Tiles of an epoch, if the recipe's shares are the cohort's.

    Args:
        num_tiles: tiles of each slide of the whole cohort, all above 0.
        config: the recipe: its shares of validation and test slides, of slides per epoch, and of tiles per slide.
    """
    cohort, tiles = config.cohort, config.resolved(1).tiles
    drawn = (1 - cohort.val_fraction - cohort.test_fraction) * cohort.fraction_per_epoch
    used, ranks = [count_rows(n, tiles) for n in num_tiles], tiles.tiles == "top"
    return EpochTiles(
        num_encoded=round(drawn * sum(used)),
        num_read=round(drawn * sum(map(min, used, num_tiles))),
        # Slides whose tiles the model ranks are scored before they are trained on.
        num_scored=round((cohort.val_fraction + drawn * ranks) * sum(min(n, tiles.max_tiles) for n in num_tiles)),
    )


def shard_size(num_tiles: Sequence[int], config: RunConfig, num_virtual: int) -> int:
    """Tiles of a virtual rank, which are encoded at once, on average over the slides; at least one."""
    tiles = config.resolved(num_virtual).tiles
    return max(1, round(statistics.fmean(count_rows(n, tiles) for n in num_tiles) / num_virtual))


def project(
    tiles: EpochTiles, reading: ReadingRate | None, encoding: EncodingRate, topology: Topology, keep: str | int
) -> Projection:
    """One epoch's time; the formula is above.

    Args:
        tiles: what an epoch takes.
        reading: how fast tiles are read here; None where it was not measured.
        encoding: how fast they are encoded on one device.
        topology: the processes.
        keep: virtual ranks of each encoder rank whose graph is kept; "auto" and "all" count as all.
    """
    busiest = max(len(topology.virtual_of(rank)) for rank in topology.encoder_ranks)
    share = busiest / topology.num_virtual if encoding.is_gpu else 1.0
    twice = 0.0 if isinstance(keep, str) else max(0, busiest - keep) / busiest
    train_s = share * tiles.num_encoded * (encoding.both_s + twice * encoding.forward_s)
    score_s = share * tiles.num_scored * encoding.forward_s
    num_read, tile_s = tiles.num_read + tiles.num_scored, reading.tile_s if reading else 0.0
    cores_s = 1 / reading.decode if reading and not encoding.is_gpu else 0.0
    parts = ((tiles.num_read, train_s), (tiles.num_scored, score_s))
    is_encoding = tile_s * num_read <= train_s + score_s
    slower = "" if reading is None else "storage" if reading.is_bound_by_storage else "decoding"
    return Projection(
        num_processes=topology.world_size,
        num_encoders=topology.num_encoders,
        reading_s=tile_s * num_read if reading else None,
        encoding_s=train_s + score_s,
        epoch_s=sum(max(n * tile_s, n * cores_s + busy_s) for n, busy_s in parts),
        bottleneck="encoding" if reading and is_encoding else slower,
    )


def in_words(tiles: EpochTiles, encoding: EncodingRate, epochs: Sequence[Projection]) -> dict[str, str]:
    """The projection as lines for people."""
    lines = {
        "encoding": f"{1 / encoding.both_s:,.0f} tiles/s forward and backward, {1 / encoding.forward_s:,.0f} forward, "
        f"{encoding.num_tiles:,} at once",
        "an epoch": f"{tiles.num_encoded:,} tiles to train on, {tiles.num_scored:,} to validate",
    }
    for epoch in epochs:
        parts = f"encoding {duration(epoch.encoding_s)}"
        if epoch.reading_s is not None:
            parts += f", reading {duration(epoch.reading_s)}; the bottleneck is {epoch.bottleneck}"
        else:
            parts += "; reading was not measured: give a SLIDE, or --manifests"
        lines[count(epoch.num_processes, "process", "processes")] = f"about {duration(epoch.epoch_s)} ({parts})"
    lines["note"] = "a projection from seconds of measuring, as if memory held all graphs; it may be wrong by two times"
    return lines


def measure_encoding(
    config: RunConfig, tile_px: int, most_tiles: int, device: torch.device, num_threads: int
) -> EncodingRate:
    """Times the recipe's encoder, with random weights, on noise: a few batches, about ten seconds at most.

    The batch doubles until it takes half a second, or the device's memory is full, or it is a shard.

    Args:
        config: the recipe.
        tile_px: side of the tiles, px.
        most_tiles: tiles that training encodes at once; a larger batch would look faster than training is.
        device: where.
        num_threads: threads of torch on a CPU.

    Raises:
        TrainerError: unknown encoder.
    """
    own_threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            encoder = build_encoder(config.encoder, tile_px, initial=False)
            most = max(2, min(most_tiles, _MOST_TILES, _MOST_BYTES // (3 * tile_px**2)))
            noise_NHWC = torch.randint(0, 256, (most, tile_px, tile_px, 3), dtype=torch.uint8)
        precision = config.optim.precision
        dtype = torch.float64 if precision == "float64" else torch.float32
        return _measure(
            encoder.to(device, dtype), noise_NHWC, device, precision == "bf16", batchnorm=config.encoder.batchnorm
        )
    finally:
        torch.set_num_threads(own_threads)


def _measure(
    encoder: nn.Module, noise_NHWC: torch.Tensor, device: torch.device, is_bf16: bool, *, batchnorm: str
) -> EncodingRate:
    deadline = time.perf_counter() + _MOST_S

    def run(num_tiles: int, *, training: bool) -> float:
        """Seconds of one batch, from the CPU's memory."""
        started = time.perf_counter()
        autocast = torch.autocast(device.type, torch.bfloat16) if is_bf16 else contextlib.nullcontext()
        with torch.set_grad_enabled(training):
            with autocast:
                features_ND = encoder(noise_NHWC[:num_tiles].to(device))
            if training:
                features_ND.float().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    def settle(*, training: bool) -> float:
        seconds = [run(num_tiles, training=training)]
        while len(seconds) < _NUM_ROUNDS and time.perf_counter() < deadline:
            seconds.append(run(num_tiles, training=training))
        return statistics.median(seconds) / num_tiles

    def probe(num_tiles: int) -> float:
        """Seconds of a batch; the first of its size, which may be slow for being that, counts only if it is quick."""
        first_s = run(num_tiles, training=True)
        return first_s if first_s < _ENOUGH_S else run(num_tiles, training=True)

    set_mode(encoder, training=True, batchnorm=batchnorm)
    num_tiles, spent_s = 2, probe(2)
    while num_tiles < len(noise_NHWC) and spent_s < (_FEW_S if num_tiles < _FEW_TILES else _ENOUGH_S):
        more = min(2 * num_tiles, len(noise_NHWC))
        try:
            spent_s = probe(more)
        except torch.OutOfMemoryError:
            break
        num_tiles = more
    both_s = settle(training=True)
    set_mode(encoder, training=False, batchnorm=batchnorm)
    run(2, training=False)
    return EncodingRate(
        both_s=both_s, forward_s=settle(training=False), num_tiles=num_tiles, is_gpu=device.type == "cuda"
    )
