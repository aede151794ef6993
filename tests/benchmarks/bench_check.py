"""What looking for damage costs beside reading the tiles once, and which damage is noticed.

Cost: seconds of each check on one synthetic slide (JPEG, 20,000 px; all its 224-px tiles, tissue everywhere, so that
every compressed tile is touched), one thread, warm cache; the median of the rounds, each round running all ways, and
the ratio to `read_tiles` of the same tiles. `tables` is one parse of the TIFF tables; all checks of a slide share it.
The same for tables and markers of a slide of 100,000 px, whose 204,096 tiles are the same few bytes of the file.
`rows` is what a second look while training costs: seconds for as many random tiles, their marks alone and strictly, and
how many compressed tiles lie under them.

Detection: the share of damaged tiles that is noticed, by codec, kind of damage and check; `changed` is the share of
them whose pixels differ at all from what they were. `false_alarms` counts undamaged tiles that are called damaged.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from manifests import Manifest
from tiler import TilerConfig, build_manifest, open_slide, read_tiles
from tiler.integrity import bad_mark_rows, bad_rows, find_damage, lay
from tiler.integrity.decode import bad_decodes
from tiler.integrity.markers import bad_marks
from tiler.slide import Slide
from tiler.synth import CohortConfig, make_cohort
from tiler.synth.svs import Level, write_svs
from tiler.tiff_tables import TileTable, _read_tables, read_tables

CODECS = ("jpeg", "jpeg2000", "lzw", "deflate", "none")
KINDS = ("cut", "zeros", "random", "byte", "bit", "mixed", "swapped")
TILE_PX = 256
NUM_ROWS = (2600, 64, 8, 1)


def main(
    num_rounds: int = 5, side_px: int = 20_000, huge_px: int = 100_000, num_damaged: int = 60
) -> dict[str, object]:
    """Measures cost and detection."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = CohortConfig(width_px=(2048, 2048), height_px=(2048, 2048), scant_every=0, tissue_fraction=(0.55, 0.6))
        (source,) = make_cohort(folder, 1, seed=0, config=config, num_workers=1)
        jpegs = _tissue_jpegs(source)
        big, huge = folder / "big.svs", folder / "huge.tif"
        _write_big(big, jpegs, side_px)
        _write_huge(huge, jpegs[:4], huge_px)
        cost = _cost(big, num_rounds)
        cost["huge"] = _cost_of_tables(huge, num_rounds)
        with tifffile.TiffFile(source) as tiff:
            pixels = tiff.pages[0].asarray()
        detection = {codec: _detect(source, pixels, folder, codec, num_damaged) for codec in CODECS}
    return {**cost, "detection": detection, "num_damaged": num_damaged, "num_rounds": num_rounds}


