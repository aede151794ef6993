"""Encoders: a timm model by name, or a foundation model, with weights from this machine, as a function of raw tiles.

First an outline of the model, without memory behind its tensors, answers all that can be asked before a weight is
read: whether it takes such tiles, how wide its features are, what of it may be frozen. Then timm builds it, and loads
what was read as it would load its own weights, position embeddings resampled to the tiles' size.

Training never goes online: weights are files that somebody downloaded.
"""

from pathlib import Path
from typing import Any, Self

import timm
import torch
from torch import Tensor, nn

from trainer.config import Encoder
from trainer.encoders.blueprint import Blueprint, find_weights, plan_encoder
from trainer.encoders.freezing import block_numbers, freeze, rest_frozen
from trainer.encoders.weights import read_tensors
from trainer.errors import TrainerError

_HEADS = ("fc", "head", "classifier")
_PATCHES = "patch_embed.proj.weight"
_LENIENT = ("timm.models.dla", "timm.models.mobilenetv5")
"""Models that timm would load without some of their tensors, and say nothing."""


class TileEncoder(nn.Module):
    """Tiles to features: uint8 NHWC in, float (N, num_features) out; normalisation included.

    Args:
        backbone: timm's model, without its head.
        mean: of the normalisation: red, green, blue in [0, 1].
        std: likewise.
        pooling: what of a vision transformer's tokens makes the feature (config `encoder.pooling`).

    Attributes:
        num_features: width D of the features.
    """

    mean_C: Tensor
    std_C: Tensor

    def __init__(
        self, backbone: nn.Module, num_features: int, mean: tuple[float, ...], std: tuple[float, ...], pooling: str
    ) -> None:
        super().__init__()
        self.backbone, self.num_features, self.pooling = backbone, num_features, pooling
        self.register_buffer("mean_C", torch.tensor(mean), persistent=False)
        self.register_buffer("std_C", torch.tensor(std), persistent=False)

    def forward(self, tiles_NHWC: Tensor) -> Tensor:
        # The loader's NHWC bytes, seen as NCHW, are already channels-last: the fast layout, without a copy.
        x_NHWC = tiles_NHWC.to(self.mean_C.dtype).div_(255).sub_(self.mean_C).div_(self.std_C)
        return features_of(self.backbone, x_NHWC.permute(0, 3, 1, 2), self.pooling)

    def train(self, mode: bool = True) -> Self:
        """Training or scoring mode; what is frozen stays in scoring mode."""
        super().train(mode)
        if mode:
            rest_frozen(self)
        return self


def build_encoder(config: Encoder, tile_px: int, *, initial: bool = True) -> TileEncoder:
    """Builds an encoder.

    Args:
        config: which model, which weights, what is frozen.
        tile_px: side of the tiles; models with a fixed input size are built for it.
        initial: with the weights that the config names; False where a checkpoint's will follow.

    Raises:
        TrainerError: unknown model, tiles or settings that it cannot take, or weights that are not here or do not fit.
    """
    plan = plan_encoder(config, tile_px)
    outline = _outline(config, plan, tile_px)
    num_features = _num_features(config, plan, outline, tile_px)
    freeze(outline, config.freeze)
    if config.layer_decay != 1:
        block_numbers(outline, f"encoder.layer_decay is {config.layer_decay}")
    file = find_weights(config) if initial else None
    backbone = _create(plan) if file is None else _load(plan, outline, file)
    freeze(backbone, config.freeze)
    encoder = TileEncoder(backbone, num_features, *plan.normalisation(backbone), plan.pooling)
    return encoder.eval().to(memory_format=torch.channels_last)


def features_of(model: Any, x_NCHW: Tensor, pooling: str) -> Tensor:
    """A timm model's features (N, D), pooled from its tokens in its own way (auto) or another."""
    if pooling == "auto":
        pooled_ND: Tensor = model(x_NCHW)
        return pooled_ND
    tokens_NTD = model.forward_features(x_NCHW)
    # Registers stand with the class token before the patches' tokens; they are no part of the picture.
    parts = {"token": tokens_NTD[:, 0], "mean": tokens_NTD[:, model.num_prefix_tokens :].mean(1)}
    # Models that average their tokens have their last norm behind the average.
    norm = getattr(model, "fc_norm", None) or nn.Identity()
    return torch.cat([norm(parts[name]) for name in pooling.split("+")], 1)


def _create(plan: Blueprint, **loading: Any) -> nn.Module:
    model: nn.Module = timm.create_model(plan.architecture, pretrained_cfg=plan.data, **plan.arguments, **loading)
    return model


