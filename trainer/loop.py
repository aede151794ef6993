"""The loop: epochs of slides, validation on whole slides, checkpoints, and the test at the end.

Runs on every rank. What a rank decides it decides from what all ranks know, so that nobody waits for a call that
another never makes; the main rank alone writes the journal, the scores and the report.
"""

import itertools
import math
import sys
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
from trainer.heads import Head
from trainer.job import Job, cores_per_rank, rank_memory
from trainer.journal import Journal
from trainer.loading.read_ahead import Reading
from trainer.loading.shards import Reads, SlideInput
from trainer.measures.merits import MERITS, rank_of
from trainer.memory import settle_keep
from trainer.model import build_engine, halves_of, load_weights
from trainer.optimizers import build_optimizer, set_rates
from trainer.sampler import SlideSampler, StepPlan, count_rows, shards_of, steps_of
from trainer.schedule import learning_rate
from trainer.scoring import Score, Tick, score_split, split_merit
from trainer.step import Outcome

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
        whole = list_checkpoints(job.run)
        name = comm.from_main(whole[-1].name if whole else None)
        self.newest = job.run / "checkpoints" / name if name else None
        """The checkpoint to go on from."""
        head = Head.for_cohort(config.head, job.cohort)
        self.engine = build_engine(config, comm, tile_px=job.tile_px, head=head, initial=name is None)
        if config.machine.keep == "auto":
            self._settle_keep()
        self.loader = job.loader(comm)
        self.sampler = SlideSampler(
            job.cohort.num_tiles("train"),
            comm.topology,
            comm.rank,
            seed=config.seed,
            fraction=config.cohort.fraction_per_epoch,
            tiles=config.tiles,
        )
        self.optimizers = {half: build_optimizer(m, config, half) for half, m in halves_of(self.engine).items()}
        self.slides_per_epoch = len(self.sampler.steps())
        self.best: tuple[float | None, float | None] | None = None
        """(merit on the validation slides, minus their loss) of the best epoch; None where it is not defined."""
        self.best_epoch: int | None = None
        self.skipped: dict[str, str] = {}
        """slide_id to why it was skipped, the last time."""

    def run(self) -> None:
        """Trains to the end, from the newest checkpoint if there is one."""
        self._begin()
        with ExitStack() as stack:
            journal = stack.enter_context(Journal(self.job.run)) if self.comm.is_main else None
            started = time.perf_counter()
            if journal:
                journal.write("run", **self._describe())
            for epoch in range(self.sampler.epoch, self.job.config.optim.epochs):
                self._epoch(epoch, journal)
            if journal:
                journal.write("end", seconds=time.perf_counter() - started)

    def score_best(self, split: str) -> tuple[list[Score], list[tuple[str, str]]]:
        """Scores a split with the checkpoint chosen on validation."""
        load_weights(self.engine, self.job.run / "checkpoints" / self.comm.from_main(self._chosen_name()))
        return score_split(self.engine, self.job, split, self.tick, self.loader)

    def _chosen_name(self) -> str | None:
        return chosen_checkpoint(self.job.run).name if self.comm.is_main else None

    def _epoch(self, epoch: int, journal: Journal | None) -> None:
        started = time.perf_counter()
        self.sampler.set_epoch(epoch)
        steps = self.sampler.steps()
        self.engine.set_training(True)
        with self.loader.read(self.sampler, keep=self.engine.side.keep) as reading:
            losses, num_tiles = self._train(epoch, steps, reading, journal)
        if not losses:
            raise TrainerError(
                f"epoch {epoch}: none of {len(steps)} slides could be read; first: {next(iter(self.skipped.values()))}"
            )
        train_s = time.perf_counter() - started
        validated = self._validate(epoch, journal)
        self._finish_epoch(epoch, validated)
        if journal:
            journal.write(
                "epoch",
                at=epoch,
                epoch=epoch,
                train_loss=float(np.mean(losses)),
                **validated,
                seconds=time.perf_counter() - started,
                tiles_per_s=num_tiles / train_s,
            )

    def _train(
        self, epoch: int, steps: list[StepPlan], reading: Reading, journal: Journal | None
    ) -> tuple[list[float], int]:
        """The epoch's steps; returns the losses of the slides that were not skipped, and how many tiles they had."""
        losses: list[float] = []
        num_tiles, optim = 0, self.job.config.optim
        slides = self._inputs(self._mine(steps), reading)
        optimizers = [optimizer for optimizer in self.optimizers.values() if optimizer is not None]
        for first in range(0, len(steps), optim.slides_per_step):
            step_started = time.perf_counter()
            plans = steps[first : first + optim.slides_per_step]
            factor = self._rate_factor(epoch, first // optim.slides_per_step)
            for optimizer in optimizers:
                set_rates(optimizer, factor)
                optimizer.zero_grad(set_to_none=True)
            outcomes = self._step(itertools.islice(slides, len(self._mine(plans))))
            if not all(outcome.error for outcome in outcomes):
                for optimizer in optimizers:  # 6. update
                    optimizer.step()
            slide_s = (time.perf_counter() - step_started) / len(plans)
            for outcome in outcomes:
                plan = outcome.plan
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
                        lr=optim.lr * factor,
                        num_tiles=plan.num_rows,
                        step_s=slide_s,
                        data_wait_s=outcome.wait_s / self.comm.topology.num_groups,  # Groups wait side by side.
                        **_describe_reads(outcome.reads, plan.num_rows),
                    )
        return losses, num_tiles

    def _step(self, slides: Iterator[SlideInput]) -> list[Outcome]:
        try:
            return self.engine.step(slides)
        except torch.OutOfMemoryError as error:
            raise TrainerError(
                f"the GPU's memory is full in the middle of a step ({str(error).splitlines()[0]}); give --resume with "
                "a smaller --machine.keep, or another --out with more --virtual-ranks"
            ) from None

    def _mine(self, steps: list[StepPlan]) -> list[StepPlan]:
        """The slides of this rank's group."""
        return steps_of(steps, self.comm.topology, self.comm.rank)

    def _skip(self, slide_id: str, reason: str, epoch: int, journal: Journal | None) -> None:
        self.skipped[slide_id] = reason
        if journal:
            journal.write("skip", slide_id=slide_id, epoch=epoch, reason=reason)

    def _validate(self, epoch: int, journal: Journal | None) -> dict[str, float]:
        """`val_loss`, the mean loss on the validation slides, whole, `val_auc`, and the merit if it is another.

        NaN where it is not defined, or without such slides.
        """
        scores: list[Score] = []
        skipped: list[tuple[str, str]] = []
        if self.job.cohort.of("val"):
            scores, skipped = score_split(self.engine, self.job, "val", self.tick, self.loader)
        for slide_id, reason in skipped:
            self._skip(slide_id, reason, epoch, journal)
        loss = float(np.mean([score.loss for score in scores])) if scores else math.nan
        name, merit = split_merit(scores, self.job.cohort)
        validated = {"val_loss": loss, "val_auc": math.nan, f"val_{name}": merit}
        found: dict[str, float] = self.comm.from_main(validated)
        return found

    def _finish_epoch(self, epoch: int, validated: dict[str, float]) -> None:
        """Saves a checkpoint; names it best if validation says so: by its merit, of equal ones by the loss.

        Where the merit is not defined in any epoch, as that of slides of one class, the loss decides alone.
        """
        known = {name: value if math.isfinite(value) else None for name, value in validated.items()}
        loss = known["val_loss"]
        merit = (known[f"val_{MERITS[self.job.cohort.task]}"], None if loss is None else -loss)
        if rank_of(merit) > rank_of(self.best or (None, None)):
            self.best, self.best_epoch = merit, epoch
        halves: dict[str, dict[str, Any]] = {
            name: {"model": half.state_dict(), "optimizer": o.state_dict() if (o := self.optimizers[name]) else None}
            for name, half in halves_of(self.engine).items()
        }
        self.sampler.set_epoch(epoch + 1)
        state = {
            "epoch": epoch,
            "sampler": self.sampler.state_dict(),
            "best": self.best,
            "best_epoch": self.best_epoch,
            "skipped": self.skipped,
            **known,
        }
        save_checkpoint(self.job.run, self.comm, halves, state)

    def _begin(self) -> None:
        """From the newest checkpoint, else from the start."""
        if self.newest is None:
            if self.job.config.encoder.batchnorm == "calibrated":
                self._calibrate()
            return
        state = read_state(self.newest)
        self.sampler.load_state_dict(state["sampler"])
        self.best = tuple(state["best"]) if state["best"] else None
        self.best_epoch, self.skipped = state["best_epoch"], state["skipped"]
        for half_name, half in halves_of(self.engine).items():
            saved, optimizer = load_half(self.newest, half_name), self.optimizers[half_name]
            half.load_state_dict(saved["model"])
            if optimizer is not None:
                optimizer.load_state_dict(saved["optimizer"])

    def _calibrate(self) -> None:
        """Measures BatchNorm on the first slides of the first epoch, before the first step."""
        steps = self._mine(self.sampler.steps()[:_CALIBRATION_SLIDES])
        shards = shards_of(steps, self.comm.topology, self.comm.rank, self.job.config.seed)
        with self.loader.read(shards) as reading:
            self.engine.calibrate(self._inputs(steps, reading))

    def _inputs(self, steps: list[StepPlan], reading: Reading) -> Iterator[SlideInput]:
        """The steps with this rank's shards, to be taken in order."""
        cases = self.job.cohort.of("train")
        for plan in steps:
            tiles = reading.slide(plan)
            yield SlideInput(plan, tiles.first(), cases[plan.slide_id].targets, tiles)

    def _rate_factor(self, epoch: int, step: int) -> float:
        """The epoch's optimiser step number `step`: its learning rates as a share of their peaks."""
        optim = self.job.config.optim
        per_epoch = math.ceil(self.slides_per_epoch / optim.slides_per_step)
        return learning_rate(
            epoch * per_epoch + step,
            num_steps=optim.epochs * per_epoch,
            num_warmup=round(optim.warmup_epochs * per_epoch),
        )

    def _settle_keep(self) -> None:
        topology, config = self.comm.topology, self.job.config
        self.engine.set_training(True)
        most_rows = max(count_rows(n, config.tiles) for n in self.job.cohort.num_tiles("train").values())
        note = settle_keep(
            self.engine,
            most_rows=most_rows,
            tile_px=self.job.tile_px,
            cpu_bytes=rank_memory(topology) - self.job.read_ahead_bytes(topology),
        )
        if note and self.comm.is_main:
            print(f"note: {note}", file=sys.stderr)

    def _describe(self) -> dict[str, Any]:
        topology, config = self.comm.topology, self.job.config
        return {
            "recipe": config.recipe,
            "version": VERSION,
            "torch": torch.__version__,
            "device": self.comm.device.type,
            "world_size": topology.world_size,
            "num_encoder_ranks": len(topology.encoder_ranks),
            "num_groups": topology.num_groups,
            "keep": "all" if self.engine.side.keep is None else self.engine.side.keep,
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
