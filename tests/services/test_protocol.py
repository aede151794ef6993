"""Clients that send or read too slowly, or too much, against the running service."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.services.running import serving

HASTY = {"HEADER_S": "0.4", "STALLED_S": "0.4", "MAX_CONNECTIONS": "12", "MAX_HEADER_BYTES": "4096"}


class Service:
    """The running service, from outside."""

    def __init__(self, pid: int, address: str) -> None:
        host, port = address.removeprefix("http://").split(":")
        self._pid, self._at = pid, (host, int(port))

    def connect(self) -> socket.socket:
        """A connection that nothing was sent on."""
        return socket.create_connection(self._at, timeout=30)

    def num_sockets(self) -> int:
        """Sockets that the process holds."""
        folder = Path(f"/proc/{self._pid}/fd")
        found = 0
        for fd in os.listdir(folder):
            try:
                found += os.readlink(folder / fd).startswith("socket:")
            except OSError:
                continue
        return found


@pytest.fixture(scope="module")
def service(settled: Path) -> Iterator[Service]:
    variables = {f"SLIDEGRAD_{name}": value for name, value in HASTY.items()}
    with serving(str(settled), **variables) as (process, address):
        yield Service(process.pid, address)


def _read_all(client: socket.socket) -> bytes:
    parts = []
    try:
        while part := client.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def _problem(answer: bytes) -> tuple[int, str]:
    """Status and detail of an answer that must be a problem document and the connection's last."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert "content-type: application/problem+json" in lines
    assert "connection: close" in lines
    told = json.loads(body)
    assert lines[0].startswith(f"http/1.1 {told['status']} ")
    return told["status"], told["detail"]


REQUEST = b"GET /v1/slides/a_1 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@pytest.mark.parametrize("begun", [b"", b"GET", REQUEST[:-2], REQUEST + b"GET /v1"])
def test_headers_that_do_not_come_are_not_waited_for(service: Service, begun: bytes) -> None:
    with service.connect() as client:
        client.sendall(begun)
        answer = _read_all(client)
    if begun.startswith(REQUEST):
        assert answer.startswith(b"HTTP/1.1 200")
        answer = answer[answer.index(b"HTTP/1.1 408") :]
    assert _problem(answer) == (408, "the request's headers did not come in time")


def test_headers_that_trickle_are_not_waited_for(service: Service) -> None:
    with service.connect() as client:
        client.sendall(REQUEST[:-2])
        try:
            for i in range(200):
                client.sendall(f"X-{i}: 1\r\n".encode())
                time.sleep(0.02)
        except ConnectionError:
            return
        assert _problem(_read_all(client))[0] == 408


ENDLESS = (
    REQUEST[:-2] + b"X-Long: " + b"x" * 9000,
    b"GET /" + b"x" * 9000,
    REQUEST[:-2] + b"X-1: 1\r\n" * 900,
)


@pytest.mark.parametrize("endless", ENDLESS)
def test_headers_without_end_are_refused(service: Service, endless: bytes) -> None:
    with service.connect() as client:
        client.sendall(endless)
        assert _problem(_read_all(client))[0] == 431


GARBAGE = (b"\x16\x03\x01\x02\x00", b"hello\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n")


@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_is_no_http_is_a_problem_document(service: Service, garbage: bytes) -> None:
    with service.connect() as client:
        client.sendall(garbage)
        assert _problem(_read_all(client)) == (400, "this is no HTTP request")


def test_a_client_that_reads_nothing_is_dropped(service: Service) -> None:
    before = service.num_sockets()
    wanted = b"GET /v1/slides/B_3/tiles?format=geojson HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(30)
        client.connect(service._at)
        client.sendall(wanted * 60)
        _wait_until(lambda: service.num_sockets() > before)
        _wait_until(lambda: service.num_sockets() <= before)
        assert _read_all(client).count(b"HTTP/1.1 200") < 60


def test_so_many_connections_and_no_more(service: Service) -> None:
    clients = [service.connect() for _ in range(12)]
    try:
        _wait_until(lambda: service.num_sockets() > 12)
        for client in clients:
            client.sendall(REQUEST)
        with service.connect() as one_more:
            assert _problem(_read_all(one_more))[0] == 503
    finally:
        for client in clients:
            client.close()
    _wait_until(lambda: _is_answered(service))


def _is_answered(service: Service) -> bool:
    with service.connect() as client:
        client.sendall(REQUEST)
        return client.recv(20).startswith(b"HTTP/1.1 200")


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)
