"""What a catalogue sums up to, by hand for a few slides, against plain Python for many."""

import math
import statistics
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests import ManifestError, SlideRecord
from manifests.schema import CATALOG_SCHEMA, records_to_catalog
from manifests.stats import PAPER_K, Count, Devices, Histogram, Spread, summarise_catalog

KIND = {"vendor": "aperio", "backend": "cucim", "mpp_source": "vendor", "tile_px": 224, "tile_mpp": 0.5}
CATALOG = records_to_catalog(
    [
        *(SlideRecord(slide_id=f"s{n}", status="ok", num_tiles=n, **KIND) for n in (1, 2, 3)),  # type: ignore[arg-type]
        SlideRecord(
            slide_id="big",
            status="ok",
            num_tiles=50_578,
            num_bad_tiles=7,
            rejected_pen=5,
            rejected_tissue=100,
            vendor="hamamatsu",
            backend="openslide",
            mpp_source="csv",
            tile_px=256,
        ),
        SlideRecord(slide_id="none", status="empty", rejected_tissue=20, vendor="aperio"),
        SlideRecord(slide_id="broken", status="failed", error="cut"),
    ]
)


def test_a_few_slides_by_hand() -> None:
    stats = summarise_catalog(CATALOG)
    assert (stats.num_slides, stats.num_tiles, stats.num_bad_tiles) == (6, 50_584, 7)
    assert stats.status == {
        "ok": Count(slides=4, tiles=50_584),
        "empty": Count(slides=1, tiles=0),
        "failed": Count(slides=1, tiles=0),
    }
    assert stats.vendor == {
        "unknown": Count(slides=1, tiles=0),
        "aperio": Count(slides=4, tiles=6),
        "hamamatsu": Count(slides=1, tiles=50_578),
    }
    assert stats.backend["openslide"] == Count(slides=1, tiles=50_578)
    assert stats.mpp_source["csv"] == Count(slides=1, tiles=50_578)
    assert stats.rejected == {"tissue": 120, "pen": 5, "black": 0, "white": 0, "blur": 0}
    assert (stats.tile_px, stats.tile_mpp) == ((224, 256), (0.5,))
    assert stats.tiles_per_slide.max == 50_578
    assert stats.tiles_per_slide.median == 2.5
    assert stats.histogram == Histogram(counts=(3, *[0] * 9, 1), edges=tuple(range(0, 60_000, 5_000)))


def test_the_papers_devices_and_those_that_are_asked_for() -> None:
    found = {devices.name: devices for devices in summarise_catalog(CATALOG).devices}
    assert list(found) == list(PAPER_K)
    assert found["ResNet50 fp32"].max == 61  # 60.2: one more than whole devices hold.
    (asked,) = summarise_catalog(CATALOG, (25_289,)).devices
    assert asked == Devices(k=25_289, name="", median=1, p95=2, p99=2, max=2)
    with pytest.raises(ManifestError, match="--k 0: expected at least 1 tile"):
        summarise_catalog(CATALOG, (5, 0))


def test_nothing_sums_up_to_nothing() -> None:
    stats = summarise_catalog(CATALOG_SCHEMA.empty_table())
    assert (stats.num_slides, stats.num_tiles, stats.rejected["pen"], stats.vendor) == (0, 0, 0, {})
    assert stats.tiles_per_slide == Spread(median=0, p95=0, p99=0, max=0)
    assert stats.histogram == Histogram(counts=(0,), edges=(0, 1))
    assert {devices.max for devices in stats.devices} == {0}
    assert stats.status["ok"] == Count(slides=0, tiles=0)


@given(st.lists(st.integers(1, 10**8), min_size=1, max_size=60), st.integers(1, 10**6))
def test_agrees_with_plain_python(tiles: list[int], k: int) -> None:
    vendors = ["a", "b", "ä"]
    records = [
        SlideRecord(slide_id=str(i), status="ok", num_tiles=n, vendor=vendors[n % 3]) for i, n in enumerate(tiles)
    ]
    stats = summarise_catalog(records_to_catalog([*records, SlideRecord(slide_id="e", status="empty")]), (k,))
    assert stats.num_tiles == sum(tiles)
    assert stats.tiles_per_slide.median == pytest.approx(statistics.median(tiles))
    assert stats.tiles_per_slide.max == max(tiles)
    assert stats.devices[0].max == math.ceil(max(tiles) / k)
    assert stats.devices[0].median == math.ceil(statistics.median(tiles) / k)
    counts = Counter(record.vendor for record in records)
    assert {name: count.slides for name, count in stats.vendor.items() if name != "unknown"} == counts
    edges = np.array(stats.histogram.edges)
    assert edges[0] == 0
    assert edges[-2] <= max(tiles) < edges[-1]
    assert len(set(np.diff(edges).tolist())) == 1
    assert len(edges) <= 21
    for low, high, count in zip(edges, edges[1:], stats.histogram.counts, strict=False):
        assert count == sum(low <= n < high for n in tiles)
