"""Runs that are shown: what `slidegrad heatmap` wrote, of this manifest, under this folder, and nothing else."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from manifests import Manifest
from services.app import create_app
from services.errors import ServiceError
from services.index import TileIndex
from services.runs import RunShelf
from services.settings import Settings
from tests.trainer.heatmaps.made_values import ORIGIN, made_values
from trainer.heatmaps.values import write_values

WriteValues = Callable[..., Path]
AWKWARD = "ö #5%"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Where the runs lie."""
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.fixture
def write(cohort: Path, runs: Path) -> WriteValues:
    """Writes a run's values of a slide, as `slidegrad heatmap` does."""
    from manifests.files import disk_name

    index = TileIndex(cohort)

    def written(run: str, slide_id: str, *, hash_then: str | None = None, **changes: Any) -> Path:
        source = index.manifest(slide_id)
        parts = np.linspace(-1, 1, len(source.manifest), dtype=np.float32)
        parts[:1] = np.nan
        origin = dataclasses.replace(ORIGIN, manifest_hash=source.hash if hash_then is None else hash_then)
        file = runs / run / "heatmaps" / f"{disk_name(slide_id)}.parquet"
        write_values(file, source.manifest, made_values(parts, slide_id=slide_id, origin=origin, **changes))
        return file

    return written


@pytest.fixture
def client(cohort: Path, runs: Path) -> Iterator[TestClient]:
    with TestClient(create_app(Settings(manifests=cohort, runs=runs)), base_url="http://127.0.0.1") as opened:
        yield opened


def test_runs_are_listed_and_those_that_know_a_slide(client: TestClient, write: WriteValues, runs: Path) -> None:
    assert client.get("/v1/runs").json() == {"runs": []}
    write("second", "a_1")
    write("first", AWKWARD)
    write("first", "a_1")
    (runs / "empty").mkdir()
    (runs / ".hidden" / "heatmaps").mkdir(parents=True)
    (runs / "notes.txt").touch()
    assert client.get("/v1/runs").json() == {"runs": [{"run": "first"}, {"run": "second"}]}
    assert client.get("/v1/runs", params={"slide_id": AWKWARD}).json() == {"runs": [{"run": "first"}]}
    assert client.get("/v1/runs", params={"slide_id": "a_2"}).json() == {"runs": []}


def test_values_come_by_tile_row_with_null_for_tiles_not_seen(client: TestClient, write: WriteValues) -> None:
    write("first", AWKWARD)
    answer = client.get("/v1/runs/first/slides/ö %235%25")
    body = answer.json()
    assert (body["run"], body["slide_id"], body["checkpoint"], body["output"]) == (
        "first",
        AWKWARD,
        "epoch_0003",
        "tumour",
    )
    assert (body["predictions"], body["base"], body["total"]) == ([0.25, 0.75], -0.25, 1.0986)
    expected = np.linspace(-1, 1, 9, dtype=np.float32)
    assert body["columns"]["row"] == list(range(9))
    assert body["columns"]["contribution"][0] is None
    assert np.array_equal(np.array(body["columns"]["contribution"][1:], np.float32), expected[1:])
    assert body["columns"]["attention"][0] is None
    known = client.get("/v1/runs/first/slides/ö %235%25", headers={"If-None-Match": answer.headers["etag"]})
    assert (known.status_code, known.content) == (304, b"")


def test_a_number_that_is_none_is_null(client: TestClient, write: WriteValues) -> None:
    write("first", "a_1", predictions=(None, None), base=None, total=None, what="")
    body = client.get("/v1/runs/first/slides/a_1").json()
    assert (body["predictions"], body["base"], body["what"]) == ([None, None], None, "")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nobody/slides/a_1", "no run 'nobody'"),
        ("..%2Ffirst/slides/a_1", "Not Found"),
        ("%2e%2e/slides/a_1", ""),
        (".hidden/slides/a_1", "no run '.hidden'"),
        ("first/slides/a_2", "run first has no heatmap of slide a_2"),
        ("first/slides/nobody", "no slide 'nobody'"),
        ("first/slides/..%2Fa_1", "Not Found"),
    ],
)
def test_other_runs_and_slides_are_unknown(client: TestClient, write: WriteValues, path: str, words: str) -> None:
    write("first", "a_1")
    write(".hidden", "a_1")
    answer = client.get(f"/v1/runs/{path}")
    assert answer.status_code == 404
    assert words in answer.json()["detail"]


def test_values_of_an_earlier_manifest_are_refused(
    client: TestClient, write: WriteValues, write_slide: Callable[..., Manifest]
) -> None:
    write("first", "a_1")
    write_slide("a_1", 10, 8, tissue_mm2=1.0)  # As many tiles; another manifest.
    answer = client.get("/v1/runs/first/slides/a_1")
    assert (answer.status_code, answer.headers["content-type"]) == (409, "application/problem+json")
    assert "belong to an earlier manifest" in answer.json()["detail"]


def test_damaged_values_are_told_without_the_path(client: TestClient, write: WriteValues, runs: Path) -> None:
    file = write("first", "a_1")
    for content in (b"PAR1 torn", file.read_bytes()[:-200], b""):
        file.write_bytes(content)
        answer = client.get("/v1/runs/first/slides/a_1")
        assert answer.status_code == 500
        assert "run `slidegrad heatmap` again" in answer.json()["detail"]
        assert str(runs) not in answer.text


def test_what_a_symlink_leads_out_to_is_not_there(
    client: TestClient, write: WriteValues, runs: Path, tmp_path: Path
) -> None:
    file = write("first", "a_1")
    outside = tmp_path / "outside"
    (outside / "heatmaps").mkdir(parents=True)
    file.rename(outside / "heatmaps" / file.name)
    (runs / "linked").symlink_to(outside)
    file.symlink_to(outside / "heatmaps" / file.name)
    assert client.get("/v1/runs").json() == {"runs": [{"run": "first"}]}
    for run in ("linked", "first"):
        assert client.get(f"/v1/runs/{run}/slides/a_1").status_code == 404
    assert client.get("/v1/runs", params={"slide_id": "a_1"}).json() == {"runs": []}


def test_a_file_under_another_slides_name_is_not_taken(client: TestClient, write: WriteValues) -> None:
    file = write("first", "a_1")
    file.rename(file.with_name("a_2.parquet"))
    assert client.get("/v1/runs/first/slides/a_2").status_code == 404


def test_one_runs_folder_is_a_run_itself(cohort: Path, write: WriteValues, runs: Path) -> None:
    write("first", "a_1")
    shelf = RunShelf(runs / "first")
    assert shelf.names() == ["first"]
    assert len(shelf.values("first", TileIndex(cohort).manifest("a_1")).attention) == 80


def test_without_a_folder_there_are_no_runs_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    assert RunShelf(None).names("a_1") == []
    with pytest.raises(ServiceError, match=r"--runs .*: no folder"):
        RunShelf(tmp_path / "nothing")
