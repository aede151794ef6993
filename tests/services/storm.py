"""Who makes the storm of test_storm: clients that look for mixed answers, and a writer that swaps manifests.

Each slide has two versions, 1 and 2, and all that is told of a slide tells which: `x_l0 % 448`, `y_l0 % 448`,
`4 * tissue`, the record's vendor and counts, the manifest's hash. Both are processes of their own; see `main`.
"""

import asyncio
import dataclasses
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa

from manifests import Manifest, write_manifest
from manifests.catalog import rebuild_catalog
from manifests.files import atomic_path, read_hashed, tiles_path
from tests.services.conftest import TILED

SMALL, LARGE, PASSING = [f"s_{i:02}" for i in range(12)], [f"large_{i}" for i in range(3)], [f"p_{i}" for i in range(4)]
"""Small ones, ones of 45,056 tiles, and ones that come and go."""
FORMATS = ("json", "arrow", "geojson")
NUM_CLIENTS = 64
_RETRIED = (httpx.NetworkError, httpx.RemoteProtocolError)


def num_tiles(slide_id: str, version: int) -> int:
    return (256 * 176 if slide_id in LARGE else 40 * 30) + version


def make_versions(stock: Path) -> dict[str, str]:
    """Writes both versions of all slides into stock/1 and stock/2; returns the hash of each, by `id/version`."""
    hashes = {}
    for slide_id in (*SMALL, *LARGE, *PASSING):
        for version in (1, 2):
            count = num_tiles(slide_id, version)
            row, col = np.divmod(np.arange(count, dtype=np.int32), 256)
            told = {"vendor": f"v{version}", "num_rejected": version, "num_tiles": count}
            record = dataclasses.replace(TILED, slide_id=slide_id, width_l0=2**17, height_l0=2**17, **told)  # type: ignore[arg-type]
            columns = (col * 448 + version, row * 448 + version, np.full(count, version / 4, np.float32))
            file = tiles_path(stock / str(version), slide_id)
            write_manifest(file, Manifest(record, *columns))
            hashes[f"{slide_id}/{version}"] = read_hashed(file)[1]
    return hashes


def put(stock: Path, root: Path, slide_id: str, version: int) -> None:
    """Puts a version in place, as the tiler does."""
    with atomic_path(tiles_path(root, slide_id)) as partial:
        partial.write_bytes(tiles_path(stock / str(version), slide_id).read_bytes())


def write_on(stock: Path, root: Path, seconds: float) -> dict[str, int]:
    """Swaps versions, adds and removes slides, and writes the catalogue anew, until the time is over."""
    draw, done, end_s = random.Random(1), Counter[str](), time.monotonic() + seconds
    while time.monotonic() < end_s:
        slide_id = draw.choice([*SMALL, *LARGE, *PASSING])
        if slide_id in PASSING and draw.random() < 0.5:
            tiles_path(root, slide_id).unlink(missing_ok=True)
            done["removals"] += 1
        else:
            put(stock, root, slide_id, draw.choice((1, 2)))
            done["rewrites"] += 1
        if draw.random() < 0.02:
            rebuild_catalog(root)
            done["catalogs"] += 1
        time.sleep(0.02)
    return dict(done)


class Storm:
    """Clients that ask for everything at random, and what they found."""

    def __init__(self, address: str, hashes: dict[str, str], seconds: float) -> None:
        self._address, self._hashes, self._end_s = address, hashes, time.monotonic() + seconds
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    async def run(self) -> dict[str, Any]:
        await asyncio.gather(*(self._client(random.Random(number)) for number in range(NUM_CLIENTS)))
        return {**self.counts, "faults": len(self.faults), "first_faults": self.faults[:5]}

    async def _client(self, draw: random.Random) -> None:
        etags: dict[str, tuple[str, str | None]] = {}
        async with httpx.AsyncClient(base_url=self._address, verify=False, timeout=60) as client:
            while time.monotonic() < self._end_s:
                path, slide_id = _draw_path(draw)
                headers = {"Accept-Encoding": draw.choice(("identity", "gzip"))}
                if draw.random() < 0.05:  # So that a worker that came later gets its share of the clients.
                    headers["Connection"] = "close"
                if etags and draw.random() < 0.2:
                    path = draw.choice(list(etags)[-10:])
                    headers["If-None-Match"], slide_id = etags[path]
                answer = await self._ask(client, path, headers)
                if answer is None:
                    continue
                self.counts[f"status_{answer.status_code}"] += 1
                try:
                    _check(answer, path, slide_id, self._hashes)
                except Exception as error:  # noqa: BLE001 - whatever is wrong with an answer is a finding
                    self.faults.append(f"{path}: {answer.status_code}: {error!r}"[:500])
                if "etag" in answer.headers:
                    etags[path] = answer.headers["etag"], slide_id
                    if len(etags) > 100:
                        etags.pop(next(iter(etags)))

    async def _ask(self, client: httpx.AsyncClient, path: str, headers: dict[str, str]) -> httpx.Response | None:
        """One request, made once again where the connection breaks: its worker may have been killed."""
        for attempt in (1, 2):
            try:
                answer = await client.get(path, headers=headers)
            except _RETRIED as error:
                self.counts["broken_connections"] += 1
                if attempt == 2:
                    self.faults.append(f"{path}: broken twice: {error!r}")
            else:
                self.counts["answers"] += 1
                return answer
        return None


