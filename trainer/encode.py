"""The encoder's side of a step: this rank's virtual ranks, one after another, each under its own random state.

A virtual rank whose graph is not kept is encoded again for the backward pass with the same random state: the same
dropout, the same augmentation, the same BatchNorm statistics, so the same features.
"""

import contextlib
import hashlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.augment import augment_tiles, draw_stain
from trainer.batchnorm import RunningStats, own_layers, virtual_rank_pass
from trainer.config import Augment
from trainer.loading.shards import NO_CELLS, Shard, SlideInput
from trainer.sampler import StepPlan
from trainer.topology import Topology

_CHUNK = 256
"""Tiles encoded at once where no gradient is needed."""


@dataclass
class Pass:
    """A virtual rank's features between its two passes, its tiles' cells, and its tiles if they are held."""

    features_ND: Tensor
    cells_N2: Tensor
    shard: Shard | None = None


@dataclass(frozen=True)
class InStep:
    """How ranks go through an encoder that is spread over them: equally often, with a blank where one has no tiles."""

    topology: Topology
    tile_px: int

    @property
    def blank(self) -> Shard:
        """A virtual rank without tiles."""
        return Shard(-1, self.blank_tile[:0], NO_CELLS)

    @property
    def blank_tile(self) -> Tensor:
        """What goes through the encoder in place of no tile."""
        return torch.zeros(1, self.tile_px, self.tile_px, 3, dtype=torch.uint8)

    def blanks(self, num_mine: int) -> list[Shard]:
        """What fills a rank's `num_mine` virtual ranks up to those of the rank that has most; they come first."""
        most = max(len(self.topology.virtual_of(rank)) for rank in self.topology.encoder_ranks)
        return [self.blank] * (most - num_mine)

    def most_tiles(self, plan: StepPlan) -> int:
        """Tiles of the largest virtual rank."""
        return math.ceil(plan.num_rows / self.topology.num_virtual)


