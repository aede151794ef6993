"""The two halves of a run's model on this rank, made from its config or from a checkpoint."""

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from timm.layers import convert_sync_batchnorm
from torch import nn

from manifests.files import atomic_path
from trainer import fsdp
from trainer.aggregators import build_aggregator
from trainer.checkpoint import load_half
from trainer.comm import Comm, join_group
from trainer.config import RunConfig
from trainer.encode import InStep
from trainer.encoders.encoder import TileEncoder, build_encoder
from trainer.errors import TrainerError
from trainer.heads import Head
from trainer.job import Job
from trainer.step import Engine
from trainer.topology import Topology

HalfName = Literal["encoder", "aggregator"]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build_engine(config: RunConfig, comm: Comm, *, tile_px: int, head: Head, initial: bool = True) -> Engine:
    """Both halves as this rank holds them; random weights follow from the config's seed, alike on all ranks.

    Args:
        config: the run's.
        comm: this rank's end of the run's processes.
        tile_px: side of the tiles, px.
        head: what is predicted.
        initial: with the weights that a run starts from; False where a checkpoint's will take their place.

    Raises:
        TrainerError: unknown encoder, or weights that do not fit.
    """
    with torch.random.fork_rng(devices=[]):  # Built on the CPU.
        torch.manual_seed(config.seed)
        # A dedicated aggregator builds the encoder too, to know the features' width, and drops it.
        encoder = build_encoder(config.encoder, tile_px, initial=initial)
        aggregator = build_aggregator(config.aggregator, encoder.num_features, head.num_outputs, head.task)
    precision = config.optim.precision
    dtype = torch.float64 if precision == "float64" else torch.float32
    set_products(tf32=precision == "tf32")
    is_frozen = not any(parameter.requires_grad for parameter in encoder.parameters())
    num_features, keep = encoder.num_features, config.machine.keep
    if config.encoder.batchnorm == "sync" and comm.topology.num_encoders > 1:
        # timm's: torch's own would drop the activation that timm's BatchNorm layers hold.
        encoder = convert_sync_batchnorm(encoder, comm.encoder_group)
    if is_spread := config.machine.fsdp and comm.topology.num_encoders > 1:
        digest = fsdp.digest_of(encoder)
        if comm.any_error("" if digest == comm.from_main(digest) else "not alike"):
            raise TrainerError("machine.fsdp: the ranks start from different encoder weights; give all the same file")

    def place(encoder: TileEncoder) -> TileEncoder:
        if is_spread:
            fsdp.spread(encoder.to(dtype), comm, config.encoder.name)
            return encoder
        return encoder.to(comm.device, dtype)

    engine = Engine(
        comm,
        place(encoder) if comm.is_encoder else None,
        aggregator.to(comm.device, dtype) if comm.is_aggregator else None,
        num_features=num_features,
        seed=config.seed,
        head=head,
        keep=None if is_frozen or isinstance(keep, str) else keep,
        is_frozen=is_frozen,
        augment=config.augment,
        batchnorm=config.encoder.batchnorm,
        autocast=_AUTOCAST.get(precision),
        in_step=InStep(comm.topology, tile_px) if is_spread and comm.is_encoder else None,
    )
    if engine.encoder is not None:
        if not is_spread:
            comm.share_encoder([*engine.encoder.parameters(), *engine.encoder.buffers()])
        _fit_machine(engine.encoder.backbone, config)
    return engine


def _fit_machine(backbone: Any, config: RunConfig) -> None:
    """Trades time and memory as `config.machine` says.

    Raises:
        TrainerError: a model of which that cannot be done.
    """
    if config.machine.recompute:
        has_batchnorm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules())
        try:
            backbone.set_grad_checkpointing(not has_batchnorm)
        except (AssertionError, AttributeError):
            has_batchnorm = True
        if has_batchnorm:
            raise TrainerError(
                f"machine.recompute with encoder.name {config.encoder.name!r}: expected a model in blocks, without "
                "BatchNorm; leave it away, or give a smaller --machine.keep"
            )
    if config.machine.compile:
        backbone.compile()


def halves_of(engine: Engine) -> dict[HalfName, nn.Module]:
    """The halves that this rank holds, by name."""
    both: dict[HalfName, nn.Module | None] = {"encoder": engine.encoder, "aggregator": engine.aggregator}
    return {name: half for name, half in both.items() if half is not None}


def load_weights(engine: Engine, checkpoint: Path) -> None:
    """Puts a checkpoint's weights, averaged ones if it has them, into the halves that this rank holds."""
    for name, half in halves_of(engine).items():
        fsdp.load_into(half, _weights(checkpoint, name))


def load_alone(job: Job, checkpoint: Path) -> Engine:
    """Both halves of a checkpoint of a run, in this process."""
    _, _, device = join_group()
    assert job.config.virtual_ranks, "a saved config is resolved"
    comm = Comm(Topology.make(1, "auto", job.config.virtual_ranks), 0, device)
    head = Head.for_cohort(job.config.head, job.cohort)  # Of the whole cohort, whose training slides make the head.
    engine = build_engine(job.config, comm, tile_px=job.tile_px, head=head, initial=False)
    load_weights(engine, checkpoint)
    return engine


def export_weights(run: Path, checkpoint: Path) -> None:
    """Writes a checkpoint's weights as RUN/weights/{encoder,aggregator}.safetensors, for other programs and other runs.

    The encoder's have timm's names, so that timm, and --encoder.weights, take the file.
    """
    for name in ("encoder", "aggregator"):
        tensors = {k.removeprefix("backbone."): v.contiguous() for k, v in _weights(checkpoint, name).items()}
        with atomic_path(run / "weights" / f"{name}.safetensors") as partial:
            save_file(tensors, partial)


def _weights(checkpoint: Path, half: str) -> dict[str, Any]:
    saved = load_half(checkpoint, half)
    own: dict[str, Any] = saved["model"]
    average = saved.get("average") or {}
    return {k.removeprefix("module."): v for k, v in average.items() if k != "n_averaged"} or own


def set_products(*, tf32: bool) -> None:
    """Whether a GPU may round the factors of float32 products to TF32; on the CPU nothing changes."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
