"""From an encoder's name and weights in the config to what timm is called with, and to the file of its weights.

A model's architecture comes from timm's own list, from the config.json that was downloaded with it, or from its row in
`trainer.encoders.foundation`. Neither is built here, and no weight is read.
"""

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg
from torch import nn

from trainer.config import Encoder
from trainer.encoders.foundation import FOUNDATIONS, Foundation, foundation_of, how_to_get, hub_repo
from trainer.encoders.weights import FILE_NAMES, in_folder, in_hub_cache, in_torch_cache, read_description
from trainer.errors import TrainerError

PRETRAINED = "pretrained"
"""Value of encoder.weights."""


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """What timm is called with, and what its model's own config leaves out."""

    architecture: str
    """timm's name, with its tag if the user gave one."""
    arguments: dict[str, Any]
    """Besides the name."""
    data: dict[str, Any] | None = None
    """What the model's config.json says of its pictures and layers; None for timm's own."""
    row: Foundation | None = None
    """What its card says."""
    pooling: str = "auto"
    """What of a vision transformer's tokens makes the feature: the user's choice, else the card's, else timm's."""

    @property
    def own_px(self) -> int:
        """Side of the pictures that the model was made for, px."""
        own = get_pretrained_cfg(self.architecture)
        size: tuple[int, ...] = own.input_size if own else (3, 224, 224)
        return size[-1]

    def normalisation(self, backbone: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation: the card's, else those of the model's config."""
        if self.row:
            return self.row.mean, self.row.std
        data = resolve_model_data_config(backbone)
        return tuple(data["mean"]), tuple(data["std"])


def plan_encoder(config: Encoder, tile_px: int) -> Blueprint:
    """Settles what the config's encoder is.

    Args:
        config: the encoder's.
        tile_px: side of the tiles; models with a fixed input size are built for it.

    Raises:
        TrainerError: unknown model, or a config.json that is not here, not readable or of another model.
    """
    repo = hub_repo(config.name)
    plan = _plan_timm_model(config) if repo is None else _plan_hub_model(config, repo)
    arguments = {**plan.arguments, "num_classes": 0}
    if config.drop_path:
        arguments["drop_path_rate"] = config.drop_path
    own = get_pretrained_cfg(plan.architecture.partition(".")[0])
    if own is not None and own.fixed_input_size:  # Vision transformers and their kin are built for one input size.
        arguments["img_size"] = tile_px
    pooling = plan.row.pooling if plan.row and config.pooling == "auto" else config.pooling
    return replace(plan, arguments=arguments, pooling=pooling)


def find_weights(config: Encoder) -> Path | None:
    """The file of weights that the config names; None for random ones.

    Raises:
        TrainerError: it is not on this machine; and what to do for it.
    """
    repo, path = hub_repo(config.name), _given_path(config)
    if path is not None:
        if not path.exists():
            raise TrainerError(f"encoder.weights {path}: no such file or folder")
        return in_folder(path) if path.is_dir() else path
    if repo is not None:
        row = foundation_of(repo)
        licence, is_gated = (row.licence, row.is_gated) if row else (None, False)
        file = in_hub_cache(repo, FILE_NAMES)
        way_out = how_to_get(repo, licence, is_gated=is_gated)
    elif config.weights == PRETRAINED:
        repo = config.name
        file, way_out = _timm_weights(config.name)
    else:
        return None
    if file is None:
        raise TrainerError(f"encoder.name {config.name!r}: the weights of {repo} are not on this machine; {way_out}")
    return file


def _timm_weights(name: str) -> tuple[Path | None, str]:
    """timm's own weights if they are here; and what to do for them if not."""
    own = get_pretrained_cfg(name)
    if own is None or not own.has_weights:
        return None, "timm has none: give --encoder.weights FILE"
    names = [own.hf_hub_filename.replace(".bin", ".safetensors"), own.hf_hub_filename] if own.hf_hub_filename else []
    file = in_hub_cache(own.hf_hub_id, names or FILE_NAMES) if own.hf_hub_id else None
    address = own.url if isinstance(own.url, str) else ""
    if file is None and address:
        file = in_torch_cache(address)
    if own.hf_hub_id:
        return file, how_to_get(own.hf_hub_id, own.license, is_gated=False)
    return file, f"download {address} on a machine with internet, then give --encoder.weights FILE"


def _plan_timm_model(config: Encoder) -> Blueprint:
    name = config.name
    try:
        own = get_pretrained_cfg(name, allow_unregistered=timm.is_model(name))
    except RuntimeError:  # An unknown model, or an unknown tag of a known one.
        models = [f"hf-hub:{name}"] if foundation_of(name) else []
        models += difflib.get_close_matches(name.lower(), [*FOUNDATIONS, *timm.list_models()], 5)
        near = ", ".join(models)
        raise TrainerError(f"encoder.name {name!r}: timm does not know it{f'; near: {near}' if near else ''}") from None
    folder = _given_folder(config)
    described = read_description(folder / "config.json") if folder else None
    if described and described.architecture != name.partition(".")[0]:
        raise TrainerError(f"encoder.weights {folder}: of a {described.architecture}, but encoder.name is {name!r}")
    if described and own and any(tuple(described.data.get(k, getattr(own, k))) != getattr(own, k) for k in _COLOURS):
        raise TrainerError(
            f"encoder.weights {folder}: its config.json asks for other colours than timm's {name}; give "
            "--encoder.name hf-hub:OWNER/MODEL, under which that file counts"
        )
    return Blueprint(architecture=name, arguments={})


_COLOURS = ("mean", "std")


def _plan_hub_model(config: Encoder, repo: str) -> Blueprint:
    row, folder = foundation_of(repo), _given_folder(config)
    files = [folder / "config.json" if folder else None, in_hub_cache(repo, ["config.json"])]
    described = [one for file in files if file and (one := read_description(file))]
    if described:
        architecture, arguments, data = described[0].architecture, described[0].arguments, described[0].data
    elif row:
        architecture, arguments, data = row.architecture, {}, None
    else:
        raise TrainerError(
            f"encoder.name {config.name!r}: there is no config.json of it on this machine that names an architecture "
            f"of timm; {how_to_get(repo, None, is_gated=False)}"
        )
    if not timm.is_model(architecture):
        raise TrainerError(f"encoder.name {config.name!r}: timm {timm.__version__} does not know its {architecture!r}")
    # What the file says, and of the row what the file leaves out.
    arguments = {**(row.arguments if row else {}), **arguments}
    return Blueprint(architecture=architecture, arguments=arguments, data=data, row=row)


def _given_path(config: Encoder) -> Path | None:
    return None if config.weights is None or config.weights == PRETRAINED else Path(config.weights)


def _given_folder(config: Encoder) -> Path | None:
    """The folder of the weights that the user gave, where a config.json may lie."""
    path = _given_path(config)
    return path if path is None or path.is_dir() else path.parent
