"""`machine.fsdp`: an encoder that does not fit one device, spread over the encoder ranks by torch's FSDP2.

Each rank holds a slice of every weight, of its gradient and of AdamW's moments; a block's weights are gathered for its
own passes and let go. One thing to know before changing it: to gather is a collective. So every encoder rank goes
through the encoder equally often, with graphs at the same places; `encode.EncoderSide` fills up with blank tiles where
a rank has fewer virtual ranks, or none that could be read. Checkpoints hold whole tensors, so a run may go on with or
without it.

Source: Zhao et al., PyTorch FSDP: experiences on scaling fully sharded data parallel, VLDB 2023; per-parameter sharding
as in torch.distributed.fsdp.fully_shard.
"""

import hashlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from trainer.batchnorm import BatchNorm
from trainer.comm import Comm
from trainer.encoders.encoder import TileEncoder
from trainer.errors import TrainerError


def spread(encoder: TileEncoder, comm: Comm, name: str) -> None:
    """Leaves this rank its slices of an encoder's weights, on its device, block by block; called by all encoder ranks.

    Gradients are then summed over the ranks in each backward pass.

    Args:
        encoder: whole, on the CPU, alike on all ranks.
        comm: this rank's end of the run's processes.
        name: of the encoder, for the error.

    Raises:
        TrainerError: as `blocks_of`.
    """
    # Nothing is done in place to what an encoder gives.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    encoder.to(memory_format=torch.contiguous_format)  # Slices are taken of weights that lie as they are counted.
    mesh = comm.encoder_mesh()
    for module in (*blocks_of(encoder, name), encoder):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        assert isinstance(module, FSDPModule), "made one"
        # A sum over ranks, as without it; by default they are averaged.
        module.set_gradient_divide_factor(1.0)


def blocks_of(encoder: nn.Module, name: str) -> list[nn.Module]:
    """What is gathered at once: timm's blocks.

    Args:
        encoder: with timm's model in it.
        name: of the encoder, for the error.

    Raises:
        TrainerError: it has none, or BatchNorm, whose statistics a blank tile would change.
    """
    lists = [module for path, module in encoder.named_modules() if path.rpartition(".")[2] == "blocks"]
    blocks = [block for listed in lists for block in listed.children()]
    if not blocks or any(isinstance(module, BatchNorm) for module in encoder.modules()):
        raise TrainerError(
            f"machine.fsdp with encoder.name {name!r}: expected a model in blocks, without BatchNorm, as vision "
            "transformers are; leave it away"
        )
    return blocks


def digest_of(encoder: nn.Module) -> str:
    """Of all weights, to see that ranks would each take a slice of the same."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in encoder.state_dict().values():
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def whole(states: Any, *, keep: bool) -> Any:
    """Nested states with whole tensors on the CPU in place of slices; called by all encoder ranks together.

    Args:
        states: of a model or an optimiser.
        keep: this rank wants them; elsewhere empty tensors stand for them.
    """

    def gather(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        tensor = value.full_tensor()
        return tensor.cpu() if keep else tensor.new_empty(0)

    return tree_map(gather, states)


def load_into(half: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Loads whole tensors, of which a half that is spread takes its slices."""
    own = half.state_dict()
    half.load_state_dict({name: sliced_like(tensor, own.get(name)) for name, tensor in tensors.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, states: dict[str, Any]) -> None:
    """Loads whole states, of which the optimiser of a half that is spread takes its slices."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        i: {name: sliced_like(value, parameters[i]) for name, value in of.items()} for i, of in states["state"].items()
    }
    optimizer.load_state_dict({**states, "state": state})


def sliced_like(value: Any, like: Tensor | None) -> Any:
    """This rank's slice of a tensor, as `like` is sliced; as it is if that is whole, or of another shape."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    mesh, device = like.device_mesh, like.to_local().device
    return distribute_tensor(value.to(device), mesh, like.placements, src_data_rank=None)


def slice_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_norm(norm: Tensor) -> float:
    """A norm over gradients that may be spread; called by all encoder ranks together."""
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
