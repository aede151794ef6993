"""One training step: the paper's section 2, encoder side and aggregator side beside each other.

1. encode      each encoder rank encodes its virtual ranks' tiles, one virtual rank after another
2. gather      features, and where on the slide they lie, travel to the aggregator, in slide order; a failed read is
               told, and all skip the slide
3. aggregate   outputs, loss, backward down to the features
4. scatter     each encoder rank receives the gradient of its own features
5. backward    through the encoder, virtual rank by virtual rank; after the step's last slide gradients are summed
               over encoder ranks
6. update      each half takes its optimiser step (`update.py`)

The sum in phase 5 is explicit and exact for any split; the paper's factor N undoes DDP's averaging, a sum needs none.
Groups of ranks do phases 1 to 5 for a slide each, at the same time; the sum is over all of them. The tiles of a virtual
rank whose graph is not kept may have to be read again, and that may fail: where any rank reads again, a slide's
gradients and statistics count only after a second agreement.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trainer.aggregators import contributions_of
from trainer.batchnorm import RunningStats, own_layers, set_mode
from trainer.comm import Comm
from trainer.config import Augment
from trainer.encode import EncoderSide, InStep, WaitClock, random_state
from trainer.fsdp import whole_norm
from trainer.heads import Head
from trainer.loading.shards import Reads, Shard, ShardSource, SlideInput
from trainer.sampler import StepPlan

__all__ = ["Engine", "Outcome", "Reads", "Shard", "ShardSource", "SlideInput"]


@dataclass(frozen=True)
class Outcome:
    """What a slide gave. `loss`, `outputs_C`, `attention_K` its aggregator alone knows, the rest all ranks."""

    plan: StepPlan
    error: str = ""
    """Why all ranks skip the slide; empty if they do not."""
    wait_s: float = 0.0
    """Seconds that the slowest rank waited for its tiles."""
    reads: Reads = field(default_factory=Reads)
    """Of all ranks together; the seconds are those of the rank that read longest."""
    gradient_norm: float = float("nan")
    """Of the whole step's gradient, over both halves."""
    loss: float = float("nan")
    outputs_C: Tensor | None = None
    """Of a tile-level aggregator in training those of each tile, (K, C)."""
    attention_K: Tensor | None = None
    contributions_KC: Tensor | None = None
    """Each tile's part of the outputs, where it was asked for and the aggregator can tell."""