def _tissue_jpegs(path: Path) -> list[bytes]:
    """The larger half of a slide's tiles."""
    table, content = read_tables(path)[0], path.read_bytes()
    places = sorted(zip(table.num_bytes.ravel().tolist(), table.offsets.ravel().tolist(), strict=True))
    return [content[at : at + length] for length, at in places[len(places) // 2 :]]


def _write_big(path: Path, jpegs: list[bytes], side_px: int) -> None:
    """A slide whose tiles are drawn from `jpegs`, each with its own place in the file."""
    rng, levels = np.random.default_rng(0), []
    for side in (side_px, side_px // 4, side_px // 16):
        picks = rng.integers(0, len(jpegs), (-(-side // TILE_PX)) ** 2)
        levels.append(Level(width_px=side, height_px=side, jpegs=[jpegs[i] for i in picks.tolist()]))
    thumbnail = np.full((64, 64, 3), 200, np.uint8)
    write_svs(path, levels, thumbnail, mpp=0.5, app_mag=20, quality=85)


def _write_huge(path: Path, jpegs: list[bytes], side_px: int) -> None:
    """A pyramid whose tables repeat a few tiles: written with one tile a level, then the tables are replaced."""
    layout = {"dtype": np.uint8, "photometric": "ycbcr", "compression": "jpeg", "subsampling": (2, 2)}
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for i, side in enumerate((side_px, side_px // 2, side_px // 4, side_px // 8, side_px // 16, side_px // 32)):
            num_tiles = (-(-side // TILE_PX)) ** 2
            empty = iter([jpegs[0]] + [b""] * (num_tiles - 1))
            tiff.write(empty, shape=(side, side, 3), tile=(TILE_PX, TILE_PX), subfiletype=int(i > 0), **layout)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for page in tiff.pages:
            count = len(page.dataoffsets)
            page.tags[324].overwrite([page.dataoffsets[0]] * count)
            page.tags[325].overwrite([page.databytecounts[0]] * count)


def _cost(path: Path, num_rounds: int) -> dict[str, object]:
    manifest = build_manifest(path, "slide", TilerConfig(min_tissue=0, check="none")).manifest
    slide = open_slide(path)
    ways: dict[str, Callable[[], object]] = {
        "tables": lambda: _parse(path),
        "markers": lambda: find_damage(slide, manifest, "markers"),
        "sample": lambda: find_damage(slide, manifest, "sample"),
        "decode": lambda: find_damage(slide, manifest, "decode"),
        "read_tiles": lambda: _read_all(slide, manifest),
    }
    seconds = _time(ways, num_rounds)
    found = {check: int(find_damage(slide, manifest, check).bad.sum()) for check in ("markers", "decode", "sample")}
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    return {
        "num_tiles": len(manifest),
        "num_file_tiles": int(read_tables(path)[0].offsets.size),
        "file_mb": round(path.stat().st_size / 1e6),
        "seconds": {way: round(value, 4) for way, value in medians.items()},
        "spread": {way: round((max(v) - min(v)) / medians[way], 2) for way, v in seconds.items()},
        "ratio_to_read_tiles": {way: round(value / medians["read_tiles"], 4) for way, value in medians.items()},
        "false_alarms": found,
        "rows": [_cost_of_rows(slide, manifest, min(num, len(manifest)), num_rounds) for num in NUM_ROWS],
    }


def _cost_of_rows(slide: Slide, manifest: Manifest, num_rows: int, num_rounds: int) -> dict[str, float]:
    rows = np.random.default_rng(0).choice(len(manifest), num_rows, replace=False)
    ways: dict[str, Callable[[], object]] = {
        "marks": lambda: bad_mark_rows(slide, manifest, rows),
        "strict": lambda: bad_rows(slide, manifest, rows),
    }
    seconds = {way: round(statistics.median(values), 5) for way, values in _time(ways, num_rounds).items()}
    under = lay(slide, manifest, rows)
    assert under is not None
    return {"num_rows": num_rows, "num_file_tiles": int(under[1].touched().sum()), **seconds}


def _cost_of_tables(path: Path, num_rounds: int) -> dict[str, float]:
    tables = read_tables(path)
    wanted = np.ones(tables[0].shape, bool)
    ways: dict[str, Callable[[], object]] = {
        "tables": lambda: _parse(path),
        "markers": lambda: bad_marks(path, tables[0], wanted, may_be_empty=False),
    }
    seconds = {way: round(statistics.median(values), 4) for way, values in _time(ways, num_rounds).items()}
    return {**seconds, "num_file_tiles": sum(table.offsets.size for table in tables)}


def _time(ways: dict[str, Callable[[], object]], num_rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(num_rounds):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - start)
    return seconds


def _parse(path: Path) -> None:
    _read_tables.cache_clear()
    read_tables(path)


def _read_all(slide: Slide, manifest: Manifest) -> None:
    for rows in np.array_split(np.arange(len(manifest)), -(-len(manifest) // 512)):
        read_tiles(slide, manifest, rows, num_threads=1)


def _detect(source: Path, pixels: NDArray[np.uint8], folder: Path, codec: str, count: int) -> dict[str, object]:
    """Shares noticed by kind of damage, for one codec."""
    path = source
    if codec != "jpeg":
        path = folder / f"{codec}.tif"
        compression = {"deflate": "zlib", "none": None}.get(codec, codec)
        tifffile.imwrite(path, pixels, tile=(TILE_PX, TILE_PX), photometric="rgb", compression=compression)
    table, content = read_tables(path)[0], path.read_bytes()
    everywhere = np.ones(table.shape, bool)
    decoded = bad_decodes(path, table, everywhere)
    alarms = bad_marks(path, table, everywhere, may_be_empty=False) | (everywhere if decoded is None else decoded)
    return {
        "false_alarms": int(alarms.sum()),
        **{kind: _detect_kind(path, table, content, kind, count) for kind in KINDS},
    }


def _detect_kind(path: Path, table: TileTable, content: bytes, kind: str, count: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    places = list(zip(table.offsets.ravel().tolist(), table.num_bytes.ravel().tolist(), strict=True))
    full = [i for i, (_, length) in enumerate(places) if length >= np.median(table.num_bytes)]
    damaged = path.with_name(f"damaged{path.suffix}")
    found: dict[str, list[bool]] = {"changed": [], "markers": [], "decode": []}
    for _ in range(count):
        i, other = (int(rng.choice(full)) for _ in range(2))
        (at, length), (from_, other_length) = places[i], places[other]
        good = content[at : at + length]
        bad = damage(kind, good, content[from_ : from_ + other_length], rng)
        damaged.write_bytes(content[:at] + bad + content[at + length :])
        wanted = np.arange(len(places)).reshape(table.shape) == i
        decoded = bad_decodes(damaged, table, wanted)
        marks = bool(bad_marks(damaged, table, wanted, may_be_empty=False).any())
        found["changed"].append(_pixels(table, bad, i) != _pixels(table, good, i))
        found["markers"].append(marks)
        found["decode"].append(marks or decoded is None or bool(decoded.any()))
    return {name: round(float(np.mean(values)), 2) for name, values in found.items()}


def damage(kind: str, tile: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """A tile's bytes, damaged; as many as before."""
    half, length = len(tile) // 2, len(tile)
    if kind == "cut":
        return tile[:half] + bytes(length - half)
    if kind == "zeros":
        return tile[:half] + bytes(length - half - 2) + tile[-2:]
    if kind == "random":
        at = int(rng.integers(length // 3, 2 * length // 3))
        return (tile[:at] + rng.bytes(64) + tile[at + 64 :])[:length]
    if kind == "byte":
        at = int(rng.integers(length))
        return tile[:at] + bytes([tile[at] ^ int(rng.integers(1, 256))]) + tile[at + 1 :]
    if kind == "bit":
        at = int(rng.integers(length))
        return tile[:at] + bytes([tile[at] ^ 1 << int(rng.integers(8))]) + tile[at + 1 :]
    if kind == "mixed":
        return (tile[:half] + other[half:-2])[: length - 2].ljust(length - 2, b"\x5a") + tile[-2:]
    return (other + tile[len(other) :])[:length]


def _pixels(table: TileTable, tile: bytes, index: int) -> bytes | None:
    try:
        return table.decode(tile, index)[0].tobytes()  # type: ignore[index, no-any-return]
    except (ValueError, RuntimeError):
        return None


def _print_table(result: dict[str, object]) -> None:
    print(f"{'way':12}{'seconds':>10}{'of a read':>12}", file=sys.stderr)
    for way, value in result["seconds"].items():  # type: ignore[attr-defined]
        print(f"{way:12}{value:10.4f}{result['ratio_to_read_tiles'][way]:12.2%}", file=sys.stderr)  # type: ignore[index]
    print(f"\n{'noticed':10}" + "".join(f"{codec + ' m/d':>16}" for codec in CODECS), file=sys.stderr)
    for kind in KINDS:
        cells = [result["detection"][codec][kind] for codec in CODECS]  # type: ignore[index]
        shares = [f"{cell['markers']:.0%} / {cell['decode']:.0%}" for cell in cells]
        print(f"{kind:10}" + "".join(f"{share:>16}" for share in shares), file=sys.stderr)


if __name__ == "__main__":
    tiny = {"num_rounds": 1, "side_px": 2048, "huge_px": 4096, "num_damaged": 3} if "--tiny" in sys.argv else {}
    outcome = main(**tiny)
    _print_table(outcome)
    print(json.dumps(outcome))
