"""Trees and sets answer alike from a folder, an object store and a web server; what is not there is told."""

import sys
import threading
import uuid
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from manifests import LocalManifests, Manifest, ManifestError, ManifestSource, SlideRecord, open_manifests
from manifests.catalog import rebuild_catalog
from manifests.compact import compact
from manifests.files import tiles_path, write_manifest
from manifests.folders import shown
from manifests.source import local_path, open_stored

SIZES = {"a ä": 0, "case_1": 5, "case_2": 3_000, "z": 40}


@pytest.fixture(scope="module", params=["tree", "set"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four slides, one of them failed."""
    tree, rng = tmp_path_factory.mktemp("tree"), np.random.default_rng(0)
    for slide_id, n in SIZES.items():
        record = SlideRecord(slide_id=slide_id, status="ok" if n else "failed", error="" if n else "cut", num_tiles=n)
        x_l0, y_l0 = rng.integers(0, 10**6, (2, n), np.int32)
        manifest = Manifest(record, x_l0, y_l0, rng.random(n, np.float32))
        write_manifest(tiles_path(tree, slide_id), manifest, '{"mpp": 0.5}')
    rebuild_catalog(tree)
    if request.param == "tree":
        return tree
    compact(open_stored(tree), tree.with_name("set"))
    return tree.with_name("set")


def _assert_same(source: ManifestSource, expected: ManifestSource) -> None:
    assert source.catalog().equals(expected.catalog())
    assert list(source) == list(expected) == list(SIZES)
    for slide_id in expected:
        ours, theirs = source[slide_id], expected[slide_id]
        assert ours.slide == theirs.slide
        assert ours.to_table().equals(theirs.to_table())
    with pytest.raises(ManifestError, match=r"no such manifest|no slide nobody"):
        source["nobody"]


@pytest.fixture
def memory(root: Path) -> Iterator[str]:
    """`root` copied into fsspec's memory store."""
    url = f"memory://{uuid.uuid4().hex}/manifests"
    store, place = fsspec.core.url_to_fs(url)
    for file in root.rglob("*.parquet"):
        store.pipe_file(f"{place}/{file.relative_to(root).as_posix()}", file.read_bytes())
    yield url
    store.rm(place.rsplit("/", 1)[0], recursive=True)


def test_an_object_store_answers_as_the_folder_does(root: Path, memory: str) -> None:
    _assert_same(open_manifests(memory), open_manifests(root))
    # What pathlib makes of an address given as a path.
    _assert_same(open_manifests(Path(memory)), open_manifests(root))


def test_the_tilers_config_is_read_with_the_manifest(root: Path, memory: str) -> None:
    for where in (root, memory):
        assert open_stored(where).read("case_1").tiler_json == '{"mpp": 0.5}'


def test_a_file_address_is_the_folder(root: Path, tmp_path: Path) -> None:
    _assert_same(open_manifests(root.as_uri()), open_manifests(root))
    spaced = tmp_path / "with space"
    assert local_path(spaced.as_uri()) == local_path(str(spaced)) == spaced
    (spaced / "tiles").mkdir(parents=True)
    source = open_manifests(spaced.as_uri())
    assert isinstance(source, LocalManifests)
    assert source.root == spaced


class _Quiet(SimpleHTTPRequestHandler):
    """Python's web server: no byte ranges."""

    asked: ClassVar[list[str]] = []

    def log_message(self, *_: Any) -> None:
        self.asked.append(self.path)


class _Ranges(_Quiet):
    """A web server that knows byte ranges."""

    sent: ClassVar[list[int]] = []

    def do_GET(self) -> None:
        file = Path(self.translate_path(self.path))
        if "Range" not in self.headers or not file.is_file():
            return super().do_GET()
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        data = file.read_bytes()[first : last + 1]
        self.send_response(206 if data else 416)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.sent.append(len(data))
        return None


@pytest.fixture
def serve(root: Path) -> Iterator[Any]:
    """Starts a web server over `root` with a handler; gives its address."""
    servers = []

    def start(handler: type[SimpleHTTPRequestHandler]) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(root)))
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("handler", [_Quiet, _Ranges])
def test_a_web_server_answers_as_the_folder_does(root: Path, serve: Any, handler: type[_Quiet]) -> None:
    _assert_same(open_manifests(f"{serve(handler)}/"), open_manifests(root))


def test_of_a_large_file_only_what_is_needed_is_fetched(root: Path, serve: Any) -> None:
    _Ranges.sent.clear()
    source = open_manifests(serve(_Ranges))
    source["case_1"]
    source["case_1"]
    shards = list(root.glob("shards/*"))
    if not shards:  # A tree's files are small.
        assert _Ranges.sent == []
        return
    group = pq.read_metadata(shards[0]).row_group(0)
    tiles = sum(group.column(i).total_compressed_size for i in range(3))
    assert _Ranges.sent[1:] == [tiles, tiles]


def test_a_server_without_ranges_is_asked_for_a_shard_once(root: Path, serve: Any) -> None:
    _Quiet.asked.clear()
    source = open_manifests(serve(_Quiet))
    for slide_id in source:
        source[slide_id]
    if (root / "shards").is_dir():
        assert len([path for path in _Quiet.asked if path.startswith("/shards/")]) == 1
    else:
        asked = [path for path in _Quiet.asked if not path.startswith("/v1/")]  # Whether it is a service.
        assert len(asked) == 1 + len(SIZES)


