"""How fast the service answers, beside a bare FastAPI route that returns the same bytes from memory.

The bare route is an `async def` in a process of its own, under the same server (uvicorn, uvloop, httptools), with
nothing around it. Clients are a process of their own, on this machine; every round asks the bare route and the service
one after the other. `rate_ratio` is the service's rate over the bare route's, `cpu_ratio` the bare route's processor
time per answer over the service's: the second does not depend on how busy the clients' core is. Median over the rounds,
and lowest and highest. `p99` is in ms.

- `whole slide`: all tiles of a slide of 45,000 as Arrow, saturated. `sample`: 4,096 of them, another epoch at each
  request, so that nothing is answered from memory. `box`: rectangles over the same slide at 200 requests a second.
- `ranks`: 256 clients ask for their share of one slide at once that nobody asked for before; seconds until the last has
  its answer, and how often the manifest was read.
- `catalogue`: a compacted set of 100,000 slides and a billion tiles, whose rows share one shard's row groups. Seconds
  until it answers, memory of the worker, and pages at 50 requests a second, in all orders, with and without filters.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manifests import Manifest, SlideRecord, write_manifest
from manifests.compact import compact
from manifests.files import tiles_path
from manifests.source import open_stored
from services.search import SORTS

SIDE = 213
"""Tiles across and down: 45,369, a few more than the paper's largest slide has."""
NUM_SLIDES = 100_000
NUM_RANKS = 256
NUM_CONNECTIONS = 16
_SET_SIDE = 100
_HOME = Path(__file__).parents[2]
_RECORD = SlideRecord(slide_id="", status="ok", mpp_x=0.25, mpp_y=0.25, tile_px=224, tile_mpp=0.5, read_w=448)
_BARE = """
import sys, uvicorn
from fastapi import FastAPI
from starlette.responses import Response
app, body = FastAPI(), open(sys.argv[1], "rb").read()

@app.get("/")
async def give():
    return Response(body, media_type="application/vnd.apache.arrow.stream")

class Server(uvicorn.Server):
    async def startup(self, sockets=None):
        await super().startup(sockets)
        print("at http://127.0.0.1:%d" % self.servers[0].sockets[0].getsockname()[1], file=sys.stderr, flush=True)

Server(uvicorn.Config(app, port=0, access_log=False, log_level="error")).run()
"""


def main(
    side: int = SIDE, num_slides: int = NUM_SLIDES, num_ranks: int = NUM_RANKS, seconds: float = 4, num_rounds: int = 5
) -> dict[str, Any]:
    """Measures all of it.

    Args:
        side: tiles across and down the slide.
        num_slides: of the catalogue.
        num_ranks: that ask at once.
        seconds: of each round, for each of the two.
        num_rounds: of each comparison.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_slides(folder / "tree", side, ["slide", *(f"cold_{i}" for i in range(num_rounds))])
        with serving(folder / "tree") as service:
            versus = _compare(folder, service, side, seconds, num_rounds)
            ranks = [_ask_at_once(service, f"cold_{i}", side**2, num_ranks) for i in range(num_rounds)]
            read = _counted(service.address, 'slidegrad_cache_loads_total{cache="manifests"}')
        catalogue = _measure_catalogue(folder, num_slides, seconds, num_rounds)
    return {
        "num_tiles": side**2,
        "load": os.getloadavg(),
        "versus": versus,
        "ranks": {"num_ranks": num_ranks, "seconds": _spread(ranks), "manifests_read_of": [read, num_rounds + 1]},
        "catalogue": catalogue,
    }


@dataclasses.dataclass
class Running:
    """A server."""

    address: str
    pid: int

    def cpu_s(self) -> float:
        """Processor time that it took so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_mb(self) -> float:
        """The most memory that it held."""
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert found is not None
        return int(found[1]) / 1024


@contextlib.contextmanager
def serving(manifests: Path) -> Iterator[Running]:
    """`slidegrad serve` with one worker."""
    with _started([sys.executable, str(_HOME / "slidegrad.py"), "serve", str(manifests), "--port", "0"]) as running:
        yield running


@contextlib.contextmanager
def bare(body: Path) -> Iterator[Running]:
    """The bare route."""
    with _started([sys.executable, "-c", _BARE, str(body)]) as running:
        yield running


@contextlib.contextmanager
def _started(command: list[str]) -> Iterator[Running]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLIDEGRAD_")}
    environment["PYTHONPATH"] = str(_HOME)
    pipes: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.search(r" ?at (http://\S+)", line)
            assert found is not None, line + process.stderr.read()
            yield Running(found[1], process.pid)
        finally:
            process.send_signal(signal.SIGTERM)


