"""Clients of the service, in a process of their own: `python -m tests.benchmarks.service_load` reads a plan as JSON.

Connections are kept open. A plan with `rate` asks at fixed moments whatever the answers do, and counts each answer's
time from the moment that it was due: a service that stalls is not asked less for it. Without `rate` each connection
asks again once it has its answer.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import uvloop


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> int:
    """Sends one request; returns the bytes of the answer's body."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(head.decode("latin-1") + str(await reader.read(500)))
    start = head.index(b"content-length: ") + 16
    num_bytes = int(head[start : head.index(b"\r", start)])
    await reader.readexactly(num_bytes)
    return num_bytes


async def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Asks as the plan says; returns seconds of each answer, and in all."""
    at = urlsplit(plan["address"])
    host, port = at.hostname or "", at.port or 0
    requests = [f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode() for path in plan["paths"]]
    # Before the clock starts: connecting is no part of it.
    pairs = [await asyncio.open_connection(host, port, limit=2**21) for _ in range(plan["connections"])]
    rate, seconds, latencies, num_bytes = plan.get("rate"), plan["seconds"], [], 0
    numbers: Iterator[int] = iter(range(plan.get("most", 10**9)))
    began = time.perf_counter()

    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_bytes
        for number in numbers:
            due = time.perf_counter() if rate is None else began + number / rate
            if due - began > seconds:
                return
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            num_bytes += await _ask(reader, writer, requests[number % len(requests)])
            latencies.append(time.perf_counter() - due)

    await asyncio.gather(*(work(*pair) for pair in pairs))
    total = time.perf_counter() - began
    for _, writer in pairs:
        writer.close()
    return {"seconds": total, "latencies": latencies, "num_bytes": num_bytes}


if __name__ == "__main__":
    print(json.dumps(uvloop.run(run(json.load(sys.stdin)))))
