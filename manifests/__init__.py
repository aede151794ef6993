"""Manifests: which tiles a slide has, where they lie, and which of them a step uses.

The only contract between tiler, trainer and services. Depends on pyarrow and numpy alone.
"""

from manifests.errors import ManifestError, SlidegradError
from manifests.files import read_manifest, write_manifest
from manifests.sampling import part_bounds, sample_tiles, shard
from manifests.schema import Manifest, SlideRecord
from manifests.source import LocalManifests, ManifestSource, open_manifests

__all__ = [
    "LocalManifests",
    "Manifest",
    "ManifestError",
    "ManifestSource",
    "SlideRecord",
    "SlidegradError",
    "open_manifests",
    "part_bounds",
    "read_manifest",
    "sample_tiles",
    "shard",
    "write_manifest",
]
