"""Learning rate and weight decay over a run. Pure."""

import math


def learning_rate(step: int, *, num_steps: int, num_warmup: int) -> float:
    """Linear warm-up from 1 / num_warmup to 1, then half a cosine down to 0.

    Args:
        step: optimiser steps done, from 0.
        num_steps: steps of the whole run.
        num_warmup: steps of warm-up.

    Source: Loshchilov, Hutter, SGDR, 2017 (cosine); Goyal et al., 2017 (warm-up).
    """
    if step < num_warmup:
        return (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def weight_decay(step: int, *, num_steps: int, first: float, last: float) -> float:
    """Half a cosine from `first`, at step 0, to `last`, after `num_steps`.

    Source: Caron et al., Emerging properties in self-supervised vision transformers, 2021 (weight decay that grows).
    """
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * min(1.0, step / max(1, num_steps))))
