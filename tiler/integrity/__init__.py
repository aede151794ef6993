"""Checks of a slide's bytes: cuCIM does not notice damage, so we look ourselves.

`check_whole` finds cut files. At tiling time `find_damage` looks at the compressed tiles under the tiles of a manifest,
at the level they are read from, and at all of the level that tissue was looked for on (one tile in 16 more, or fewer):
what is damaged there may hide tissue, or show another slide's, so that one damaged tile there is the end. Where both
are the same level, tiles that touch damage are left out, as ever.

While training, `bad_mark_rows` and `bad_rows` look again at the bytes under single tiles of a manifest: a slide of
20,000 px, 2,600 tiles, 6 ms and 280 ms; 64 tiles, 0.8 ms and 24 ms; one tile, 0.3 ms and 0.9 ms. Any number of threads
may call them at once.

Share of 60 damaged tiles that is found, by damage and codec (tests/benchmarks/bench_check.py). Markers find the first
line, and what lies outside the file; JPEG stands for its baseline and progressive kinds.

    damage                                   markers    decode: JPEG   JPEG 2000   LZW     Deflate
    zeros to the end (a cut tile, a hole)      100 %        100 %       100 %     100 %     100 %
    zeros in the second half, end kept           0 %        100 %       100 %     100 %     100 %
    64 random bytes in the middle                0 %         82 %         7 %      98 %     100 %
    one byte                                     0 %         20 %         2 %      43 %     100 %
    one bit                                      0 %         17 %         2 %      17 %     100 %
    another tile's second half                   0 %         98 %         0 %      87 %     100 %
    another whole tile over it             where that is longer, else by none

Of tiles without compression nothing is found but a wrong length or place: there is nothing to go by.

"sample" decodes strictly and reads with two readers, but a hundredth of the tiles; from the first damage it finds it
goes on as "decode". What no decoder notices (a whole tile of another place, JPEG 2000's coefficients) two readers do
not notice either.

An empty tile (length 0) is no damage where the scanner leaves out glass (Philips, and others that OpenSlide paints
white), but is in Aperio files, where the scanner failed, and where cuCIM paints it black. Formats without TIFF tables
(MRXS, VMS, DICOM) have no markers to look at: their reader is OpenSlide, which raises where JPEG cannot be decoded, but
passes over what libjpeg only warns of; "decode" reads every tile with it. So it does where OpenSlide moves tiles about
(Ventana, Leica, Trestle) and where a level is made from another (NDPI): there a bad marker anywhere leads to reading
all tiles.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from manifests.geometry import l0_to_level
from manifests.schema import Manifest
from tiler.config import Check
from tiler.errors import TilerError
from tiler.integrity.compare import other_reader, sample_rows, unequal, unreadable
from tiler.integrity.cover import Cover, Grid, cover
from tiler.integrity.decode import bad_decodes, bad_streams
from tiler.integrity.markers import JPEG2000, bad_marks
from tiler.masks import overview_level
from tiler.slide import Slide
from tiler.tiff_tables import TileTable, read_tables


def check_whole(path: Path) -> None:
    """Raises if a TIFF-based slide is cut: tiles of its pyramid lie beyond the end of the file.

    Files that are not TIFF pass; their reader notices.

    Raises:
        TilerError: the file is cut, with the numbers, or its tables make no sense.
    """
    tables, size = read_tables(path), path.stat().st_size
    pyramid = [table for table in tables if table.is_tiled] or tables
    num_tiles = sum(table.offsets.size for table in pyramid)
    beyond = sum(int((table.offsets > size - table.num_bytes).sum()) for table in pyramid)
    if beyond:
        raise TilerError(f"{path.name}: cut file, {beyond} of {num_tiles} tiles lie beyond its {size} bytes")


@dataclass(frozen=True)
class Damage:
    """What a check found: `bad` (n,) marks tiles of the manifest that touch damaged bytes."""

    bad: NDArray[np.bool_]


def find_damage(slide: Slide, manifest: Manifest, check: Check) -> Damage:
    """Looks for damage under the tiles of a manifest.

    Args:
        slide: the open slide.
        manifest: its tiles.
        check: how; "none" looks at nothing.

    Raises:
        TilerError: the level that tissue was looked for on is damaged.
        OSError: the disk does not give the bytes.
    """
    if check == "none":
        return Damage(np.zeros(len(manifest), bool))
    _check_overview(slide, manifest, decode=check == "decode")
    rows = np.arange(len(manifest))
    if check == "decode":
        return Damage(bad_rows(slide, manifest, rows))
    bad = bad_mark_rows(slide, manifest, rows)
    if slide.table(manifest.slide.level) is None and _any_bad_mark(slide):
        bad = unreadable(slide, manifest, rows)
    if check == "sample":
        sample = sample_rows(len(manifest), slide.fingerprint)
        if bad.any() or _bad_in_sample(slide, manifest, sample, bad):
            bad |= bad_rows(slide, manifest, rows)
    return Damage(bad)


def bad_rows(slide: Slide, manifest: Manifest, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which tiles of a manifest touch compressed tiles that lost their marks or do not decode strictly.

    Only the compressed tiles under them are looked at; where all of those are refused, 16 more, to know whether their
    codec is known. Formats without tables are read by OpenSlide, which does not tell damage from a disk that does not
    answer.

    Args:
        slide: the open slide.
        manifest: its manifest.
        rows: which tiles, (n,), in any order.

    Returns:
        bool (n,).

    Raises:
        TilerError: the file's tables make no sense.
        OSError: the disk does not give the bytes; another try may succeed.
    """
    under = lay(slide, manifest, rows)
    if under is None:
        return unreadable(slide, manifest, rows)
    table, covered = under
    bad, is_known = _bad_file_tiles(slide, table, covered.touched(), decode=True)
    touching = covered.touching(bad)
    if not is_known:
        touching[~touching] = unreadable(slide, manifest, rows[~touching])
    return touching


