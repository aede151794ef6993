"""The store: FEATURES/<key>/<xx>/<slide_id>/, a zarr v3 array (num_tiles, D) for each slide, beside <key>/key.json.

Many runs may fill it at once, without locks: a slide is written to a folder beside its place and renamed, so that it is
there as a whole or not at all; and that folder tells the others that somebody is at it. One thing to know before
changing it: nothing of a slide is believed that its attributes do not say.

One shard to a slide, so that a store of 100,000 slides has 200,000 files; inner chunks of 1,024 rows, so that a rank
reads its own. Blosc's lz4 with shuffle, measured on (45,056, 512) on one core of two: float32 features take 0.92 of
their size, those of an encoder in bf16 0.45; read at 0.9 GB/s, without compression at 0.7 to 1.1, with zstd at 0.2 to
0.6. Every chunk has a checksum.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from manifests.files import tiles_key, write_text
from trainer.errors import TrainerError
from trainer.features.key import digest_of

Standing = Literal["kept", "absent", "stale"]

_KEY_NAME = re.compile(r"[0-9a-f]{32}")
_KEY_FILE = "key.json"
_FORMAT = 1
_CHUNK_ROWS = 1024
_LEFT_BEHIND_S = 24 * 3600
"""Age at which a folder that nobody renamed is another's no more."""
_TAKEN = ("c", "0", "0")
"""Where zarr lays the one shard."""
_NUM_TRIES = 5


