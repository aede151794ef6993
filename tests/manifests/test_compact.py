"""A set holds what the tree holds, bit for bit; it is the old one or the new one, never half of either."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from manifests import Manifest, ManifestError, SlideRecord, open_manifests, write_manifest
from manifests.catalog import rebuild_catalog
from manifests.compact import LEFTOVER_S, compact
from manifests.files import tiles_path
from manifests.sets import SET_KEY
from manifests.source import is_set, open_stored

NUM_SLIDES = 11


def _write(tree: Path, number: int, *, shift: int = 0) -> None:
    """Slide `number` with as many tiles; without any where it divides by four."""
    n = number if number % 4 else 0
    record = SlideRecord(slide_id=f"slide_{number:02d}_ä", status="ok" if n else "empty", num_tiles=n, mpp_x=number / 3)
    x_l0 = np.arange(n, dtype=np.int32) * number + shift
    manifest = Manifest(record, x_l0, x_l0[::-1].copy(), np.linspace(0, 1, n, dtype=np.float32))
    write_manifest(tiles_path(tree, record.slide_id), manifest, f'{{"min_tissue": {number % 2}}}')


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("manifests.compact.SLIDES_PER_SHARD", 3)
    for number in range(NUM_SLIDES):
        _write(tmp_path / "tree", number)
    rebuild_catalog(tmp_path / "tree")
    return tmp_path / "tree"


def _content(folder: Path) -> dict[str, str]:
    """Every file, hidden ones too, with the digest of its bytes."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _age(folder: Path) -> None:
    """Makes all shards of a set so old that nobody is at work on them."""
    for shard in (folder / "shards").iterdir():
        os.utime(shard, (time.time() - LEFTOVER_S - 60,) * 2)


def _assert_same(one: Path, other: Path) -> None:
    a, b = open_stored(one), open_stored(other)
    assert a.catalog().equals(b.catalog())
    assert list(a) == list(b)
    for slide_id in a:
        ours, theirs = a.read(slide_id), b.read(slide_id)
        assert ours.manifest.slide == theirs.manifest.slide
        assert ours.manifest.to_table().equals(theirs.manifest.to_table())
        assert ours.tiler_json == theirs.tiler_json


def test_a_set_holds_what_the_tree_holds(tree: Path, tmp_path: Path) -> None:
    done = compact(open_stored(tree), tmp_path / "set")
    assert (done.num_slides, done.num_tiles, done.num_shards) == (11, sum(range(11)) - 4 - 8, 4)
    assert done.num_bytes == sum(file.stat().st_size for file in (tmp_path / "set").rglob("*.parquet"))
    assert is_set(tmp_path / "set")
    assert not is_set(tree)
    _assert_same(tree, tmp_path / "set")


def test_slides_of_what_the_tiler_wrote_are_the_same_too(small_manifests: Path, tmp_path: Path) -> None:
    compact(open_stored(small_manifests), tmp_path / "set")
    _assert_same(small_manifests, tmp_path / "set")


def test_equal_manifests_give_equal_bytes_from_wherever_they_come(tree: Path, tmp_path: Path) -> None:
    compact(open_stored(tree), tmp_path / "one")
    compact(open_stored(tree), tmp_path / "two")
    compact(open_stored(tmp_path / "one"), tmp_path / "three")
    compact(open_stored(tmp_path / "two"), tmp_path / "two")  # Over itself.
    expected = _content(tmp_path / "one")
    assert len(expected) == 5
    for name in ("two", "three"):
        assert _content(tmp_path / name) == expected


def test_a_set_of_slides_without_tiles_has_no_shards(tmp_path: Path) -> None:
    _write(tmp_path / "tree", 4)
    done = compact(open_stored(tmp_path / "tree"), tmp_path / "set")
    assert (done.num_slides, done.num_tiles, done.num_shards) == (1, 0, 0)
    _assert_same(tmp_path / "tree", tmp_path / "set")


