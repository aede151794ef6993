"""Reading one shard: the slide opened when it is needed, trouble that may pass waited out, the rest told in a sentence.

A network drive that stumbles gives errors that are gone a moment later, or an open file that is stale for good: so a
further attempt opens the slide anew, and its fingerprint must be the manifest's again. Damaged bytes and files that
are no slide, or another one, stay what they are.
"""

import errno
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifests import Manifest, ManifestSource, SlidegradError
from manifests.privacy import without_paths
from tiler import DamageError, ReadError, Slide, TilerError, open_slide, plan_tiles, read_plan
from trainer.loading.shards import Reads
from trainer.sampler import ShardPlan

RETRY_DELAYS_S = (0.5, 2.0, 8.0)
"""Seconds before each further attempt."""
_FOR_GOOD = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM)
_OPEN_SLIDES = 4


class ShardReader:
    """Reads shards; for one thread.

    Args:
        source: the manifests.
        paths: slide_id to slide file.
        num_threads: threads over the reads of one shard.
        pause: waits so many seconds; False if there is no use in another attempt.
        hold: told which slide is in hand while its bytes are decoded, and "" after.
        quarantined: slides that are not to be read.
    """

    def __init__(
        self,
        source: ManifestSource,
        paths: Mapping[str, Path],
        num_threads: int,
        pause: Callable[[float], bool],
        hold: Callable[[str], None] = lambda _: None,
        quarantined: Collection[str] = (),
    ) -> None:
        self._source, self._paths, self._num_threads, self._pause = source, paths, num_threads, pause
        self._hold, self._quarantined = hold, quarantined
        self._open: OrderedDict[str, tuple[Slide, Manifest, NDArray[np.int32]]] = OrderedDict()
        self._was_open: set[str] = set()

    def read(self, plan: ShardPlan, out: NDArray[np.uint8]) -> tuple[Reads, Tensor]:
        """Reads a shard's tiles into `out`, uint8 (n, tile_px, tile_px, 3).

        Returns:
            What it took, and the tiles' cells in the slide's grid, int32 (n, 2).

        Raises:
            SlidegradError, OSError: they cannot be read, nor after some more attempts where that could have helped.
        """
        if (slide_id := plan.step.slide_id) in self._quarantined:
            raise TilerError(
                f"slide {slide_id}: reading it crashed the process, more than once; check the file, and remove "
                "in_hand/crashes.json in the run's folder to try it again"
            )
        delays_s = iter(RETRY_DELAYS_S)
        while True:
            try:
                self._hold(slide_id)
                return self._read_once(plan, out)
            except Exception as error:
                self._open.pop(plan.step.slide_id, None)
                delay_s = next(delays_s, None) if self._may_pass(error, plan.step.slide_id) else None
                if delay_s is None or not self._pause(delay_s):
                    raise
            finally:
                self._hold("")

    def _may_pass(self, error: Exception, slide_id: str) -> bool:
        """Another attempt may succeed. A file that was never there does not come back; one that was may be renamed."""
        if isinstance(error, OSError):
            return error.errno not in _FOR_GOOD or (error.errno == errno.ENOENT and slide_id in self._was_open)
        return isinstance(error, ReadError) and not isinstance(error, DamageError)

    def tell(self, slide_id: str, error: Exception) -> str:
        """The error in one sentence that names the slide, not its file nor any folder."""
        if isinstance(error, OSError):
            reason = error.strerror or type(error).__name__
            text = f"its file cannot be read ({reason}); look whether the archive is where it was and can be reached"
        else:
            text = str(error) if isinstance(error, SlidegradError) else f"{type(error).__name__}: {error}"
        path = self._paths.get(slide_id)
        if path is not None:
            text = text.removeprefix(f"{path.name}: ").replace(str(path), slide_id).replace(path.name, slide_id)
        text = without_paths(text)
        return text if text.startswith("slide ") else f"slide {slide_id}: {text}"

    def _read_once(self, plan: ShardPlan, out: NDArray[np.uint8]) -> tuple[Reads, Tensor]:
        started = time.perf_counter()
        slide, manifest, cells = self._get(plan.step.slide_id)
        if len(manifest) != plan.step.num_tiles:
            raise TilerError(
                f"slide {plan.step.slide_id}: {len(manifest)} tiles in the manifest, {plan.step.num_tiles} at the "
                "start: it was tiled anew, start another run"
            )
        tiles = plan_tiles(slide, manifest, plan.rows)
        read_plan(slide, manifest, tiles, out, self._num_threads)
        reads = Reads(
            num_tiles=len(plan.rows),
            num_decoded=tiles.num_decoded,
            num_bytes=tiles.num_file_bytes,
            seconds=time.perf_counter() - started,
        )
        return reads, torch.from_numpy(cells[plan.rows])

    def _get(self, slide_id: str) -> tuple[Slide, Manifest, NDArray[np.int32]]:
        if slide_id not in self._open:
            if slide_id not in self._paths:
                raise TilerError(f"slide {slide_id}: its file is not in the path list of the manifests; tile it again")
            manifest = self._source[slide_id]
            _reach(self._paths[slide_id])
            slide = open_slide(self._paths[slide_id], manifest.slide.backend)  # type: ignore[arg-type]
            self._open[slide_id] = (slide, manifest, manifest.cells)
            self._was_open.add(slide_id)
            while len(self._open) > _OPEN_SLIDES:
                self._open.popitem(last=False)
        self._open.move_to_end(slide_id)
        return self._open[slide_id]


def _reach(path: Path) -> None:
    """Raises the system's own error if a file cannot be reached now: `open_slide` makes a verdict of it."""
    if not path.is_dir():
        with path.open("rb") as stream:
            stream.read(1)
