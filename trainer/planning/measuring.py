"""The rates of the device at hand: short trials with random weights and noise, some ten seconds for each encoder.

Encoding is measured as `slidegrad doctor` measures it (`trainer.projection`). The network and the storage are not
measured: one process has neither; `slidegrad doctor SLIDE` tells how fast tiles are read.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from trainer.aggregators import build_aggregator
from trainer.config import Optim, RunConfig
from trainer.encoders.encoder import build_encoder
from trainer.planning.rates import RateInputs, Rates, given_rates
from trainer.projection import measure_encoding

_NUM_ROUNDS = 3
_NUM_CLASSES = 2


def measure_rates(
    config: RunConfig, tile_px: int, *, num_tiles: int, at_once: int, device: torch.device, inputs: RateInputs
) -> Rates:
    """Measures encoder, aggregator and optimiser; reading and the network are as given.

    Args:
        config: encoder, aggregator and precision.
        tile_px: side of the tiles, px.
        num_tiles: of the slide.
        at_once: tiles of a virtual rank.
        device: where; a CPU computes with the threads that torch has.
        inputs: what is not measured.

    Raises:
        TrainerError: unknown encoder, or tiles that it cannot take.
    """
    encoding = measure_encoding(config, tile_px, at_once, device, torch.get_num_threads())
    with torch.random.fork_rng(devices=[]):
        encoder = build_encoder(config.encoder, tile_px, initial=False).to(device)
        aggregator = build_aggregator(config.aggregator, encoder.num_features, _NUM_CLASSES).to(device)
    return Rates(
        forward_s=encoding.forward_s,
        backward_s=max(0.0, encoding.both_s - encoding.forward_s),
        aggregate_s=_aggregate_s(aggregator, num_tiles, encoder.num_features, device) / num_tiles,
        update_s=max(_update_s(encoder, config.optim, device), _update_s(aggregator, config.optim, device)),
        **given_rates(inputs),
    )


def _aggregate_s(aggregator: nn.Module, num_tiles: int, num_features: int, device: torch.device) -> float:
    places = torch.arange(num_tiles, device=device)
    cells_N2 = torch.stack([places % 256, places // 256], 1).int()
    features_ND = torch.zeros(num_tiles, num_features, device=device, requires_grad=True)

    def aggregate() -> None:
        outputs_C, _ = aggregator(features_ND, cells_N2)
        outputs_C.sum().backward()

    return _median_s(aggregate, device)


def _update_s(half: nn.Module, optim: Optim, device: torch.device) -> float:
    parameters = list(half.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=optim.lr)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return _median_s(optimizer.step, device)


def _median_s(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds; the first time, which sets things up, does not count."""
    seconds = []
    for _ in range(_NUM_ROUNDS + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
