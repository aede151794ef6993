"""BatchNorm under virtual ranks: whose statistics normalise a tile, and how running statistics move.

A virtual rank is what a GPU is in the paper: it normalises by its own tiles. The running statistics move once a step,
by the mean of what each virtual rank alone would have made of them, weighted by its tiles. That sum does not depend on
how virtual ranks are spread over processes, nor on how often a virtual rank is encoded.

A virtual rank of a single tile has no statistics to speak of: it is normalised by the running ones.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trainer.encoders.freezing import is_frozen

BatchNorm = nn.modules.batchnorm._BatchNorm


def set_mode(encoder: nn.Module, *, training: bool, batchnorm: str) -> None:
    """Training or scoring mode, with BatchNorm by the virtual rank's own tiles or by running statistics.

    Args:
        encoder: the encoder.
        training: dropout and drop-path on.
        batchnorm: "running": own tiles in training, running statistics in scoring; "sync": so, too, the own tiles being
            those of all ranks; "virtual": own tiles in both; "frozen" or "calibrated": running statistics in both.
            A layer that is not trained uses running statistics, whatever this is; but for "measured", where all use
            their own tiles, to see what their statistics are.
    """
    encoder.train(training)
    by_own_tiles = batchnorm == "virtual" or (batchnorm in ("running", "sync") and training)
    for module in encoder.modules():
        if isinstance(module, BatchNorm):
            module.train(batchnorm == "measured" or (by_own_tiles and not is_frozen(module)))


def own_layers(encoder: nn.Module) -> list[BatchNorm]:
    """The BatchNorm layers that normalise by the tiles at hand."""
    return [module for module in encoder.modules() if isinstance(module, BatchNorm) and module.training]


@contextlib.contextmanager
def virtual_rank_pass(layers: list[BatchNorm], num_tiles: int, *, moves_stats: bool) -> Iterator[None]:
    """Around one virtual rank's forward pass.

    Args:
        layers: from `own_layers`.
        num_tiles: tiles of the virtual rank.
        moves_stats: running statistics take part; False where the pass is a repetition, or scoring.
    """
    for layer in layers:
        layer.training = num_tiles > 1 or isinstance(layer, nn.SyncBatchNorm)
        layer.track_running_stats = moves_stats or not layer.training
    try:
        yield
    finally:
        for layer in layers:
            layer.training, layer.track_running_stats = True, True


class RunningStats:
    """Collects the running statistics of one step, or of a calibration."""

    def __init__(self, encoder: nn.Module) -> None:
        self.layers = [layer for layer in own_layers(encoder) if layer.running_mean is not None]
        self._before = self._current()
        self._tracked = [layer.num_batches_tracked for layer in self.layers]
        # Per buffer the sum over tiles, and the number of tiles: tensors that ranks can add up.
        self.sums = [torch.zeros_like(buffer) for buffer in self._before]
        like = next(encoder.parameters())
        self.num_tiles = torch.zeros(1, dtype=like.dtype, device=like.device)
        self._pending: list[tuple[int, list[Tensor]]] = []
        self._restore()

    def collect(self, num_tiles: int) -> None:
        """Takes what one virtual rank's forward pass left in the layers, and puts them back to before it."""
        self._pending.append((num_tiles, self._current()))
        self._restore()

    def settle(self, *, keep: bool) -> None:
        """Counts what was collected since the last call, or forgets it, as of a slide that is skipped."""
        for num_tiles, buffers in self._pending if keep else ():
            self.num_tiles += num_tiles
            for buffer, total in zip(buffers, self.sums, strict=True):
                total += num_tiles * buffer
        self._pending.clear()

    def commit(self) -> None:
        """Writes the means over all tiles, after the sums were added up over ranks."""
        if self.layers and self.num_tiles.item():
            self._set([total / self.num_tiles for total in self.sums])
            for layer, tracked in zip(self.layers, self._tracked, strict=True):
                layer.num_batches_tracked = None if tracked is None else tracked + 1

    def _current(self) -> list[Tensor]:
        """Running means and variances, layer after layer."""
        both = [(layer.running_mean, layer.running_var) for layer in self.layers]
        return [buffer for pair in both for buffer in pair if buffer is not None]

    def _restore(self) -> None:
        # New tensors, not copies into the old ones: a graph that is kept holds the old ones for its backward pass.
        self._set([buffer.clone() for buffer in self._before])
        for layer, tracked in zip(self.layers, self._tracked, strict=True):
            layer.num_batches_tracked = None if tracked is None else tracked.clone()

    def _set(self, buffers: list[Tensor]) -> None:
        for layer, mean, var in zip(self.layers, buffers[::2], buffers[1::2], strict=True):
            layer.running_mean, layer.running_var = mean, var
