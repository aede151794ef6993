"""Small manifests with slides of any name, and the labels beside them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from manifests import LocalManifests, Manifest, SlideRecord, write_manifest
from manifests.files import tiles_path

MakeSource = Callable[[Mapping[str, str]], LocalManifests]


@pytest.fixture
def make_source(tmp_path: Path) -> MakeSource:
    """Manifests of slides: slide_id to fingerprint; one that is empty is of a slide without tiles."""

    def make(fingerprints: Mapping[str, str]) -> LocalManifests:
        root = tmp_path / "manifests"
        for slide_id, fingerprint in fingerprints.items():
            num_tiles = 3 if fingerprint else 0
            record = SlideRecord(
                slide_id=slide_id,
                status="ok" if num_tiles else "empty",
                num_tiles=num_tiles,
                mpp_x=0.5,
                mpp_y=0.5,
                tile_px=32,
                tile_mpp=1.0,
                fingerprint=fingerprint,
            )
            zeros = np.zeros(num_tiles, np.int32)
            write_manifest(tiles_path(root, slide_id), Manifest(record, zeros, zeros, zeros.astype(np.float32)))
        return LocalManifests(root)

    return make
