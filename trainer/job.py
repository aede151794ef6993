"""What every rank of a run starts from: the config, the cohort, the manifests, and where the slides are."""

import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from manifests import LocalManifests, ManifestSource, open_manifests
from manifests.catalog import read_paths
from manifests.source import local_path
from tiler.pool import share_memory
from trainer.cohort import Cohort
from trainer.comm import Comm
from trainer.config import RunConfig
from trainer.errors import TrainerError
from trainer.loading.loader import TileLoader
from trainer.topology import Topology

_MOST_BYTES = 8_000_000_000


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run as a rank sees it."""

    run: Path
    """The run's folder."""
    config: RunConfig
    cohort: Cohort
    root: Path
    """The manifests folder: where slides lie, and their thumbnails."""
    source: ManifestSource
    """Where tiles lie: this folder, or an index in front of it."""
    paths: dict[str, Path]
    """slide_id to slide file."""
    tile_px: int
    tile_mpp: float

    @classmethod
    def open(cls, run: Path, config: RunConfig, cohort: Cohort, index: ManifestSource | None = None) -> Self:
        """Opens the manifests and checks that they fit together.

        Args:
            run: the run's folder.
            config: the run's.
            cohort: likewise.
            index: what tells where tiles lie, in the place of the manifests folder.

        Raises:
            TrainerError: tiles of several sizes, or no local tree of manifests.
            ManifestError: no manifests.
        """
        manifests = config.machine.manifests
        assert manifests is not None, "set when the run is prepared"
        root, source = local_path(manifests), open_manifests(manifests) if index is None else index
        has_paths = isinstance(source, LocalManifests) or (index and root and (root / "paths").is_dir())
        if root is None or not has_paths:
            raise TrainerError(
                f"{manifests}: training needs the folder that `slidegrad tile` wrote, where slide paths are kept; "
                "got a compacted set, an address (that of a service is given as --index), or a folder without them"
            )
        wanted = {case.slide_id for case in cohort.cases}
        rows = [row for row in source.catalog().to_pylist() if row["slide_id"] in wanted]
        sizes = {(row["tile_px"], row["tile_mpp"]) for row in rows}
        if not sizes:
            raise TrainerError(f"{manifests}: none of the cohort's slides is here")
        if len(sizes) != 1:
            listed = ", ".join(f"{px} px at {mpp} mpp" for px, mpp in sorted(sizes))
            raise TrainerError(
                f"{manifests}: the cohort's manifests hold tiles of several kinds ({listed}); tile again"
            )
        tile_px, tile_mpp = sizes.pop()
        return cls(
            run=run,
            config=config,
            cohort=cohort,
            root=root,
            source=source,
            paths=read_paths(root, config.machine.archive),
            tile_px=tile_px,
            tile_mpp=tile_mpp,
        )

    def loader(
        self, comm: Comm, hold: Callable[[str], None] = lambda _: None, quarantined: Collection[str] = ()
    ) -> TileLoader:
        """A tile loader for one rank, with this rank's share of cores and memory unless the config says otherwise.

        Args:
            comm: this rank's end of the group.
            hold: see `ShardReader`.
            quarantined: likewise.
        """
        machine = self.config.machine
        most, budget = rank_memory(comm.topology), self.read_ahead_bytes(comm.topology)
        if machine.read_ahead_gb is not None and budget > most and comm.is_first_encoder:
            print(
                f"note: machine.read_ahead_gb is {machine.read_ahead_gb:g}, a rank's share of this machine's memory is "
                f"{most / 1e9:.0f} GB: reading ahead stops there",
                file=sys.stderr,
            )
        return TileLoader(
            self.source,
            self.paths,
            tile_px=self.tile_px,
            num_threads=machine.reader_threads or cores_per_rank(comm.topology),
            budget_bytes=min(budget, most),
            deadline_s=machine.read_deadline_s,
            device=comm.device,
            hold=hold,
            quarantined=quarantined,
        )

    def read_ahead_bytes(self, topology: Topology) -> int:
        """Bytes for the tiles that an encoder rank holds in memory."""
        given_gb = self.config.machine.read_ahead_gb
        return auto_budget(topology) if given_gb is None else round(given_gb * 1e9)


def rank_memory(topology: Topology) -> int:
    """Bytes of this machine's memory that are one encoder rank's share."""
    return share_memory(_encoders_on_node(topology))


def cores_per_rank(topology: Topology) -> int:
    """Cores for one encoder rank."""
    return max(1, len(os.sched_getaffinity(0)) // _encoders_on_node(topology))


def auto_budget(topology: Topology) -> int:
    """Bytes for the tiles of one encoder rank: a quarter of its share of this node's memory, at most 8 GB."""
    return min(rank_memory(topology) // 4, _MOST_BYTES)


def _encoders_on_node(topology: Topology) -> int:
    """As if all ranks of this node were encoders, as far as there are so many."""
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", topology.world_size))
    return max(1, min(on_node, len(topology.encoder_ranks)))
