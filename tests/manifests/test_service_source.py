"""Manifests behind a real service are the folder's, row for row; whatever stands in between is told in a sentence."""

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from manifests import Manifest, ManifestError, SlideRecord, open_manifests, write_manifest
from manifests.answers import NotAServiceError, ServiceAwayError, ServiceClient
from manifests.catalog import rebuild_catalog
from manifests.files import read_hashed, tiles_path
from manifests.service import ServiceManifests, open_service
from services.app import create_app
from services.settings import Settings
from tests.serving import Answer, Meddling, closed_address, serving

SIZES = {"B_3": 3_000, "a_1": 80, "c_empty": 0, "d_failed": 0, "ö #5%": 9}
TOKEN = "sixteen-characters-or-more"
Meddle = Callable[[str, Answer], Answer]
Serve = Callable[..., str]


def write_slide(root: Path, slide_id: str, num_tiles: int, seed: int = 0) -> None:
    status = "failed" if slide_id.endswith("failed") else "ok" if num_tiles else "empty"
    scale = {"mpp_x": 0.25, "mpp_y": 0.2501, "tile_px": 224, "tile_mpp": 0.5, "read_w": 448, "read_h": 448}
    record = SlideRecord(slide_id=slide_id, status=status, num_tiles=num_tiles, fingerprint="f", **scale)  # type: ignore[arg-type]
    rng = np.random.default_rng(seed)
    x_l0, y_l0 = rng.integers(0, 2**31 - 1, (2, num_tiles), np.int32)
    manifest = Manifest(record, x_l0, y_l0, rng.random(num_tiles, np.float32))
    write_manifest(tiles_path(root, slide_id), manifest, '{"mpp": 0.5}')


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for slide_id, num_tiles in SIZES.items():
        write_slide(tmp_path / "M", slide_id, num_tiles)
    rebuild_catalog(tmp_path / "M")
    return tmp_path / "M"


