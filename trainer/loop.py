"""The loop: epochs of slides, validation on whole slides, checkpoints, and the test at the end.

Runs on every rank. What a rank decides it decides from what all ranks know, so that nobody waits for a call that
another never makes; the aggregator alone writes the journal, the scores and the report.
"""

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from tiler.version import VERSION
from trainer.checkpoint import chosen_checkpoint, list_checkpoints, load_half, read_state, save_checkpoint
from trainer.comm import Comm
from trainer.errors import TrainerError
from trainer.job import Job, cores_per_rank
from trainer.journal import Journal
from trainer.model import build_engine, halves_of, load_weights
from trainer.read_ahead import Reading
from trainer.sampler import SlideSampler, StepPlan, shards_of
from trainer.schedule import learning_rate
from trainer.scoring import Score, Tick, score_split, split_auc
from trainer.shards import Reads, SlideInput

_CALIBRATION_SLIDES = 32


class Loop:
    """One run on one rank.

    Args:
        job: the run.
        comm: this rank's end of the group.
        tick: progress.
    """

    def __init__(self, job: Job, comm: Comm, tick: Tick) -> None:
        self.job, self.comm, self.tick = job, comm, tick
        config = job.config
        if comm.device.type == "cpu":
            torch.set_num_threads(cores_per_rank(comm.topology))
        self.engine = build_engine(config, comm, tile_px=job.tile_px, num_classes=len(job.cohort.classes))
        self.loader = job.loader(comm)
        self.sampler = SlideSampler(
            job.cohort.num_tiles("train"),
            comm.topology,
            comm.rank,
            seed=config.seed,
            fraction=config.cohort.fraction_per_epoch,
            tiles=config.tiles,
        )
        self.peak = {"encoder": config.optim.lr, "aggregator": config.optim.aggregator_lr or config.optim.lr}
        self.optimizers = {
            name: torch.optim.AdamW(half.parameters(), lr=self.peak[name], weight_decay=config.optim.weight_decay)
            for name, half in halves_of(self.engine).items()
        }
        self.slides_per_epoch = len(self.sampler.steps())
        self.best: tuple[float, float] | None = None
        """(validation AUC, minus validation loss) of the best epoch."""
        self.best_epoch: int | None = None
        self.skipped: dict[str, str] = {}
        """slide_id to why it was skipped, the last time."""

    def run(self) -> None:
        """Trains to the end, from the newest checkpoint if there is one."""
        self._begin()
        with ExitStack() as stack:
            journal = stack.enter_context(Journal(self.job.run)) if self.comm.is_aggregator else None
            started = time.perf_counter()
            if journal:
                journal.write("run", **self._describe())
            for epoch in range(self.sampler.epoch, self.job.config.optim.epochs):
                self._epoch(epoch, journal)
            if journal:
                journal.write("end", seconds=time.perf_counter() - started)

    def score_best(self, split: str) -> tuple[list[Score], list[tuple[str, str]]]:
        """Scores a split with the checkpoint chosen on validation."""
        load_weights(self.engine, self.job.run / "checkpoints" / self.comm.from_aggregator(self._chosen_name()))
        return score_split(self.engine, self.job, split, self.tick, self.loader)

    def _chosen_name(self) -> str | None:
        return chosen_checkpoint(self.job.run).name if self.comm.is_aggregator else None

    def _epoch(self, epoch: int, journal: Journal | None) -> None:
        started = time.perf_counter()
        self.sampler.set_epoch(epoch)
        steps = self.sampler.steps()
        self.engine.set_training(True)
        with self.loader.read(self.sampler, keep=self.engine.keep) as reading:
            losses, num_tiles = self._train(epoch, steps, reading, journal)
        if not losses:
            raise TrainerError(
                f"epoch {epoch}: none of {len(steps)} slides could be read; first: {next(iter(self.skipped.values()))}"
            )
        train_s = time.perf_counter() - started
        val_auc, val_loss = self._validate(epoch, journal)
        self._finish_epoch(epoch, val_auc, val_loss)
        if journal:
            journal.write(
                "epoch",
                at=epoch,
                epoch=epoch,
                train_loss=float(np.mean(losses)),
                val_loss=val_loss,
                val_auc=val_auc,
                seconds=time.perf_counter() - started,
                tiles_per_s=num_tiles / train_s,
            )

    def _train(
        self, epoch: int, steps: list[StepPlan], reading: Reading, journal: Journal | None
    ) -> tuple[list[float], int]:
        """The epoch's steps; returns the losses of the slides that were not skipped, and how many tiles they had."""
        losses: list[float] = []
        num_tiles, optim = 0, self.job.config.optim
        slides = self._inputs(steps, reading)
        for first in range(0, len(steps), optim.slides_per_step):
            step_started = time.perf_counter()
            plans = steps[first : first + optim.slides_per_step]
            rate = self._set_rates(epoch, first // optim.slides_per_step)
            for optimizer in self.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            outcomes = self.engine.step(itertools.islice(slides, len(plans)))
            if not all(outcome.error for outcome in outcomes):
                for optimizer in self.optimizers.values():  # 6. update
                    optimizer.step()
            slide_s = (time.perf_counter() - step_started) / len(plans)
            for plan, outcome in zip(plans, outcomes, strict=True):
                self.sampler.advance()
                about = f"loss {np.mean(losses[-50:]):.3f}" if losses else ""
                note = f"skipped: {outcome.error}" if outcome.error else ""
                self.tick(doing=f"epoch {epoch + 1} of {optim.epochs}", total=len(steps), about=about, note=note)
                if outcome.error:
                    self._skip(plan.slide_id, outcome.error, epoch, journal)
                    continue
                losses.append(outcome.loss)
                num_tiles += plan.num_rows
                if journal:
                    number = epoch * self.slides_per_epoch + plan.index
                    journal.write(
                        "step",
                        at=number,
                        step=number,
                        epoch=epoch,
                        slide_id=plan.slide_id,
                        loss=outcome.loss,
                        lr=rate,
                        num_tiles=plan.num_rows,
                        step_s=slide_s,
                        data_wait_s=outcome.wait_s,
                        **_describe_reads(outcome.reads, plan.num_rows),
                    )
        return losses, num_tiles

    def _skip(self, slide_id: str, reason: str, epoch: int, journal: Journal | None) -> None:
        self.skipped[slide_id] = reason
        if journal:
            journal.write("skip", slide_id=slide_id, epoch=epoch, reason=reason)

    def _validate(self, epoch: int, journal: Journal | None) -> tuple[float, float]:
        """AUC and mean loss on the validation slides, whole; NaN without any."""
        if not self.job.cohort.of("val"):
            return math.nan, math.nan
        scores, skipped = score_split(self.engine, self.job, "val", self.tick, self.loader)
        for slide_id, reason in skipped:
            self._skip(slide_id, reason, epoch, journal)
        loss = float(np.mean([score.loss for score in scores])) if scores else math.nan
        found: tuple[float, float] = self.comm.from_aggregator((split_auc(scores, self.job.cohort), loss))
        return found

    def _finish_epoch(self, epoch: int, val_auc: float, val_loss: float) -> None:
        """Saves a checkpoint; names it best if validation says so. AUC decides, the loss breaks ties."""
        merit = (val_auc, -val_loss)
        is_best = math.isfinite(val_auc) and (self.best is None or merit > self.best)
        if is_best:
            self.best, self.best_epoch = merit, epoch
        halves = {
            name: {"model": half.state_dict(), "optimizer": self.optimizers[name].state_dict()}
            for name, half in halves_of(self.engine).items()
        }
        self.sampler.set_epoch(epoch + 1)
        state = {
            "epoch": epoch,
            "sampler": self.sampler.state_dict(),
            "best": self.best,
            "best_epoch": self.best_epoch,
            "skipped": self.skipped,
            "val_auc": val_auc if math.isfinite(val_auc) else None,
        }
        save_checkpoint(self.job.run, self.comm, halves, state)

    def _begin(self) -> None:
        """From the newest checkpoint, else from the start."""
        whole = list_checkpoints(self.job.run)
        name = self.comm.from_aggregator(whole[-1].name if whole else None)
        if name is None:
            if self.job.config.encoder.batchnorm == "calibrated":
                self._calibrate()
            return
        newest = self.job.run / "checkpoints" / name
        state = read_state(newest)
        self.sampler.load_state_dict(state["sampler"])
        self.best = tuple(state["best"]) if state["best"] else None
        self.best_epoch, self.skipped = state["best_epoch"], state["skipped"]
        for half_name, half in halves_of(self.engine).items():
            saved = load_half(newest, half_name)
            half.load_state_dict(saved["model"])
            self.optimizers[half_name].load_state_dict(saved["optimizer"])

    def _calibrate(self) -> None:
        """Measures BatchNorm on the first slides of the first epoch, before the first step."""
        steps = self.sampler.steps()[:_CALIBRATION_SLIDES]
        shards = shards_of(steps, self.comm.topology, self.comm.rank, self.job.config.seed)
        with self.loader.read(shards) as reading:
            self.engine.calibrate(self._inputs(steps, reading))

    def _inputs(self, steps: list[StepPlan], reading: Reading) -> Iterator[SlideInput]:
        """The steps with this rank's shards, to be taken in order."""
        labels = self.job.cohort.of("train")
        for plan in steps:
            tiles = reading.slide(plan)
            yield SlideInput(plan, tiles.first(), labels[plan.slide_id].label, tiles)

    def _set_rates(self, epoch: int, step: int) -> float:
        """Sets the learning rates for the epoch's optimiser step number `step`; returns the encoder's."""
        optim = self.job.config.optim
        per_epoch = math.ceil(self.slides_per_epoch / optim.slides_per_step)
        for name, optimizer in self.optimizers.items():
            rate = learning_rate(
                epoch * per_epoch + step,
                peak=self.peak[name],
                num_steps=optim.epochs * per_epoch,
                num_warmup=round(optim.warmup_epochs * per_epoch),
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
        return rate

    def _describe(self) -> dict[str, Any]:
        topology, config = self.comm.topology, self.job.config
        return {
            "recipe": config.recipe,
            "version": VERSION,
            "torch": torch.__version__,
            "device": self.comm.device.type,
            "world_size": topology.world_size,
            "num_encoder_ranks": topology.num_encoders,
            "virtual_ranks": topology.num_virtual,
            "num_slides": {split: len(self.job.cohort.of(split)) for split in ("train", "val", "test")},
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def _describe_reads(reads: Reads, num_rows: int) -> dict[str, float]:
    """What a step's line in the journal says of its reading, all ranks together.

    Args:
        reads: what it took.
        num_rows: tiles that the step used.
    """
    return {
        "read_tiles_per_s": reads.num_tiles / reads.seconds if reads.seconds else math.nan,
        "decoded_per_tile": reads.num_decoded / num_rows,
        "read_bytes": reads.num_bytes or math.nan,
        "reread_tiles": reads.num_reread,
    }
