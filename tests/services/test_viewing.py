"""Thumbnails, areas and tile pixels: what the tiler and training see, and no path of any slide."""

import dataclasses
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from manifests import open_manifests
from manifests.catalog import Place, find_place, read_places, write_paths
from manifests.files import mask_path
from services.app import create_app
from services.settings import Settings
from tests.tiler.damage import harm
from tiler import open_slide, read_tiles
from tiler.archive import Job, tile_archive
from tiler.config import TilerConfig
from tiler.masks import read_mask

PENNED = "synth_0006"
CONFIG = TilerConfig(tile_px=32, mpp=1.0)


@pytest.fixture(scope="module")
def archive(small_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides that a test may harm: two of the cohort's, under a name that must not be told."""
    folder = tmp_path_factory.mktemp("archive") / "Jane Doe"
    folder.mkdir()
    for slide_id in ("synth_0000", PENNED):
        shutil.copy(small_cohort / "slides" / f"{slide_id}.svs", folder)
    return folder


@pytest.fixture(scope="module")
def root(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("viewed")
    (archive / "broken.svs").write_bytes(b"no slide")
    tile_archive(str(archive), out, CONFIG, Job(num_workers=0))
    return out


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[TestClient]:
    with TestClient(create_app(Settings(manifests=root, decode_processes=1)), base_url="http://127.0.0.1") as opened:
        yield opened


@pytest.fixture
def put_back(archive: Path) -> Iterator[Path]:
    """The archive; a test may do to it what it likes."""
    kept = {file: file.read_bytes() for file in archive.iterdir()}
    yield archive
    for file, content in kept.items():
        file.unlink(missing_ok=True)
        file.write_bytes(content)


def _open(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def test_the_thumbnail_is_the_tilers(client: TestClient, root: Path) -> None:
    answer = client.get(f"/v1/slides/{PENNED}/thumbnail")
    assert answer.headers["content-type"] == "image/jpeg"
    overview = read_mask(mask_path(root, PENNED)).overview
    assert float(answer.headers["slidegrad-px-l0"]) == overview.px_l0
    shown = np.asarray(_open(answer.content).convert("RGB"), np.float64)
    assert shown.shape == overview.thumbnail.shape
    assert np.abs(shown - overview.thumbnail).mean() < 6  # JPEG.


def test_areas_are_the_tilers_and_nothing_is_transparent(client: TestClient, root: Path) -> None:
    answer = client.get(f"/v1/slides/{PENNED}/areas")
    assert answer.headers["content-type"] == "image/png"
    picture, areas = _open(answer.content), read_mask(mask_path(root, PENNED)).areas
    assert np.array_equal(np.asarray(picture), areas)
    rgba = np.asarray(picture.convert("RGBA"))
    assert np.array_equal(rgba[..., 3] > 0, areas > 0)
    legend = {one["name"]: one for one in json.loads(answer.headers["slidegrad-legend"])}
    assert set(legend) == {"tissue", "pen"}
    for one in legend.values():
        where = areas == one["value"]
        assert one["share"] == pytest.approx(where.mean(), abs=1e-6)
        assert {"#" + bytes(colour).hex() for colour in rgba[where][:, :3]} == {one["colour"]}


def test_a_large_thumbnail_is_halved_and_says_so(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    from services import worker

    file = mask_path(root, PENNED)
    whole = worker.draw_pictures(file, PENNED)
    monkeypatch.setattr(worker, "_MAX_SIDE_PX", 40)
    half = worker.draw_pictures(file, PENNED)
    assert half.px_l0 == 2 * whole.px_l0
    sizes = [_open(content).size for content in (whole.thumbnail, half.thumbnail, half.areas)]
    assert sizes[1] == sizes[2] == tuple(-(-side // 2) for side in sizes[0])


@pytest.mark.parametrize("what", ["thumbnail", "areas", "tiles/3/pixels"])
def test_what_the_client_has_is_not_sent_again(client: TestClient, what: str) -> None:
    path = f"/v1/slides/{PENNED}/{what}"
    first = client.get(path)
    for known in (first.headers["etag"], f'"other", W/{first.headers["etag"]}'):
        again = client.get(path, headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert client.get(path, headers={"If-None-Match": '"other"'}).content == first.content
    assert client.head(path).headers["content-length"] == str(len(first.content))


def test_a_slide_that_was_tiled_again_shows_its_new_thumbnail(client: TestClient, root: Path) -> None:
    file, path = mask_path(root, PENNED), f"/v1/slides/{PENNED}/thumbnail"
    content, before = file.read_bytes(), client.get(path)
    try:
        shutil.copy(mask_path(root, "synth_0000"), file)
        after = client.get(path, headers={"If-None-Match": before.headers["etag"]})
        assert after.status_code == 200
        assert after.content == client.get("/v1/slides/synth_0000/thumbnail").content
        file.write_bytes(content[: len(content) // 2])
        torn = client.get(path)
        assert (torn.status_code, "--overwrite" in torn.json()["detail"]) == (500, True)
        assert str(root) not in torn.text
    finally:
        file.write_bytes(content)
    assert client.get(path).content == before.content


@pytest.mark.parametrize("row", [0, 7, 43])
def test_pixels_are_those_that_training_reads(client: TestClient, root: Path, archive: Path, row: int) -> None:
    manifest = open_manifests(root)[PENNED]
    assert len(manifest) == 44
    expected = read_tiles(open_slide(archive / f"{PENNED}.svs"), manifest, np.array([row]))[0]
    answer = client.get(f"/v1/slides/{PENNED}/tiles/{row}/pixels")
    assert answer.headers["content-type"] == "image/png"
    assert np.array_equal(np.asarray(_open(answer.content)), expected)


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("nobody/thumbnail", 404, "no slide 'nobody'"),
        ("broken/thumbnail", 404, "broken has no thumbnail"),
        ("broken/areas", 404, "broken has no thumbnail"),
        ("broken/tiles/0/pixels", 404, "has 0 tiles"),
        (f"{PENNED}/tiles/44/pixels", 404, "has 44 tiles, counted from 0; there is no tile 44"),
        (f"{PENNED}/tiles/-1/pixels", 400, "row: Input should be"),
        (f"{PENNED}/tiles/x/pixels", 400, "row: "),
        (f"{PENNED}/tiles/0/pixels?size=2", 400, "size: "),
        (f"{PENNED}/thumbnail?format=png", 400, "format: "),
        (f"{PENNED}/label", 404, "Not Found"),
        (f"{PENNED}/macro", 404, "Not Found"),
    ],
)
def test_every_refusal_is_a_problem_document(client: TestClient, path: str, status: int, words: str) -> None:
    answer = client.get(f"/v1/slides/{path}")
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, answer.json()["status"]) == (status, status)
    assert words in answer.json()["detail"]


def test_a_slide_that_changed_is_refused_until_it_is_the_same_again(client: TestClient, put_back: Path) -> None:
    file, path = put_back / f"{PENNED}.svs", f"/v1/slides/{PENNED}/tiles/5/pixels"
    content, before = file.read_bytes(), client.get(path).content
    shutil.copy(put_back / "synth_0000.svs", file)
    refused = client.get(path)
    assert (refused.status_code, "changed since it was tiled" in refused.json()["detail"]) == (409, True)
    file.write_bytes(content)
    assert client.get(path).content == before


def test_trouble_with_a_slide_is_told_without_its_file(
    client: TestClient, put_back: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    file, path = put_back / f"{PENNED}.svs", f"/v1/slides/{PENNED}/tiles/6/pixels"
    told = []
    file.write_bytes(b"II*\0 no slide")
    told.append((client.get(path), 409, "tile 6 cannot be read"))
    file.unlink()
    told.append((client.get(path), 503, "mount the archive there"))
    for answer, status, words in told:
        assert (answer.status_code, words in answer.json()["detail"]) == (status, True), answer.text
        assert not any(secret in answer.text for secret in ("Jane", ".svs", str(put_back)))
    assert not any(secret in caplog.text for secret in ("Jane", ".svs"))


def test_damage_under_a_tile_is_told(archive: Path, tmp_path: Path) -> None:
    harmed, out = tmp_path / "harmed", tmp_path / "out"
    harmed.mkdir()
    file = Path(shutil.copy(archive / f"{PENNED}.svs", harmed))
    for index in range(12):  # All compressed tiles of its finest level.
        harm(file, "second half zeros", index)
    tile_archive(str(harmed), out, dataclasses.replace(CONFIG, check="none"), Job(num_workers=0))
    with TestClient(create_app(Settings(manifests=out, decode_processes=1)), base_url="http://127.0.0.1") as client:
        answers = [client.get(f"/v1/slides/{PENNED}/tiles/{row}/pixels") for row in range(44)]
    refused = [answer.json() for answer in answers if answer.status_code != 200]
    assert refused
    for body in refused:
        assert (body["status"], "the file is damaged under tile" in body["detail"]) == (409, True)


def test_an_archive_that_moved_is_read_where_it_is_now(root: Path, put_back: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(put_back, moved)
    (put_back / f"{PENNED}.svs").unlink()
    settings = Settings(manifests=root, archive=moved, decode_processes=1)
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        assert client.get(f"/v1/slides/{PENNED}/tiles/0/pixels").status_code == 200


def test_where_slides_lie_may_be_unknown_or_not_readable(client: TestClient, root: Path) -> None:
    manifest = open_manifests(root)[PENNED]
    path = f"/v1/slides/{PENNED}/tiles/1/pixels"
    [kept] = (root / "paths").glob("*.parquet")
    content = kept.read_bytes()
    try:
        kept.write_bytes(b"torn")
        torn = client.get(path)
        assert (torn.status_code, "run it as that user" in torn.json()["detail"]) == (503, True)
        assert str(root) not in torn.text
        kept.unlink()
        unknown = client.get(path)
        assert (unknown.status_code, "tile it again" in unknown.json()["detail"]) == (404, True)
    finally:
        kept.write_bytes(content)
    assert len(manifest) == 44


def test_one_slides_place_is_that_among_all_places(root: Path) -> None:
    places = read_places(root)
    assert set(places) == {"broken", "synth_0000", PENNED}
    assert {slide_id: find_place(root, slide_id) for slide_id in places} == places
    assert find_place(root, "nobody") is None


def test_the_latest_list_tells_where_a_slide_lies(tmp_path: Path) -> None:
    places = {name: Place(f"/{name}", "s.svs") for name in ("first", "second")}
    for name, place in places.items():
        write_paths(tmp_path, name, {"s": place, "other": Place("/x", "o.svs")})
    for latest in ("first", "second"):
        os.utime(tmp_path / "paths" / f"{latest}.parquet", (2e9, 2e9))
        assert find_place(tmp_path, "s") == read_places(tmp_path)["s"] == places[latest]
        os.utime(tmp_path / "paths" / f"{latest}.parquet", (1e9, 1e9))


def test_the_http_process_loads_no_decoder_for_pictures(root: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from fastapi.testclient import TestClient\n"
        "from services.app import create_app\n"
        "from services.settings import Settings\n"
        "if __name__ == '__main__':\n"
        f"    app = create_app(Settings(manifests=Path({str(root)!r}), decode_processes=1))\n"
        "    with TestClient(app, base_url='http://127.0.0.1') as client:\n"
        f"        for what in ('thumbnail', 'tiles/0/pixels'):\n"
        f"            print(client.get('/v1/slides/{PENNED}/' + what).status_code)\n"
        "    print(sorted({'torch', 'cucim', 'openslide', 'cv2', 'tiler', 'trainer'} & set(sys.modules)))\n"
    )
    file = root.parent / "serve_once.py"
    file.write_text(script)
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split("\n")[:3] == ["200", "200", "[]"]
