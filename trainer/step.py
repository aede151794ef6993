"""One training step: the paper's section 2, encoder side and aggregator side beside each other.

1. encode      each encoder rank encodes its virtual ranks' tiles, one virtual rank after another
2. gather      features travel to the aggregator, in slide order; a failed read is told, and all skip the slide
3. aggregate   logits, loss, backward down to the features
4. scatter     each encoder rank receives the gradient of its own features
5. backward    through the encoder, virtual rank by virtual rank; after the step's last slide gradients are summed
               over encoder ranks
6. update      each half takes its optimiser step

The sum in phase 5 is explicit and exact for any split; the paper's factor N undoes DDP's averaging, a sum needs none.
A virtual rank whose graph is not kept is encoded again in phase 5 with the same random state: the same dropout, the
same augmentation, the same BatchNorm statistics, so the same features.
"""

import contextlib
import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.augment import random_dihedral
from trainer.batchnorm import RunningStats, own_layers, set_mode, virtual_rank_pass
from trainer.comm import Comm
from trainer.sampler import StepPlan

_SCORING_CHUNK = 256
"""Tiles encoded at once where no gradient is needed."""


@dataclass(frozen=True)
class Shard:
    """One virtual rank's tiles, uint8 (n, tile_px, tile_px, 3) on the CPU; or why they could not be read."""

    virtual_rank: int
    tiles_NHWC: Tensor
    error: str = ""


class SlideInput(NamedTuple):
    """One slide of a step: its plan and class, alike on every rank, and this rank's virtual ranks' tiles, in order."""

    plan: StepPlan
    shards: Iterable[Shard]
    label: int


@dataclass(frozen=True)
class Outcome:
    """What a slide gave. `loss`, `logits_C`, `attention_K` are known to the aggregator alone, the rest to all ranks."""

    error: str = ""
    """Why all ranks skip the slide; empty if they do not."""
    wait_s: float = 0.0
    """Seconds that the slowest rank waited for its tiles."""
    loss: float = float("nan")
    logits_C: Tensor | None = None
    attention_K: Tensor | None = None


