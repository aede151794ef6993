"""Sampling is what SPEC.md says: its golden vectors, a second implementation from its text, and what follows."""

import hashlib
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import manifests
from manifests import ManifestError, part_bounds, sample_tiles, shard

SPEC = (Path(manifests.__file__).parent / "SPEC.md").read_text(encoding="utf-8")
_VECTOR = re.compile(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| `(.+)` \| ([\d ]+) \|$", re.MULTILINE)
GOLDEN = [(*map(int, row[:4]), row[4], row[5]) for row in _VECTOR.findall(SPEC)]

seeds = st.integers(0, 2**63)
epochs = st.integers(0, 10_000)
slide_ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


def test_the_spec_holds_golden_vectors() -> None:
    assert len(GOLDEN) >= 6


@pytest.mark.parametrize(("n", "k", "seed", "epoch", "slide_id", "rows"), GOLDEN)
def test_golden_vectors(n: int, k: int, seed: int, epoch: int, slide_id: str, rows: str) -> None:
    assert sample_tiles(n, k=k, seed=seed, epoch=epoch, slide_id=slide_id).tolist() == list(map(int, rows.split()))


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def _draw(i: int, n: int, seed: int, epoch: int, slide_id: str) -> int:
    """Draw `i`, one number at a time, as SPEC.md tells it."""
    cycle, v = divmod(i, n)
    text = b"\0".join(str(part).encode() for part in ("slidegrad-sample-1", seed, epoch, slide_id, cycle))
    digest = hashlib.blake2b(text, digest_size=64).digest()
    keys = [int.from_bytes(digest[at : at + 8], "little") for at in range(0, 64, 8)]
    h = max(1, -(-(n - 1).bit_length() // 2))
    while True:
        left, right = v >> h, v % 2**h
        for key in keys:
            left, right = right, left ^ _mix((right + key) % 2**64) % 2**h
        v = left << h | right
        if v < n:
            return v


@given(st.integers(1, 100_000), st.integers(1, 60), seeds, epochs, slide_ids)
def test_equals_a_second_implementation(n: int, k: int, seed: int, epoch: int, slide_id: str) -> None:
    expected = sorted(_draw(i, n, seed, epoch, slide_id) for i in range(k))
    assert sample_tiles(n, k=k, seed=seed, epoch=epoch, slide_id=slide_id).tolist() == expected


@given(st.integers(1, 9), st.integers(1, 60), seeds)
def test_equals_a_second_implementation_over_several_cycles(n: int, k: int, seed: int) -> None:
    expected = sorted(_draw(i, n, seed, 0, "s") for i in range(k))
    assert sample_tiles(n, k=k, seed=seed, epoch=0, slide_id="s").tolist() == expected


@given(st.integers(1, 3_000), st.integers(1, 6_000), seeds, slide_ids)
def test_a_sample_is_ascending_and_as_even_as_can_be(n: int, k: int, seed: int, slide_id: str) -> None:
    rows = sample_tiles(n, k=k, seed=seed, epoch=1, slide_id=slide_id)
    assert rows.dtype == np.int64
    assert len(rows) == k
    assert 0 <= rows[0] <= rows[-1] < n
    assert (np.diff(rows) >= 0).all()
    counts = np.bincount(rows, minlength=n)
    assert counts.max() - counts.min() <= 1
    if k <= n:
        assert counts.max() == 1


@given(st.integers(1, 300), st.integers(1, 700), st.integers(1, 700), seeds)
def test_a_smaller_sample_is_part_of_a_larger_one(n: int, k: int, more: int, seed: int) -> None:
    small, large = (Counter(sample_tiles(n, k=x, seed=seed, epoch=2, slide_id="s").tolist()) for x in (k, k + more))
    assert small <= large


def test_rows_are_drawn_alike_and_apart() -> None:
    n, k, num_epochs = 50, 10, 2_000
    drawn = np.zeros((num_epochs, n))
    for epoch in range(num_epochs):
        drawn[epoch, sample_tiles(n, k=k, seed=5, epoch=epoch, slide_id="s")] = 1
    share = k / n
    five_sigma = 5 * np.sqrt(share * (1 - share) / num_epochs)
    assert np.abs(drawn.mean(0) - share).max() < five_sigma
    # Two rows together, as often as two balls without replacement; 1225 pairs, so 5 sigma once more.
    together = (drawn.T @ drawn / num_epochs)[np.triu_indices(n, 1)]
    pair_share = share * (k - 1) / (n - 1)
    assert np.abs(together - pair_share).max() < 5 * np.sqrt(pair_share * (1 - pair_share) / num_epochs)


def test_seed_epoch_and_slide_each_change_the_sample() -> None:
    base = {"k": 100, "seed": 0, "epoch": 0, "slide_id": "a"}
    samples = {
        tuple(sample_tiles(10_000, **{**base, **change}).tolist())  # type: ignore[arg-type]
        for change in ({}, {"seed": 1}, {"epoch": 1}, {"slide_id": "b"}, {"seed": 10}, {"epoch": 10})
    }
    assert len(samples) == 6


@given(st.integers(0, 500), st.integers(1, 40))
def test_shards_are_a_contiguous_partition_of_like_sizes(n: int, num_parts: int) -> None:
    rows = np.arange(n, dtype=np.int64) * 3
    parts = [shard(rows, part=part, num_parts=num_parts) for part in range(num_parts)]
    assert np.array_equal(np.concatenate(parts), rows)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    bounds = [part_bounds(n, part, num_parts) for part in range(num_parts)]
    assert bounds == [(part * n // num_parts, (part + 1) * n // num_parts) for part in range(num_parts)]


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ManifestError, match="slide s: no tiles"):
        sample_tiles(0, k=1, seed=0, epoch=0, slide_id="s")
    with pytest.raises(ManifestError, match="slide s: k is 0"):
        sample_tiles(5, k=0, seed=0, epoch=0, slide_id="s")
    for part, num_parts in ((-1, 3), (3, 3), (0, 0)):
        with pytest.raises(ManifestError, match=f"part {part} of {num_parts}"):
            shard(np.arange(5), part=part, num_parts=num_parts)
