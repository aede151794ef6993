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


def egfr_resnet50() -> RunConfig:
    """EGFR mutation from lung slides: ResNet50 + GMA from ImageNet weights (the paper's Fig. 4, Table 1).

    K = 4,900 tiles a slide, the most of the paper's 50, 100, 350, 700, 2,100 and 4,900, as 7 x 700: in float32 a GPU of
    80 GB takes 840 (Fig. 1). Tiles of 256 px (`slidegrad tile --tile-px 256`). Rate and epochs are those of the breast
    run, for lack of others.
    """
    return RunConfig(
        virtual_ranks=7,
        tiles=Tiles(tiles="fixed", k=4_900),
        encoder=Encoder(name="resnet50", weights="pretrained"),
        optim=Optim(epochs=30, lr=5e-5),
    )


def finetune_vit_base() -> RunConfig:
    """A foundation model fine-tuned by slides' labels: ViT-base + GMA, 15 x 728 tiles, AMP (the paper's Fig. 6).

    AdamW at 1e-6 for 20 epochs; the frozen baseline beside it is --encoder.freeze all --optim.lr 1e-4. Give your own
    model's weights by --encoder.weights, or another encoder by --encoder.name; timm's are of ImageNet.
    """
    return RunConfig(
        virtual_ranks=15,
        tiles=Tiles(tiles="fixed", k=15 * 728),
        encoder=Encoder(name="vit_base_patch16_224", weights="pretrained", pooling="token"),
        optim=Optim(epochs=20, lr=1e-6, precision="bf16"),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe for recipe in (demo, breast_full_slide, egfr_resnet50, finetune_vit_base)
}


def get_recipe(name: str) -> RunConfig:
    """A recipe's config.

    Raises:
        TrainerError: no such recipe; names those there are.
    """
    if name not in RECIPES:
        raise TrainerError(f"unknown recipe {name!r}; one of {', '.join(RECIPES)}")
    return dataclasses.replace(RECIPES[name](), recipe=name)
