"""What features depend on, in words and as a digest: of the encoder as it is, and of a slide's tiles.

Pure; knows no store. One thing to know before changing it: two things that give other features must never share a
digest, two that give the same ones may have several. What only rounds otherwise (the device, torch's version,
machine.compile) is in no digest, as it is no part of a run's result.
"""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from manifests import Manifest
from trainer.config import RunConfig
from trainer.encoders.encoder import TileEncoder
from trainer.encoders.foundation import hub_repo

PREPROCESSING = 1
"""Raise it when the same slide, manifest and weights come to give other features: another way to read tiles, or from
bytes to what enters the model."""
_FIELDS = ("fingerprint", "backend", "level", "read_w", "read_h", "tile_px", "tile_mpp", "mpp_x", "mpp_y")
"""Of a slide's record: the file, and how a tile of it is read."""
_DIGEST_BYTES = 16


def describe_key(encoder: TileEncoder, config: RunConfig, tile_px: int, tile_mpp: float) -> dict[str, Any]:
    """What the features of every slide depend on, JSON-ready.

    Args:
        encoder: as it encodes, BatchNorm measured.
        config: the run's.
        tile_px: side of the tiles, px.
        tile_mpp: their scale, microns per px.
    """
    return {
        "encoder": hub_repo(config.encoder.name) or config.encoder.name,
        "pooling": encoder.pooling,
        "mean": encoder.mean_C.tolist(),
        "std": encoder.std_C.tolist(),
        "weights": hash_weights(encoder),
        "precision": config.optim.precision,
        "tile_px": tile_px,
        "tile_mpp": tile_mpp,
        "preprocessing": PREPROCESSING,
    }


def digest_of(words: dict[str, Any]) -> str:
    """The digest of such a description, 32 hex digits."""
    return hashlib.blake2b(json.dumps(words, sort_keys=True).encode(), digest_size=_DIGEST_BYTES).hexdigest()


def hash_weights(module: nn.Module) -> str:
    """Digest of all parameters and buffers, BatchNorm's statistics among them: names, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}\x00{tensor.dtype}\x00{tuple(tensor.shape)}\x00".encode())
        # Viewed as bytes: numpy knows no bfloat16. Contiguous: channels-last weights are the same weights.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_read_plan(manifest: Manifest) -> str:
    """Digest of what decides a slide's pixels: the file's fingerprint, how it is read, and where its tiles lie.

    Of the content, not of the manifest's file: who tiles again with the same outcome keeps the features.
    """
    record = {name: getattr(manifest.slide, name) for name in _FIELDS}
    digest = hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=_DIGEST_BYTES)
    for coordinates in (manifest.x_l0, manifest.y_l0):
        digest.update(coordinates.astype("<i4").tobytes())
    return digest.hexdigest()
