"""The store: whole slides or none, nothing believed that is not said, several writers at once."""

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import TrainerError
from trainer.features.store import FeatureStore, check_root

WIDTH = 6


def open_store(root: Path, **words: Any) -> FeatureStore:
    return FeatureStore(root, {"weights": "w", **words}, WIDTH)


def features(num_tiles: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(num_tiles, WIDTH)).astype(np.float32)


def put(store: FeatureStore, slide_id: str, values: np.ndarray[Any, Any], plan_hash: str = "h") -> None:
    with store.claim(slide_id) as partial:
        store.put(partial, slide_id, values, plan_hash)


def files(root: Path) -> list[str]:
    return sorted(file.name for file in root.rglob("*") if file.is_file() and file.name != "key.json")


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    found = open_store(tmp_path / "F")
    found.begin()
    return found


def test_what_is_put_is_read_bit_for_bit(store: FeatureStore) -> None:
    values = features(2500)
    values[:1024] = 0  # zarr would leave out a chunk of one value.
    values[1024, 0] = np.nan
    put(store, "Fall 1", values)
    assert store.look("Fall 1", 2500, "h") == "kept"
    for rows in (slice(0, 2500), slice(1000, 1030), slice(2499, 2500), slice(0, 0)):
        np.testing.assert_array_equal(store.read("Fall 1", 2500, "h", rows), values[rows])
    put(store, "b", np.full((3, WIDTH), np.nan, np.float32))  # Of an encoder that diverged.
    assert store.look("b", 3, "h") == "kept"


def test_a_slide_is_one_sharded_array_that_says_what_it_is(store: FeatureStore) -> None:
    put(store, "a", features(2500))
    (folder,) = [file.parent for file in store.root.glob("*/??/a/zarr.json")]
    array = zarr.open_array(folder, mode="r")
    assert (array.metadata.zarr_format, array.shape, array.dtype) == (3, (2500, WIDTH), np.float32)
    assert (array.chunks, array.shards) == ((1024, WIDTH), (3072, WIDTH))
    assert files(store.root) == ["0", "zarr.json"]
    expected = {"slide_id": "a", "manifest": "h", "key": store.key, "num_tiles": 2500, "num_features": WIDTH}
    assert dict(array.attrs) == expected
    about = json.loads((store.root / store.key / "key.json").read_text())
    assert about["made_from"] == {"weights": "w"}


def test_what_is_not_what_it_should_be_is_not_read(store: FeatureStore) -> None:
    assert store.look("a", 5, "h") == "absent"
    put(store, "a", features(5))
    for num_tiles, plan_hash in ((5, "other"), (6, "h")):
        assert store.look("a", num_tiles, plan_hash) == "stale"
        assert store.read("a", num_tiles, plan_hash, slice(0, 5)) is None
    (shard,) = store.root.glob("*/??/a/c/0/0")
    whole = shard.read_bytes()
    shard.write_bytes(b"")
    assert store.look("a", 5, "h") == "stale"
    shard.unlink()  # zarr alone would give what an empty array holds.
    assert store.read("a", 5, "h", slice(0, 5)) is None
    shard.write_bytes(whole)
    assert store.look("a", 5, "h") == "kept"
    for torn in (b"", b"[]", b'{"attributes"'):
        (shard.parents[2] / "zarr.json").write_bytes(torn)
        assert store.look("a", 5, "h") == "stale"
    put(store, "a", features(5))
    assert store.look("a", 5, "h") == "kept"


@given(at=st.integers(0, 2**30), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    store = open_store(tmp_path_factory.mktemp("flipped"))
    values = features(1500)
    put(store, "a", values)
    (shard,) = store.root.glob("*/??/a/c/0/0")
    damaged = bytearray(shard.read_bytes())
    damaged[at % len(damaged)] ^= 1 << bit
    shard.write_bytes(damaged)
    with pytest.raises(Exception):  # noqa: B017, PT011 - each codec has its own
        store.read("a", 1500, "h", slice(0, 1500))
    store.discard("a")
    assert store.look("a", 1500, "h") == "absent"
    store.discard("a")


def test_who_is_second_leaves_the_first_alone_and_replaces_what_is_stale(store: FeatureStore) -> None:
    put(store, "a", features(5, seed=1))
    put(store, "a", features(5, seed=2))
    np.testing.assert_array_equal(store.read("a", 5, "h", slice(0, 5)), features(5, seed=1))
    put(store, "a", features(7, seed=3), "new")
    np.testing.assert_array_equal(store.read("a", 7, "new", slice(0, 7)), features(7, seed=3))
    assert files(store.root) == ["0", "zarr.json"]


def test_a_claim_is_seen_by_others_and_leaves_nothing(store: FeatureStore) -> None:
    assert not store.is_claimed("a")
    with store.claim("a") as partial:
        assert store.is_claimed("a")
        assert not store.is_claimed("b")
        (partial / "zarr.json").write_text("{}")
        assert store.look("a", 5, "h") == "absent"
    assert not store.is_claimed("a")
    assert files(store.root) == []


def test_a_write_that_fails_leaves_what_was_there(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, "a", features(5))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("trainer.features.store.os.fsync", full)
    for slide_id, plan_hash in (("a", "new"), ("b", "h")):
        with pytest.raises(OSError, match="No space left"):
            put(store, slide_id, features(5, seed=1), plan_hash)
    np.testing.assert_array_equal(store.read("a", 5, "h", slice(0, 5)), features(5))
    assert store.look("b", 5, "h") == "absent"
    assert files(store.root) == ["0", "zarr.json"]


def test_what_a_killed_run_left_is_cleared_after_a_day(store: FeatureStore) -> None:
    left = [store.root / store.key / "aa" / f".{name}.{'0' * 32}.tmp" for name in ("old", "new")]
    for folder in left:
        (folder / "c").mkdir(parents=True)
    yesterday = time.time() - 25 * 3600
    os.utime(left[0], (yesterday, yesterday))
    store.begin()
    assert [folder.exists() for folder in left] == [False, True]


def test_other_words_are_another_key(store: FeatureStore) -> None:
    put(store, "a", features(5))
    other = open_store(store.root, precision="bf16")
    assert other.key != store.key
    assert other.look("a", 5, "h") == "absent"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}'])
def test_a_key_file_that_tells_of_something_else_is_refused(store: FeatureStore, text: str) -> None:
    (store.root / store.key / "key.json").write_text(text)
    with pytest.raises(TrainerError, match=r"key\.json: does not tell .* give another --machine\.features"):
        open_store(store.root)


def test_the_users_folder_is_looked_at_first(tmp_path: Path, store: FeatureStore) -> None:
    check_root(store.root)
    for name in ("lost+found", ".snapshot"):  # What a file system has of its own.
        (tmp_path / "new" / name).mkdir(parents=True)
    check_root(tmp_path / "new")
    check_root(tmp_path / "not/yet")
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "a.svs").touch()
    with pytest.raises(TrainerError, match=r"holds other things than features \(a\.svs\); give a folder of its own"):
        check_root(tmp_path / "slides")
    for place in (tmp_path / "slides" / "a.svs", Path("/proc/nowhere")):
        with pytest.raises(TrainerError, match="cannot be used as a folder"):
            check_root(place)
