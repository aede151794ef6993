"""A second run opens no slide that looks as it did, and tiles again what changed; a key hides the names everywhere."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import tiler.archive
import tiler.survey
from manifests import read_manifest
from manifests.catalog import read_places, rebuild_catalog
from manifests.compact import compact
from manifests.files import mask_path, tiles_path
from manifests.source import open_stored
from tests.tiler import formats
from tiler import open_slide
from tiler.archive import Job, Plan, Tiled, plan_archive, tile_archive
from tiler.config import TilerConfig, TissueConfig
from tiler.errors import TilerError
from tiler.pseudonym import pseudonym, read_key

CONFIG = TilerConfig(tile_px=32, mpp=2.0)


@pytest.fixture
def archive(small_cohort: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "archive"
    folder.mkdir()
    for i in range(4):
        shutil.copy(small_cohort / "slides" / f"synth_000{i}.svs", folder / f"{'abcd'[i]}.svs")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def _tile(archive: Path, out: Path, config: TilerConfig = CONFIG, **job: Any) -> Tiled:
    return tile_archive(str(archive), out, config, Job(num_workers=0, **job))


def _plan(archive: Path, out: Path, config: TilerConfig = CONFIG, **job: Any) -> Plan:
    return plan_archive(str(archive), out, config, Job(**job))


def _todo(plan: Plan) -> str:
    return "".join(task.slide_id for task in plan.survey.todo)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which slides' fingerprints a survey computed."""
    seen: list[str] = []
    compute = tiler.survey.fingerprint
    monkeypatch.setattr(tiler.survey, "fingerprint", lambda path: seen.append(path.stem) or compute(path))
    return seen


def test_a_second_run_opens_no_slide(archive: Path, out: Path, hashed: list[str]) -> None:
    assert _todo(_plan(archive, out)) == "abcd"
    assert not out.exists()  # A plan writes nothing.
    assert _tile(archive, out).num_new == 4
    assert _tile(archive, out).num_new == 0
    assert _todo(_plan(archive, out)) == ""
    assert hashed == []


def test_a_file_that_looks_different_is_hashed_and_tiled_only_if_it_is(
    archive: Path, out: Path, hashed: list[str]
) -> None:
    _tile(archive, out)
    os.utime(archive / "a.svs", (1, 1))
    shutil.copy(archive / "c.svs", archive / "b.svs")
    plan = _plan(archive, out)
    assert (_todo(plan), plan.survey.num_changed, sorted(hashed)) == ("b", 1, ["a", "b"])
    _tile(archive, out)
    hashed.clear()
    assert _todo(_plan(archive, out)) == ""
    assert hashed == []  # What was learnt was written down.


def test_a_change_that_keeps_size_and_time_is_found_with_rehash(archive: Path, out: Path, hashed: list[str]) -> None:
    _tile(archive, out)
    state = (archive / "a.svs").stat()
    with (archive / "a.svs").open("r+b") as stream:
        stream.seek(-2, os.SEEK_END)
        stream.write(b"\x12\x34")
    os.utime(archive / "a.svs", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert _todo(_plan(archive, out)) == ""
    assert _todo(_plan(archive, out, rehash=True)) == "a"
    assert sorted(hashed) == list("abcd")


def test_a_run_that_was_killed_before_it_wrote_down_anything_loses_nothing(
    archive: Path, out: Path, hashed: list[str]
) -> None:
    _tile(archive, out)
    for file in (out / "paths").iterdir():
        file.unlink()
    (out / "catalog.parquet").unlink()
    assert _todo(_plan(archive, out)) == ""
    assert sorted(hashed) == list("abcd")


def test_a_manifest_torn_later_is_made_again(archive: Path, out: Path) -> None:
    _tile(archive, out)
    tiles_path(out, "c").write_bytes(b"torn")
    assert _todo(_plan(archive, out)) == "c"
    assert _tile(archive, out).catalog.column("status").to_pylist() == ["ok"] * 4


def test_a_slide_of_several_files_is_looked_at_whole(tmp_path: Path, out: Path, hashed: list[str]) -> None:
    """A folder's own time does not change when a file deep inside it does."""
    archive = tmp_path / "zarrs"
    archive.mkdir()
    slide = formats.write_ome_zarr(archive / "a.ome.zarr", formats.draw_picture())
    config = TilerConfig(tile_px=64, min_tissue=0)
    assert _tile(archive, out, config).catalog.column("status").to_pylist() == ["ok"]
    assert _todo(_plan(archive, out, config)) == ""
    assert hashed == ["a.ome"]
    chunk = max((file for file in slide.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    chunk.write_bytes(chunk.read_bytes() + b"more")
    assert _todo(_plan(archive, out, config)) == "a"


def test_pseudonyms_do_not_come_to_lie_beside_the_names(archive: Path, out: Path) -> None:
    _tile(archive, out)
    with pytest.raises(TilerError, match="holds 4 of these slides under other ids; give another --out"):
        _tile(archive, out, key=b"0123456789abcdef")


def test_the_same_archive_mounted_elsewhere_is_the_same(archive: Path, out: Path, tmp_path: Path) -> None:
    _tile(archive, out)
    (tmp_path / "mount").mkdir()
    for slide in archive.iterdir():
        os.link(slide, tmp_path / "mount" / slide.name)
    assert _tile(tmp_path / "mount", out).num_new == 0


def test_an_outcome_that_does_not_arrive_is_told(archive: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiler.archive, "run_here", lambda *_: iter(()))  # As workers that write into another folder.
    with pytest.raises(TilerError, match="4 slides left no manifest here; do the workers see this folder"):
        _tile(archive, out)


def test_what_other_settings_would_replace_is_told(archive: Path, out: Path) -> None:
    _tile(archive, out)
    plan = _plan(archive, out, TilerConfig(tile_px=64, mpp=2.0))
    assert (_todo(plan), plan.survey.num_other_settings) == ("abcd", 4)
    assert plan.notes[0].startswith("4 manifests here were made with other settings; they will be made anew")
    assert _plan(archive, out).survey.num_other_settings == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"archive": ""}, "ARCHIVE is empty"),
        ({"out": Path("s3://bucket/M")}, "manifests are written to a folder of this machine"),
        ({"masks": Path("/")}, "no file there is called as a slide here"),
        ({"config": TilerConfig(tissue=TissueConfig(mask_values=(1,)))}, "give --masks too"),
    ],
)
def test_what_cannot_be_meant_is_told_before_anything_is_done(
    archive: Path, out: Path, change: dict[str, Any], sentence: str
) -> None:
    wanted = {"archive": str(archive), "out": out, "config": CONFIG, "masks": None} | change
    with pytest.raises(TilerError, match=sentence):
        plan_archive(wanted["archive"], wanted["out"], wanted["config"], Job(), masks=wanted["masks"])
    assert not out.exists()


