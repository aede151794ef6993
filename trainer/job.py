"""What every rank of a run starts from: the config, the cohort, the manifests, and where the slides are."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from manifests import LocalManifests, ManifestSource, open_manifests
from manifests.catalog import read_paths
from trainer.cohort import Cohort
from trainer.config import RunConfig
from trainer.errors import TrainerError
from trainer.loader import TileLoader
from trainer.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run as a rank sees it."""

    run: Path
    """The run's folder."""
    config: RunConfig
    cohort: Cohort
    source: ManifestSource
    paths: dict[str, Path]
    """slide_id to slide file."""
    tile_px: int

    @classmethod
    def open(cls, run: Path, config: RunConfig, cohort: Cohort) -> Self:
        """Opens the manifests and checks that they fit together.

        Raises:
            TrainerError: tiles of several sizes, or no local tree of manifests.
            ManifestError: no manifests.
        """
        manifests = config.machine.manifests
        assert manifests is not None, "set when the run is prepared"
        source = open_manifests(manifests)
        if not isinstance(source, LocalManifests):
            raise TrainerError(
                f"{manifests}: training needs the folder that `slidegrad tile` wrote, where slide paths are kept; "
                "got a compacted set or an address"
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
        paths = read_paths(source.root, config.machine.archive)
        return cls(run=run, config=config, cohort=cohort, source=source, paths=paths, tile_px=sizes.pop()[0])

    def loader(self, topology: Topology) -> TileLoader:
        """A tile loader for one rank, with this rank's share of the cores unless the config says otherwise."""
        machine = self.config.machine
        threads = machine.reader_threads or cores_per_rank(topology)
        return TileLoader(self.source, self.paths, num_threads=threads, read_ahead=machine.read_ahead)


def cores_per_rank(topology: Topology) -> int:
    """Cores for one encoder rank, as if all ranks of this node were encoders but the aggregator."""
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", topology.world_size))
    encoders = max(1, min(on_node, topology.num_encoders))
    return max(1, len(os.sched_getaffinity(0)) // encoders)
