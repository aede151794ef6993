"""Recipes: functions that return a whole config; and methods, which change a recipe's config into another way to learn.

Start from RECIPE, or from RECIPE+METHOD, and override single fields on the command line. Methods are the rows of the
paper's Table 1 (Campanella et al. 2024): end-to-end learning, and the baselines that it is held against, in one trainer
and on the same slides, so that nothing but the method differs. A method says nothing of the task, the cohort, the
epochs or the machine.
"""

import dataclasses
from collections.abc import Callable

from trainer.config import Aggregator, Augment, Cohort, Encoder, Machine, Optim, RunConfig, Tiles
from trainer.errors import TrainerError

_FROZEN_LR = 1e-4
_TRANSMIL_WIDTHS = 4
"""TransMIL's tokens are so many times as wide as GMA's attention layer: 512, as in its paper, beside 128."""


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

    AdamW at 1e-6 for 20 epochs; the frozen baseline beside it is finetune_vit_base+frozen_gma. Give your own model's
    weights by --encoder.weights, or another encoder by --encoder.name; timm's are of ImageNet.
    """
    return RunConfig(
        virtual_ranks=15,
        tiles=Tiles(tiles="fixed", k=15 * 728),
        encoder=Encoder(name="vit_base_patch16_224", weights="pretrained", pooling="token"),
        optim=Optim(epochs=20, lr=1e-6, precision="bf16"),
    )


def end_to_end(config: RunConfig) -> RunConfig:
    """Encoder and aggregator learn together, as the recipe has it (the paper's method)."""
    return config


def frozen_gma(config: RunConfig) -> RunConfig:
    """The encoder stays as it is, gated attention learns over its features (Ilse et al. 2018)."""
    return _frozen(config, dataclasses.replace(config.aggregator, name="gma"))


def frozen_transmil(config: RunConfig) -> RunConfig:
    """The encoder stays as it is, TransMIL learns over its features (Shao et al. 2021)."""
    width = _TRANSMIL_WIDTHS * config.aggregator.hidden
    return _frozen(config, dataclasses.replace(config.aggregator, name="transmil", hidden=width))


def tile_mean(config: RunConfig) -> RunConfig:
    """Supervised on tiles: each learns the slide's label, and a slide's prediction is its tiles' mean.

    With --tiles.regions only tiles inside a pathologist's annotations learn it.
    """
    return dataclasses.replace(config, aggregator=dataclasses.replace(config.aggregator, name="tile_mean"))


def tile_max(config: RunConfig) -> RunConfig:
    """As tile_mean, but a slide's prediction is that of the tile where what is looked for is most probable."""
    return dataclasses.replace(config, aggregator=dataclasses.replace(config.aggregator, name="tile_max"))


def max_pool(config: RunConfig) -> RunConfig:
    """Max-pool MIL: of each slide the tile that the model ranks highest learns its label (Campanella et al. 2019).

    All tiles of an epoch's slides are ranked by the model as it is at its start. A slide's prediction is that of its
    highest tile. A tile alone has no statistics for BatchNorm: those of the weights stay, or where these are random,
    those that were measured on training slides.
    """
    batchnorm = config.encoder.batchnorm
    if batchnorm not in ("frozen", "calibrated"):
        batchnorm = "calibrated" if config.encoder.weights is None else "frozen"
    return dataclasses.replace(
        tile_max(config),
        tiles=dataclasses.replace(config.tiles, tiles="top", k=1, k_per_rank=None),
        encoder=dataclasses.replace(config.encoder, batchnorm=batchnorm),
    )


def _frozen(config: RunConfig, aggregator: Aggregator) -> RunConfig:
    """The aggregator alone learns, at 1e-4 (the paper's Fig. 6), from tiles as they are."""
    encoder = config.encoder
    return dataclasses.replace(
        config,
        augment=Augment(flips=False, stain=0.0, blur=0.0),
        encoder=dataclasses.replace(
            encoder,
            freeze="all",
            drop_path=0.0,
            layer_decay=1.0,
            batchnorm="frozen" if encoder.batchnorm in ("virtual", "sync") else encoder.batchnorm,
        ),
        aggregator=aggregator,
        optim=dataclasses.replace(config.optim, lr=_FROZEN_LR, aggregator_lr=None),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe for recipe in (demo, breast_full_slide, egfr_resnet50, finetune_vit_base)
}
METHODS: dict[str, Callable[[RunConfig], RunConfig]] = {
    method.__name__: method for method in (end_to_end, frozen_gma, frozen_transmil, tile_mean, tile_max, max_pool)
}


def get_recipe(name: str) -> RunConfig:
    """The config of RECIPE, or of RECIPE+METHOD.

    Raises:
        TrainerError: no such recipe or method; names those there are.
    """
    recipe, plus, method = name.partition("+")
    if recipe not in RECIPES:
        raise TrainerError(f"unknown recipe {recipe!r}; one of {', '.join(RECIPES)}")
    if plus and method not in METHODS:
        raise TrainerError(f"unknown method {method!r} in {name!r}; RECIPE+METHOD takes one of {', '.join(METHODS)}")
    config = RECIPES[recipe]()
    return dataclasses.replace(METHODS[method](config) if plus else config, recipe=name)


def describe_choices() -> str:
    """Recipes and methods, each with the first line of its docstring."""
    lines = []
    for title, choices in (("recipes", RECIPES), ("methods, as RECIPE+METHOD", METHODS)):
        width = max(map(len, choices))
        told = [
            f"  {name:<{width}}  {(choice.__doc__ or '').partition(chr(10))[0]}" for name, choice in choices.items()
        ]
        lines += [f"{title}:", *told, ""]
    return "\n".join(lines).rstrip()
