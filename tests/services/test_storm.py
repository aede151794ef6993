"""A storm: many clients, manifests that change under them, workers that are killed. Nothing mixed, nothing lost."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from manifests.catalog import rebuild_catalog
from tests.services.running import environment_of, serving
from tests.services.storm import LARGE, NUM_CLIENTS, PASSING, SMALL, make_versions, put
from tests.services.test_serve import _pids

SMALL_CACHES = {"SLIDEGRAD_MAX_MANIFESTS_MB": "2", "SLIDEGRAD_MAX_ANSWERS_MB": "8", "SLIDEGRAD_RESCAN_S": "0.5"}
"""Full soon: what grows afterwards is a leak."""
LARGE_ANSWERS = {"SLIDEGRAD_MAX_GEOJSON_TILES": "50000"}
KILL_EVERY_S = 4
NUM_SLOW = 8
SERVING_SOCKETS = 12
"""A worker that has so many answers clients; of its own it has five."""
OLD_S = 300
"""Memory of younger workers still settles."""


def _start(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.services.storm", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment_of(OMP_NUM_THREADS="1"))


def _rss_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _num_sockets(pid: int) -> int:
    """Sockets that a worker holds; 0 where it ended meanwhile."""
    num_sockets = 0
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            num_sockets += os.readlink(file).startswith("socket:")
    return num_sockets


def _storm(parent: int, clients: "subprocess.Popen[str]", rng: random.Random) -> tuple[int, list[float]]:
    """Kills one worker after the other while clients ask; returns how many, and the memory of one that is spared."""
    spared = rng.choice(sorted(_pids(parent)))
    num_kills, memory_mb, killed_s = 0, list[float](), time.monotonic()
    while clients.poll() is None:
        time.sleep(0.5)
        assert spared in _pids(parent), "a worker ended that nobody killed"
        memory_mb.append(_rss_mb(spared))
        serving_too = [pid for pid in _pids(parent) - {spared} if _num_sockets(pid) >= SERVING_SOCKETS]
        if time.monotonic() - killed_s > KILL_EVERY_S and serving_too:
            os.kill(serving_too[0], signal.SIGKILL)
            num_kills, killed_s = num_kills + 1, time.monotonic()
    return num_kills, memory_mb


def _count(address: str) -> int:
    """Requests that the service counted, those of dead workers too."""
    text = httpx.get(f"{address}/metrics", timeout=60).text
    return sum(round(float(n)) for n in re.findall(r"^slidegrad_http_requests_total\{.*\} (\S+)$", text, re.MULTILINE))


def _drain(process: "subprocess.Popen[str]", address: str) -> int:
    """Tells the service to stop while it answers clients that are slow to read; returns how many get it whole."""
    host, port = address.removeprefix("http://").split(":")
    asked = f"GET /v1/slides/{LARGE[0]}/tiles?format=geojson&limit=45000 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    clients = [socket.socket() for _ in range(NUM_SLOW)]
    for client in clients:
        client.settimeout(60)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**15)  # 9 MB do not fit in between.
        client.connect((host, int(port)))
        client.sendall(asked)
    begun = [client.recv(1000) for client in clients]
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    num_whole = 0
    for client, first in zip(clients, begun, strict=True):
        with client:
            head, _, body = (first + b"".join(iter(lambda: client.recv(2**16), b""))).partition(b"\r\n\r\n")  # noqa: B023
        told = re.search(rb"content-length: (\d+)", head)
        num_whole += told is not None and len(body) == int(told[1])
    return num_whole


@pytest.mark.slow
@pytest.mark.torture
def test_in_a_storm_no_answer_is_mixed_none_is_lost_and_memory_stays(
    tmp_path: Path, times: Callable[[int, int], int]
) -> None:
    seconds = times(20, 600)
    stock, root, known = tmp_path / "stock", tmp_path / "manifests", tmp_path / "hashes.json"
    known.write_text(json.dumps(make_versions(stock)))
    for slide_id in (*SMALL, *LARGE, *PASSING):
        put(stock, root, slide_id, 1)
    rebuild_catalog(root)
    with serving(str(root), "--workers", "2", **SMALL_CACHES, **LARGE_ANSWERS) as (process, address):
        writer = _start("write", str(stock), str(root), str(seconds + 10))
        clients = _start("ask", address, str(known), str(seconds))
        try:
            num_kills, memory_mb = _storm(process.pid, clients, random.Random(1))
            found, written = json.loads(clients.communicate()[0]), json.loads(writer.communicate()[0])
        finally:
            clients.kill()
            writer.kill()
        num_counted = _count(address)
        num_whole = _drain(process, address)
        stdout, stderr = process.communicate(timeout=60)
    # Ten numbers, of ten equal times.
    tenths_mb = [round(statistics.median(part), 1) for part in np.array_split(memory_mb, 10)]
    told = {**found, **written, "kills": num_kills, "counted": num_counted, "memory_mb": tenths_mb}
    print(f"storm of {seconds} s: {json.dumps(told)}", file=sys.stderr)
    assert found["faults"] == 0, told
    assert not [name for name in found if name.startswith("status_5")]
    assert min(found["answers"], found["status_304"], written["rewrites"], num_kills) > 0
    # A killed worker may have sent what it did not come to count; it does both in one turn.
    assert found["answers"] - 4 * num_kills <= num_counted
    assert num_counted <= found["answers"] + found.get("broken_connections", 0) + 1
    assert found.get("broken_connections", 0) <= NUM_CLIENTS * num_kills
    if seconds >= OLD_S:
        assert tenths_mb[-1] == pytest.approx(tenths_mb[5], rel=0.05)
    assert (num_whole, process.returncode) == (NUM_SLOW, 0)
    assert json.loads(stdout.splitlines()[-1])["num_requests"] >= num_counted + NUM_SLOW
    assert stderr.count("is replaced") == num_kills
