"""The learning rate over a run, as a share of its peak. Pure."""

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
