"""Recipes: functions that return a whole config. Start from one, override single fields on the command line."""

import dataclasses
from collections.abc import Callable

from trainer.config import Aggregator, Cohort, Encoder, Machine, Optim, RunConfig, Tiles
from trainer.errors import TrainerError


def demo() -> RunConfig:
    """A small encoder from random weights on 64-um tiles of 32 px: minutes on two CPU cores.

    Calibrated BatchNorm: with few slides a step and random weights, the other ways learn a slide's label from the
    statistics of its tiles (see tests/benchmarks/results/batchnorm_cpu_202611.md).
    """
    return RunConfig(
        virtual_ranks=2,
        cohort=Cohort(val_fraction=0.15, test_fraction=0.35),
        tiles=Tiles(tiles="fixed", k=96),
        encoder=Encoder(name="test_resnet", batchnorm="calibrated"),
        aggregator=Aggregator(hidden=64),
        optim=Optim(epochs=30, slides_per_step=4, lr=5e-4, weight_decay=0.05, warmup_epochs=1),
    )


def breast_full_slide() -> RunConfig:
    """Breast cancer detection on full slides: ResNet18 + GMA, 11 encoder GPUs (the paper's section 2.5, Fig. 5)."""
    return RunConfig(
        virtual_ranks=11,
        cohort=Cohort(fraction_per_epoch=0.5),
        tiles=Tiles(tiles="all", max_tiles=45_056),
        encoder=Encoder(name="resnet18"),
        optim=Optim(epochs=30, lr=5e-5, precision="bf16"),
        machine=Machine(aggregator="auto"),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {"demo": demo, "breast_full_slide": breast_full_slide}


def get_recipe(name: str) -> RunConfig:
    """A recipe's config.

    Raises:
        TrainerError: no such recipe; names those there are.
    """
    if name not in RECIPES:
        raise TrainerError(f"unknown recipe {name!r}; one of {', '.join(RECIPES)}")
    return dataclasses.replace(RECIPES[name](), recipe=name)
