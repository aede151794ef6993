"""The two halves of a run's model on this rank, made from its config or from a checkpoint."""

from pathlib import Path

import torch
from torch import nn

from trainer.aggregators import build_aggregator
from trainer.checkpoint import load_half
from trainer.comm import Comm
from trainer.config import RunConfig
from trainer.encoders import build_encoder
from trainer.step import Engine

_DTYPES = {"float32": torch.float32, "bf16": torch.float32, "float64": torch.float64}


def build_engine(config: RunConfig, comm: Comm, *, tile_px: int, num_classes: int) -> Engine:
    """Both halves as this rank holds them; the weights follow from the config's seed, alike on all ranks.

    Raises:
        TrainerError: unknown encoder, or weights that do not fit.
    """
    with torch.random.fork_rng(devices=[]):  # Built on the CPU.
        torch.manual_seed(config.seed)
        # A dedicated aggregator builds the encoder too, to know the features' width, and drops it.
        encoder = build_encoder(config.encoder, tile_px)
        aggregator = build_aggregator(config.aggregator, encoder.num_features, num_classes)
    dtype = _DTYPES[config.optim.precision]
    engine = Engine(
        comm,
        encoder.to(comm.device, dtype) if comm.is_encoder else None,
        aggregator.to(comm.device, dtype) if comm.is_aggregator else None,
        num_features=encoder.num_features,
        seed=config.seed,
        keep=config.machine.keep,
        augment=config.augment,
        batchnorm=config.encoder.batchnorm,
        autocast=torch.bfloat16 if config.optim.precision == "bf16" else None,
    )
    if engine.encoder is not None:
        comm.share_encoder([*engine.encoder.parameters(), *engine.encoder.buffers()])
    return engine


def halves_of(engine: Engine) -> dict[str, nn.Module]:
    """The halves that this rank holds, by name."""
    both = {"encoder": engine.encoder, "aggregator": engine.aggregator}
    return {name: half for name, half in both.items() if half is not None}


def load_weights(engine: Engine, checkpoint: Path) -> None:
    """Puts a checkpoint's weights into the halves that this rank holds."""
    for name, half in halves_of(engine).items():
        half.load_state_dict(load_half(checkpoint, name)["model"])