def load(address: str, paths: list[str], seconds: float, **plan: Any) -> dict[str, Any]:
    """Runs the clients; see `tests.benchmarks.service_load`."""
    plan = {"address": address, "paths": paths, "seconds": seconds, "connections": NUM_CONNECTIONS, **plan}
    command = [sys.executable, "-m", "tests.benchmarks.service_load"]
    done = subprocess.run(command, input=json.dumps(plan), stdout=subprocess.PIPE, text=True, check=True, cwd=_HOME)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _compare(folder: Path, service: Running, side: int, seconds: float, num_rounds: int) -> dict[str, Any]:
    """The service and the bare route, for each kind of request."""
    rng = np.random.default_rng(0)
    corners = rng.integers(0, side * 448 * 3 // 4, (400, 2)).tolist()
    size = side * 448 // 4
    k = min(4096, side**2)
    kinds: dict[str, tuple[list[str], dict[str, Any]]] = {
        "whole slide": (["/v1/slides/slide/tiles?format=arrow"], {}),
        "sample": ([f"/v1/slides/slide/sample?k={k}&format=arrow&epoch={epoch}" for epoch in range(5_000)], {}),
        "box": ([f"/v1/slides/slide/tiles?format=arrow&bbox={x},{y},{x + size},{y + size}" for x, y in corners],
                {"rate": 200}),
    }  # fmt: skip
    found = {}
    for kind, (paths, plan) in kinds.items():
        body = folder / "body"
        with urllib.request.urlopen(service.address + paths[0]) as answer:
            body.write_bytes(answer.read())
        with bare(body) as baseline:
            rounds = []
            for number in range(num_rounds):
                # Every round begins elsewhere: what the one before left in memory helps none.
                shift = number * len(paths) // num_rounds
                turns = {"bare": (baseline, ["/"]), "service": (service, paths[shift:] + paths[:shift])}
                rounds.append({name: _timed(*turn, seconds, plan) for name, turn in turns.items()})
        found[kind] = {"num_bytes": body.stat().st_size, **_summary(rounds)}
    return found


def _timed(running: Running, paths: list[str], seconds: float, plan: dict[str, Any]) -> dict[str, float]:
    load(running.address, paths, min(0.3, seconds), **plan)  # Warm.
    before_s = running.cpu_s()
    found = load(running.address, paths, seconds, **plan)
    num = len(found["latencies"])
    return {
        "rate": num / found["seconds"],
        "cpu_ms": 1e3 * (running.cpu_s() - before_s) / num,
        "p50": 1e3 * float(np.percentile(found["latencies"], 50)),
        "p99": 1e3 * float(np.percentile(found["latencies"], 99)),
    }


def _summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    def median(name: str, key: str) -> float:
        return round(statistics.median(found[name][key] for found in rounds), 3)

    def ratio(key: str, over: str, under: str) -> list[float]:
        return _spread([found[over][key] / max(found[under][key], 1e-9) for found in rounds])

    figures = {
        f"{name}_{key}": median(name, key) for name in ("bare", "service") for key in ("rate", "cpu_ms", "p50", "p99")
    }
    return {
        **figures,
        "rate_ratio": ratio("rate", "service", "bare"),
        "cpu_ratio": ratio("cpu_ms", "bare", "service"),
        "p99_ratio": ratio("p99", "service", "bare"),
    }


def _ask_at_once(service: Running, slide_id: str, num_tiles: int, num_ranks: int) -> float:
    paths = [
        f"/v1/slides/{slide_id}/sample?k={num_tiles}&format=arrow&part={part}&num_parts={num_ranks}"
        for part in range(num_ranks)
    ]
    found = load(service.address, paths, 60, connections=num_ranks, most=num_ranks)
    assert len(found["latencies"]) == num_ranks
    return float(found["seconds"])


def _measure_catalogue(folder: Path, num_slides: int, seconds: float, num_rounds: int) -> dict[str, Any]:
    write_set(folder, num_slides)
    began = time.perf_counter()
    with serving(folder / "set") as service:
        start_s = time.perf_counter() - began
        start_mb = service.peak_mb()
        filters = ["", "&status=ok", "&q=case_0", "&prefix=case_00", "&q=77&status=failed"]
        firsts = [f"/v1/slides?sort={sort}{chosen}" for sort in SORTS for chosen in filters]
        paths = [*firsts, *(following for path in firsts if (following := _following(service.address, path)))]
        tiles = [f"/v1/slides/case_{i * (num_slides // 50):06d}/tiles?limit=500" for i in range(50)]
        rounds = [_timed(service, paths, seconds, {"rate": 50}) for _ in range(num_rounds)]
        any_tiles = [_timed(service, tiles, seconds, {"rate": 50}) for _ in range(num_rounds)]
        with urllib.request.urlopen(f"{service.address}/v1/slides?limit=1") as answer:
            assert json.load(answer)["numberMatched"] == num_slides
        return {
            "num_slides": num_slides,
            "num_tiles": num_slides * _SET_SIDE**2,
            "start_s": round(start_s, 2),
            "start_mb": round(start_mb),
            "peak_mb": round(service.peak_mb()),
            "page_p50_ms": _spread([found["p50"] for found in rounds]),
            "page_p99_ms": _spread([found["p99"] for found in rounds]),
            "tiles_p99_ms": _spread([found["p99"] for found in any_tiles]),
        }


def _following(address: str, path: str) -> str | None:
    with urllib.request.urlopen(address + path) as answer:
        links = {link["rel"]: link["href"] for link in json.load(answer)["links"]}
    return links.get("next")


def _counted(address: str, name: str) -> int:
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return round(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)))


