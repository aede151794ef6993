"""The head: what a slide's outputs mean, for each task: loss against its targets, and predictions in their own units.

A head has no weights of its own; the aggregator's last layer gives its outputs. What it knows of the cohort, class
weights and the scale of numbers, follows from the training slides alone and is worked out anew by every process that
needs it, so nothing of it is in a checkpoint. One thing to know before changing it: one slide is one loss. A weight
multiplies it and is not divided out again, as torch's `weight=` with `reduction="mean"` does: over a single slide that
would cancel the weight.

Targets: classes, the class's position; multilabel, 1 (yes) or 0 (no) for each column; regression, a number for each
column. NaN in a column is not known, and does not count in the loss.
"""

import math
from dataclasses import dataclass
from typing import Self, assert_never

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainer.cohort import Cohort
from trainer.config import Head as HeadConfig
from trainer.errors import TrainerError
from trainer.targets import Task


@dataclass(frozen=True, kw_only=True)
class Head:
    """What is predicted of a slide."""

    task: Task
    num_outputs: int
    """Classes, or columns."""
    weights: tuple[float, ...] = ()
    """Of each class, or of a yes against a no in each column; empty for regression."""
    means: tuple[float, ...] = ()
    """Of each column over the training slides, in its own unit (regression)."""
    stds: tuple[float, ...] = ()
    """As `means`, above 0."""

    @classmethod
    def of_classes(cls, num: int) -> Self:
        """A head of so many classes that weigh the same."""
        return cls(task="classes", num_outputs=num, weights=(1.0,) * num)

    @classmethod
    def for_cohort(cls, config: HeadConfig, cohort: Cohort) -> Self:
        """The head that fits a cohort; what it learns of it, it learns of the training slides.

        Raises:
            TrainerError: not one class weight for each class or column, or numbers without a usable scale.
        """
        targets = np.array([case.targets for case in cohort.of("train").values()], np.float64)
        names = cohort.columns if config.task != "classes" else cohort.classes
        if config.task == "regression":
            with np.errstate(over="ignore", invalid="ignore"):
                means, stds = np.nanmean(targets, axis=0), np.nanstd(targets, axis=0)
            if odd := [name for name, std in zip(names, stds, strict=True) if not 0 < std < math.inf]:
                raise TrainerError(
                    f"head.columns {', '.join(odd)}: the training slides' numbers are too large or too much alike to "
                    "learn; give them in another unit"
                )
            return cls(task=config.task, num_outputs=len(names), means=_floats(means), stds=_floats(stds))
        if isinstance(config.class_weights, tuple):
            weights = config.class_weights
            if len(weights) != len(names):
                kind = "classes" if config.task == "classes" else "columns"
                raise TrainerError(
                    f"head.class_weights has {len(weights)} numbers: expected one for each of the {len(names)} {kind}, "
                    f"in the order {', '.join(names)}"
                )
        elif config.class_weights == "none":
            weights = (1.0,) * len(names)
        elif config.task == "classes":
            weights = _balanced(np.bincount(targets[:, 0].astype(np.int64), minlength=len(names)))
        else:
            weights = _floats((targets == 0).sum(0) / (targets == 1).sum(0))
        return cls(task=config.task, num_outputs=len(names), weights=weights)

    def loss(self, outputs: Tensor, targets: tuple[float, ...]) -> Tensor:
        """The slide's loss, a scalar; over columns the mean of those that are known, over tiles the mean.

        Args:
            outputs: the aggregator's, of the slide (C,) or of each of its tiles (K, C), which all have its targets.
            targets: the slide's, see the module; at least one is known.
        """
        assert not all(map(math.isnan, targets)), "a cohort holds no slide of which nothing is known"
        outputs_KC = outputs.reshape(-1, self.num_outputs)  # A slide's row, or rows of tiles.
        if self.task == "classes":
            label = round(targets[0])
            wanted_K = torch.full((len(outputs_KC),), label, device=outputs.device)
            return self.weights[label] * F.cross_entropy(outputs_KC, wanted_K)
        targets_C = outputs.new_tensor(self._standardised(targets))
        known_C = ~targets_C.isnan()
        outputs_KC = outputs_KC[:, known_C]
        targets_KC = targets_C[known_C].expand_as(outputs_KC)
        if self.task == "multilabel":
            weights_C = outputs.new_tensor(self.weights)[known_C]
            return F.binary_cross_entropy_with_logits(outputs_KC, targets_KC, pos_weight=weights_C)
        return F.mse_loss(outputs_KC, targets_KC)

    def predict(self, outputs_C: Tensor) -> Tensor:
        """Probabilities of the classes, of a yes in each column, or numbers in the columns' own units, (C,) float64."""
        outputs_C = outputs_C.detach().double()
        match self.task:
            case "classes":
                return outputs_C.softmax(0)
            case "multilabel":
                return outputs_C.sigmoid()
            case "regression":
                return outputs_C * outputs_C.new_tensor(self.stds) + outputs_C.new_tensor(self.means)
            case _:
                assert_never(self.task)

    def _standardised(self, targets: tuple[float, ...]) -> tuple[float, ...]:
        """Targets as the outputs shall be: numbers with mean 0 and standard deviation 1 over the training slides."""
        if self.task != "regression":
            return targets
        return tuple((t - mean) / std for t, mean, std in zip(targets, self.means, self.stds, strict=True))


def _balanced(counts: NDArray[np.int64]) -> tuple[float, ...]:
    """Weights of classes that have `counts` training slides: each class counts the same, the mean over slides is 1.

    A class without training slides, which the cohort tells of, keeps the weight 1; it counts in validation alone.
    """
    num_present = np.count_nonzero(counts)
    return _floats(np.where(counts > 0, counts.sum() / (num_present * np.maximum(counts, 1)), 1.0))


def _floats(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
