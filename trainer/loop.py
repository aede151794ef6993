"""The loop: epochs of slides, validation on whole slides, checkpoints, and the test at the end.

Runs on every rank. What a rank decides it decides from what all ranks know, so that nobody waits for a call that
another never makes; the main rank alone writes the journal, the scores and the report.
"""

import dataclasses
import itertools
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import torch

from manifests.errors import Stopped
from manifests.privacy import without_paths
from trainer.checkpoint import chosen_checkpoint, load_newest, save_checkpoint
from trainer.comm import Comm
from trainer.errors import TrainerError
from trainer.features.cache import serve_run
from trainer.heads import Head
from trainer.index import IndexedManifests
from trainer.job import Job, cores_per_rank, rank_memory
from trainer.journal import Journal, describe_run, describe_step
from trainer.loading.quarantine import InHand, collect_crashes
from trainer.loading.shards import ShardLoader, ShardReading, SlideInput
from trainer.measures.merits import MERITS, rank_of
from trainer.memory import peak_memory, settle_keep
from trainer.model import build_engine, load_weights
from trainer.ranking import rank_slides
from trainer.regions import read_regions
from trainer.sampler import ALL, Eligible, SlideSampler, StepPlan, count_eligible, count_rows, shards_of, steps_of
from trainer.schedule import learning_rate, weight_decay
from trainer.scoring import Score, Tick, score_split, split_merit
from trainer.standing import Standing
from trainer.stopping import stopped, wants_stop
from trainer.update import Update

