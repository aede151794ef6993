"""The routes: formats, caching, problems, the gate."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from manifests import Manifest, SlideRecord, read_manifest, sample_tiles, shard
from manifests.files import tiles_path
from services.app import create_app
from services.gate import is_loopback
from services.settings import Settings

ARROW = "application/vnd.apache.arrow.stream"
TOKEN = "sixteen-characters-or-more"


@pytest.fixture
def client(cohort: Path) -> Iterator[TestClient]:
    settings = Settings(manifests=cohort, max_tiles=2000, max_slides=50, max_k=5000, max_draws_per_tile=100)
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as opened:
        yield opened


def _table(content: bytes) -> pa.Table:
    return pa.ipc.open_stream(content).read_all()


def test_slides_page_by_page_in_json_and_arrow(client: TestClient) -> None:
    first = client.get("/v1/slides", params={"limit": 4}).json()
    assert (first["num_matched"], len(first["slides"]), first["next_cursor"]) == (6, 4, "c_empty")
    rest = _table(client.get("/v1/slides", params={"cursor": "c_empty", "format": "arrow"}).content)
    assert rest["slide_id"].to_pylist() == ["d_failed", "ö #5%"]
    assert json.loads(rest.schema.metadata[b"slidegrad"])["next_cursor"] is None
    failed = client.get("/v1/slides?status=failed&q=FAIL").json()["slides"]
    assert [slide["slide_id"] for slide in failed] == ["d_failed"]


def test_one_slide(client: TestClient) -> None:
    slide = client.get("/v1/slides/" + quote("ö #5%")).json()
    assert (slide["slide_id"], slide["num_tiles"], slide["footprint_l0"]) == ("ö #5%", 9, [448, 448])
    assert re.fullmatch("[0-9a-f]{32}", slide["manifest_hash"])


def test_all_tiles_over_arrow_make_the_manifest_again(client: TestClient, cohort: Path) -> None:
    answer = client.get("/v1/slides/B_3/tiles", headers={"Accept": ARROW})
    assert answer.headers["content-type"] == ARROW
    table = _table(answer.content)
    there = Manifest.from_table(SlideRecord.from_json(table.schema.metadata[b"slidegrad"], "the answer"), table)
    here = read_manifest(tiles_path(cohort, "B_3"))
    assert there.slide == here.slide
    assert there.to_table().equals(here.to_table())
    assert table["row"].to_pylist() == list(range(1200))


def test_tiles_are_the_same_in_every_format(client: TestClient) -> None:
    address = "/v1/slides/B_3/tiles?bbox=500,500,3000,2000&min_tissue=0.1&offset=2&limit=9"
    body = client.get(address).json()
    assert (len(body["columns"]["row"]), body["offset"], body["next_offset"]) == (9, 2, 11)
    table = _table(client.get(address, headers={"Accept": ARROW}).content)
    assert table.to_pydict() == body["columns"]  # float32 as JSON is exact.
    features = client.get(address + "&format=geojson").json()["features"]
    assert [f["properties"]["row"] for f in features] == body["columns"]["row"]
    x, y = body["columns"]["x_l0"][0], body["columns"]["y_l0"][0]
    ring = [[x, y], [x + 448, y], [x + 448, y + 448], [x, y + 448], [x, y]]
    assert features[0]["geometry"] == {"type": "Polygon", "coordinates": [ring]}


def test_no_tiles_are_an_answer_in_every_format(client: TestClient) -> None:
    for slide_id in ("c_empty", "d_failed", "a_1"):
        address = f"/v1/slides/{slide_id}/tiles?bbox=90000,0,90001,1"
        assert client.get(address).json()["columns"]["row"] == []
        assert len(_table(client.get(address + "&format=arrow").content)) == 0
        assert client.get(address + "&format=geojson").json()["features"] == []


def test_samples_are_those_of_the_local_functions_and_name_their_manifest(client: TestClient, cohort: Path) -> None:
    manifest = read_manifest(tiles_path(cohort, "B_3"))
    rows = sample_tiles(len(manifest), k=1500, seed=-7, epoch=3, slide_id="B_3")
    address = "/v1/slides/B_3/sample?k=1500&seed=-7&epoch=3"
    parts = [client.get(f"{address}&part={part}&num_parts=11") for part in range(11)]
    for part, answer in enumerate(parts):
        mine = shard(rows, part=part, num_parts=11)
        assert answer.json()["columns"]["row"] == mine.tolist()
        assert answer.json()["columns"]["x_l0"] == manifest.x_l0[mine].tolist()
    whole = _table(client.get(address, headers={"Accept": ARROW}).content)
    assert np.array_equal(whole["row"].to_numpy(), rows)
    hashes = {answer.json()["manifest_hash"] for answer in parts}
    assert hashes == {client.get("/v1/slides/B_3").json()["manifest_hash"]}
    assert json.loads(whole.schema.metadata[b"slidegrad"])["manifest_hash"] in hashes


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "json"),
        ("*/*", "json"),
        ("text/html", "json"),
        (ARROW, "arrow"),
        (f"application/json;q=0.5, {ARROW}", "arrow"),
        (f"application/json, {ARROW};q=0.9", "json"),
        (f"{ARROW};q=0", "json"),
        ("application/geo+json", "geo+json"),
    ],
)
def test_the_accept_header_chooses(client: TestClient, accept: str, expected: str) -> None:
    answer = client.get("/v1/slides/a_1/tiles", headers={"Accept": accept})
    assert expected in answer.headers["content-type"]
    assert answer.headers["vary"] == "Accept"


@pytest.mark.parametrize(
    "path", ["/v1/slides", "/v1/slides/a_1", "/v1/slides/a_1/tiles", "/v1/slides/a_1/sample?k=5", "/v1/stats"]
)
def test_what_the_client_has_is_not_sent_again(client: TestClient, path: str) -> None:
    first = client.get(path)
    etag = first.headers["etag"]
    assert client.get(path).headers["etag"] == etag
    for known in (etag, f'"other", W/{etag}', "*"):
        again = client.get(path, headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert client.get(path, headers={"If-None-Match": '"other"'}).content == first.content


def test_formats_have_their_own_etag_and_a_new_manifest_a_new_one(
    client: TestClient, write_slide: Callable[..., Manifest]
) -> None:
    path = "/v1/slides/a_1/tiles"
    etags = [client.get(path, params={"format": name}).headers["etag"] for name in ("json", "arrow", "geojson")]
    assert len(set(etags)) == 3
    write_slide("a_1", 3, 1)
    fresh = client.get(path, headers={"If-None-Match": etags[0]})
    assert (fresh.status_code, fresh.json()["num_matched"]) == (200, 3)


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/v1/slides/nobody", 404, "no slide 'nobody'"),
        ("/v1/slides/nobody/tiles", 404, "no slide"),
        ("/v1/slides/..%2F..%2Fetc", 404, "Not Found"),
        ("/v1/slides/%2e%2e", 404, ""),
        ("/v1/slides/d_failed/sample?k=1", 409, "failed when it was tiled"),
        ("/v1/slides/c_empty/sample?k=1", 409, "no tissue tiles"),
        ("/v1/slides/a_1/sample", 400, "k: Field required"),
        ("/v1/slides/a_1/sample?k=0", 400, "k: "),
        ("/v1/slides/a_1/sample?k=x", 400, "k: "),
        ("/v1/slides/a_1/sample?k=5001", 400, "k is 5001, at most 5000"),
        ("/v1/slides/a_2/sample?k=101", 400, "k is 101, at most 100"),
        ("/v1/slides/a_1/sample?k=5&part=3&num_parts=3", 400, "part is 3 of 3"),
        ("/v1/slides/a_1/sample?k=5&epoch=-1", 400, "epoch: "),
        ("/v1/slides/a_1/tiles?bbox=1,2,3", 400, "bbox is '1,2,3'"),
        ("/v1/slides/a_1/tiles?min_tissue=1.5", 400, "min_tissue: "),
        ("/v1/slides/a_1/tiles?min_tissue=nan", 400, "min_tissue: "),
        ("/v1/slides/a_1/tiles?min_tisue=0.5", 400, "min_tisue: Extra inputs"),
        ("/v1/slides/a_1/tiles?limit=2001", 400, "limit is 2001, at most 2000"),
        ("/v1/slides/a_1/tiles?offset=-1", 400, "offset: "),
        ("/v1/slides/a_1?format=arrow", 400, "format is 'arrow'"),
        ("/v1/slides?limit=51", 400, "limit is 51, at most 50"),
        ("/v1/slides?status=fine", 400, "status: "),
        ("/v1/slides?format=xml", 400, "format: "),
        ("/nothing", 404, "Not Found"),
    ],
)
def test_every_refusal_is_a_problem_document(client: TestClient, path: str, status: int, words: str) -> None:
    answer = client.get(path)
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert (answer.status_code, body["status"], body["type"]) == (status, status, "about:blank")
    assert words in body["detail"]


def test_other_methods_are_a_problem_and_head_is_get_without_a_body(client: TestClient) -> None:
    refused = client.post("/v1/slides")
    assert (refused.status_code, refused.json()["status"], refused.headers["allow"]) == (405, 405, "GET")
    head, get = client.head("/v1/slides"), client.get("/v1/slides")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(get.content))


def test_nothing_that_is_served_holds_a_path(client: TestClient, cohort: Path) -> None:
    tiles_path(cohort, "a_2").write_bytes(b"torn")
    damaged = client.get("/v1/slides/a_2/tiles")
    assert (damaged.status_code, damaged.json()["title"]) == (500, "Internal Server Error")
    paths = ("/v1/slides", "/v1/slides/d_failed", "/v1/slides/d_failed/tiles", "/v1/stats", "/metrics", "/openapi.json")
    everything = damaged.text + "".join(client.get(path).text for path in paths)
    arrow = b"".join(client.get(path, params={"format": "arrow"}).content for path in ("/v1/slides", paths[2]))
    for secret in (str(cohort), "Jane", ".svs", ".parquet"):
        assert secret not in everything
        assert secret.encode() not in arrow


def test_our_own_faults_are_told_without_a_trace(cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> bytes:
        raise ValueError("secret /data/Jane.svs")

    monkeypatch.setattr("services.app.summarise", fail)
    client = TestClient(
        create_app(Settings(manifests=cohort)), base_url="http://localhost", raise_server_exceptions=False
    )
    answer = client.get("/v1/stats")
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert "secret" not in answer.text
    assert 'route="/v1/stats",status="500"' in client.get("/metrics").text


def test_probes_and_metrics(client: TestClient, cohort: Path) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}
    for _ in range(3):
        client.get("/nothing-" + "x" * 50)
    assert 'slidegrad_http_requests_total{route="other",status="404"} 3' in client.get("/metrics").text
    assert (
        'route="/v1/slides/{slide_id}",status="404"} 1' in (client.get("/v1/slides/x"), client.get("/metrics"))[1].text
    )
    (cohort / "catalog.parquet").unlink()
    (cohort / "tiles").rename(cohort / "gone")
    assert (client.get("/readyz").status_code, client.get("/healthz").status_code) == (503, 200)


def test_the_page_needs_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    files = sorted({"/", *re.findall(r"page/[a-z]+\.[a-z]+", page.text)})
    assert "page/main.js" in files
    for name in files:
        answer = client.get(name)
        assert (answer.status_code, answer.headers["x-content-type-options"]) == (200, "nosniff")
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; connect-src 'self';")
        assert "'unsafe" not in answer.headers["content-security-policy"]
        assert not re.search(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg)", answer.text)
        known = client.get(name, headers={"If-None-Match": answer.headers["etag"]})
        assert (known.status_code, known.content) == (304, b"")


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fapp.py", "%2e%2e/app.py", "../app.py", "", "main.js/x"])
def test_only_the_pages_own_files_are_served(client: TestClient, name: str) -> None:
    assert client.get(f"/page/{name}").status_code == 404


@pytest.fixture
def guarded(cohort: Path, tmp_path: Path) -> TestClient:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    return TestClient(create_app(Settings(manifests=cohort, token_file=file)), base_url="http://tiles.example")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/slides",
        "/v1/slides/a_1/tiles",
        "/v1/slides/a_1/thumbnail",
        "/v1/slides/a_1/tiles/0/pixels",
        "/v1/runs",
        "/v1/stats",
        "/metrics",
        "/openapi.json",
        "/page/nothing",
        "/nothing",
    ],
)
def test_a_token_guards_everything_but_probes_and_the_page(guarded: TestClient, path: str) -> None:
    wrong: list[dict[str, Any]] = [
        {},
        *({"Authorization": v} for v in ("Bearer", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer é")),
    ]
    for headers in wrong:
        answer = guarded.get(path, headers={k: v.encode("latin-1") for k, v in headers.items()})
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert answer.json()["detail"] == "a bearer token is needed"
    assert guarded.get(path, headers={"Authorization": f"bearer {TOKEN}"}).status_code in (200, 404)
    open_paths = ("/", "/page/main.js", "/page/style.css", "/healthz", "/readyz")
    assert [guarded.get(open_path).status_code for open_path in open_paths] == [200] * 5


def test_without_a_token_only_loopback_names_are_answered(client: TestClient) -> None:
    for host, status in (
        ("localhost:8080", 200),
        ("[::1]:80", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("[", 421),
    ):
        assert client.get("/v1/stats", headers={"Host": host}).status_code == status


def test_loopback_is_told_from_other_addresses() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    assert not any(
        is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.evil.example")
    )
