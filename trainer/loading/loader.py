"""The loader: shards in, their pixels out, read on the fly while the model computes.

What a rank's readings have in common: where the slides are, how many threads read, and the memory. The reading itself
is in `read_ahead`; which shard is read when, in `demands`. No worker processes, no handle that crosses a process
border. A read that fails travels as a value: the step tells the group, and all ranks skip the slide together.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import torch

from manifests import ManifestSource
from trainer.loading.buffers import BufferPool, DeviceCopies
from trainer.loading.demands import Demands
from trainer.loading.read_ahead import Reading
from trainer.loading.reading import ShardReader
from trainer.sampler import ShardPlan


class TileLoader:
    """Reads the tiles of shards; its memory serves one reading after another.

    Args:
        source: the manifests.
        paths: slide_id to slide file.
        tile_px: side of the tiles, px.
        num_threads: threads over the reads of one shard.
        budget_bytes: memory for tiles that were read and are still needed.
        deadline_s: how long a slide's tiles may be waited for in all.
        device: where the caller wants them; the CPU by default.
        hold: see `ShardReader`.
        quarantined: likewise.

    Attributes:
        pool: the buffers, and how much memory they took.
    """

    def __init__(
        self,
        source: ManifestSource,
        paths: Mapping[str, Path],
        *,
        tile_px: int,
        num_threads: int,
        budget_bytes: int,
        deadline_s: float = 300.0,
        device: torch.device | None = None,
        hold: Callable[[str], None] = lambda _: None,
        quarantined: Collection[str] = (),
    ) -> None:
        self._source, self._paths, self._num_threads = source, paths, num_threads
        self._tile_px, self._deadline_s = tile_px, deadline_s
        self._hold, self._quarantined = hold, quarantined
        self._gpu = device if device is not None and device.type == "cuda" else None
        self.pool = BufferPool(budget_bytes, pinned=self._gpu is not None)

    def read(self, plans: Iterable[ShardPlan], keep: int | None = None) -> Reading:
        """Begins to read as soon as the first slide is asked for; to be used as a context, one at a time.

        Args:
            plans: the shards of this rank, those of a slide one after another.
            keep: of each slide, all but the last so many shards are asked for twice; none if None.
        """
        return Reading(
            Demands(plans, keep),
            self.pool,
            lambda pause: ShardReader(
                self._source, self._paths, self._num_threads, pause, self._hold, self._quarantined
            ),
            tile_px=self._tile_px,
            deadline_s=self._deadline_s,
            copies=DeviceCopies(self._gpu) if self._gpu is not None else None,
        )
