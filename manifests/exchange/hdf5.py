"""The HDF5 file of coordinates that CLAM and TRIDENT share: a dataset `coords` (n, 2) with attributes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from manifests.errors import ManifestError
from manifests.exchange.tiles import MAX_PX, ReadPlan, TileSet, whole_numbers
from manifests.files import atomic_path
from manifests.schema import Manifest

_PLAN = "slidegrad"
"""Attribute of `coords` with the read plan as JSON. Both tools pass over attributes they do not know."""
_CHUNK_ROWS = 4096
_LEAST = 1e-6
"""No size, scale or magnification is smaller."""


@dataclass(frozen=True)
class CoordsFile:
    """`coords` (n, 2), level-0 px; `attributes` of it; `tissue` (n,) or None."""

    coords: NDArray[np.int64]
    attributes: Mapping[str, Any]
    tissue: NDArray[np.float32] | None

    def number(self, name: str) -> float | None:
        """An attribute as a positive number below 2^31; None where there is none (TRIDENT writes the word None)."""
        try:
            value = float(np.ravel(self.attributes[name])[0])
        except (KeyError, IndexError, TypeError, ValueError):
            return None
        return value if _LEAST < value < MAX_PX else None

    def whole(self, name: str, file: Path) -> tuple[int, ...]:
        """An attribute as whole numbers.

        Raises:
            ManifestError: it holds something else.
        """
        values = np.ravel(self.attributes[name])
        try:
            numbers = values.astype(np.float64)
        except (TypeError, ValueError):
            numbers = np.full(1, np.nan)
        if not (np.isfinite(numbers) & (numbers == np.round(numbers)) & (np.abs(numbers) < MAX_PX)).all():
            raise ManifestError(f"{file.name}: {name} is {str(values.tolist())[:80]}, expected whole numbers")
        return tuple(numbers.astype(np.int64).tolist())

    def names(self, file: Path) -> tuple[str, ...]:
        """What the file calls its slide."""
        stem = file.stem
        name = self.attributes.get("name")
        names = [str(name)] if isinstance(name, str) else []
        return tuple(dict.fromkeys([*names, stem.removesuffix("_patches"), stem]))

    def planned(self, file: Path) -> TileSet | None:
        """The tiles by the plan that Slidegrad left; None in a file of another writer."""
        text = self.attributes.get(_PLAN)
        if text is None:
            return None
        try:
            values = json.loads(text)
        except (TypeError, ValueError):
            values = {}
        plan = ReadPlan.parse(values if isinstance(values, dict) else {}, file.name)
        return TileSet.planned(plan, self.coords[:, 0], self.coords[:, 1], self.tissue, self.names(file))


def write_coords(file: Path, manifest: Manifest, attributes: Mapping[str, Any]) -> None:
    """Writes one slide's corners, atomically, with the read plan and the tissue shares beside them.

    Both datasets can be appended to, as the tools' own can.
    """
    coords = np.stack([manifest.x_l0, manifest.y_l0], axis=1).astype(np.int64)
    rows = min(max(len(coords), 1), _CHUNK_ROWS)
    with atomic_path(file) as partial, h5py.File(partial, "w") as store:
        written = store.create_dataset("coords", data=coords, maxshape=(None, 2), chunks=(rows, 2))
        written.attrs.update(attributes)
        written.attrs[_PLAN] = ReadPlan.of(manifest.slide).to_json()
        store.create_dataset("tissue", data=manifest.tissue, maxshape=(None,), chunks=(rows,))


def read_coords(file: Path) -> CoordsFile:
    """Reads a file of coordinates.

    Raises:
        ManifestError: no such file, not HDF5, no dataset `coords` of that shape, or corners that are no whole px.
    """
    try:
        with h5py.File(file, "r") as store:
            if not isinstance(store.get("coords"), h5py.Dataset):
                raise ManifestError(f"{file.name}: no dataset coords in it, only {sorted(store)}")
            attributes = dict(store["coords"].attrs)
            coords = np.asarray(store["coords"])
            tissue = np.asarray(store["tissue"], np.float32) if _PLAN in attributes and "tissue" in store else None
    except FileNotFoundError:
        raise ManifestError(f"{file.name}: no such file") from None
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"{file.name}: not a readable HDF5 file ({type(error).__name__})") from None
    if coords.size == 0:
        coords = coords.reshape(0, 2)
    if coords.ndim != 2 or coords.shape[1] != 2 or (tissue is not None and tissue.shape != coords.shape[:1]):
        raise ManifestError(f"{file.name}: coords of shape {coords.shape}, expected (n, 2)")
    return CoordsFile(whole_numbers(coords, file.name), attributes, tissue)