def _draw_path(draw: random.Random) -> tuple[str, str | None]:
    slide_id = draw.choice([*SMALL, *PASSING]) if draw.random() < 0.95 else draw.choice(LARGE)
    name = draw.choice(FORMATS)
    x, y = draw.randrange(0, 60_000), draw.randrange(0, 10_000)
    of_slide = {
        f"/v1/slides/{slide_id}": 2,
        f"/v1/slides/{slide_id}/tiles?format={name}&limit={draw.choice((10, 500, 2000, 20000))}": 3,
        f"/v1/slides/{slide_id}/tiles?format={name}&limit=2000&bbox={x},{y},{x + 9000},{y + 9000}": 3,
        f"/v1/slides/{slide_id}/sample?format={name}&k=300&epoch={draw.randrange(50)}&part=1&num_parts=3": 4,
    }
    others = {
        f"/v1/slides?format={draw.choice(FORMATS[:2])}&limit={draw.choice((3, 100))}": 2,
        "/v1/slides?sort=-num_tiles&q=s_": 1,
        "/v1/stats": 1,
        "/healthz": 1,
        "/readyz": 1,
        "/": 1,
        "/metrics": 0.1,
        "/openapi.json": 0.1,
    }
    [path] = draw.choices([*of_slide, *others], [*of_slide.values(), *others.values()])
    return path, slide_id if path in of_slide else None


def _check(answer: httpx.Response, path: str, slide_id: str | None, hashes: dict[str, str]) -> None:
    """Raises where an answer is none, or is made of two versions."""
    if answer.status_code == 304:
        assert answer.headers["etag"] == answer.request.headers["if-none-match"], "304 with another etag"
        return
    if answer.status_code == 404 and slide_id in PASSING:
        return
    assert answer.status_code == 200, answer.text[:200]
    if slide_id is not None:
        told, columns = _read_tiles(answer) if "?" in path else (answer.json(), None)
        versions = {version for version in (1, 2) if hashes[f"{slide_id}/{version}"] == told["manifest_hash"]}
        assert len(versions) == 1, "a hash of no version"
        assert told["manifest_hash"] in answer.headers["etag"], "the etag of another version"
        if columns is None:
            versions |= _versions_of_record(told)
        else:
            x, y, tissue = columns
            versions |= {*np.unique(x % 448).tolist(), *np.unique(y % 448).tolist(), *np.unique(4 * tissue).tolist()}
            if "record" in told:
                versions |= _versions_of_record(told["record"])
            if "/tiles" in path and "bbox" not in path:
                versions.add(told["numberMatched"] - num_tiles(slide_id, 0))
        assert len(versions) == 1, f"of versions {versions}"
    elif path.startswith("/v1/slides"):
        table = pa.ipc.open_stream(answer.content).read_all() if "format=arrow" in path else None
        for slide in answer.json()["slides"] if table is None else table.to_pylist():
            assert len(_versions_of_record(slide)) == 1, f"{slide['slide_id']} is listed as of two versions"


def _versions_of_record(slide: dict[str, Any]) -> set[float]:
    return {int(slide["vendor"][1:]), slide["num_rejected"], slide["num_tiles"] - num_tiles(slide["slide_id"], 0)}


def _read_tiles(answer: httpx.Response) -> tuple[dict[str, Any], tuple[Any, Any, Any]]:
    """What is told beside the tiles, and x_l0, y_l0 and tissue."""
    kind = answer.headers["content-type"]
    if "arrow" in kind:
        table = pa.ipc.open_stream(answer.content).read_all()
        told = json.loads(table.schema.metadata[b"slidegrad"])
        columns = tuple(table[name].to_numpy() for name in ("x_l0", "y_l0", "tissue"))
        return {**told, "record": told["slide"]}, columns  # type: ignore[return-value]
    told = answer.json()
    if "geo" not in kind:
        return told, tuple(np.array(told["columns"][name]) for name in ("x_l0", "y_l0", "tissue"))  # type: ignore[return-value]
    features = told["features"]
    corners = np.array([f["geometry"]["coordinates"][0][0] for f in features]).reshape(-1, 2)
    tissue = np.array([f["properties"]["tissue"] for f in features])
    return {**told, **told["slidegrad"]}, (corners[:, 0], corners[:, 1], tissue)


def main(what: str, *arguments: str) -> None:
    """`write STOCK ROOT SECONDS` or `ask ADDRESS HASHES SECONDS`; the last line of stdout is the result."""
    if what == "write":
        result: dict[str, Any] = write_on(Path(arguments[0]), Path(arguments[1]), float(arguments[2]))
    else:
        hashes = json.loads(Path(arguments[1]).read_text())
        result = asyncio.run(Storm(arguments[0], hashes, float(arguments[2])).run())
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
