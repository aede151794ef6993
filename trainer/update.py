"""Phase 6 of a step: the gradient of both halves looked at as one, then each half's optimiser step.

One thing to know before changing it: what is decided here is decided from the norm that `Engine.step` found, which all
ranks know; so all of them take the step, or none.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainer import fsdp
from trainer.config import RunConfig
from trainer.errors import TrainerError
from trainer.model import HalfName, halves_of
from trainer.optimizers import build_optimizer, set_rates
from trainer.step import Engine, Outcome

_GROWTH_STEPS = 2_000
_LEAST_SCALE = 2.0**-20


class Update:
    """The optimisers of the halves that this rank holds, and what goes with them.

    Args:
        engine: the model.
        config: the run's.
    """

    def __init__(self, engine: Engine, config: RunConfig) -> None:
        self._engine, self._optim = engine, config.optim
        self._halves = halves_of(engine)
        self.optimizers = {name: build_optimizer(half, config, name) for name, half in self._halves.items()}
        self._averages: dict[HalfName, AveragedModel] = {}
        if self._optim.ema is not None:
            average = get_ema_multi_avg_fn(self._optim.ema)
            # With BatchNorm's statistics, which go with the weights.
            self._averages = {
                name: AveragedModel(half, multi_avg_fn=average, use_buffers=True) for name, half in self._halves.items()
            }
        self._is_scaled = self._optim.precision == "fp16"
        self._num_good = 0
        """Steps since the loss scale changed."""
        engine.loss_scale = 2.0**16 if self._is_scaled else 1.0

    def begin(self, rate: float, weight_decay: float) -> None:
        """Before a step: rates set, gradients cleared.

        Args:
            rate: learning rates as a share of their peaks.
            weight_decay: of all that is decayed.
        """
        for optimizer in self._each():
            set_rates(optimizer, rate, weight_decay)
            optimizer.zero_grad(set_to_none=True)

    def finish(self, outcomes: Sequence[Outcome], step: int) -> None:
        """After a step: clips, updates and averages, unless its slides were skipped or, with fp16, it overflowed.

        Args:
            outcomes: of all the step's slides.
            step: its number, from 0, for the error.

        Raises:
            TrainerError: a loss or gradient is not a number; names the slides, and nothing was changed.
        """
        used = [outcome for outcome in outcomes if not outcome.error]
        if not used:
            return
        norm = used[0].gradient_norm
        if not math.isfinite(norm):
            if not self._is_scaled or self._engine.loss_scale <= _LEAST_SCALE:
                raise self._diverged(used, step)
            # Two numbers for one scale that both halves share: as torch's GradScaler has them.
            self._engine.loss_scale, self._num_good = self._engine.loss_scale / 2, 0
            return
        shrink = 1.0 if self._optim.clip is None else min(1.0, self._optim.clip / max(norm, 1e-12))
        if (factor := shrink / self._engine.loss_scale) != 1:
            for optimizer in self._each():
                gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
                torch._foreach_mul_(gradients, factor)
        for optimizer in self._each():
            optimizer.step()
        for name, average in self._averages.items():
            average.update_parameters(self._halves[name])
        self._num_good += 1
        if self._is_scaled and self._num_good == _GROWTH_STEPS:
            self._engine.loss_scale, self._num_good = self._engine.loss_scale * 2, 0

    def _each(self) -> list[torch.optim.Optimizer]:
        return [optimizer for optimizer in self.optimizers.values() if optimizer is not None]

    def _diverged(self, used: list[Outcome], step: int) -> TrainerError:
        """Said by the main rank, which knows the losses of all groups' slides."""
        bad = [outcome for outcome in used if not math.isfinite(outcome.loss)]
        what = "the loss" if bad else "the gradient"
        slides = ", ".join(outcome.plan.slide_id for outcome in bad or used)
        sentence = (
            f"optimiser step {step}, slide {slides}: {what} is not a number, so nothing was changed; go on from the "
            "last checkpoint in another run with a lower --optim.lr, --optim.clip 1, or --optim.precision float32"
        )
        return TrainerError(self._engine.comm.from_main(sentence))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The engine scores by the averaged weights meanwhile, if there are any."""
        engine, own = self._engine, dict(self._halves)
        if self._averages:
            _put(engine, {name: average.module for name, average in self._averages.items()})
        try:
            yield
        finally:
            _put(engine, own)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """By half: its weights, its optimiser's state, and its average, None where there is none.

        Of a half that is spread over ranks, which call this together, the first encoder rank has them whole.
        """
        states = {
            name: {
                "model": half.state_dict(),
                "optimizer": None if (optimizer := self.optimizers[name]) is None else optimizer.state_dict(),
                "average": self._averages[name].state_dict() if name in self._averages else None,
            }
            for name, half in self._halves.items()
        }
        gathered: dict[str, dict[str, Any]] = fsdp.whole(states, keep=self._engine.comm.is_first_encoder)
        return gathered

    def scale_state(self) -> list[float]:
        """The loss scale and the good steps since it changed."""
        return [self._engine.loss_scale, self._num_good]

    def load_state_dict(self, halves: dict[str, dict[str, Any]], scale: Sequence[float] | None) -> None:
        """Goes on where `state_dict` and `scale_state` were taken."""
        for name, half in self._halves.items():
            saved, optimizer = halves[name], self.optimizers[name]
            fsdp.load_into(half, saved["model"])
            if optimizer is not None:
                fsdp.load_optimizer(optimizer, saved["optimizer"])
            if name in self._averages:
                self._averages[name].load_state_dict(saved["average"])
        if scale is not None:
            self._engine.loss_scale, self._num_good = float(scale[0]), int(scale[1])


def _put(engine: Engine, halves: dict[Any, nn.Module]) -> None:
    engine.encoder = engine.side.encoder = halves.get("encoder")
    engine.aggregator = halves.get("aggregator")