def bad_mark_rows(
    slide: Slide, manifest: Manifest, rows: NDArray[np.int64], *, look_through: bool = False
) -> NDArray[np.bool_]:
    """Which tiles of a manifest touch compressed tiles without their codec's marks: 36 bytes each are read.

    With `look_through`, JPEG 2000, whose decoder takes any bytes, is also looked through for what an encoder never
    writes: 1 % of the time of decoding it. No tile is bad where a level is not a grid of compressed tiles (MRXS, DICOM,
    NDPI's made levels …): OpenSlide reads it, and raises. Arguments, result and errors as for `bad_rows`.
    """
    under = lay(slide, manifest, rows)
    if under is None:
        return np.zeros(len(rows), bool)
    table, covered = under
    bad, _ = _bad_file_tiles(slide, table, covered.touched(), decode=False)
    if look_through and table.compression in JPEG2000:
        bad |= bad_streams(slide.path, table, covered.touched() & ~bad)
    return covered.touching(bad)


def _bad_in_sample(slide: Slide, manifest: Manifest, rows: NDArray[np.int64], bad: NDArray[np.bool_]) -> bool:
    """Whether some of the `rows` are damaged; they are marked in `bad`, (n,)."""
    # Decoded first: cuCIM may take the process with it on what does not decode.
    found = bad_rows(slide, manifest, rows)
    if (other := other_reader(slide)) is not None:
        found[~found] = unequal(slide, other, manifest, rows[~found])
    bad[rows] |= found
    return bool(found.any())


def _bad_file_tiles(slide: Slide, table: TileTable, wanted: Grid, *, decode: bool) -> tuple[Grid, bool]:
    """The bad ones of the `wanted` tiles of a picture, and whether that is known (their decoder must take some)."""
    bad = bad_marks(slide.path, table, wanted, may_be_empty=_may_be_empty(slide))
    if not decode:
        return bad, True
    undecoded = bad_decodes(slide.path, table, wanted & ~bad)
    return (bad, False) if undecoded is None else (bad | undecoded, True)


def lay(slide: Slide, manifest: Manifest, rows: NDArray[np.int64]) -> tuple[TileTable, Cover] | None:
    """The table of the read level and what of it lies under the `rows`; None where a level is no picture's grid."""
    record = manifest.slide
    level, table = slide.levels[record.level], slide.table(record.level)
    if table is None:
        return None
    x, y = (l0_to_level(corner[rows], level.downsample) for corner in (manifest.x_l0, manifest.y_l0))
    beside = 0 if slide.is_exact(record.level) else 1  # Interpolated with the next px.
    size = record.read_w + beside, record.read_h + beside
    return table, cover(x, y, size, (table.tile_w, table.tile_h), table.shape)


def _check_overview(slide: Slide, manifest: Manifest, *, decode: bool) -> None:
    record = manifest.slide
    index = overview_level(slide, max(record.mpp_x, record.mpp_y))
    table = slide.table(index)
    if table is None or (index == record.level and len(manifest)):
        return  # Where it is the read level, its tiles are looked at one by one: unless there are none.
    bad, _ = _bad_file_tiles(slide, table, np.ones(table.shape, bool), decode=decode)
    if bad.any():
        raise TilerError(
            f"slide {record.slide_id}: {int(bad.sum())} of {bad.size} compressed tiles of level {index}, where tissue "
            "is looked for, are damaged; restore the file from its source"
        )


def _any_bad_mark(slide: Slide) -> bool:
    tables = [table for table in read_tables(slide.path) if table.is_tiled]
    empty = _may_be_empty(slide)
    return any(bad_marks(slide.path, t, np.ones(t.shape, bool), may_be_empty=empty).any() for t in tables)


def _may_be_empty(slide: Slide) -> bool:
    return slide.vendor == "philips" or (slide.backend == "openslide" and slide.vendor != "aperio")
