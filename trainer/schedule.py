"""The learning rate over a run. Pure."""

import math


def learning_rate(step: int, *, peak: float, num_steps: int, num_warmup: int) -> float:
    """Linear warm-up from peak / num_warmup to the peak, then half a cosine down to 0.

    Args:
        step: optimiser steps done, from 0.
        peak: highest learning rate.
        num_steps: steps of the whole run.
        num_warmup: steps of warm-up.

    Source: Loshchilov, Hutter, SGDR, 2017 (cosine); Goyal et al., 2017 (warm-up).
    """
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
