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
same augmentation, the same BatchNorm statistics, so the same features. Its tiles may have to be read again, and that
may fail: where any rank reads again, a slide's gradients and statistics count only after a second agreement.
"""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.augment import augment_tiles, draw_stain
from trainer.batchnorm import RunningStats, own_layers, set_mode, virtual_rank_pass
from trainer.comm import Comm
from trainer.config import Augment
from trainer.sampler import StepPlan
from trainer.shards import Reads, Shard, ShardSource, SlideInput

__all__ = ["Engine", "Outcome", "Reads", "Shard", "ShardSource", "SlideInput"]

_SCORING_CHUNK = 256
"""Tiles encoded at once where no gradient is needed."""


@dataclass(frozen=True)
class Outcome:
    """What a slide gave. `loss`, `logits_C`, `attention_K` are known to the aggregator alone, the rest to all ranks."""

    error: str = ""
    """Why all ranks skip the slide; empty if they do not."""
    wait_s: float = 0.0
    """Seconds that the slowest rank waited for its tiles."""
    reads: Reads = field(default_factory=Reads)
    """Of all ranks together; the seconds are those of the rank that read longest."""
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
        augment: what training does to tiles; nothing if None.
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
        augment: Augment | None = None,
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
        halves = [half for half in (self.encoder, self.aggregator) if half is not None]
        before = [(parameter, parameter.grad) for half in halves for parameter in half.parameters()]
        for parameter, _ in before:
            parameter.grad = None
        outcome = self._forward_backward(slide, stats)
        for parameter, gradient in before:
            if outcome.error or parameter.grad is None:
                parameter.grad = gradient
            elif gradient is not None:
                parameter.grad += gradient
        if stats is not None:
            stats.settle(keep=not outcome.error)
        return outcome

    def _forward_backward(self, slide: SlideInput, stats: RunningStats | None) -> Outcome:
        plan, comm, clock = slide.plan, self.comm, _WaitClock()

        # 1. encode
        passes, error = self._first_pass(slide, stats, clock)
        features_ND = self._stack([p.features_ND.detach() for p in passes])

        # 2. gather
        outcome, is_reread = self._agree(error, clock, slide.source)
        if outcome.error:
            return outcome
        features_KD = comm.gather_rows(features_ND, plan.num_rows, self.num_features)

        # 3. aggregate, loss, backward to the features
        loss = logits_C = attention_K = gradient_KD = None
        if features_KD is not None and self.aggregator is not None:
            features_KD.requires_grad_()
            with self._random_state(plan, "aggregator"):
                logits_C, attention_K = self.aggregator(features_KD)
            loss = F.cross_entropy(logits_C[None], torch.tensor([slide.label], device=logits_C.device))
            loss.backward()
            gradient_KD = features_KD.grad

        # 4. scatter
        gradient_ND = comm.scatter_rows(gradient_KD, features_ND)

        # 5. backward through the encoder
        error = self._second_pass(slide, passes, gradient_ND, clock)
        if is_reread:
            outcome, _ = self._agree(error, clock, slide.source)
        assert is_reread or not error, "what is in memory cannot fail"
        if outcome.error or loss is None or logits_C is None or attention_K is None:
            return outcome
        return dataclasses.replace(
            outcome, loss=loss.item(), logits_C=logits_C.detach(), attention_K=attention_K.detach()
        )

    def _first_pass(
        self, slide: SlideInput, stats: RunningStats | None, clock: "_WaitClock"
    ) -> tuple[list["_Pass"], str]:
        """Encodes this rank's virtual ranks: the last `keep` with a graph, those before them without.

        Returns:
            The passes, empty virtual ranks left out; and why tiles could not be read.
        """
        num_mine = len(self.comm.topology.virtual_of(self.comm.rank))
        passes: list[_Pass] = []
        error = ""
        for position, shard in enumerate(clock.watch(slide.shards)):
            error = error or shard.error
            if error or not len(shard.tiles_NHWC):
                continue
            keep_graph = self.keep is None or position >= num_mine - self.keep
            with torch.set_grad_enabled(keep_graph):
                features_ND = self._encode(slide.plan, shard, moves_stats=True)
            assert stats is not None, "shards come to encoder ranks only"
            stats.collect(len(shard.tiles_NHWC))
            passes.append(_Pass(features_ND, shard if slide.source is None and not keep_graph else None))
            del shard  # On a GPU, another's place.
        return passes, error

    def _second_pass(self, slide: SlideInput, passes: list["_Pass"], gradient_ND: Tensor, clock: "_WaitClock") -> str:
        """Sends the gradient back through the encoder; virtual ranks without a graph are encoded again.

        Returns:
            Why tiles could not be read again; then some of the gradient is missing.
        """
        again = clock.watch(slide.source.again() if slide.source is not None else ())
        pieces = gradient_ND.split([len(p.features_ND) for p in passes]) if passes else ()
        # Kept graphs (the last ones) first: their memory is free before others are encoded again.
        for p, piece_ND in reversed(list(zip(passes, pieces, strict=True))):
            if not p.features_ND.requires_grad:
                shard = p.shard if p.shard is not None else next(again)
                if shard.error:
                    return shard.error
                p.features_ND = self._encode(slide.plan, shard, moves_stats=False)
                del shard
            p.features_ND.backward(piece_ND)
            p.features_ND = p.features_ND.detach()
        next(again, None)  # There is none: the last one's memory goes back.
        return ""

    def _agree(self, error: str, clock: "_WaitClock", source: ShardSource | None) -> tuple[Outcome, bool]:
        """What all ranks make of a pass.

        Returns:
            The outcome so far, and whether any rank has to read tiles again; the same on all ranks.
        """
        reads = source.reads if source is not None else Reads()
        will_reread = source is not None and not error and source.will_reread()
        error, by_rank = self.comm.agree(error, clock.wait_s, float(will_reread), *dataclasses.astuple(reads))
        waits_s, rereads, tiles, reread, decoded, read_bytes, seconds = zip(*by_rank, strict=True)
        together = Reads(
            num_tiles=round(sum(tiles)),
            num_reread=round(sum(reread)),
            num_decoded=round(sum(decoded)),
            num_bytes=round(sum(read_bytes)),
            seconds=max(seconds),
        )
        return Outcome(error=error, wait_s=max(waits_s), reads=together), any(rereads)

    @torch.no_grad()
    def calibrate(self, slides: Iterable[SlideInput]) -> None:
        """Sets BatchNorm's running statistics to the mean over the slides' virtual ranks, weighted by tiles.

        Slides that cannot be read are passed over by all ranks; training will tell.
        """
        if self.encoder is not None:
            set_mode(self.encoder, training=False, batchnorm="virtual")
        layers = own_layers(self.encoder) if self.encoder is not None else []
        stats = RunningStats(self.encoder) if self.encoder is not None else None
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.momentum = 1.0  # The running statistics after a pass are those of the pass.
        for slide in slides:
            error, clock = "", _WaitClock()
            for shard in clock.watch(slide.shards):
                error = error or shard.error
                if stats is not None and not error and len(shard.tiles_NHWC) > 1:
                    self._encode(slide.plan, shard, moves_stats=True)
                    stats.collect(len(shard.tiles_NHWC))
            outcome, _ = self._agree(error, clock, slide.source)
            if stats is not None:
                stats.settle(keep=not outcome.error)
        if stats is not None:
            self.comm.sum_over_encoders([*stats.sums, stats.num_tiles])
            stats.commit()
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum

    @torch.no_grad()
    def score(self, slide: SlideInput) -> Outcome:
        """Logits and loss of one slide, no gradient, after `set_training(False)`."""
        chunks, error, clock = [], "", _WaitClock()
        for shard in clock.watch(slide.shards):
            error = error or shard.error
            # Where BatchNorm looks at the tiles, a virtual rank must be encoded whole.
            whole = self.encoder is not None and bool(own_layers(self.encoder))
            size = max(1, len(shard.tiles_NHWC)) if whole else _SCORING_CHUNK
            for tiles_NHWC in shard.tiles_NHWC.split(size) if len(shard.tiles_NHWC) and not error else ():
                chunks.append(self._forward(tiles_NHWC.to(self.comm.device), moves_stats=False))
        outcome, _ = self._agree(error, clock, slide.source)
        if outcome.error:
            return outcome
        features_KD = self.comm.gather_rows(self._stack(chunks), slide.plan.num_rows, self.num_features)
        if features_KD is None or self.aggregator is None:
            return outcome
        logits_C, attention_K = self.aggregator(features_KD)
        loss = F.cross_entropy(logits_C[None], torch.tensor([slide.label], device=logits_C.device))
        return dataclasses.replace(outcome, loss=loss.item(), logits_C=logits_C, attention_K=attention_K)

    def _encode(self, plan: StepPlan, shard: Shard, *, moves_stats: bool) -> Tensor:
        """One virtual rank's features, under its own random state."""
        tiles_NHWC = shard.tiles_NHWC.to(self.comm.device, non_blocking=True)
        with self._random_state(plan, "stain"):
            stain_S2 = draw_stain(self.augment)
        with self._random_state(plan, shard.virtual_rank):
            return self._forward(augment_tiles(tiles_NHWC, self.augment, stain_S2), moves_stats=moves_stats)

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
    """A virtual rank's features between phases 1 and 5, and its tiles if they are held for a second encoding."""

    features_ND: Tensor
    shard: Shard | None


class _WaitClock:
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


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The parameter's gradient; zeros on a rank that had no tiles."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