class Engine:
    """Both halves of the model on this rank, and the step.

    Args:
        comm: this rank's end of the group.
        encoder: on encoder ranks; None on a dedicated aggregator.
        aggregator: on the aggregator rank; None elsewhere.
        num_features: width D of the features.
        seed: the run's seed; dropout and augmentation follow from (seed, epoch, slide, virtual rank).
        keep: virtual ranks of this rank whose graph is kept; all if None.
        augment: random flips and quarter turns.
        autocast: dtype of the encoder's autocast, or None.
        batchnorm: see `batchnorm.set_mode`.
    """

    def __init__(
        self,
        comm: Comm,
        encoder: nn.Module | None,
        aggregator: nn.Module | None,
        *,
        num_features: int,
        seed: int,
        keep: int | None = None,
        augment: bool = False,
        autocast: torch.dtype | None = None,
        batchnorm: str = "running",
    ) -> None:
        self.comm, self.encoder, self.aggregator = comm, encoder, aggregator
        self.num_features, self.seed, self.keep = num_features, seed, keep
        self.augment, self.autocast, self.batchnorm = augment, autocast, batchnorm
        half = encoder if encoder is not None else aggregator
        assert half is not None, "a rank holds at least one half"
        self.dtype = next(half.parameters()).dtype

    def set_training(self, training: bool) -> None:
        """Both halves to training, or to scoring."""
        if self.encoder is not None:
            set_mode(self.encoder, training=training, batchnorm=self.batchnorm)
        if self.aggregator is not None:
            self.aggregator.train(training)

    def step(self, slides: Iterable[SlideInput]) -> list[Outcome]:
        """Gradients of the mean loss of one or more slides, left in both halves' `.grad` (phases 1 to 5).

        The caller clears gradients before and updates after. Slides that are skipped do not count in the mean.
        """
        stats = RunningStats(self.encoder) if self.encoder is not None else None
        outcomes = [self._slide(slide, stats) for slide in slides]

        # 5b. gradients, and BatchNorm's statistics, summed over encoder ranks
        if self.encoder is not None and stats is not None:
            gradients = [_gradient(parameter) for parameter in self.encoder.parameters() if parameter.requires_grad]
            self.comm.sum_over_encoders([*gradients, *stats.sums, stats.num_tiles])
            stats.commit()
        num_used = sum(not outcome.error for outcome in outcomes)
        for half in (self.encoder, self.aggregator) if num_used > 1 else ():
            for parameter in half.parameters() if half is not None else ():
                if parameter.grad is not None:
                    parameter.grad /= num_used
        return outcomes

    def _slide(self, slide: SlideInput, stats: RunningStats | None) -> Outcome:
        """Phases 1 to 5 of one slide; its gradients are added to those of the step's slides before it."""
        plan, comm = slide.plan, self.comm
        mine = comm.topology.virtual_of(comm.rank)

        # 1. encode: the last `keep` virtual ranks with a graph, those before them without.
        passes: list[_Pass] = []
        error, clock = "", _WaitClock(slide.shards)
        for position, shard in enumerate(clock):
            error = error or shard.error
            if error or not len(shard.tiles_NHWC):
                continue
            keep_graph = self.keep is None or position >= len(mine) - self.keep
            with torch.set_grad_enabled(keep_graph):
                features_ND = self._encode(plan, shard, moves_stats=True)
            assert stats is not None, "shards come to encoder ranks only"
            stats.collect(len(shard.tiles_NHWC))
            passes.append(_Pass(shard, features_ND))
        features_ND = self._stack([p.features_ND.detach() for p in passes])

        # 2. gather
        error, wait_s = comm.agree(error, clock.wait_s)
        if stats is not None:
            stats.settle(keep=not error)
        if error:
            return Outcome(error=error, wait_s=wait_s)
        features_KD = comm.gather_rows(features_ND, plan.num_rows, self.num_features)

        # 3. aggregate, loss, backward to the features
        outcome, gradient_KD = Outcome(wait_s=wait_s), None
        if features_KD is not None and self.aggregator is not None:
            features_KD.requires_grad_()
            with self._random_state(plan, "aggregator"):
                logits_C, attention_K = self.aggregator(features_KD)
            loss = F.cross_entropy(logits_C[None], torch.tensor([slide.label], device=logits_C.device))
            loss.backward()
            gradient_KD = features_KD.grad
            outcome = Outcome("", wait_s, loss.item(), logits_C.detach(), attention_K.detach())

        # 4. scatter
        gradient_ND = comm.scatter_rows(gradient_KD, features_ND)

        # 5. backward through the encoder
        pieces = gradient_ND.split([len(p.features_ND) for p in passes]) if passes else ()
        # Kept graphs (the last ones) first: their memory is free before others are encoded again.
        for p, piece_ND in reversed(list(zip(passes, pieces, strict=True))):
            if not p.features_ND.requires_grad:
                p.features_ND = self._encode(plan, p.shard, moves_stats=False)
            p.features_ND.backward(piece_ND)
            p.features_ND = p.features_ND.detach()
        return outcome

    @torch.no_grad()
    def calibrate(self, slides: Iterable[SlideInput]) -> None:
        """Sets BatchNorm's running statistics to the mean over the slides' virtual ranks, weighted by tiles.

        Slides that cannot be read are passed over; training will tell.
        """
        if self.encoder is None:
            return
        set_mode(self.encoder, training=False, batchnorm="virtual")
        layers = own_layers(self.encoder)
        stats, momenta = RunningStats(self.encoder), [layer.momentum for layer in layers]
        for layer in layers:
            layer.momentum = 1.0  # The running statistics after a pass are those of the pass.
        for slide in slides:
            for shard in slide.shards:
                if not shard.error and len(shard.tiles_NHWC) > 1:
                    self._encode(slide.plan, shard, moves_stats=True)
                    stats.collect(len(shard.tiles_NHWC))
        stats.settle(keep=True)
        self.comm.sum_over_encoders([*stats.sums, stats.num_tiles])
        stats.commit()
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum

    @torch.no_grad()
    def score(self, slide: SlideInput) -> Outcome:
        """Logits and loss of one slide, no gradient, after `set_training(False)`."""
        chunks, error, clock = [], "", _WaitClock(slide.shards)
        for shard in clock:
            error = error or shard.error
            # Where BatchNorm looks at the tiles, a virtual rank must be encoded whole.
            whole = self.encoder is not None and bool(own_layers(self.encoder))
            size = max(1, len(shard.tiles_NHWC)) if whole else _SCORING_CHUNK
            for tiles_NHWC in shard.tiles_NHWC.split(size) if len(shard.tiles_NHWC) and not error else ():
                chunks.append(self._forward(tiles_NHWC.to(self.comm.device), moves_stats=False))
        error, wait_s = self.comm.agree(error, clock.wait_s)
        if error:
            return Outcome(error=error, wait_s=wait_s)
        features_KD = self.comm.gather_rows(self._stack(chunks), slide.plan.num_rows, self.num_features)
        if features_KD is None or self.aggregator is None:
            return Outcome(wait_s=wait_s)
        logits_C, attention_K = self.aggregator(features_KD)
        loss = F.cross_entropy(logits_C[None], torch.tensor([slide.label], device=logits_C.device))
        return Outcome("", wait_s, loss.item(), logits_C, attention_K)

    def _encode(self, plan: StepPlan, shard: Shard, *, moves_stats: bool) -> Tensor:
        """One virtual rank's features, under its own random state."""
        tiles_NHWC = shard.tiles_NHWC.to(self.comm.device, non_blocking=True)
        with self._random_state(plan, shard.virtual_rank):
            return self._forward(random_dihedral(tiles_NHWC) if self.augment else tiles_NHWC, moves_stats=moves_stats)

    def _forward(self, tiles_NHWC: Tensor, *, moves_stats: bool) -> Tensor:
        assert self.encoder is not None, "only encoder ranks encode"
        device = self.comm.device.type
        autocast = torch.autocast(device, self.autocast) if self.autocast else contextlib.nullcontext()
        layers = own_layers(self.encoder)
        with autocast, virtual_rank_pass(layers, len(tiles_NHWC), moves_stats=moves_stats):
            features_ND: Tensor = self.encoder(tiles_NHWC)
        return features_ND.to(self.dtype)

    def _stack(self, features: list[Tensor]) -> Tensor:
        empty = torch.zeros(0, self.num_features, dtype=self.dtype, device=self.comm.device)
        return torch.cat([empty, *features])

    @contextlib.contextmanager
    def _random_state(self, plan: StepPlan, who: int | str) -> Iterator[None]:
        """torch's random state as a function of (seed, epoch, slide, virtual rank); the old one comes back after."""
        text = f"slidegrad-state-1\x00{self.seed}\x00{plan.epoch}\x00{plan.slide_id}\x00{who}"
        state = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
        devices = [self.comm.device] if self.comm.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(state)
            yield


@dataclass
class _Pass:
    """A virtual rank's tiles and features between phases 1 and 5."""

    shard: Shard
    features_ND: Tensor


class _WaitClock:
    """Passes shards on and adds up the time that was spent waiting for them."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._shards, self.wait_s = shards, 0.0

    def __iter__(self) -> Iterator[Shard]:
        start = time.perf_counter()
        for shard in self._shards:
            self.wait_s += time.perf_counter() - start
            yield shard
            start = time.perf_counter()


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The parameter's gradient; zeros on a rank that had no tiles."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
