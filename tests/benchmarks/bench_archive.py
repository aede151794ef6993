"""Seconds and memory of a second run over an archive of half a million slides, and of `manifest stats` over it.

The archive is a tree of empty files, the manifests are names with a real catalogue and path list, all as after a
finished run; so what is measured is what a run does before its first slide: listing both trees, asking for every
file's state, comparing. On a network file system the wait for file states comes on top. Each command runs in a process
of its own, whose wall time and peak memory are given.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manifests.catalog import Place, write_paths
from manifests.files import tiles_key
from manifests.schema import CATALOG_SCHEMA, SlideRecord, records_to_catalog
from tiler.config import TilerConfig


def main(num_slides: int = 500_000) -> dict[str, object]:
    """Makes the archive and runs both commands; returns seconds and peak GB of each."""
    with tempfile.TemporaryDirectory() as folder:
        archive, out = Path(folder, "archive"), Path(folder, "manifests")
        make_archive(archive, out, num_slides)
        return {
            "num_slides": num_slides,
            "resume_scan": _run("tile", str(archive), "--out", str(out), "--dry-run"),
            "manifest_stats": _run("manifest", "stats", str(out)),
        }


def make_archive(archive: Path, out: Path, num_slides: int) -> None:
    """An archive of empty files in folders of 1,000, and manifests, catalogue and path list as a finished run's."""
    names = [f"{i // 1000:04d}/case_{i:07d}.svs" for i in range(num_slides)]
    places: dict[str, Place] = {}
    for name in names:
        file = archive / name
        if name.endswith("000.svs"):
            file.parent.mkdir(parents=True)
        os.close(os.open(file, os.O_CREAT))
        state = file.stat()
        places[file.stem] = Place(str(archive), name, state.st_size, state.st_mtime_ns, "f" * 32)
    keys = [tiles_key(slide_id) for slide_id in places]
    for shard in {key[:2] for key in keys}:
        (out / "tiles" / shard).mkdir(parents=True)
    for key in keys:
        os.close(os.open(out / "tiles" / f"{key}.parquet", os.O_CREAT))
    write_paths(out, "bench", places)
    record = SlideRecord(
        slide_id="", status="ok", fingerprint="f" * 32, config_hash=TilerConfig().hash, mpp_source="vendor", tile_px=224
    )
    (row,) = records_to_catalog([record]).to_pylist()
    columns = {name: pa.array([value] * num_slides, CATALOG_SCHEMA.field(name).type) for name, value in row.items()}
    tiles = np.random.default_rng(0).lognormal(8.5, 0.8, num_slides)
    columns |= {"slide_id": pa.array(sorted(places)), "num_tiles": pa.array(tiles.astype(np.int32))}
    # The listing that the catalogue stands for began well after the manifests appeared.
    mark = {"slidegrad": json.dumps({"scanned_at_ns": time.time_ns() + 3_600 * 10**9})}
    catalog = pa.Table.from_pydict(columns, schema=CATALOG_SCHEMA).replace_schema_metadata(mark)
    pq.write_table(catalog, out / "catalog.parquet", compression="zstd")


def _run(*words: str) -> dict[str, float]:
    """Wall seconds and peak resident GB of a command, and what it says."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "slidegrad", *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    result = json.loads(process.stdout.read().splitlines()[-1])
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    assert result["num_slides"] > 0
    assert result.get("to_tile", 0) == 0
    return {"seconds": round(time.perf_counter() - start, 2), "peak_gb": round(usage.ru_maxrss / 1e6, 2)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slides", type=int, default=500_000)
    print(json.dumps(main(parser.parse_args().slides)))
