"""An encoder's weights: where they lie on this machine, and how a file of them is read.

Nothing here goes online, and nothing runs code from a file. What to look for is `trainer.encoders.encoder`' to know.
"""

import json
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file
from torch import Tensor

from trainer.errors import TrainerError

FILE_NAMES = (
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
"""What Hugging Face's models call their weights, the best first."""
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_WRAPPERS = ("teacher", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "teacher.", "model.", "backbone.", "encoder.")


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a model's config.json says of it, in timm's format."""

    architecture: str
    arguments: dict[str, Any]
    """What timm was called with; no input size, which is the tiles'."""
    data: dict[str, Any]
    """Of timm's pretrained_cfg what is said of pictures and of the first and last layer."""


def read_description(file: Path) -> Description | None:
    """Reads a config.json; None if there is none, or not in timm's format.

    Raises:
        TrainerError: not readable.
    """
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainerError(f"encoder: {file} is not readable ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("architecture"), str):
        return None
    data = content.get("pretrained_cfg", content)
    arguments = {k: v for k, v in content.get("model_args", {}).items() if v is not None}
    return Description(
        architecture=content["architecture"],
        arguments={k: v for k, v in arguments.items() if k not in ("img_size", "num_classes")},
        data={k: data[k] for k in ("mean", "std", "input_size", "first_conv", "classifier") if data.get(k) is not None},
    )


def in_hub_cache(repo: str, names: Iterable[str]) -> Path | None:
    """The first of the files of a Hugging Face model that was downloaded to this machine's cache.

    Args:
        repo: OWNER/MODEL, in upper or lower case, perhaps with @REVISION.
        names: files, the best first.
    """
    cache = _hub_cache()
    repo, _, revision = repo.partition("@")
    # A folder of the cache is called as the model was when it was downloaded, in upper or lower case.
    wanted = f"models--{repo.replace('/', '--')}".lower()
    folders = sorted(cache.glob("models--*")) if cache.is_dir() else []
    for owned in (folder.name.split("--", 2)[1:] for folder in folders if folder.name.lower() == wanted):
        for name in names:
            found = try_to_load_from_cache("/".join(owned), name, cache_dir=cache, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
    return None


def _hub_cache() -> Path:
    # huggingface_hub reads these when it is imported; what counts here is what they are now.
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(home).expanduser() / "hub"


def in_torch_cache(address: str) -> Path | None:
    """The file that torch.hub, or an older timm, downloaded from an address."""
    file = Path(torch.hub.get_dir(), "checkpoints", address.rpartition("/")[2])
    return file if file.is_file() else None


def in_folder(folder: Path) -> Path:
    """The weights file of a downloaded model.

    Raises:
        TrainerError: there is none, or several of which none has a known name.
    """
    for name in FILE_NAMES:
        if (folder / name).is_file():
            return folder / name
    others = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    if len(others) != 1:
        names = ", ".join(file.name for file in others) or "none"
        raise TrainerError(f"encoder.weights {folder}: expected one weights file, found {names}; give the file itself")
    return others[0]


def read_tensors(file: Path, expected: Iterable[str]) -> dict[str, Tensor]:
    """Reads a weights file: tensors by name, out of what training scripts wrap around them.

    Args:
        file: .safetensors, or what torch.save wrote.
        expected: the names in the model; where the file has none of them, they are looked for beneath a prefix.

    Raises:
        TrainerError: not readable.
    """
    try:
        content: Any = (
            load_file(file)
            if file.suffix == ".safetensors"
            # Mapped where the format allows it: the ranks of a machine share one copy of a model of gigabytes.
            else torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        )
    except Exception as error:  # noqa: BLE001 - whatever a damaged weights file raises, the user gets one sentence
        raise TrainerError(
            f"encoder.weights {file}: not readable ({type(error).__name__}); expected a .safetensors file, or what "
            "torch.save(model.state_dict()) writes, whole"
        ) from None
    while isinstance(content, dict) and (inner := _unwrapped(content)) is not None:
        content = inner
    found = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not found:
        raise TrainerError(f"encoder.weights {file}: expected tensors by name, found none")
    if bad := [name for name, tensor in found.items() if not torch.isfinite(tensor).all()]:
        raise TrainerError(f"encoder.weights {file}: {len(bad)} tensors hold no numbers (NaN, inf), first {bad[0]}")
    return _without_prefix(found, set(expected))


def _unwrapped(content: dict[str, Any]) -> Any:
    return next((content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), None)


def _without_prefix(found: dict[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """What lies beneath known prefixes, such as those of an encoder inside a larger model."""
    while not expected & found.keys():
        beneath = (
            {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)} for prefix in _PREFIXES
        )
        inner = next((tensors for tensors in beneath if tensors), None)
        if inner is None:
            return found
        found = inner
    return found
