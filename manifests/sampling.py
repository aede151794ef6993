"""Which tiles of a slide a step uses: a pure function of (seed, epoch, slide_id), never of the number of ranks.

The algorithm is written down in SPEC.md with golden vectors, so that it can be re-implemented elsewhere and outlives
any random generator of numpy. Changing a single output is a new schema version.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from manifests.errors import ManifestError

_NUM_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def sample_tiles(n: int, *, k: int, seed: int, epoch: int, slide_id: str) -> NDArray[np.int64]:
    """Draws `k` of a slide's `n` tiles.

    Draw i is position i mod n of a pseudo-random permutation of the rows, number i // n. So k <= n draws distinct
    rows, k > n repeats rows (with replacement, as evenly as possible: counts differ by at most one), and the draws of
    a smaller k are the first draws of a larger one. Time and memory are O(k + sqrt(n)).

    Args:
        n: tiles of the slide.
        k: tiles to draw.
        seed: the run's seed.
        epoch: the epoch, from 0.
        slide_id: the slide.

    Returns:
        Row numbers, int64, ascending, length k.

    Raises:
        ManifestError: n is 0, or k is below 1.

    Source: balanced Feistel network with cycle walking (Black and Rogaway, Ciphers with arbitrary finite domains,
    2002), round function SplitMix64's finaliser (Steele, Lea, Flood, 2014), keys from BLAKE2b (RFC 7693).
    """
    if n < 1:
        raise ManifestError(f"slide {slide_id}: no tiles to sample from")
    if k < 1:
        raise ManifestError(f"slide {slide_id}: k is {k}, expected at least 1")
    # A whole permutation draws every row once, whatever its keys are: only one that is cut short is worked out.
    num_whole, rest = divmod(k, n)
    drawn = _permute(np.arange(rest), n, _round_keys(seed, epoch, slide_id, num_whole))
    if not num_whole:
        return _sort(drawn, n)
    counts = np.full(n, num_whole)
    counts[drawn] += 1
    return np.repeat(np.arange(n), counts)


def shard(rows: NDArray[np.int64], *, part: int, num_parts: int) -> NDArray[np.int64]:
    """Contiguous piece `part` of `num_parts`; sizes differ by at most one, and the pieces in order are `rows`.

    Parts are encoder shards (virtual ranks), not torch ranks.

    Raises:
        ManifestError: part is not in [0, num_parts).
    """
    if not 0 <= part < num_parts:
        raise ManifestError(f"part {part} of {num_parts}: expected 0 <= part < num_parts")
    begin, end = part_bounds(len(rows), part, num_parts)
    return rows[begin:end]


def part_bounds(num_rows: int, part: int, num_parts: int) -> tuple[int, int]:
    """Begin and end of piece `part` of `num_parts` of a run of `num_rows`."""
    return part * num_rows // num_parts, (part + 1) * num_rows // num_parts


def _round_keys(seed: int, epoch: int, slide_id: str, cycle: int) -> NDArray[np.uint64]:
    """One uint64 key per Feistel round: a 64-byte BLAKE2b digest, little-endian."""
    text = f"slidegrad-sample-1\x00{seed}\x00{epoch}\x00{slide_id}\x00{cycle}"
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8 * _NUM_ROUNDS).digest(), dtype="<u8")


def _permute(values: NDArray[np.int64], n: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Image of `values` (k,), all < n, under the permutation of [0, n) with round keys (8,)."""
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    tables = _round_tables(keys, half_bits)
    out = _feistel(values, half_bits, tables)
    outside = np.flatnonzero(out >= n)
    while len(outside):  # The domain 4^half_bits is at most 4n: fewer than 4 walks on average.
        walked = _feistel(out[outside], half_bits, tables)
        out[outside] = walked
        outside = outside[walked >= n]
    return out


def _round_tables(keys: NDArray[np.uint64], half_bits: int) -> NDArray[np.int64]:
    """What each round makes of each half (8, 2^half_bits).

    A half has at most sqrt(4 n) values: looking its round function up costs a tenth of computing it k times over.
    """
    halves = np.arange(1 << half_bits, dtype=np.uint64)
    return (_mix(halves + keys[:, None]) & np.uint64((1 << half_bits) - 1)).astype(np.int64)


def _feistel(values: NDArray[np.int64], half_bits: int, tables: NDArray[np.int64]) -> NDArray[np.int64]:
    left, right = values >> half_bits, values & ((1 << half_bits) - 1)
    for table in tables:
        left ^= table.take(right)
        left, right = right, left
    return (left << half_bits) | right


def _sort(rows: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Ascending; numpy sorts 16-bit numbers by their digits, seven times as fast."""
    narrow = np.uint16 if n <= 1 << 16 else np.int64
    return np.sort(rows.astype(narrow), kind="stable").astype(np.int64)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = z + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))