def _outline(config: Encoder, plan: Blueprint, tile_px: int) -> nn.Module:
    """The model with shapes but without values."""
    try:
        with torch.device("meta"):
            return _create(plan).eval()
    except TypeError as error:
        given = ", ".join(plan.arguments)
        raise TrainerError(f"encoder.name {config.name!r}: cannot be built with {given} ({error})") from None
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _wrong_size(config, plan, tile_px, error) from None


def _num_features(config: Encoder, plan: Blueprint, outline: Any, tile_px: int) -> int:
    """Width of the features, as the outline gives it for one tile.

    Raises:
        TrainerError: it cannot take such tiles, or its tokens cannot be pooled in that way.
    """
    _check_pooling(config, plan, outline)
    side = getattr(getattr(outline, "patch_embed", None), "patch_size", (1,))[0]
    if tile_px % side:
        fitting = [size for size in (tile_px // side * side, (tile_px // side + 1) * side) if size]
        raise TrainerError(
            f"encoder.name {config.name!r}: tiles of {tile_px} px are no whole number of its patches of {side} px; "
            f"{' and '.join(map(str, fitting))} px are: tile again with slidegrad tile --tile-px {fitting[0]}"
        )
    try:
        with torch.device("meta"), torch.no_grad():
            features = features_of(outline, torch.zeros(1, 3, tile_px, tile_px), plan.pooling)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _wrong_size(config, plan, tile_px, error) from None
    if features.ndim != 2:
        raise TrainerError(
            f"encoder.pooling is auto: expected token, mean or token+mean, as {config.name} leaves that open"
        )
    return int(features.shape[1])


def _check_pooling(config: Encoder, plan: Blueprint, outline: Any) -> None:
    pooling = plan.pooling
    if pooling == "auto":
        return
    if not hasattr(outline, "num_prefix_tokens"):
        raise TrainerError(f"encoder.pooling is {pooling}: expected auto, as {config.name} has no tokens")
    if "token" in pooling and getattr(outline, "cls_token", None) is None:
        raise TrainerError(f"encoder.pooling is {pooling}: expected auto or mean, as {config.name} has no class token")


def _wrong_size(config: Encoder, plan: Blueprint, tile_px: int, error: Exception) -> TrainerError:
    reason = str(error).partition("\n")[0]
    return TrainerError(
        f"encoder.name {config.name!r}: cannot take tiles of {tile_px} px ({reason}); its own are {plan.own_px} px: "
        f"tile again with slidegrad tile --tile-px {plan.own_px}"
    )


def _load(plan: Blueprint, outline: nn.Module, file: Path) -> nn.Module:
    """The model with the weights of a file."""
    expected = {name: tensor.shape for name, tensor in outline.state_dict().items()}
    heads = _heads_of(outline)
    tensors = {
        name: tensor
        for name, tensor in read_tensors(file, expected).items()
        if name in expected or name.partition(".")[0] not in heads
    }
    wrong = _differing(tensors, expected)
    patches = tensors.get(_PATCHES)
    # timm would stretch patches of another size too, which are those of another model.
    is_other = patches is not None and patches.ndim == 4 and patches.shape != expected.get(_PATCHES, patches.shape)
    if is_other or (wrong and type(outline).__module__ in _LENIENT):
        raise _misfit(file, wrong or [_PATCHES])
    # As if they were timm's own, headless like the model: so timm takes all of them or none, and resamples positions.
    own = {"state_dict": tensors, "num_classes": 0, "label_offset": 0, "custom_load": False}
    try:
        model = _create(plan, pretrained=True, pretrained_cfg_overlay=own)
    except Exception as error:  # noqa: BLE001 - timm's adaptions to a model raise anything for a foreign file
        raise _misfit(file, wrong) if wrong else TrainerError(f"encoder.weights {file}: do not fit ({error})") from None
    del model.pretrained_cfg["state_dict"]  # type: ignore[union-attr,operator]
    return model


def _heads_of(outline: Any) -> set[str]:
    """First parts of the names of heads, which a file of weights may have over."""
    own = outline.pretrained_cfg.get("classifier") or ()
    return {*_HEADS, *(name.partition(".")[0] for name in ([own] if isinstance(own, str) else own))}


def _differing(tensors: dict[str, Tensor], expected: dict[str, torch.Size]) -> list[str]:
    """Names that only one side has; where there are none, those of other shapes."""
    names = [*(name for name in expected if name not in tensors), *(name for name in tensors if name not in expected)]
    return names or [name for name, shape in expected.items() if tensors[name].shape != shape]


def _misfit(file: Path, wrong: list[str]) -> TrainerError:
    return TrainerError(
        f"encoder.weights {file}: do not fit the model, {len(wrong)} keys differ in name or shape, first {wrong[0]}"
    )