@pytest.mark.parametrize(("code", "num_asked"), [(503, 4), (429, 4), (403, 2)])
def test_a_busy_server_is_asked_again_and_then_told(
    serve: Any, monkeypatch: pytest.MonkeyPatch, code: int, num_asked: int
) -> None:
    asked = []

    class Busy(_Quiet):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(code)

    monkeypatch.setattr("manifests.folders.time.sleep", lambda _: None)
    with pytest.raises(ManifestError, match=rf"\(HTTP {code}[ )]"):
        open_manifests(serve(Busy))
    assert len(asked) == num_asked


def test_nothing_there_is_told_in_a_sentence(serve: Any, tmp_path: Path) -> None:
    for address in (f"memory://{uuid.uuid4().hex}", f"{serve(_Quiet)}/elsewhere"):
        with pytest.raises(ManifestError, match=r"no manifests here \(no catalog.parquet\); give the address"):
            open_manifests(address)
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ManifestError, match=r"no manifests here .* run `slidegrad tile"):
            open_manifests(folder)
    (tmp_path / "shards").mkdir()
    with pytest.raises(ManifestError, match=r"half a set .* copy it whole"):
        open_manifests(tmp_path)


def _tree(root: Path, *slide_ids: str) -> Path:
    none = np.zeros(0, np.int32)
    for slide_id in slide_ids:
        record = SlideRecord(slide_id=slide_id, status="empty")
        write_manifest(tiles_path(root, slide_id), Manifest(record, none, none, none.astype(np.float32)))
    return root


@pytest.mark.parametrize(
    "error", [None, PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")]
)
def test_a_catalogue_that_a_killed_tiler_left_behind_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError | None
) -> None:
    rebuild_catalog(_tree(tmp_path, "a", "gone"))
    _tree(tmp_path, "late")
    tiles_path(tmp_path, "gone").unlink()
    before = (tmp_path / "catalog.parquet").read_bytes()

    def refuse(_: Path) -> None:
        raise error

    if error is not None:
        monkeypatch.setattr("manifests.source.rebuild_catalog", refuse, raising=False)
    source = open_manifests(tmp_path)
    assert list(source) == source.catalog()["slide_id"].to_pylist() == ["a", "late"]
    assert ((tmp_path / "catalog.parquet").read_bytes() == before) == (error is not None)


def test_opening_writes_nothing_where_nothing_changed(tmp_path: Path) -> None:
    rebuild_catalog(_tree(tmp_path, "a", "torn"))
    tiles_path(tmp_path, "torn").write_bytes(b"PAR1")
    open_manifests(tmp_path)
    before = (tmp_path / "catalog.parquet").read_bytes()
    first, second = open_manifests(tmp_path), open_manifests(tmp_path)
    assert (tmp_path / "catalog.parquet").read_bytes() == before
    assert first.catalog().equals(second.catalog(), check_metadata=True)


def test_manifests_that_are_not_listed_are_named(tmp_path: Path) -> None:
    torn = tiles_path(_tree(tmp_path, "a", "torn"), "torn")
    torn.write_bytes(b"PAR1")
    source = open_manifests(tmp_path)
    assert isinstance(source, LocalManifests)
    assert (list(source), source.unlisted()) == (["a"], [torn])


def test_a_manifest_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_stored(_tree(tmp_path, "a"))

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ManifestError, match=r"a\.parquet: cannot be read \(Permission denied\)$"):
        source.read("a")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(
        ManifestError, match=r"^s3://bucket/m: addresses with s3:// need one more package: pip install s3fs$"
    ):
        open_manifests("s3://bucket/m")
    with pytest.raises(ManifestError, match=r"^unheard://of: not an address that can be read"):
        open_manifests("unheard://of")


def test_a_store_that_refuses_is_told_in_a_sentence(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bytes:
        raise RuntimeError("no credentials")

    monkeypatch.setattr(fsspec.filesystem("memory"), "cat_file", refuse)
    with pytest.raises(ManifestError, match=r"cannot read catalog.parquet \(RuntimeError: no credentials\)"):
        open_manifests(memory)


def test_passwords_and_tokens_are_not_shown() -> None:
    assert shown("https://me:secret@host:8080/a/b?token=secret") == "https://host:8080/a/b"
    assert shown("s3://bucket/a") == "s3://bucket/a"


def test_an_older_catalogue_gets_the_defaults_of_what_it_did_not_know(root: Path, memory: str) -> None:
    store, place = fsspec.core.url_to_fs(f"{memory}/catalog.parquet")
    with pq.ParquetFile(root / "catalog.parquet") as opened:
        table = opened.read()
    with store.open(place, "wb") as stream:
        pq.write_table(table.drop_columns(["rejected_blur", "mpp_source"]), stream)
    _assert_same(open_manifests(memory), open_manifests(root))
    with store.open(place, "wb") as stream:
        pq.write_table(table.drop_columns(["status"]), stream)
    with pytest.raises(ManifestError, match=r"catalog.parquet: no column status; not a catalogue"):
        open_manifests(memory)