def test_a_set_takes_no_more_slides(archive: Path, out: Path, tmp_path: Path) -> None:
    _tile(archive, out)
    compact(open_stored(out), tmp_path / "set")
    with pytest.raises(TilerError, match="a compacted set takes no more slides"):
        _plan(archive, tmp_path / "set")


def test_a_slide_that_fails_now_keeps_no_mask(archive: Path, out: Path) -> None:
    _tile(archive, out)
    assert mask_path(out, "a").exists()
    (archive / "a.svs").write_text("no slide")
    _tile(archive, out)
    assert not mask_path(out, "a").exists()


def test_shards_make_the_whole(archive: Path, out: Path) -> None:
    parts = [_tile(archive, out, shard=tiler.archive.Shard(i, 3)).catalog for i in range(3)]
    ids = [slide_id for part in parts for slide_id in part.column("slide_id").to_pylist()]
    assert sorted(ids) == list("abcd")
    assert len(rebuild_catalog(out)) == 4
    assert set(read_places(out)) == set("abcd")
    assert len(list((out / "paths").iterdir())) == 3
    assert _tile(archive, out).num_new == 0


def test_copies_are_told(archive: Path, out: Path) -> None:
    shutil.copy(archive / "a.svs", archive / "z.svs")
    (note,) = _tile(archive, out).notes
    assert note.startswith("2 slides are copies of one another in 1 groups, first a = z;")


def test_a_name_that_comes_up_twice_is_told_and_its_old_manifest_named(archive: Path, out: Path) -> None:
    for folder, name in (("one", "a"), ("two", "b")):
        (archive / folder).mkdir()
        (archive / f"{name}.svs").rename(archive / folder / f"{name}.svs")
    _tile(archive, out)
    shutil.copy(archive / "two" / "b.svs", archive / "two" / "a.svs")
    plan = _plan(archive, out)
    assert _todo(plan) == "one__atwo__a"
    assert plan.notes == [
        "2 file names appear more than once: their slide ids hold folders or suffixes too, first one__a",
        f"1 slides had other ids before, first 'a'; their old manifests are still in {out}",
    ]


def test_ids_of_the_users_table_that_match_nothing_are_told(archive: Path, out: Path) -> None:
    table = {"a": (0.5, 0.5), "nobody": (0.5, 0.5)}
    plan = plan_archive(str(archive), out, CONFIG, Job(), mpp=table)
    (note,) = plan.notes
    assert note.startswith("--mpp-csv: 1 of 2 ids match no slide of this archive, first 'nobody'; a slide id is")