class EncoderSide:
    """What an encoder rank does with its tiles; on a dedicated aggregator, which has none, nothing.

    Args:
        encoder: the encoder; None on a dedicated aggregator.
        device: where it is.
        dtype: of the features.
        num_features: their width D.
        seed: the run's seed.
        keep: virtual ranks of this rank whose graph is kept, the last ones; all if None.
        is_frozen: the encoder is not trained.
        augment: what training does to tiles; nothing if None.
        autocast: dtype of the encoder's autocast, or None.
        in_step: where the encoder is spread over ranks (`trainer.fsdp`), how they go through it together; else None.
    """

    def __init__(
        self,
        encoder: nn.Module | None,
        device: torch.device,
        *,
        dtype: torch.dtype,
        num_features: int,
        seed: int,
        keep: int | None,
        is_frozen: bool,
        augment: Augment | None,
        autocast: torch.dtype | None,
        in_step: "InStep | None" = None,
    ) -> None:
        self.encoder, self.device, self.dtype, self.num_features = encoder, device, dtype, num_features
        self.seed, self.keep, self.is_frozen = seed, keep, is_frozen
        self.augment, self.autocast, self.in_step = augment, autocast, in_step

    def first_pass(
        self, slide: SlideInput, num_mine: int, stats: RunningStats | None, clock: "WaitClock"
    ) -> tuple[list[Pass], str]:
        """Encodes this rank's `num_mine` virtual ranks: the last `keep` with a graph, those before them without.

        Returns:
            The passes, empty virtual ranks left out; and why tiles could not be read.
        """
        passes: list[Pass] = []
        error = ""
        blanks = self.in_step.blanks(num_mine) if self.in_step else []
        for position, shard in enumerate(itertools.chain(blanks, clock.watch(slide.shards)), -len(blanks)):
            error = error or shard.error
            if error and self.in_step:
                shard = self.in_step.blank
            elif error or not (shard.num_tiles or self._is_synced or self.in_step):
                continue
            keep_graph = not self.is_frozen and (self.keep is None or position >= num_mine - self.keep)
            with torch.set_grad_enabled(keep_graph):
                features_ND = self.encode(slide.plan, shard, moves_stats=True)
            assert stats is not None, "shards come to encoder ranks only"
            stats.collect(shard.num_tiles)
            is_held = slide.source is None and not keep_graph and not self.is_frozen
            passes.append(Pass(features_ND, shard.cells_N2, shard if is_held else None))
            del shard  # On a GPU, another's place.
        return passes, error

    def second_pass(self, slide: SlideInput, passes: list[Pass], gradient_ND: Tensor, clock: "WaitClock") -> str:
        """Sends the gradient back through the encoder; virtual ranks without a graph are encoded again.

        Returns:
            Why tiles could not be read again; then some of the gradient is missing.
        """
        again = clock.watch(slide.source.again() if slide.source is not None else ())
        pieces = gradient_ND.split([len(p.features_ND) for p in passes]) if passes else ()
        error = ""
        # Kept graphs (the last ones) first: their memory is free before others are encoded again.
        for p, piece_ND in reversed(list(zip(passes, pieces, strict=True))):
            if not p.features_ND.requires_grad:
                if self.in_step and (error or not len(p.features_ND)):
                    shard = self.in_step.blank
                else:
                    shard = p.shard if p.shard is not None else next(again)
                if shard.error:
                    error = shard.error
                    if not self.in_step:
                        return error
                    shard = self.in_step.blank  # The others do not know yet, and wait for this rank in their passes.
                p.features_ND = self.encode(slide.plan, shard, moves_stats=False)
                piece_ND = piece_ND[: len(p.features_ND)]
                del shard
            p.features_ND.backward(piece_ND)
            p.features_ND = p.features_ND.detach()
        next(again, None)  # There is none: the last one's memory goes back.
        return error

    @torch.no_grad()
    def score_pass(self, slide: SlideInput, num_mine: int, clock: "WaitClock") -> tuple[list[Pass], str]:
        """Encodes this rank's virtual ranks as scoring does: no graph, no augmentation, no statistics moved."""
        passes: list[Pass] = []
        error = ""
        blanks = self.in_step.blanks(num_mine) if self.in_step else []
        for shard in itertools.chain(blanks, clock.watch(slide.shards)):
            error = error or shard.error
            if error and self.in_step:
                shard = self.in_step.blank
            if self.in_step or (shard.num_tiles and not error):
                features_ND = self._given(shard)
                if features_ND is None:
                    tiles_NHWC = shard.tiles_NHWC.to(self.device, non_blocking=True)
                    features_ND = self._in_chunks(slide.plan, tiles_NHWC, moves_stats=False)
                passes.append(Pass(features_ND, shard.cells_N2))
        return passes, error

    def encode(self, plan: StepPlan, shard: Shard, *, moves_stats: bool) -> Tensor:
        """One virtual rank's features, (its tiles, D), under its own random state."""
        if (features_ND := self._given(shard)) is not None:
            return features_ND
        tiles_NHWC = shard.tiles_NHWC.to(self.device, non_blocking=True)
        with random_state(self.device, self.seed, plan, "stain"):
            stain_S2 = draw_stain(self.augment)
        with random_state(self.device, self.seed, plan, shard.virtual_rank):
            tiles_NHWC = augment_tiles(tiles_NHWC, self.augment, stain_S2)
            if self.is_frozen:
                return self._in_chunks(plan, tiles_NHWC, moves_stats=moves_stats)
            return self._forward(tiles_NHWC, moves_stats=moves_stats)

    def _given(self, shard: Shard) -> Tensor | None:
        """The features that the shard brings with it, where the encoder has nothing to do."""
        given_ND = shard.features_ND
        return None if given_ND is None else given_ND.to(self.device, self.dtype, non_blocking=True)

    def _in_chunks(self, plan: StepPlan, tiles_NHWC: Tensor, *, moves_stats: bool) -> Tensor:
        """Features without a graph: where BatchNorm looks at the tiles, of a virtual rank at once."""
        assert self.encoder is not None, "only encoder ranks encode"
        size = max(1, len(tiles_NHWC)) if own_layers(self.encoder) else _CHUNK
        chunks = list(tiles_NHWC.split(size))
        if self.in_step:  # As many as the largest virtual rank has.
            chunks += [tiles_NHWC[:0]] * (math.ceil(self.in_step.most_tiles(plan) / size) - len(chunks))
        return torch.cat([self._forward(chunk, moves_stats=moves_stats) for chunk in chunks])

    def _forward(self, tiles_NHWC: Tensor, *, moves_stats: bool) -> Tensor:
        assert self.encoder is not None, "only encoder ranks encode"
        autocast = torch.autocast(self.device.type, self.autocast) if self.autocast else contextlib.nullcontext()
        layers, num_tiles = own_layers(self.encoder), len(tiles_NHWC)
        if self.in_step and not num_tiles:
            tiles_NHWC = self.in_step.blank_tile.to(self.device)
        with autocast, virtual_rank_pass(layers, num_tiles, moves_stats=moves_stats):
            features_ND: Tensor = self.encoder(tiles_NHWC)
        return features_ND[:num_tiles].to(self.dtype)

    @property
    def _is_synced(self) -> bool:
        """BatchNorm is the whole slide's: a rank without tiles takes part in it."""
        return self.encoder is not None and any(isinstance(m, nn.SyncBatchNorm) for m in own_layers(self.encoder))

    def stack(self, passes: Iterable[Pass]) -> tuple[Tensor, Tensor]:
        """Features (n, D), without their graph, and cells (n, 2) of this rank's tiles, in slide order."""
        features = [torch.zeros(0, self.num_features, dtype=self.dtype, device=self.device)]
        cells = [torch.zeros(0, 2, dtype=torch.int32, device=self.device)]
        for p in passes:
            features.append(p.features_ND.detach())
            cells.append(p.cells_N2.to(self.device))
        return torch.cat(features), torch.cat(cells)


@contextlib.contextmanager
def random_state(device: torch.device, seed: int, plan: StepPlan, who: int | str) -> Iterator[None]:
    """torch's random state as a function of (seed, epoch, slide, virtual rank); the old one comes back after."""
    text = f"slidegrad-state-1\x00{seed}\x00{plan.epoch}\x00{plan.slide_id}\x00{who}"
    state = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(state)
        yield


class WaitClock:
    """Adds up the time that is spent waiting for shards."""

    def __init__(self) -> None:
        self.wait_s = 0.0

    def watch(self, shards: Iterable[Shard]) -> Iterator[Shard]:
        """Passes shards on, without holding any."""
        iterator = iter(shards)

        def take() -> Shard | None:
            start = time.perf_counter()
            try:
                return next(iterator, None)
            finally:
                self.wait_s += time.perf_counter() - start

        return iter(take, None)
