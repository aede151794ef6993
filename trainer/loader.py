"""The loader: shards in, their pixels out, read on the fly while the model computes.

A few shards are read ahead by one thread, which reads each by many (`tiler.read_tiles`); no worker processes, no
handle that crosses a process border. A read that fails travels as a value: the step tells the group, and all ranks
skip the slide together.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from manifests import Manifest, ManifestSource, SlidegradError
from tiler import Slide, TilerError, open_slide, read_tiles
from trainer.sampler import ShardPlan
from trainer.step import Shard

_OPEN_SLIDES = 4


class TileLoader:
    """Reads the tiles of shards.

    Args:
        source: the manifests.
        paths: slide_id to slide file.
        num_threads: threads over the block reads of one shard.
        read_ahead: shards read while the caller computes.
    """

    def __init__(self, source: ManifestSource, paths: Mapping[str, Path], *, num_threads: int, read_ahead: int) -> None:
        self._source, self._paths = source, paths
        self._num_threads, self._read_ahead = num_threads, read_ahead
        self._open: OrderedDict[str, tuple[Slide, Manifest]] = OrderedDict()

    def read(self, plans: Iterable[ShardPlan]) -> Iterator[Shard]:
        """The shards of `plans`, in order, read ahead."""
        waiting: deque[Future[Shard]] = deque()
        pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        try:
            for plan in plans:
                waiting.append(pool.submit(self._read, plan))
                if len(waiting) > self._read_ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, plan: ShardPlan) -> Shard:
        slide_id = plan.step.slide_id
        try:
            if not len(plan.rows):
                return Shard(plan.virtual_rank, torch.zeros(0, 1, 1, 3, dtype=torch.uint8))
            slide, manifest = self._get(slide_id)
            if len(manifest) != plan.step.num_tiles:
                raise TilerError(
                    f"slide {slide_id}: {len(manifest)} tiles in the manifest, {plan.step.num_tiles} at the start: "
                    "it was tiled anew, start another run"
                )
            tiles_NHWC = read_tiles(slide, manifest, plan.rows, num_threads=self._num_threads)
            return Shard(plan.virtual_rank, torch.from_numpy(tiles_NHWC))
        except Exception as error:  # noqa: BLE001 - the per-slide boundary: the group is told, and skips the slide
            sentence = self._tell(slide_id, error)
            return Shard(plan.virtual_rank, torch.zeros(0, 1, 1, 3, dtype=torch.uint8), sentence)

    def _tell(self, slide_id: str, error: Exception) -> str:
        """The error in one sentence that names the slide and not its file."""
        text = error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)
        path = self._paths.get(slide_id)
        if path is not None:
            text = text.replace(str(path), slide_id).replace(path.name, slide_id)
        kind = "" if isinstance(error, SlidegradError | OSError) else f"{type(error).__name__}: "
        return text if text.startswith("slide ") else f"slide {slide_id}: {kind}{text}"

    def _get(self, slide_id: str) -> tuple[Slide, Manifest]:
        if slide_id not in self._open:
            if slide_id not in self._paths:
                raise TilerError(f"slide {slide_id}: its file is not in the path list of the manifests; tile it again")
            manifest = self._source[slide_id]
            slide = open_slide(self._paths[slide_id], manifest.slide.backend)  # type: ignore[arg-type]
            self._open[slide_id] = (slide, manifest)
            while len(self._open) > _OPEN_SLIDES:
                self._open.popitem(last=False)
        self._open.move_to_end(slide_id)
        return self._open[slide_id]
