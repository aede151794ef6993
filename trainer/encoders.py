"""Encoders: any timm model by name, random or from a local weights file, with the normalisation of its own config."""

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from trainer.config import Encoder
from trainer.errors import TrainerError


class TileEncoder(nn.Module):
    """Tiles to features: uint8 NHWC in, float (N, num_features) out; normalisation included.

    Attributes:
        num_features: width D of the features.
    """

    mean_C: Tensor
    std_C: Tensor

    def __init__(self, backbone: nn.Module, num_features: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.backbone, self.num_features = backbone, num_features
        self.register_buffer("mean_C", torch.tensor(mean), persistent=False)
        self.register_buffer("std_C", torch.tensor(std), persistent=False)

    def forward(self, tiles_NHWC: Tensor) -> Tensor:
        # The loader's NHWC bytes, seen as NCHW, are already channels-last: the fast layout, without a copy.
        x_NHWC = tiles_NHWC.to(self.mean_C.dtype).div_(255).sub_(self.mean_C).div_(self.std_C)
        features_ND: Tensor = self.backbone(x_NHWC.permute(0, 3, 1, 2))
        return features_ND


def build_encoder(config: Encoder, tile_px: int) -> TileEncoder:
    """Builds an encoder.

    Args:
        config: which model, which weights.
        tile_px: side of the tiles; models with a fixed input size are built for it.

    Raises:
        TrainerError: unknown model, or weights that do not fit it.
    """
    if not timm.is_model(config.name):
        near = ", ".join(timm.list_models(f"*{config.name.split('_')[0]}*")[:5])
        raise TrainerError(f"encoder.name {config.name!r}: timm does not know it{f'; near: {near}' if near else ''}")
    kwargs: dict[str, Any] = {"num_classes": 0}
    if config.drop_path:
        kwargs["drop_path_rate"] = config.drop_path
    try:
        backbone = timm.create_model(config.name, **kwargs)
        if hasattr(backbone, "patch_embed"):  # Vision transformers are built for one input size.
            backbone = timm.create_model(config.name, img_size=tile_px, **kwargs)
    except TypeError as error:
        raise TrainerError(f"encoder.name {config.name!r}: cannot be built with {kwargs} ({error})") from None
    if config.weights is not None:
        _load(backbone, config.weights)
    data = timm.data.resolve_model_data_config(backbone)
    encoder = TileEncoder(backbone, int(backbone.num_features), data["mean"], data["std"])
    with torch.no_grad():  # timm's num_features is not the output width of every model: measure it.
        encoder.eval()
        encoder.num_features = int(encoder(torch.zeros(1, tile_px, tile_px, 3, dtype=torch.uint8)).shape[1])
    return encoder.to(memory_format=torch.channels_last)


def _load(backbone: nn.Module, file: Path) -> None:
    if not file.is_file():
        raise TrainerError(f"encoder.weights {file}: no such file")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: dict[str, Any] = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - whatever a damaged weights file raises, the user gets one sentence
        raise TrainerError(f"encoder.weights {file}: not readable ({error})") from None
    state = state.get("state_dict", state.get("model", state))
    missing, unexpected = backbone.load_state_dict(state, strict=False)
    head = [k for k in unexpected if k.split(".")[0] in ("fc", "head", "classifier")]
    if missing or len(unexpected) > len(head):
        wrong = [*missing, *(k for k in unexpected if k not in head)]
        raise TrainerError(f"encoder.weights {file}: do not fit the model, {len(wrong)} keys differ, first {wrong[0]}")
