"""Requests that no library would send, byte by byte against the running service; slowness alone is in test_protocol."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.services.running import serving
from tests.services.test_protocol import Service, _read_all, _wait_until

TAIL = b" HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
GOOD = b"GET /v1/slides/a_1" + TAIL
TILES = b"/v1/slides/a_1/tiles?"
NUM_IDLE = 300


@pytest.fixture(scope="module")
def service(settled: Path) -> Iterator[Service]:
    """With a secret beside the manifests, for those who climb."""
    (settled.parent / "secret.parquet").write_text("secret")
    variables = {"SLIDEGRAD_HEADER_S": "2", "SLIDEGRAD_STALLED_S": "2"}
    with serving(str(settled), **variables) as (process, address):
        yield Service(process.pid, address)


def _ask(service: Service, sent: bytes) -> bytes:
    """All that comes back until the connection ends."""
    with service.connect() as client:
        client.sendall(sent)
        return _read_all(client)


def _get(target: bytes) -> bytes:
    return b"GET " + target + TAIL


def _with(headers: bytes, body: bytes = b"", method: bytes = b"GET") -> bytes:
    return method + b" /v1/slides/a_1 HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n" + headers + b"\r\n" + body


CLIMBING = {
    "dots": b"/v1/slides/../../secret.parquet",
    "dots below a slide": b"/v1/slides/a_1/../../../../secret/tiles",
    "encoded dots": b"/v1/slides/%2e%2e%2f%2e%2e%2fsecret",
    "twice encoded dots": b"/v1/slides/%252e%252e%252f%252e%252e%252fsecret",
    "backslashes": b"/v1/slides/..\\..\\secret",
    "dots that are longer than need be": b"/v1/slides/%c0%ae%c0%ae%c0%afsecret",
    "full-width dots": b"/v1/slides/%ef%bc%8e%ef%bc%8e%ef%bc%8fsecret",
    "an end in the middle": b"/v1/slides/a_1%00.parquet",
    "an absolute path": b"/v1/slides//etc/passwd",
    "a file's address": b"file:///etc/passwd",
    "a half escape": b"/v1/slides/%",
    "an escape of nothing": b"/v1/slides/%zz/tiles",
    "a right-to-left mark": b"/v1/slides/%e2%80%aea_1",
    "half a character": b"/v1/slides/%c3",
    "a long id": b"/v1/slides/" + b"%f0%9f%92%a9" * 900,
}
NUMBERS = {
    "a box without an edge": TILES + b"bbox=0,0,inf,1",
    "a box of no numbers": TILES + b"bbox=NaN,NaN,NaN,NaN",
    "a box beyond all": TILES + b"bbox=-99999999999999999999,0,1,1",
    "a box with a sign": TILES + b"bbox=%2B0,0,1,1",
    "a box with an end in it": TILES + b"bbox=0,0,1,1%00",
    "a box on two lines": TILES + b"bbox=0,0,1,1%0a",
    "a share that is none": TILES + b"min_tissue=-nan",
    "a share beyond all": TILES + b"min_tissue=1e999",
    "a limit of 4000 digits": TILES + b"limit=" + b"9" * 4000,
    "a limit in hex": TILES + b"limit=0x10",
    "an offset of 2^31": TILES + b"offset=2147483648",
    "a seed of 2^63": b"/v1/slides/a_1/sample?k=1&seed=9223372036854775808",
    "parts without end": b"/v1/slides/a_1/sample?k=1&num_parts=99999999999999999999",
    "a parameter of half a character": TILES + b"%c3=1",
    "a thousand parameters": TILES + b"&".join(b"p%d=1" % i for i in range(1000)),
    "a cursor deep within": b"/v1/slides?cursor=" + b"W1tb" * 400,
}
BROKEN = {
    "an end in the address": b"GET /v1/slides/a_1\x00" + TAIL,
    "a blank in the address": _get(b"/v1/slides/a_1 x"),
    "a raw letter in the address": _get("/v1/slides/ö".encode()),
    "no address": b"GET" + TAIL,
    "a method of its own": b"BREW /v1/slides/a_1" + TAIL,
    "a tunnel": b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n",
    "no host": b"GET /v1/slides/a_1 HTTP/1.1\r\nConnection: close\r\n\r\n",
    "two hosts": _with(b"Host: evil.example\r\n"),
    "a host of its own": b"GET /v1/slides/a_1 HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
    "a header without a name": _with(b": value\r\n"),
    "a header with an end in it": _with(b"X-A: \x00\r\n"),
    "a body": _with(b"Content-Length: 5\r\n", b"hello"),
    "a posted body": _with(b"Content-Length: 5\r\n", b"hello", b"POST"),
    "a body in chunks": _with(b"Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n0\r\n\r\n"),
    "a body of two lengths": _with(b"Content-Length: 5\r\nContent-Length: 6\r\n", b"hello!"),
    "a body that is told twice": _with(b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + GOOD),
    "a body of less than nothing": _with(b"Content-Length: -1\r\n"),
    "a body without end": _with(b"Content-Length: 99999999999999\r\n", b"x" * 50_000, b"PUT"),
    "chunks of no size": _with(b"Transfer-Encoding: chunked\r\n", b"zz\r\n"),
}
HOSTILE = {name: _get(target) for name, target in {**CLIMBING, **NUMBERS}.items()} | BROKEN


@pytest.mark.parametrize("sent", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_request_is_refused_once_and_others_are_answered(service: Service, sent: bytes) -> None:
    answer = _ask(service, sent)
    head, _, body = answer.partition(b"\r\n\r\n")
    told = json.loads(body)  # One answer and no more: what was smuggled in a body is no request.
    assert 400 <= told["status"] < 500, told
    assert head.startswith(b"HTTP/1.1 %d " % told["status"])
    assert b"secret.parquet" not in body
    assert b"root:" not in body
    assert b"Traceback" not in body
    assert _ask(service, GOOD).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("at_once", [True, False], ids=["in one piece", "after the answer"])
def test_garbage_after_a_request_ends_the_connection(service: Service, at_once: bool) -> None:
    kept = GOOD.replace(b"Connection: close\r\n", b"")
    garbage = b"\x00\xff garbage\r\n\r\n" + kept
    with service.connect() as client:
        client.sendall(kept + garbage if at_once else kept)
        if not at_once:
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
            client.sendall(garbage)
        *_, last = _read_all(client).split(b"HTTP/1.1 ")
    assert last.startswith(b"400 ")
    assert json.loads(last.partition(b"\r\n\r\n")[2])["detail"] == "this is no HTTP request"


def test_many_who_send_nothing_or_half_or_do_not_read_keep_nobody_waiting(service: Service) -> None:
    before = service.num_sockets()
    large = b"GET /v1/slides/B_3/tiles?format=geojson HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with ExitStack() as stack:
        for number in range(NUM_IDLE):
            client = stack.enter_context(service.connect())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall((b"", b"GET /v1", GOOD[:-2], large * 20)[number % 4])
        _wait_until(lambda: service.num_sockets() >= before + NUM_IDLE // 2)
        for _ in range(20):
            assert _ask(service, GOOD).startswith(b"HTTP/1.1 200")
        _wait_until(lambda: service.num_sockets() <= before)
    assert _ask(service, GOOD).startswith(b"HTTP/1.1 200")
