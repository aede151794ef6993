"""What of an encoder is not trained: its stem and first blocks, or all of it; and what its blocks are.

What is frozen runs as in scoring: no dropout, no drop-path, BatchNorm by its running statistics. Otherwise features
that nothing is learnt from would still differ from step to step.
"""

from types import SimpleNamespace
from typing import Literal

from timm.models import group_parameters
from torch import nn

from trainer.errors import TrainerError

_NO_NAME = "\0"


def block_numbers(backbone: nn.Module, setting: str) -> dict[str, int]:
    """Each parameter's block, in the order in which a tile passes them: 0 is the stem, 1 the first block.

    What stands above all blocks, such as a last norm, counts to the last one.

    Args:
        backbone: a timm model.
        setting: what needs to know, with its value, for the error.

    Raises:
        TrainerError: timm does not say what its blocks are.
    """
    if not hasattr(backbone, "group_matcher"):
        name = backbone.pretrained_cfg["architecture"]  # type: ignore[index]
        raise TrainerError(f"{setting}: not possible with {name}, of which timm does not say what its blocks are")
    # timm numbers what its patterns do not know as one more group above all others: a name that none can know shows it.
    named = [*backbone.named_parameters(), (_NO_NAME, None)]
    matcher = backbone.group_matcher(coarse=False)  # type: ignore[operator]
    numbers: dict[str, int] = group_parameters(SimpleNamespace(named_parameters=lambda: named), matcher, reverse=True)
    above = numbers.pop(_NO_NAME)
    return {name: min(number, above - 1) for name, number in numbers.items()}


def freeze(backbone: nn.Module, what: Literal["none", "all"] | int) -> None:
    """Takes the stem and the first so many blocks, or all, out of training.

    Raises:
        TrainerError: not that many blocks, or timm does not say what they are.
    """
    if what == "none":
        return
    if what == "all":
        backbone.requires_grad_(False)
        return
    numbers = block_numbers(backbone, f"encoder.freeze is {what}")
    num_blocks = max(numbers.values())
    if int(what) >= num_blocks:
        raise TrainerError(f"encoder.freeze is {what}: expected below {num_blocks}, the number of its blocks, or all")
    for name, parameter in backbone.named_parameters():
        if numbers[name] <= int(what):
            parameter.requires_grad_(False)


def rest_frozen(module: nn.Module) -> None:
    """Puts what is frozen into scoring mode: whole parts with all that is in them, and what holds frozen parameters."""
    for part in module.modules():
        if is_frozen(part):
            part.eval()
        elif is_frozen(part, recurse=False):
            part.training = False


def is_frozen(module: nn.Module, *, recurse: bool = True) -> bool:
    """It has parameters, and none of them is trained."""
    trained = [parameter.requires_grad for parameter in module.parameters(recurse)]
    return bool(trained) and not any(trained)