class Engine:
    """Both halves of the model on this rank, and the step.

    Args:
        comm: this rank's end of the run's processes.
        encoder: on encoder ranks; None on a dedicated aggregator.
        aggregator: on aggregators; None elsewhere.
        num_features: width D of the features.
        seed: the run's seed; dropout and augmentation follow from (seed, epoch, slide, virtual rank).
        head: what the outputs mean, and the loss; two classes by default.
        keep: virtual ranks of this rank whose graph is kept; all if None.
        is_frozen: the encoder is not trained; the same on all ranks.
        augment: what training does to tiles; nothing if None.
        autocast: dtype of the encoder's autocast, or None.
        batchnorm: see `batchnorm.set_mode`.
        in_step: see `encode.EncoderSide`; its gradients are summed in the backward pass.

    Attributes:
        loss_scale: factor on the loss, and so on the gradients that `step` leaves: small ones are lost in fp16.
    """

    def __init__(
        self,
        comm: Comm,
        encoder: nn.Module | None,
        aggregator: nn.Module | None,
        *,
        num_features: int,
        seed: int,
        head: Head | None = None,
        keep: int | None = None,
        is_frozen: bool = False,
        augment: Augment | None = None,
        autocast: torch.dtype | None = None,
        batchnorm: str = "running",
        in_step: InStep | None = None,
    ) -> None:
        self.comm, self.encoder, self.aggregator = comm, encoder, aggregator
        self.seed, self.batchnorm, self.head = seed, batchnorm, head or Head.of_classes(2)
        self.loss_scale = 1.0
        half = encoder if encoder is not None else aggregator
        assert half is not None, "a rank holds at least one half"
        self.side = EncoderSide(
            encoder,
            comm.device,
            dtype=next(half.parameters()).dtype,
            num_features=num_features,
            seed=seed,
            keep=keep,
            is_frozen=is_frozen,
            augment=augment,
            autocast=autocast,
            in_step=in_step,
        )

    def set_training(self, training: bool) -> None:
        """Both halves to training, or to scoring."""
        if self.encoder is not None:
            set_mode(self.encoder, training=training, batchnorm=self.batchnorm)
        if self.aggregator is not None:
            self.aggregator.train(training)

    def step(self, slides: Iterable[SlideInput]) -> list[Outcome]:
        """Gradients of the mean loss of a step's slides, left in both halves' `.grad` (phases 1 to 5).

        The caller clears gradients before and updates after. Slides that are skipped do not count in the mean.

        Args:
            slides: those of this rank's group; none if the step has none for it.

        Returns:
            The outcomes of all groups' slides, in the order of the epoch.
        """
        stats = RunningStats(self.encoder) if self.encoder is not None else None
        outcomes = [self._slide(slide, stats) for slide in slides]
        if self.comm.topology.num_groups > 1:
            plain = [_to_tell(outcome) for outcome in outcomes]
            outcomes = sorted(itertools.chain(*self.comm.from_groups(plain)), key=lambda o: o.plan.index)

        # 5b. gradients, and BatchNorm's statistics, summed over encoder ranks; over groups, the aggregator's too
        if stats is not None and self.encoder is not None:
            gradients = _gradients(self.encoder) if self.side.in_step is None else []
            self.comm.sum_over_encoders([*gradients, *stats.sums, stats.num_tiles])
        if self.aggregator is not None and self.comm.topology.num_groups > 1:
            self.comm.sum_over_aggregators(_gradients(self.aggregator))
        num_used = sum(not outcome.error for outcome in outcomes)
        for half in (self.encoder, self.aggregator) if num_used > 1 else ():
            for parameter in half.parameters() if half is not None else ():
                if parameter.grad is not None:
                    parameter.grad /= num_used

        # 5c. what all ranks decide by; of a step that overflowed nothing is kept
        norm = self._gradient_norm()
        if stats is not None and math.isfinite(norm):
            stats.commit()
        return [dataclasses.replace(outcome, gradient_norm=norm) for outcome in outcomes]

    def _gradient_norm(self) -> float:
        """Norm of the gradient of both halves as one, as of the loss without its scale; the same on all ranks."""
        halves = ((self.encoder, self.comm.is_first_encoder), (self.aggregator, self.comm.is_main))
        squares = [_norm(half) ** 2 * is_mine if half is not None else 0.0 for half, is_mine in halves]
        return math.sqrt(sum(self.comm.total(*squares))) / self.loss_scale

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
        plan, comm, side, clock = slide.plan, self.comm, self.side, WaitClock()

        # 1. encode
        if self.batchnorm == "sync":  # Its statistics are a collective: nobody begins what another cannot join.
            slide, error = _with_first_at_hand(slide, clock)
            outcome, _ = self._agree(slide, error, clock)
            if outcome.error:
                return outcome
        passes, error = side.first_pass(slide, len(comm.topology.virtual_of(comm.rank)), stats, clock)

        # 2. gather
        outcome, is_reread = self._agree(slide, error, clock)
        if outcome.error:
            return outcome
        features_ND, cells_N2 = side.stack(passes)
        features_KD = comm.gather_rows(features_ND, plan.num_rows)
        cells_K2 = comm.gather_rows(cells_N2, plan.num_rows)

        # 3. aggregate, loss, backward to the features
        loss = outputs_C = attention_K = gradient_KD = None
        if features_KD is not None and self.aggregator is not None:
            features_KD.requires_grad_(not side.is_frozen)
            with random_state(comm.device, self.seed, plan, "aggregator"):
                outputs_C, attention_K = self.aggregator(features_KD, cells_K2)
            loss = self.head.loss(outputs_C, slide.targets)
            (loss * self.loss_scale).backward()
            gradient_KD = features_KD.grad

        if not side.is_frozen:
            # 4. scatter
            gradient_ND = comm.scatter_rows(gradient_KD, features_ND)

            # 5. backward through the encoder
            error = side.second_pass(slide, passes, gradient_ND, clock)
            if is_reread:
                outcome, _ = self._agree(slide, error, clock)
            assert is_reread or not error, "what is in memory cannot fail"
        if outcome.error or loss is None or outputs_C is None or attention_K is None:
            return outcome
        return dataclasses.replace(
            outcome, loss=loss.item(), outputs_C=outputs_C.detach(), attention_K=attention_K.detach()
        )

    def _agree(self, slide: SlideInput, error: str, clock: WaitClock) -> tuple[Outcome, bool]:
        """What all ranks of the group make of a pass.

        Returns:
            The outcome so far, and whether any rank has to read tiles again; the same on all ranks of the group.
        """
        source = slide.source
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
        return Outcome(slide.plan, error=error, wait_s=max(waits_s), reads=together), any(rereads)

    @torch.no_grad()
    def calibrate(self, slides: Iterable[SlideInput]) -> bool:
        """Sets BatchNorm's running statistics to the mean over the slides' virtual ranks, weighted by tiles.

        Slides that cannot be read are passed over by all ranks; training will tell.

        Args:
            slides: those of this rank's group; the statistics are those of all groups.

        Returns:
            False if slides were read, and none had a virtual rank of two tiles or more, which it takes to measure.
        """
        if self.encoder is not None:
            set_mode(self.encoder, training=False, batchnorm="measured")
        layers = own_layers(self.encoder) if self.encoder is not None else []
        stats = RunningStats(self.encoder) if self.encoder is not None else None
        momenta, num_read = [layer.momentum for layer in layers], 0
        for layer in layers:
            layer.momentum = 1.0  # The running statistics after a pass are those of the pass.
        for slide in slides:
            error, clock = "", WaitClock()
            for shard in clock.watch(slide.shards):
                error = error or shard.error
                if stats is not None and not error and len(shard.tiles_NHWC) > 1:
                    self.side.encode(slide.plan, shard, moves_stats=True)
                    stats.collect(len(shard.tiles_NHWC))
            outcome, _ = self._agree(slide, error, clock)
            num_read += not outcome.error
            if stats is not None:
                stats.settle(keep=not outcome.error)
        if stats is not None:
            self.comm.sum_over_encoders([*stats.sums, stats.num_tiles])
            stats.commit()
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        num_measured = float(stats.num_tiles) if stats is not None else 0.0
        measured, read = self.comm.total(num_measured, num_read)
        return bool(measured) or not read

    @torch.no_grad()
    def score(self, slide: SlideInput, *, explain: bool = False) -> Outcome:
        """Outputs and loss of one slide of this rank's group, no gradient, after `set_training(False)`.

        Args:
            slide: the slide.
            explain: contributions of the tiles too.
        """
        clock = WaitClock()
        passes, error = self.side.score_pass(slide, len(self.comm.topology.virtual_of(self.comm.rank)), clock)
        outcome, _ = self._agree(slide, error, clock)
        if outcome.error:
            return outcome
        features_ND, cells_N2 = self.side.stack(passes)
        features_KD = self.comm.gather_rows(features_ND, slide.plan.num_rows)
        cells_K2 = self.comm.gather_rows(cells_N2, slide.plan.num_rows)
        if features_KD is None or self.aggregator is None:
            return outcome
        outputs_C, attention_K = self.aggregator(features_KD, cells_K2)
        loss = self.head.loss(outputs_C, slide.targets)
        parts_KC = contributions_of(self.aggregator, features_KD, cells_K2) if explain else None
        return dataclasses.replace(
            outcome, loss=loss.item(), outputs_C=outputs_C, attention_K=attention_K, contributions_KC=parts_KC
        )


def _with_first_at_hand(slide: SlideInput, clock: WaitClock) -> tuple[SlideInput, str]:
    """Waits for the first shard; returns the slide with it, and why it could not be read."""
    shards = clock.watch(slide.shards)
    first = list(itertools.islice(shards, 1))
    return slide._replace(shards=itertools.chain(first, shards)), first[0].error if first else ""


def _to_tell(outcome: Outcome) -> Outcome:
    """What other groups need of it: nothing that grows with the slide's tiles."""
    plan = dataclasses.replace(outcome.plan, eligible=None)
    return dataclasses.replace(outcome, plan=plan, outputs_C=None, attention_K=None)


def _norm(half: nn.Module) -> float:
    gradients = [parameter.grad for parameter in half.parameters() if parameter.grad is not None]
    return whole_norm(nn.utils.get_total_norm(gradients)) if gradients else 0.0


def _gradients(half: nn.Module) -> list[Tensor]:
    """The gradients of what is trained; zeros where a rank had no tiles."""
    trained = [parameter for parameter in half.parameters() if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in trained if parameter.grad is not None]