_CALIBRATION_SLIDES = 32
_CALIBRATION_TILES = 256
"""Of a virtual rank, where the model has still to choose the tiles that it will be trained on."""


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
        mine = {"encoder": comm.is_encoder, "aggregator": comm.is_aggregator}
        self.newest, self._state, self._saved = load_newest(job.run, comm, [half for half in mine if mine[half]])
        """The checkpoint to go on from."""
        head = Head.for_cohort(config.head, job.cohort)
        self.engine = build_engine(config, comm, tile_px=job.tile_px, head=head, initial=self.newest is None)
        self.update = Update(self.engine, config)
        eligible = read_regions(job.run) if config.tiles.regions is not None else ALL
        if config.machine.keep == "auto":
            self._settle_keep(eligible)
        training = job.cohort.of("train")
        self.sampler = SlideSampler(
            job.cohort.num_tiles("train"),
            comm.topology,
            comm.rank,
            seed=config.seed,
            fraction=config.cohort.fraction_per_epoch,
            tiles=config.tiles,
            balance=config.cohort.balance,
            labels={slide_id: case.label for slide_id, case in training.items()} if head.task == "classes" else None,
            eligible=eligible,
        )
        self.slides_per_epoch = len(self.sampler.steps())
        self.standing = Standing()
        quarantined = comm.from_main(collect_crashes(job.run) if comm.is_main else None)
        self._in_hand = InHand(job.run)
        self.loader: ShardLoader = job.loader(comm, self._in_hand.hold, quarantined)

    def run(self) -> None:
        """Trains to the end, from the newest checkpoint if there is one.

        Raises:
            Stopped: a signal ended it; what is done is in a checkpoint.
        """
        self._begin()
        if self.job.config.machine.features is not None:
            self.loader = serve_run(self.engine, self.job, self.sampler, self.loader, self.tick)
        with ExitStack() as stack:
            journal = stack.enter_context(Journal(self.job.run)) if self.comm.is_main else None
            started = time.perf_counter()
            if journal:
                journal.write("run", **describe_run(self.job, self.engine))
            while self.sampler.epoch < self.job.config.optim.epochs and not self._is_out_of_patience():
                self._epoch(self.sampler.epoch, journal)
            if journal:
                journal.write("end", seconds=time.perf_counter() - started)

    def close(self) -> None:
        """Reads no more."""
        self._in_hand.close()

    def _is_out_of_patience(self) -> bool:
        patience, best = self.job.config.optim.patience, self.standing.best_epoch
        return patience is not None and best is not None and self.sampler.epoch > best + patience

    def score_best(self, split: str) -> tuple[list[Score], list[tuple[str, str]]]:
        """Scores a split with the checkpoint chosen on validation."""
        load_weights(self.engine, self.job.run / "checkpoints" / self.comm.from_main(self._chosen_name()))
        return score_split(self.engine, self.job, split, self.tick, self.loader, may_stop=True)

    def _chosen_name(self) -> str | None:
        return chosen_checkpoint(self.job.run).name if self.comm.is_main else None

    def _epoch(self, epoch: int, journal: Journal | None) -> None:
        """What is left of an epoch."""
        standing, started = self.standing, time.perf_counter()
        self._choose_tiles(epoch, journal)
        standing.train_s += time.perf_counter() - started
        if steps := self.sampler.steps():
            self.engine.set_training(True)
            with self.loader.read(self.sampler, keep=self.engine.side.keep) as reading:
                self._train(epoch, steps, reading, journal)
        if not standing.num_slides:
            raise TrainerError(
                f"epoch {epoch}: none of {standing.num_skipped} slides could be read; first: "
                f"{next(iter(standing.skipped.values()))}"
            )
        train_s, trained = standing.train_s, time.perf_counter()
        try:
            validated = self._validate(epoch, journal)
        except Stopped:
            self._save(epoch, slide=self.sampler.next_step)
            raise
        self._note_index(epoch, journal)
        epoch_s = train_s + time.perf_counter() - trained
        peak_bytes = self.comm.most(peak_memory(self.comm.device))
        if journal:
            journal.write(
                "epoch",
                at=epoch,
                epoch=epoch,
                train_loss=standing.loss_sum / standing.num_slides,
                **validated,
                seconds=epoch_s,
                device_hours=epoch_s * self.comm.topology.world_size / 3600,
                memory_gb=peak_bytes / 1e9,
                tiles_per_s=standing.num_tiles / train_s,
            )
        self._finish_epoch(epoch, validated)

    def _choose_tiles(self, epoch: int, journal: Journal | None) -> None:
        """Has the model rank the tiles of the epoch's slides, where it is to choose them, and that is not done yet.

        Raises:
            Stopped: a signal ended it; what is ranked is in a checkpoint.
        """
        if not (to_rank := self.sampler.to_rank()):
            return
        ranked = rank_slides(
            self.engine,
            self.job,
            to_rank,
            self.sampler.eligible,
            epoch=epoch,
            loader=self.loader,
            tick=self.tick,
        )
        self.sampler.chosen |= ranked.rows
        for slide_id, reason in ranked.skipped.items():
            self._skip(slide_id, reason, epoch, journal)
        if ranked.stops:
            self.standing.num_skipped += len(ranked.skipped)
            error = self._save(epoch, slide=self.sampler.next_step)
            where = f"with {len(ranked.rows)} of {len(to_rank)} slides of epoch {epoch} ranked"
            raise stopped(self.comm, f"{where}, of which nothing could be saved" if error else where)
        self._refuse_many_skipped(epoch, len(ranked.skipped))

    def _train(self, epoch: int, steps: list[StepPlan], reading: ShardReading, journal: Journal | None) -> None:
        """The epoch's steps that are left."""
        optim, standing, losses = self.job.config.optim, self.standing, deque[float](maxlen=50)
        slides = self._inputs(self._mine(steps), reading)
        for first in range(0, len(steps), optim.slides_per_step):
            step_started = time.perf_counter()
            plans = steps[first : first + optim.slides_per_step]
            number = epoch * self.steps_per_epoch + plans[0].index // optim.slides_per_step
            rate = self._rates(number)
            self.update.begin(*rate)
            outcomes = self.engine.step(itertools.islice(slides, len(self._mine(plans))))
            self.update.finish(outcomes, number)  # 6. update
            step_s = time.perf_counter() - step_started
            standing.train_s += step_s
            for outcome in outcomes:
                plan = outcome.plan
                self.sampler.advance()
                about = f"loss {np.mean(losses):.3f}" if losses else ""
                note = f"skipped: {outcome.error}" if outcome.error else ""
                self.tick(doing=f"epoch {epoch + 1} of {optim.epochs}", total=len(steps), about=about, note=note)
                if outcome.error:
                    self._skip(plan.slide_id, outcome.error, epoch, journal)
                    continue
                losses.append(outcome.loss)
                standing.loss_sum += outcome.loss
                standing.num_slides += 1
                standing.num_tiles += plan.num_rows
                if journal:
                    at = epoch * self.slides_per_epoch + plan.index
                    num_groups = self.comm.topology.num_groups
                    line = describe_step(outcome, step_s=step_s / len(plans), num_groups=num_groups)
                    journal.write("step", at=at, step=at, lr=optim.lr * rate[0], **line)
            self._refuse_many_skipped(epoch, sum(bool(outcome.error) for outcome in outcomes))
            self._save_within(epoch, number, is_last=plans[-1] is steps[-1])

    def _refuse_many_skipped(self, epoch: int, num_new: int) -> None:
        """Ends the run where so many slides fail that it is not the slides.

        Args:
            epoch: which.
            num_new: slides of this step that were skipped.
        """
        standing, most = self.standing, self.job.config.cohort.max_skipped
        standing.num_skipped += num_new
        if num_new and standing.num_skipped > max(1, most * self.slides_per_epoch):
            raise TrainerError(
                f"epoch {epoch}: {standing.num_skipped} of {self.slides_per_epoch} slides could not be read, more than "
                f"cohort.max_skipped={most:g} of them; see to the archive, then give --resume. The last one: "
                f"{next(reversed(standing.skipped.values()))}"
            )

    def _save_within(self, epoch: int, number: int, *, is_last: bool) -> None:
        """A checkpoint between two steps, if it is time for one or a signal asks for it.

        Args:
            epoch: which.
            number: of the optimiser step before, in the whole run.
            is_last: it was the epoch's last.

        Raises:
            Stopped: a signal ends the run.
        """
        every, num_done = self.job.config.machine.save_every, self.sampler.next_step
        stops = wants_stop(self.comm)
        error = ""
        if stops or (every and (number + 1) % every == 0 and not is_last):
            error = self._save(epoch, slide=num_done)
        if stops:
            where = f"after {num_done} of {self.slides_per_epoch} slides of epoch {epoch}"
            raise stopped(self.comm, f"{where}, of which nothing new could be saved" if error else where)

    def _mine(self, steps: list[StepPlan]) -> list[StepPlan]:
        """The slides of this rank's group."""
        return steps_of(steps, self.comm.topology, self.comm.rank)

    def _skip(self, slide_id: str, reason: str, epoch: int, journal: Journal | None) -> None:
        self.standing.skipped.pop(slide_id, None)  # The last one is the newest.
        self.standing.skipped[slide_id] = reason
        if journal:
            journal.write("skip", slide_id=slide_id, epoch=epoch, reason=reason)

    def _note_index(self, epoch: int, journal: Journal | None) -> None:
        """Writes down that ranks had manifests from the folder, as the index did not give them."""
        if not isinstance(self.job.source, IndexedManifests):
            return
        troubles = [trouble for trouble in self.comm.from_all(self.job.source.take_trouble()) if trouble.reason]
        if journal and troubles:
            reason, num_local = without_paths(troubles[0].reason), sum(trouble.num_local for trouble in troubles)
            journal.write("index", epoch=epoch, num_local=num_local, num_ranks=len(troubles), reason=reason)

    def _validate(self, epoch: int, journal: Journal | None) -> dict[str, float]:
        """`val_loss`, the mean loss on the validation slides, whole, `val_auc`, and the merit if it is another.

        NaN where it is not defined, or without such slides.
        """
        scores: list[Score] = []
        skipped: list[tuple[str, str]] = []
        if self.job.cohort.of("val"):
            with self.update.averaged():
                scores, skipped = score_split(self.engine, self.job, "val", self.tick, self.loader, may_stop=True)
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
        standing, before = self.standing, (self.standing.best, self.standing.best_epoch)
        if rank_of(merit) > rank_of(standing.best or (None, None)):
            standing.best, standing.best_epoch = merit, epoch
        standing.begin_epoch()
        self.sampler.set_epoch(epoch + 1)
        if error := self._save(epoch, slide=None, **known):
            standing.best, standing.best_epoch = before
            if epoch + 1 == self.job.config.optim.epochs:
                raise TrainerError(f"the last checkpoint could not be written ({error}); mend that, then give --resume")

    def _save(self, epoch: int, *, slide: int | None, **known: float | None) -> str:
        """Writes a checkpoint, or says why it is not there; the run goes on from memory then.

        Args:
            epoch: which.
            slide: how many of its slides are done; None after the whole epoch.
            known: what else is known of it.
        """
        state = {
            "epoch": epoch,
            "slide": slide,
            "sampler": self.sampler.state_dict(),
            "scale": self.update.scale_state(),
            **self.standing.to_dict(),
            **known,
        }
        error = save_checkpoint(self.job.run, self.comm, self.update.state_dict(), state)
        if error and self.comm.is_main:
            print(f"note: no checkpoint written ({error}); the one before it stays", file=sys.stderr)
        return error

    def _begin(self) -> None:
        """From the newest checkpoint, else from the start."""
        if self.newest is None:
            if self.job.config.encoder.batchnorm == "calibrated":
                self._calibrate()
                if self.job.config.machine.features is not None:
                    # Measured once: by other ranks it would round otherwise, and all features be others.
                    self._save(0, slide=0)
            return
        self.sampler.load_state_dict(self._state["sampler"])
        self.standing = Standing.from_dict(self._state)
        self.update.load_state_dict(self._saved, self._state.get("scale"))
        self._saved.clear()

    def _calibrate(self) -> None:
        """Measures BatchNorm on the first slides of the first epoch, before the first step."""
        steps = self._mine(self.sampler.steps()[:_CALIBRATION_SLIDES])
        if self.job.config.tiles.tiles == "top":  # Of what the model has still to choose there are too few.
            most = _CALIBRATION_TILES * self.comm.topology.num_virtual
            steps = [dataclasses.replace(step, num_rows=min(most, step.num_usable)) for step in steps]
        shards = shards_of(steps, self.comm.topology, self.comm.rank, self.job.config.seed)
        with self.loader.read(shards) as reading:
            is_measured = self.engine.calibrate(self._inputs(steps, reading))
        if not is_measured:
            raise TrainerError(
                f"encoder.batchnorm=calibrated: none of the first {len(steps)} slides gave a virtual rank two tiles to "
                "measure; give another --out with fewer --virtual-ranks, more tiles, or --encoder.batchnorm frozen"
            )

    def _inputs(self, steps: list[StepPlan], reading: ShardReading) -> Iterator[SlideInput]:
        """The steps with this rank's shards, to be taken in order."""
        cases = self.job.cohort.of("train")
        for plan in steps:
            tiles = reading.slide(plan)
            yield SlideInput(plan, tiles.first(), cases[plan.slide_id].targets, tiles)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return math.ceil(self.slides_per_epoch / self.job.config.optim.slides_per_step)

    def _rates(self, step: int) -> tuple[float, float]:
        """Of the run's optimiser step number `step`: its learning rates as a share of their peaks; its weight decay."""
        optim = self.job.config.optim
        num_steps, last = optim.epochs * self.steps_per_epoch, optim.final_weight_decay
        rate = learning_rate(step, num_steps=num_steps, num_warmup=round(optim.warmup_epochs * self.steps_per_epoch))
        if last is None:
            return rate, optim.weight_decay
        return rate, weight_decay(step, num_steps=num_steps, first=optim.weight_decay, last=last)

    def _settle_keep(self, eligible: Eligible) -> None:
        topology, config, num_tiles = self.comm.topology, self.job.config, self.job.cohort.num_tiles("train")
        self.engine.set_training(True)
        most_rows = max(count_rows(count_eligible(s, num_tiles, eligible), config.tiles) for s in num_tiles)
        note = settle_keep(
            self.engine,
            most_rows=most_rows,
            tile_px=self.job.tile_px,
            cpu_bytes=rank_memory(topology) - self.job.read_ahead_bytes(topology),
        )
        if note and self.comm.is_main:
            print(f"note: {note}", file=sys.stderr)
