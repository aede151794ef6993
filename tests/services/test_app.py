"""The routes: formats, caching, problems, the gate."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from manifests import Manifest, SlideRecord, read_manifest, sample_tiles, shard
from manifests.files import tiles_path
from services.app import create_app
from services.logs import set_up_logging
from services.settings import Settings, is_loopback

ARROW = "application/vnd.apache.arrow.stream"
TOKEN = "sixteen-characters-or-more"


LIMITS = {"max_tiles": 2000, "max_slides": 50, "max_k": 5000}


def _client(manifests: Path, **settings: Any) -> TestClient:
    """A client on this machine; it asks for compression only where a test does."""
    app = create_app(Settings(manifests=manifests, **settings))
    return TestClient(app, base_url="http://127.0.0.1", headers={"Accept-Encoding": "identity"})


@pytest.fixture(scope="module")
def client(settled: Path) -> TestClient:
    return _client(settled, **LIMITS)


@pytest.fixture
def own(cohort: Path) -> TestClient:
    """Over a cohort that the test may change."""
    return _client(cohort, rescan_s=0.05)


def _table(content: bytes) -> pa.Table:
    return pa.ipc.open_stream(content).read_all()


def test_slides_page_by_page_in_json_and_arrow(client: TestClient) -> None:
    first = client.get("/v1/slides", params={"limit": 4}).json()
    assert (first["numberMatched"], first["numberReturned"], len(first["slides"])) == (6, 4, 4)
    assert [link["rel"] for link in first["links"]] == ["self", "next"]
    answer = client.get(first["links"][1]["href"], headers={"Accept": ARROW})
    rest = _table(answer.content)
    assert rest["slide_id"].to_pylist() == ["d_failed", "ö #5%"]
    paging = json.loads(rest.schema.metadata[b"slidegrad"])
    assert (paging["numberMatched"], paging["numberReturned"]) == (6, 2)
    assert [(link["rel"], link["type"]) for link in paging["links"]] == [("self", ARROW)]
    assert answer.headers["link"] == f'<{paging["links"][0]["href"]}>; rel="self"; type="{ARROW}"'
    failed = client.get("/v1/slides?status=failed&q=FAIL").json()["slides"]
    assert [slide["slide_id"] for slide in failed] == ["d_failed"]


def test_the_links_lead_through_all_pages_as_arrow_too(client: TestClient) -> None:
    for start, expected in (
        ("/v1/slides?limit=2&sort=-num_tiles&q=_&format=arrow", ["B_3", "a_1", "a_2", "c_empty", "d_failed"]),
        ("/v1/slides/B_3/tiles?limit=500&min_tissue=0.5&format=arrow", list(range(600, 1200))),
    ):
        seen: list[Any] = []
        href: str | None = start
        while href:
            answer = client.get(href)
            seen += _table(answer.content).column(0).to_pylist()
            links = _links(answer)
            assert links["self"] == href
            href = links.get("next")
        assert seen == expected


def _links(answer: httpx2.Response) -> dict[str, str]:
    """`rel` to address, as clients read the header."""
    return {rel: link["url"] for rel, link in answer.links.items() if rel}


def test_links_begin_with_the_proxys_path_whether_it_takes_it_away_or_not(cohort: Path) -> None:
    client = _client(cohort, root_path="/tiles")
    for prefix in ("", "/tiles"):
        links = client.get(prefix + "/v1/slides?limit=1").json()["links"]
        assert [link["href"].partition("?")[0] for link in links] == ["/tiles/v1/slides"] * 2
        assert client.get(prefix + "/healthz").status_code == 200
    assert client.get(client.get("/v1/slides?limit=1").json()["links"][1]["href"]).json()["slides"]
    assert 'route="/v1/slides",status="200"' in client.get("/metrics").text


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
    assert (body["numberReturned"], body["offset"], body["limit"]) == (9, 2, 9)
    assert "offset=11" in body["links"][1]["href"]
    table = _table(client.get(address, headers={"Accept": ARROW}).content)
    columns = pa.table(
        {name: pa.array(body["columns"][name], table.schema.field(name).type) for name in table.schema.names}
    )
    assert columns.equals(table)  # float32 as JSON is exact.
    collection = client.get(address + "&format=geojson").json()
    assert (collection["numberMatched"], collection["numberReturned"]) == (body["numberMatched"], 9)
    assert collection["slidegrad"]["manifest_hash"] == body["manifest_hash"]
    features = collection["features"]
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
    assert answer.headers["vary"] == "Accept, Accept-Encoding"


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
    own: TestClient, write_slide: Callable[..., Manifest]
) -> None:
    path = "/v1/slides/a_1/tiles"
    etags = [own.get(path, params={"format": name}).headers["etag"] for name in ("json", "arrow", "geojson")]
    assert len(set(etags)) == 3
    write_slide("a_1", 3, 1)
    fresh = own.get(path, headers={"If-None-Match": etags[0]})
    assert (fresh.status_code, fresh.json()["numberMatched"]) == (200, 3)


def test_an_answer_that_is_kept_is_given_only_while_it_is_current(
    own: TestClient, cohort: Path, write_slide: Callable[..., Manifest]
) -> None:
    for path in ("/v1/slides/a_1/tiles", "/v1/slides/a_1/sample?k=9", "/v1/slides/a_1"):
        write_slide("a_1", 10, 8)
        before = own.get(path)
        again = own.get(path)
        assert (again.content, again.headers["etag"]) == (before.content, before.headers["etag"])
        write_slide("a_1", 3, 1)
        after = own.get(path)
        assert after.json()["manifest_hash"] != before.json()["manifest_hash"]
        tiles_path(cohort, "a_1").unlink()
        assert own.get(path).status_code == 404
    assert own.get("/v1/slides?q=a_1").json()["numberMatched"] == 1
    with own:  # Starts what brings the list up to date.
        deadline = time.monotonic() + 30
        while own.get("/v1/slides?q=a_1").json()["numberMatched"] and time.monotonic() < deadline:
            time.sleep(0.02)
    assert own.get("/v1/slides?q=a_1").json()["numberMatched"] == 0
    hits = 'slidegrad_cache_hits_total{cache="answers"}'
    counted = next(line for line in own.get("/metrics").text.splitlines() if line.startswith(hits))
    assert float(counted.rpartition(" ")[2]) >= 2


@pytest.mark.parametrize(
    ("accepted", "is_gzip"),
    [
        ("", False),
        ("gzip", True),
        ("br, gzip;q=0.5", True),
        ("gzip;q=0", False),
        ("identity", False),
        ("identity, gzip;q=0.5", False),
        ("*", False),
        ("gzipped", False),
    ],
)
def test_answers_are_compressed_for_those_who_ask_with_an_etag_of_their_own(
    client: TestClient, accepted: str, is_gzip: bool
) -> None:
    for path in ("/v1/slides", "/v1/slides/B_3/tiles?format=arrow", "/v1/slides/B_3/sample?k=50&format=geojson"):
        plain = client.get(path)
        assert "content-encoding" not in plain.headers
        answer = client.get(path, headers={"Accept-Encoding": accepted})
        assert (answer.headers.get("content-encoding") == "gzip") is is_gzip
        assert answer.content == plain.content  # The client unpacks it.
        assert (answer.headers["etag"] == plain.headers["etag"]) is not is_gzip
        headers = {"Accept-Encoding": accepted, "If-None-Match": answer.headers["etag"]}
        again = client.get(path, headers=headers)
        assert (again.status_code, again.headers["etag"]) == (304, answer.headers["etag"])


def test_geojson_has_a_cap_of_its_own_and_says_so(settled: Path) -> None:
    client = _client(settled, max_geojson_tiles=500)
    body = client.get("/v1/slides/B_3/tiles?format=geojson").json()
    assert (body["numberMatched"], body["numberReturned"], body["slidegrad"]["limit"]) == (1200, 500, 500)
    rest = client.get(client.get(body["links"][1]["href"]).json()["links"][1]["href"]).json()
    assert (rest["numberReturned"], [link["rel"] for link in rest["links"]]) == (200, ["self"])
    for path in ("/v1/slides/B_3/tiles?limit=501", "/v1/slides/B_3/sample?k=501"):
        assert client.get(path).status_code == 200
        assert "is 501, at most 500 here" in client.get(path + "&format=geojson").json()["detail"]


def test_slides_carry_their_labels_where_there_are_some(cohort: Path, tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("slide_id,label,patient_id\nB_3,tumour,p1\na_1,,p2\n")
    client = _client(cohort, labels=file)
    found = client.get("/v1/slides?label=label:tumour").json()
    assert [(slide["slide_id"], slide["labels"]) for slide in found["slides"]] == [("B_3", {"label": "tumour"})]
    assert client.get("/v1/slides/B_3").json()["labels"] == {"label": "tumour"}
    assert client.get("/v1/slides/a_1").json()["labels"] == {}
    table = _table(client.get("/v1/slides?prefix=a_1&format=arrow").content)
    assert table["labels"].to_pylist() == [{"label": None}]
    assert client.get("/v1/slides?label=label:tumour&label=label:other").json()["numberMatched"] == 0
    assert "there are: label" in client.get("/v1/slides?label=patient_id:p1").json()["detail"]
    assert "p1" not in client.get("/v1/slides").text


def test_without_labels_none_are_told(client: TestClient) -> None:
    assert "labels" not in client.get("/v1/slides").json()["slides"][0]
    assert "there are: none" in client.get("/v1/slides?label=a:b").json()["detail"]


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
        ("/v1/slides/a_1/sample?k=5&part=3&num_parts=3", 400, "part is 3 of 3"),
        ("/v1/slides/a_1/sample?k=5&epoch=-1", 400, "epoch: "),
        ("/v1/slides/a_1/tiles?bbox=1,2,3", 400, "bbox: "),
        ("/v1/slides/a_1/tiles?min_tissue=1.5", 400, "min_tissue: "),
        ("/v1/slides/a_1/tiles?min_tissue=nan", 400, "min_tissue: "),
        ("/v1/slides/a_1/tiles?min_tisue=0.5", 400, "min_tisue: Extra inputs"),
        ("/v1/slides/a_1/tiles?limit=2001", 400, "limit is 2001, at most 2000"),
        ("/v1/slides/a_1/tiles?offset=-1", 400, "offset: "),
        ("/v1/slides/a_1?format=arrow", 400, "format: "),
        ("/v1/slides?format=geojson", 400, "format: "),
        ("/v1/slides/a_1/tiles?bbox=nan,0,1,1", 400, "bbox: "),
        ("/v1/slides/a_1/tiles?bbox=inf,0,1,1", 400, "bbox: "),
        ("/v1/slides/a_1/tiles?bbox=1_0,0,1,1", 400, "bbox: "),
        ("/v1/slides/a_1/tiles?bbox=%D9%A1,0,1,1", 400, "bbox: "),
        ("/v1/slides/a_1/tiles?bbox=0,0,9999999999,1", 400, "all within 2^31"),
        ("/v1/slides/a_1/tiles?bbox=5,0,5,1", 400, "expected x0 < x1"),
        ("/v1/slides/a_1/tiles?limit=" + "9" * 400, 400, "limit: "),
        ("/v1/slides/a_1/tiles?offset=" + "9" * 5000, 400, "offset: "),
        ("/v1/slides/a_1/sample?k=1&seed=" + "9" * 30, 400, "seed: "),
        ("/v1/slides/a_1/sample?k=" + "9" * 5000, 400, "k: "),
        ("/v1/slides/" + "x" * 9000, 404, "no slide"),
        ("/v1/slides/" + "%C3%A4" * 2000, 404, "no slide"),
        ("/v1/slides/%ED%A0%80", 404, "no slide"),
        ("/v1/slides/%00", 404, "no slide"),
        ("/v1/slides/..%5C..%5Cetc", 404, "no slide"),
        ("/v1/slides/%2Fetc%2Fpasswd/tiles", 404, "Not Found"),
        ("/v1/slides?label=label", 400, "label"),
        ("/v1/slides?sort=error", 400, "sort: "),
        ("/v1/slides?cursor=nonsense", 400, "begin at the first page"),
        ("/v1/slides?" + "label=a:b&" * 21, 400, "label: "),
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


def test_no_request_takes_a_body_and_headers_have_an_end(client: TestClient) -> None:
    for told in ({"content": b"x"}, {"content": iter([b"x", b"y"])}):
        refused = client.request("GET", "/v1/slides", **told)  # type: ignore[arg-type]
        assert (refused.status_code, refused.headers["connection"]) == (413, "close")
        assert refused.json()["detail"] == "no request here takes a body"
    for more in ({"headers": {"X-Long": "x" * 20_000}}, {"params": {"q": "x" * 20_000}}):
        assert client.get("/v1/slides", **more).status_code == 431  # type: ignore[arg-type]


def test_nothing_that_is_served_holds_a_path(own: TestClient, cohort: Path) -> None:
    tiles_path(cohort, "a_2").write_bytes(b"torn")
    damaged = own.get("/v1/slides/a_2/tiles")
    assert (damaged.status_code, damaged.json()["title"]) == (500, "Internal Server Error")
    paths = ("/v1/slides", "/v1/slides/d_failed", "/v1/slides/d_failed/tiles", "/v1/stats", "/metrics", "/openapi.json")
    everything = damaged.text + "".join(own.get(path).text for path in paths)
    arrow = b"".join(own.get(path, params={"format": "arrow"}).content for path in ("/v1/slides", paths[2]))
    for secret in (str(cohort), "Jane", ".svs", ".parquet"):
        assert secret not in everything
        assert secret.encode() not in arrow


def test_our_own_faults_are_told_without_a_trace(
    cohort: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging(as_json=False)

    def fail(_: object) -> bytes:
        raise ValueError("secret /data/Jane.svs")

    monkeypatch.setattr("services.app.summarise", fail)
    client = _client(cohort)
    answer = client.get("/v1/stats")
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert "secret" not in answer.text
    logged = capsys.readouterr().err
    assert "Jane" not in logged
    assert "ValueError: secret [path]" in logged
    assert 'route="/v1/stats",status="500"' in client.get("/metrics").text


def test_probes_and_metrics(own: TestClient, cohort: Path) -> None:
    assert own.get("/healthz").json() == {"status": "ok"}
    assert own.get("/readyz").json() == {"status": "ready"}
    for _ in range(3):
        own.get("/nothing-" + "x" * 50)
    assert 'slidegrad_http_requests_total{route="other",status="404"} 3' in own.get("/metrics").text
    assert 'route="/v1/slides/{slide_id}",status="404"} 1' in (own.get("/v1/slides/x"), own.get("/metrics"))[1].text
    (cohort / "tiles").rename(cohort / "gone")
    assert (own.get("/readyz").status_code, own.get("/healthz").status_code) == (503, 200)


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
def guarded(settled: Path, tmp_path: Path) -> TestClient:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    return TestClient(create_app(Settings(manifests=settled, token_file=file)), base_url="http://tiles.example")


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