def test_slides_are_found_in_any_order_with_few_footers_in_memory(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manifests.sets._MAX_FOOTERS", 1)
    compact(open_stored(tree), tmp_path / "set")
    source = open_manifests(tmp_path / "set")
    ids = list(source) * 2
    np.random.default_rng(0).shuffle(ids)
    for slide_id in ids:
        assert source[slide_id].slide.slide_id == slide_id
        assert len(source[slide_id]) == (int(slide_id[6:8]) if int(slide_id[6:8]) % 4 else 0)
    assert len(source._footers) == 1  # type: ignore[attr-defined]


def test_progress_tells_every_slide(tree: Path, tmp_path: Path) -> None:
    told: list[int] = []
    compact(open_stored(tree), tmp_path / "set", progress=told.append)
    assert told == [NUM_SLIDES] * NUM_SLIDES


def test_a_second_run_replaces_the_set_and_its_shards(tree: Path, tmp_path: Path) -> None:
    compact(open_stored(tree), tmp_path / "set")
    before = _content(tmp_path / "set")
    _age(tmp_path / "set")
    _write(tree, 1, shift=5)
    _write(tree, 99)
    compact(open_stored(tree), tmp_path / "set")
    _assert_same(tree, tmp_path / "set")
    after = _content(tmp_path / "set")
    assert len(after) == len(before) == 5
    assert len(before.keys() & after.keys()) == 3  # The catalogue and two shards that did not change.


def test_a_reader_of_the_old_set_never_gets_tiles_of_the_new(tree: Path, tmp_path: Path) -> None:
    compact(open_stored(tree), tmp_path / "set")
    reader, old = open_manifests(tmp_path / "set"), open_manifests(tree)["slide_01_ä"].to_table()
    _write(tree, 1, shift=5)
    compact(open_stored(tree), tmp_path / "set")
    assert reader["slide_01_ä"].to_table().equals(old)  # For a day.
    _age(tmp_path / "set")
    compact(open_stored(tree), tmp_path / "set")
    with pytest.raises(ManifestError, match=r"shards/\w+\.parquet is missing; copy the whole set again"):
        reader["slide_01_ä"]
    assert reader["slide_10_ä"].to_table().equals(open_manifests(tree)["slide_10_ä"].to_table())


def _stop_at(number: int) -> Callable[[int], None]:
    calls = iter(range(1, number + 1))

    def stop(_: int) -> None:
        if next(calls) == number:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("number", [1, 3, 4, NUM_SLIDES])
def test_ctrl_c_leaves_nothing_or_the_old_set(tree: Path, tmp_path: Path, number: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        compact(open_stored(tree), tmp_path / "set", progress=_stop_at(number))
    assert not (tmp_path / "set").exists()
    compact(open_stored(tree), tmp_path / "set")
    before = _content(tmp_path / "set")
    _write(tree, 1, shift=5)
    with pytest.raises(KeyboardInterrupt):
        compact(open_stored(tree), tmp_path / "set", progress=_stop_at(number))
    assert _content(tmp_path / "set") == before


def test_ctrl_c_between_shards_and_catalogue_leaves_the_old_set(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compact(open_stored(tree), tmp_path / "set")
    before = _content(tmp_path / "set")
    _write(tree, 1, shift=5)
    rename = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target.name == "catalog.parquet" and target.parent.name == "set":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        compact(open_stored(tree), tmp_path / "set")
    after = _content(tmp_path / "set")
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"shards"}  # Old enough, they go.


@pytest.mark.parametrize("stops", [False, True])
def test_a_second_run_at_the_same_time_takes_no_shard_of_the_first(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    out = tmp_path / "set"
    compact(open_stored(tree), out)
    _write(tree, 1, shift=5)
    rename, is_first = Path.replace, True

    def replace(self: Path, target: Path) -> Path:
        """Just before the first run names its catalogue another one comes and goes; it goes on, or is stopped."""
        nonlocal is_first
        if target == out / "catalog.parquet" and is_first:
            is_first = False
            if not stops:
                _write(tree, 1, shift=7)
            compact(open_stored(tree), out)
            if stops:
                raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    if stops:
        with pytest.raises(KeyboardInterrupt):
            compact(open_stored(tree), out)
    else:
        compact(open_stored(tree), out)
    source = open_manifests(out)
    assert [len(source[slide_id]) for slide_id in source] == source.catalog()["num_tiles"].to_pylist()


def test_old_shards_that_a_later_catalogue_names_stay(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "set", Path.replace
    compact(open_stored(tree), out)
    theirs = {name: (out / name).read_bytes() for name in _content(out)}

    def replace(self: Path, target: Path) -> Path:
        """Another run's catalogue comes right after ours, and its shards are old by a clock that is wrong."""
        rename(self, target)
        if target == out / "catalog.parquet":
            for name, data in theirs.items():
                (out / name).write_bytes(data)
            _age(out)
        return target

    _write(tree, 1, shift=5)
    monkeypatch.setattr(Path, "replace", replace)
    compact(open_stored(tree), out)
    source = open_manifests(out)
    assert len([source[slide_id] for slide_id in source]) == NUM_SLIDES


def test_what_a_killed_run_left_is_built_over(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "set" / "shards").mkdir(parents=True)
    for name in ("00", "01"):
        (tmp_path / "set" / "shards" / f"{name}.parquet").write_bytes(b"PAR1")
    os.utime(tmp_path / "set" / "shards" / "00.parquet", (time.time() - LEFTOVER_S - 60,) * 2)
    (tmp_path / "set" / ".compact.00.tmp").mkdir()
    compact(open_stored(tree), tmp_path / "set")
    _assert_same(tree, tmp_path / "set")
    assert not (tmp_path / "set" / "shards" / "00.parquet").exists()
    assert (tmp_path / "set" / "shards" / "01.parquet").exists()
    assert (tmp_path / "set" / ".compact.00.tmp").exists()  # Young: it may be another run, at work.


def test_nothing_but_a_set_is_written_over(tree: Path, tmp_path: Path) -> None:
    source = open_stored(tree)
    before = _content(tree)
    with pytest.raises(ManifestError, match="holds something other than a set; give a new folder"):
        compact(source, tree)
    assert _content(tree) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(ManifestError, match="a file; give a folder for the set"):
        compact(open_stored(tree), tmp_path / "file")


def test_slides_that_the_catalogue_does_not_know_yet_are_not_left_out(tree: Path, tmp_path: Path) -> None:
    _write(tree, 50)
    assert compact(open_stored(tree), tmp_path / "set").num_slides == NUM_SLIDES + 1


def test_one_manifest_gone_and_one_new_are_seen(tree: Path, tmp_path: Path) -> None:
    source = open_stored(tree)
    tiles_path(tree, "slide_02_ä").unlink()
    _write(tree, 50)
    assert compact(source, tmp_path / "set").num_slides == NUM_SLIDES
    assert {"slide_50_ä"} == set(open_manifests(tmp_path / "set")) - {f"slide_{n:02d}_ä" for n in range(NUM_SLIDES)}


def test_a_manifest_that_cannot_be_read_stops_it(tree: Path, tmp_path: Path) -> None:
    torn = tiles_path(tree, "slide_05_ä")
    torn.write_bytes(torn.read_bytes()[:-9])
    for _ in range(2):
        with pytest.raises(
            ManifestError, match=r"slide_05.*\.parquet: a manifest that cannot be used, one of 1; `slid"
        ):
            compact(open_stored(tree), tmp_path / "set")
        (tree / "catalog.parquet").unlink()
    assert not (tmp_path / "set").exists()


def test_nothing_is_no_set(tmp_path: Path) -> None:
    (tmp_path / "tree" / "tiles").mkdir(parents=True)
    with pytest.raises(ManifestError, match="nothing to compact"):
        compact(open_stored(tmp_path / "tree"), tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_half_copied_set_names_the_shard_that_is_missing(tree: Path, tmp_path: Path) -> None:
    compact(open_stored(tree), tmp_path / "set")
    source = open_stored(tmp_path / "set")
    lost = source.contents.shards[1].file  # type: ignore[attr-defined]
    (tmp_path / "set" / lost).unlink()
    source = open_stored(tmp_path / "set")
    with pytest.raises(ManifestError, match=rf"set: {lost} is missing; copy the whole set again, or compact anew$"):
        source["slide_03_ä"]
    assert len(source["slide_10_ä"]) == 10


def test_a_cut_shard_and_an_unknown_slide_are_told(tree: Path, tmp_path: Path) -> None:
    compact(open_stored(tree), tmp_path / "set")
    for shard in (tmp_path / "set" / "shards").iterdir():
        shard.write_bytes(shard.read_bytes()[:-50])
    source = open_manifests(tmp_path / "set")
    with pytest.raises(ManifestError, match=r"slide slide_01_ä not readable in shards/"):
        source["slide_01_ä"]
    with pytest.raises(ManifestError, match="no slide nobody in this set"):
        source["nobody"]


@pytest.mark.parametrize("name", ["set_version", "schema_version"])
def test_a_set_of_a_newer_version_is_refused(tree: Path, tmp_path: Path, name: str) -> None:
    compact(open_stored(tree), tmp_path / "set")
    file = tmp_path / "set" / "catalog.parquet"
    table = pq.read_table(file)
    members = json.loads(table.schema.metadata[SET_KEY]) | {name: 99}
    pq.write_table(table.replace_schema_metadata({SET_KEY: json.dumps(members)}), file)
    with pytest.raises(ManifestError, match=r"catalog\.parquet: a set written by a newer Slidegrad"):
        open_manifests(tmp_path / "set")