def write_slides(root: Path, side: int, slide_ids: list[str]) -> None:
    """Slides of `side` x `side` tiles, in a tree."""
    row, col = np.divmod(np.arange(side**2, dtype=np.int32), side)
    tissue = np.random.default_rng(0).random(side**2, dtype=np.float32)
    for slide_id in slide_ids:
        record = dataclasses.replace(
            _RECORD, slide_id=slide_id, num_tiles=side**2, width_l0=side * 448, height_l0=side * 448
        )
        write_manifest(tiles_path(root, slide_id), Manifest(record, col * 448, row * 448, tissue))


def write_set(folder: Path, num_slides: int) -> None:
    """A compacted set whose many slides share the row groups of four."""
    write_slides(folder / "few", _SET_SIDE, [f"few_{i}" for i in range(4)])
    compact(open_stored(folder / "few"), folder / "set")
    file = folder / "set" / "catalog.parquet"
    few = pq.read_table(file)
    many = few.take(np.arange(num_slides) % 4)
    columns = {
        "slide_id": pa.array([f"case_{i:06d}" for i in range(num_slides)]),
        "tissue_mm2": pa.array(np.random.default_rng(1).random(num_slides) * 300),
        "fingerprint": pa.array([f"{i:032x}" for i in range(num_slides)]),
    }
    for name, column in columns.items():
        many = many.set_column(many.schema.get_field_index(name), name, column)
    pq.write_table(many.replace_schema_metadata(few.schema.metadata), file, compression="zstd")


def _spread(values: list[float]) -> list[float]:
    """Median, lowest, highest."""
    return [round(value, 3) for value in (statistics.median(values), min(values), max(values))]


def draw(result: dict[str, Any]) -> str:
    """The report's tables."""
    names = ("bare_rate", "service_rate", "bare_cpu_ms", "service_cpu_ms", "bare_p99", "service_p99")
    lines = [
        f"| {result['num_tiles']:,} tiles | bytes | {' | '.join(names)} | rate_ratio | cpu_ratio | p99_ratio |",
        f"|{' --- |' * (len(names) + 5)}",
    ]
    for kind, found in result["versus"].items():
        ratios = " | ".join(_told(found[name]) for name in ("rate_ratio", "cpu_ratio", "p99_ratio"))
        figures = " | ".join(str(found[name]) for name in names)
        lines.append(f"| {kind} | {found['num_bytes']:,} | {figures} | {ratios} |")
    ranks, catalogue = result["ranks"], result["catalogue"]
    read, of = ranks["manifests_read_of"]
    lines += [
        "",
        "| ranks | seconds until the last | manifests read | slides asked |",
        "| --- | --- | --- | --- |",
        f"| {ranks['num_ranks']} | {_told(ranks['seconds'])} | {read} | {of} |",
        "",
        f"| {' | '.join(catalogue)} |",
        f"|{' --- |' * len(catalogue)}",
        f"| {' | '.join(_told(v) if isinstance(v, list) else f'{v:,}' for v in catalogue.values())} |",
    ]
    return "\n".join(lines)


def _told(spread: list[float]) -> str:
    median, low, high = spread
    return f"{median} ({low}–{high})"


if __name__ == "__main__":
    measured = main()
    print(draw(measured), file=sys.stderr)
    print(json.dumps(measured))
