"""Stand-ins for packages that reading slides and parsing flags need, and a benchmark of the model alone does not.

Imported before `trainer`, so that such a benchmark runs on a GPU machine where torch, timm and pyarrow are installed,
and those are not. Nothing is replaced that is there; what is called of a stand-in does nothing.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, cast
from unittest.mock import MagicMock

_NOT_NEEDED = frozenset(
    {"cucim", "cv2", "fsspec", "h5py", "imagecodecs", "openslide", "pebble", "pydicom", "simplejpeg", "skimage", "tyro"}
    | {"rich", "scipy", "tifffile", "zarr"}
)


# Whole packages alone: one that is there knows itself which of its parts are missing.
_MISSING = {name for name in _NOT_NEEDED if find_spec(name) is None}


class _StandIns(MetaPathFinder, Loader):
    """Finds what nobody else found."""

    def find_spec(self, name: str, _path: Sequence[str] | None, _target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in _MISSING else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return cast(ModuleType, MagicMock(name=spec.name))

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it."""


if _MISSING:
    sys.meta_path.append(_StandIns())