@pytest.fixture
def serve(root: Path) -> Iterator[Serve]:
    """Starts a service over `root`, with settings, behind something that meddles with its answers."""
    with ExitStack() as stack:

        def start(meddle: Meddle = lambda _, answer: answer, **settings: Any) -> str:
            app = create_app(Settings(manifests=root, **settings))
            return stack.enter_context(serving(Meddling(app, meddle)))

        yield start


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits, which are not waited."""
    waits: list[float] = []
    monkeypatch.setattr("manifests.answers.time.sleep", waits.append)
    return waits


def assert_same(source: Any, root: Path) -> None:
    expected = open_manifests(root)
    assert source.catalog().equals(expected.catalog())
    assert list(source) == list(expected) == sorted(SIZES)
    for slide_id in expected:
        ours, theirs = source[slide_id], expected[slide_id]
        assert ours.slide == theirs.slide
        for name in ("x_l0", "y_l0", "tissue"):
            found, true = getattr(ours, name), getattr(theirs, name)
            assert (found.dtype, found.tobytes()) == (true.dtype, true.tobytes())


def remade(body: bytes, change: Callable[[pa.Table, dict[str, Any]], pa.Table]) -> bytes:
    """An Arrow answer with its table, or what is in its metadata, changed."""
    table = pa.ipc.open_stream(body).read_all()
    about = json.loads(table.schema.metadata[b"slidegrad"])
    table = change(table, about).replace_schema_metadata({b"slidegrad": json.dumps(about)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("pages", [{}, {"max_tiles": 700, "max_slides": 2}])
def test_a_service_answers_as_the_folder_does(serve: Serve, root: Path, pages: dict[str, int]) -> None:
    address = serve(**pages)
    source = open_manifests(Path(f"{address}/"))  # pathlib makes one slash of two.
    assert isinstance(source, ServiceManifests)
    assert_same(source, root)
    for slide_id in SIZES:
        (_, told), (_, true) = source.read_hashed(slide_id), read_hashed(tiles_path(root, slide_id))
        assert told == true == source.hash_of(slide_id)
    with pytest.raises(ManifestError, match=rf"^{address}: no slide .*nobody.* \(HTTP 404\)$"):
        source["nobody"]


def test_links_to_the_next_page_lead_to_no_other_server(serve: Serve, root: Path) -> None:
    def link(_: str, answer: Answer) -> Answer:
        """Links as a service behind a proxy tells them: it does not know by which name and path it is asked."""
        told = answer.headers.get("link", "").replace("</", "<http://elsewhere.invalid/hidden/")
        return Answer(answer.status, {**answer.headers, "link": told}, answer.body)

    assert_same(open_service(serve(link, max_slides=2, max_tiles=700)), root)


def test_many_threads_ask_at_once(serve: Serve, root: Path) -> None:
    source, expected = open_service(serve(max_tiles=700)), open_manifests(root)
    with ThreadPoolExecutor(8) as pool:
        for slide_id, found in zip([*SIZES] * 8, pool.map(source.__getitem__, [*SIZES] * 8), strict=True):
            assert found.to_table().equals(expected[slide_id].to_table())


def test_a_manifest_that_is_replaced_between_two_pages_is_read_anew(serve: Serve, root: Path) -> None:
    seeds = iter([1])

    def replace(path: str, answer: Answer) -> Answer:
        if "offset=" in path and "B_3" in path and (seed := next(seeds, None)):
            write_slide(root, "B_3", 3_000, seed)
        return answer

    source = open_service(serve(replace, max_tiles=1_000))
    manifest, found = source.read_hashed("B_3")
    true, expected = read_hashed(tiles_path(root, "B_3"))
    assert manifest.to_table().equals(true.to_table())
    assert (found, next(seeds, None)) == (expected, None)
    seeds = iter(range(2, 99))
    with pytest.raises(ManifestError, match="slide B_3 is being replaced all the time; ask again later"):
        source["B_3"]


def test_a_busy_service_is_asked_again_and_then_told(serve: Serve, root: Path, slept: list[float]) -> None:
    busy = [503, 429, 502]

    def refuse(_: str, answer: Answer) -> Answer:
        return Answer(busy.pop(0), {"retry-after": "7"}, b"") if busy else answer

    source = open_service(serve(refuse))
    assert slept == [7.0, 7.0, 7.0]
    assert_same(source, root)
    busy += [504] * 4
    with pytest.raises(ServiceAwayError, match=r"does not answer \(HTTP 504\); look whether the service runs there$"):
        source["a_1"]
    assert not busy


def test_nobody_there_is_told_after_some_attempts(slept: list[float]) -> None:
    address = closed_address()
    with pytest.raises(ServiceAwayError, match=rf"^{address}: does not answer \(.*refused\); look whether"):
        open_manifests(address)
    assert len(slept) == 3
    assert slept == sorted(slept)


def _cut(answer: Answer) -> Answer:
    return Answer(answer.status, answer.headers, answer.body[: len(answer.body) // 2])


def _swapped(answer: Answer) -> Answer:
    body = remade(answer.body, lambda table, _: table.take(pa.array([1, 0, *range(2, len(table))])))
    return Answer(answer.status, answer.headers, body)


def _short(answer: Answer) -> Answer:
    return Answer(answer.status, answer.headers, remade(answer.body, lambda table, _: table.slice(0, len(table) - 1)))


def _without_column(answer: Answer) -> Answer:
    return Answer(answer.status, answer.headers, remade(answer.body, lambda table, _: table.drop_columns("tissue")))


def _of_another(answer: Answer) -> Answer:
    def rename(table: pa.Table, about: dict[str, Any]) -> pa.Table:
        about["slide"]["slide_id"] = "b_2"
        return table

    return Answer(answer.status, answer.headers, remade(answer.body, rename))


def _without_hash(answer: Answer) -> Answer:
    def drop(table: pa.Table, about: dict[str, Any]) -> pa.Table:
        del about["manifest_hash"]
        return table

    return Answer(answer.status, answer.headers, remade(answer.body, drop))


def _without_end(answer: Answer) -> Answer:
    return Answer(answer.status, answer.headers | {"link": '</?offset=0>; rel="next"'}, answer.body)


def _page_of_a_proxy(_: Answer) -> Answer:
    return Answer(200, {"content-type": "text/html"}, b"<html>Log in</html>")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_cut, "the answer for v1/slides/a_1/tiles is damaged"),
        (_swapped, "damaged (not the rows 0 to 80, each once)"),
        (_short, "damaged (not the rows 0 to 80, each once)"),
        (_without_column, "damaged (columns ['row', 'x_l0', 'y_l0'])"),
        (_of_another, "damaged (it is slide b_2)"),
        (_without_hash, "damaged (no manifest_hash)"),
        (_without_end, "damaged (pages that do not end)"),
        (_page_of_a_proxy, "no tile-index service answers here (HTTP 200, text/html)"),
    ],
)
def test_an_answer_that_is_damaged_is_never_taken(
    serve: Serve, spoil: Callable[[Answer], Answer], message: str
) -> None:
    address = serve(lambda path, answer: spoil(answer) if "/a_1/" in path else answer)
    source = open_service(address)
    with pytest.raises(ManifestError) as caught:
        source["a_1"]
    assert message in str(caught.value)
    assert str(caught.value).startswith(address)
    assert "\n" not in str(caught.value)


def test_a_catalogue_that_is_damaged_is_never_taken(serve: Serve) -> None:
    address = serve(
        lambda _, answer: answer._replace(
            body=remade(answer.body, lambda table, _: table.take(pa.array([1, 0, *range(2, len(table))])))
        )
    )
    with pytest.raises(ManifestError, match=r"v1/slides is damaged \(a slide twice, or not in order\)"):
        open_manifests(address)


def test_the_token_comes_from_the_environment_and_is_in_no_message(
    serve: Serve, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    address = serve(token_file=file)
    with pytest.raises(ManifestError, match=r"asks for a token; set SLIDEGRAD_TOKEN, or SLIDEGRAD_TOKEN_FILE to"):
        open_manifests(address)
    monkeypatch.setenv("SLIDEGRAD_TOKEN", "another-of-sixteen-characters")
    with pytest.raises(ManifestError, match="does not take the token") as caught:
        open_manifests(address)
    assert "another-of-sixteen" not in str(caught.value)
    monkeypatch.setenv("SLIDEGRAD_TOKEN", TOKEN)
    assert_same(open_manifests(address), root)
    monkeypatch.setenv("SLIDEGRAD_TOKEN", "")
    monkeypatch.setenv("SLIDEGRAD_TOKEN_FILE", str(file))
    assert_same(open_manifests(address), root)


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "schlüssel"])
def test_what_can_be_no_token_is_refused_unseen(token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIDEGRAD_TOKEN", token)
    with pytest.raises(ManifestError, match=r"^SLIDEGRAD_TOKEN: a token holds no blank") as caught:
        open_manifests("http://127.0.0.1:1")
    assert token not in str(caught.value)
    monkeypatch.delenv("SLIDEGRAD_TOKEN")
    monkeypatch.setenv("SLIDEGRAD_TOKEN_FILE", str(tmp_path / "none"))
    with pytest.raises(ManifestError, match=r"^SLIDEGRAD_TOKEN_FILE .*none: No such file or directory$"):
        open_manifests("http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://me:secret@127.0.0.1:1", "http://127.0.0.1:1: expected http://HOST:PORT without user, password or"),
        ("http://127.0.0.1:1/?token=secret", "http://127.0.0.1:1: expected http://HOST:PORT without user, password"),
        ("http://127.0.0.1:port", "http://127.0.0.1:port: not an address"),
        ("ftp://127.0.0.1", "ftp://127.0.0.1: expected http://HOST:PORT"),
    ],
)
def test_what_is_no_address_is_refused_without_what_is_secret_in_it(address: str, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        ServiceClient(address)
    assert str(caught.value).startswith(message)
    assert "secret" not in str(caught.value)


@pytest.fixture
def files(root: Path) -> Iterator[tuple[str, list[Any]]]:
    """A web server with `root`'s files, and the headers that it was sent."""
    sent: list[Any] = []

    class Files(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(root))

        def log_message(self, *_: Any) -> None:
            sent.append(self.headers)

    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", sent
        server.shutdown()
        thread.join()


def test_a_web_server_with_files_is_told_from_a_service_and_gets_no_token(
    files: tuple[str, list[Any]], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, sent = files
    monkeypatch.setenv("SLIDEGRAD_TOKEN", TOKEN)
    assert_same(open_manifests(address), root)
    assert TOKEN not in str(sent)
    with pytest.raises(NotAServiceError, match=r"no tile-index service answers here .* `slidegrad serve` tells"):
        open_service(address)


def test_without_httpx_files_are_read_and_a_service_is_told_what_is_missing(
    files: tuple[str, list[Any]], serve: Serve, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = serve()
    monkeypatch.setitem(sys.modules, "httpx", None)
    assert_same(open_manifests(files[0]), root)
    with pytest.raises(ManifestError, match=r"no manifests here .* or a service \(which needs httpx; pip install"):
        open_manifests(address)
    with pytest.raises(ManifestError, match="to ask a service needs httpx; pip install httpx"):
        open_service(address)


def test_this_machine_is_never_asked_through_a_proxy(serve: Serve, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, closed_address())
    assert_same(open_manifests(serve()), root)
