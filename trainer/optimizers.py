"""The optimiser of each half, with the learning rate of each layer."""

from typing import Any, Literal

import torch
from torch import nn

from trainer.config import RunConfig
from trainer.encoders.freezing import block_numbers


def build_optimizer(
    half: nn.Module, config: RunConfig, name: Literal["encoder", "aggregator"]
) -> torch.optim.AdamW | None:
    """AdamW on what is trained of a half; None if nothing is.

    With encoder.layer_decay each block of the encoder learns at its own rate: the last one at the half's peak, each
    block below it at layer_decay times that of the block above. A group's peak is its "peak".

    Source: Howard, Ruder, Universal language model fine-tuning for text classification, 2018 (discriminative
    fine-tuning); Bao et al., BEiT, 2022 (one factor from layer to layer). Blocks are those of timm.

    Args:
        half: the encoder, whose timm model is `half.backbone`, or the aggregator.
        config: the run's.
        name: which half.

    Raises:
        TrainerError: layer_decay with a model of which timm does not say what its blocks are.
    """
    optim, decay = config.optim, config.encoder.layer_decay if name == "encoder" else 1.0
    peak = optim.lr if name == "encoder" or optim.aggregator_lr is None else optim.aggregator_lr
    groups: dict[float, list[nn.Parameter]] = {}
    numbers = block_numbers(half.backbone, f"encoder.layer_decay is {decay}") if decay != 1 else {}  # type: ignore[arg-type]
    last = max(numbers.values(), default=0)
    for full_name, parameter in half.named_parameters():
        if parameter.requires_grad:
            depth = last - numbers.get(full_name.removeprefix("backbone."), last)
            groups.setdefault(peak * decay**depth, []).append(parameter)
    if not groups:
        return None
    listed: list[dict[str, Any]] = [{"params": of, "lr": rate, "peak": rate} for rate, of in groups.items()]
    is_on_gpu = listed[0]["params"][0].is_cuda
    return torch.optim.AdamW(listed, lr=peak, weight_decay=optim.weight_decay, fused=is_on_gpu)


def set_rates(optimizer: torch.optim.Optimizer, factor: float, weight_decay: float) -> None:
    """Sets the learning rate of each group to its peak times a factor, and the weight decay of all."""
    for group in optimizer.param_groups:
        # Checkpoints of runs from before there were peaks have one group, without any.
        group["lr"] = group.get("peak", optimizer.defaults["lr"]) * factor
        group["weight_decay"] = weight_decay