def test_masks_from_outside_decide_alone_and_a_changed_one_is_noticed(archive: Path, out: Path, tmp_path: Path) -> None:
    for name in "bcd":
        (archive / f"{name}.svs").unlink()
    width, height = open_slide(archive / "a.svs").size_l0
    masks = tmp_path / "masks"
    masks.mkdir()
    picture = np.zeros((height // 8, width // 8), np.uint8)
    picture[:, : picture.shape[1] // 2] = 1  # The left half is tissue, whatever is there.
    cv2.imwrite(str(masks / "a.png"), picture)
    tile_archive(str(archive), out, CONFIG, Job(num_workers=0), masks=masks)
    manifest = read_manifest(tiles_path(out, "a"))
    assert len(manifest) > 0
    assert manifest.x_l0.max() < width / 2
    assert manifest.slide.num_rejected == manifest.slide.rejected_tissue
    assert tile_archive(str(archive), out, CONFIG, Job(num_workers=0), masks=masks).num_new == 0
    picture[:] = 1
    cv2.imwrite(str(masks / "a.png"), picture)
    assert tile_archive(str(archive), out, CONFIG, Job(num_workers=0), masks=masks).num_new == 1
    assert read_manifest(tiles_path(out, "a")).slide.num_rejected == 0
    assert tile_archive(str(archive), out, CONFIG, Job(num_workers=0)).num_new == 1  # Without masks: our own tissue.


def test_a_slide_without_a_mask_fails_and_its_name_stays_hidden(archive: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "b.geojson").write_text("{")
    job = Job(num_workers=0, key=b"0123456789abcdef")
    tiled = tile_archive(str(archive), out, CONFIG, job, masks=tmp_path / "masks")
    for row in tiled.catalog.to_pylist():
        assert row["status"] == "failed"
        assert re.match(rf"slide {row['slide_id']}: (no mask of that name in --masks|.*GeoJSON)", row["error"])
        assert str(tmp_path) not in row["error"]
        assert "b.geojson" not in row["error"]


def test_pseudonyms_are_everywhere_but_in_the_path_lists(archive: Path, out: Path, tmp_path: Path) -> None:
    for name in "abcd":
        (archive / f"{name}.svs").rename(archive / f"Jane_Doe_{name}.svs")
    (archive / "Jane_Doe_e.svs").write_text("no slide")
    (tmp_path / "key").write_text("0123456789abcdef0123456789abcdef\n")
    key = read_key(tmp_path / "key")
    tiled = _tile(archive, out, key=key)
    ids = tiled.catalog.column("slide_id").to_pylist()
    assert ids == sorted(pseudonym(key, f"Jane_Doe_{name}") for name in "abcde")
    assert all(len(slide_id) == 21 for slide_id in ids)
    for file in (path for path in out.rglob("*") if path.is_file() and path.parent.name != "paths"):
        assert b"Jane" not in file.read_bytes()
        assert "Jane" not in file.name
    assert _tile(archive, out, key=key).num_new == 1  # The one that failed.
    with pytest.raises(TilerError, match="its slide ids are pseudonyms; give --pseudonymize KEYFILE, or another --out"):
        _plan(archive, out)


def test_a_key_that_is_none_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(TilerError, match="make one with `openssl rand -hex 16 > KEYFILE`"):
        read_key(tmp_path / "key")
    (tmp_path / "key").write_text("short")
    with pytest.raises(TilerError, match="the key has 5 bytes, expected 16 to 64"):
        read_key(tmp_path / "key")


@pytest.mark.slow  # starts processes
def test_the_command_line_plans_shards_and_hides(
    archive: Path, out: Path, slidegrad: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("tile", archive, "--out", out, "--tile-px", 32, "--mpp", 2)
    ended = slidegrad(*words, "--dry-run")
    assert (ended.code, ended.result["to_tile"], out.exists()) == (0, 4, False)
    assert "would tile a" in ended.stderr
    for name, value in {"ID": 1, "MIN": 0, "MAX": 1, "STEP": 1, "COUNT": 2}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    ended = slidegrad(*words, "--shard", "auto")
    assert ended.code == 0
    assert "shard 1/2 (SLURM_ARRAY_TASK_ID=1" in ended.stderr
    assert 0 < ended.result["num_slides"] < 4
    assert "looking for damage (markers) took" in ended.stderr
    ended = slidegrad(*words, "--dask", "127.0.0.1:9")
    assert (ended.code, "no scheduler answers there" in ended.stderr) == (2, True)


@pytest.mark.slow  # starts a cluster
def test_a_dask_cluster_tiles_an_archive(archive: Path, out: Path, slidegrad: Callable[..., Any]) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        words = ("tile", archive, "--out", out, "--tile-px", 32, "--mpp", 2, "--dask", cluster.scheduler_address)
        ended = slidegrad(*words)
        assert ended.code == 0, ended.stderr
        assert (ended.result["ok"], ended.result["num_new"]) == (4, 4)
        assert slidegrad(*words).result["num_new"] == 0