class FeatureStore:
    """The features of one key.

    Args:
        root: the user's folder, `machine.features`.
        words: what the key is made from (`key.describe_key`).
        num_features: width D.
        dtype: float32, or float64 of an encoder in float64.

    Raises:
        TrainerError: a key.json that tells of something else, or cannot be read.
    """

    def __init__(self, root: Path, words: dict[str, Any], num_features: int, dtype: str = "float32") -> None:
        self.root, self.key = root, digest_of(words)
        self.num_features, self.dtype = num_features, dtype
        self._folder = root / self.key
        self._about = {"format": _FORMAT, "key": self.key, "made_from": words}
        self._check_key()

    def begin(self) -> None:
        """Before slides are put: makes the folder, says what it is, and clears what was left behind long ago.

        Raises:
            OSError: nothing can be written there.
        """
        if not (self._folder / _KEY_FILE).exists():
            write_text(self._folder / _KEY_FILE, json.dumps(self._about, indent=1))
        for left in self._folder.glob("??/.*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > _LEFT_BEHIND_S:
                    shutil.rmtree(left)

    def look(self, slide_id: str, num_tiles: int, plan_hash: str) -> Standing:
        """Whether a slide's features are kept; stale: of another manifest, or not what should be there."""
        folder = self._place(slide_id)
        try:
            about = json.loads((folder / "zarr.json").read_bytes())
            is_whole = folder.joinpath(*_TAKEN).stat().st_size > 0  # zarr takes a missing file for empty space.
        except (FileNotFoundError, NotADirectoryError):
            return "stale" if folder.exists() else "absent"
        except ValueError:
            return "stale"
        if not isinstance(about, dict) or not is_whole:
            return "stale"
        expected = {
            "shape": [num_tiles, self.num_features],
            "data_type": self.dtype,
            "attributes": self._attributes(slide_id, num_tiles, plan_hash),
        }
        return "kept" if {name: about.get(name) for name in expected} == expected else "stale"

    def read(self, slide_id: str, num_tiles: int, plan_hash: str, rows: slice) -> NDArray[Any] | None:
        """A run of rows of a slide's features, (n, D); None if they are not kept.

        Raises:
            ValueError: they are damaged.
            OSError: they cannot be reached.
        """
        if self.look(slide_id, num_tiles, plan_hash) != "kept":
            return None
        return np.asarray(zarr.open_array(self._place(slide_id), mode="r")[rows])

    def discard(self, slide_id: str) -> None:
        """Removes what cannot be read, so that it is computed again."""
        with contextlib.suppress(OSError):
            self._clear(self._place(slide_id))

    def is_claimed(self, slide_id: str) -> bool:
        """Whether another seems to be computing a slide; it may have been killed."""
        place = self._place(slide_id)
        return any(place.parent.glob(f".{place.name[:80]}.*.tmp"))

    @contextlib.contextmanager
    def claim(self, slide_id: str) -> Iterator[Path]:
        """A folder beside the slide's place to put its features in; what is left of it afterwards is removed.

        Raises:
            OSError: nothing can be written there.
        """
        partial = self._beside(self._place(slide_id))
        partial.mkdir(parents=True)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def put(self, partial: Path, slide_id: str, features_ND: NDArray[Any], plan_hash: str) -> None:
        """Writes a slide's features into a folder from `claim` and gives that its name, unless another was first.

        Raises:
            OSError: they cannot be written; nothing has changed.
        """
        num_tiles, width = features_ND.shape
        num_rows = min(num_tiles, _CHUNK_ROWS)
        array = zarr.create_array(
            store=partial,
            shape=features_ND.shape,
            dtype=self.dtype,
            chunks=(num_rows, width),
            shards=(-(-num_tiles // num_rows) * num_rows, width),
            compressors=[BloscCodec(cname="lz4", clevel=1, shuffle="shuffle"), Crc32cCodec()],
            fill_value=float("nan"),
            attributes=self._attributes(slide_id, num_tiles, plan_hash),
            config={"write_empty_chunks": True},
        )
        array[:] = features_ND
        for file in (partial / "zarr.json", partial.joinpath(*_TAKEN)):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        final = self._place(slide_id)
        for _ in range(_NUM_TRIES):  # Of several that replace what is stale, one after another is first.
            if self.look(slide_id, num_tiles, plan_hash) == "kept":
                return
            self._clear(final)
            try:
                partial.rename(final)
                return
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
        raise OSError(f"slide {slide_id}: others replace its features all the time")

    def _clear(self, folder: Path) -> None:
        """Takes a folder away from its name, then removes it: nobody ever sees a part."""
        aside = self._beside(folder)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)

    def _attributes(self, slide_id: str, num_tiles: int, plan_hash: str) -> dict[str, Any]:
        counts = {"num_tiles": num_tiles, "num_features": self.num_features}
        return {"slide_id": slide_id, "manifest": plan_hash, "key": self.key, **counts}

    def _place(self, slide_id: str) -> Path:
        return self._folder / tiles_key(slide_id)

    def _beside(self, place: Path) -> Path:
        # Leading dot and trailing .tmp, as `manifests.files.atomic_path` has them.
        return place.with_name(f".{place.name[:80]}.{uuid.uuid4().hex}.tmp")

    def _check_key(self) -> None:
        file = self._folder / _KEY_FILE
        try:
            found = json.loads(file.read_bytes())
        except FileNotFoundError:
            return
        except ValueError:
            found = None
        except OSError as error:
            raise TrainerError(f"{file}: cannot be read ({error.strerror}); make it readable for you") from None
        if found != self._about:
            raise TrainerError(
                f"{file}: does not tell what the features beside it are of; remove that folder, or give another "
                "--machine.features"
            )


def check_root(root: Path) -> None:
    """Looks at the user's folder before a run begins; makes it if there is none.

    Raises:
        TrainerError: it is something else, or cannot be made or looked into.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        names = [name for name in os.listdir(root) if not name.startswith(".") and name != "lost+found"]
    except OSError as error:
        raise TrainerError(
            f"--machine.features {root}: cannot be used as a folder ({error.strerror}); give another"
        ) from None
    if names and not any(_KEY_NAME.fullmatch(name) for name in names):
        raise TrainerError(
            f"--machine.features {root}: holds other things than features ({min(names)}); give a folder of its own"
        )
