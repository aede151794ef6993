"""Pathology foundation models by name: what they need beyond the config.json that they come with.

timm builds them, from the architecture in that file; but some of what it needs does not fit into JSON (classes of
layers), or stands only in the model's card (the normalisation, which tokens make the feature). Those are the rows
here. A row is enough to build its model without any file, so that a run's own checkpoint is enough to evaluate it.
What the file says goes before the row, but for the normalisation and the pooling, where the card is right.

Before you change a row: its numbers were read, late in 2026, in the loaders that TRIDENT (Mahmood Lab) and LazySlide
(Rendeiro Lab) publish and in excerpts of the models' cards, licences and gates in TRIDENT's list of encoders. They
were checked by number of parameters, patch size and width, not against the weights. What holds is the model's page.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SwiGLUPacked
from torch import nn

_BIOPTIMUS_MEAN, _BIOPTIMUS_STD = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
_SWIGLU: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
# Both Virchows are ViT-H/14, H-optimus and UNI2-h built from DINOv2's giant with other depths and registers.
_VIRCHOW = {**_SWIGLU, "init_values": 1e-5, "mlp_ratio": 5.3375, "global_pool": "", "dynamic_img_size": True}


@dataclass(frozen=True, kw_only=True)
class Foundation:
    """One model."""

    repo: str
    """OWNER/MODEL on Hugging Face."""
    architecture: str
    """timm's name of it."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What timm is called with."""
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    """Of the normalisation: red, green, blue in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    pooling: Literal["auto", "token", "mean", "token+mean"] = "token"
    """What its card makes a tile's feature of; auto where the card leaves it open."""
    licence: str
    is_gated: bool = True
    """Its page gives the weights only to those who were let in."""


FOUNDATIONS = {
    "uni": Foundation(
        repo="MahmoodLab/UNI",
        architecture="vit_large_patch16_224",
        arguments={"init_values": 1e-5, "dynamic_img_size": True},
        licence="cc-by-nc-nd-4.0",
    ),
    "uni2-h": Foundation(
        repo="MahmoodLab/UNI2-h",
        architecture="vit_giant_patch14_224",
        arguments={
            **_SWIGLU,
            "depth": 24,
            "num_heads": 24,
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "init_values": 1e-5,
            "reg_tokens": 8,
            "no_embed_class": True,
            "dynamic_img_size": True,
        },
        licence="cc-by-nc-nd-4.0",
    ),
    "virchow": Foundation(
        repo="paige-ai/Virchow",
        architecture="vit_huge_patch14_224",
        arguments=_VIRCHOW,
        pooling="token+mean",
        licence="apache-2.0",
    ),
    "virchow2": Foundation(
        repo="paige-ai/Virchow2",
        architecture="vit_huge_patch14_224",
        arguments={**_VIRCHOW, "reg_tokens": 4},
        pooling="token+mean",
        licence="cc-by-nc-nd-4.0",
    ),
    "h-optimus-0": Foundation(
        repo="bioptimus/H-optimus-0",
        architecture="vit_giant_patch14_reg4_dinov2",
        arguments={"init_values": 1e-5, "dynamic_img_size": False},
        mean=_BIOPTIMUS_MEAN,
        std=_BIOPTIMUS_STD,
        licence="apache-2.0",
    ),
    "h-optimus-1": Foundation(
        repo="bioptimus/H-optimus-1",
        architecture="vit_giant_patch14_reg4_dinov2",
        arguments={"init_values": 1e-5, "dynamic_img_size": False},
        mean=_BIOPTIMUS_MEAN,
        std=_BIOPTIMUS_STD,
        licence="cc-by-nc-nd-4.0",
    ),
    "h0-mini": Foundation(
        repo="bioptimus/H0-mini",
        architecture="vit_base_patch14_reg4_dinov2",
        arguments={**_SWIGLU, "init_values": 1e-5, "mlp_ratio": 5.33334, "global_pool": ""},
        mean=_BIOPTIMUS_MEAN,
        std=_BIOPTIMUS_STD,
        pooling="auto",
        licence="cc-by-nc-nd-4.0",
    ),
    "prov-gigapath": Foundation(
        repo="prov-gigapath/prov-gigapath",
        architecture="vit_giant_patch14_dinov2",
        arguments={"patch_size": 16, "init_values": 1e-5, "mlp_ratio": 5.33334},
        licence="apache-2.0 with terms of its own",
    ),
    "phikon": Foundation(
        repo="1aurent/vit_base_patch16_224.owkin_pancancer",
        architecture="vit_base_patch16_224",
        licence="owkin-non-commercial",
        is_gated=False,
    ),
}
"""Short name to model."""


def hub_repo(name: str) -> str | None:
    """OWNER/MODEL, perhaps with @REVISION, of an encoder's name; None if it is a name of timm's."""
    if name in FOUNDATIONS:
        return FOUNDATIONS[name].repo
    prefix, _, repo = name.partition(":")
    return repo if prefix in ("hf-hub", "hf_hub") else None


def foundation_of(repo: str) -> Foundation | None:
    """The row of a model, which people write in upper and lower case, with and without a revision."""
    wanted = repo.partition("@")[0].lower()
    return next((row for row in FOUNDATIONS.values() if row.repo.lower() == wanted), None)


def how_to_get(repo: str, licence: str | None, *, is_gated: bool) -> str:
    """What to do for weights that are on Hugging Face, as the end of a sentence."""
    repo, _, revision = repo.partition("@")
    download = f"`hf download {repo}{f' --revision {revision}' if revision else ''} --local-dir DIR`"
    then = f"{download} on a machine with internet, then give --encoder.weights DIR"
    if is_gated:
        return f"it is gated, under the licence {licence}: accept that on its Hugging Face page, {then}"
    return f"its licence is {licence or 'on its page'}: {then}"
