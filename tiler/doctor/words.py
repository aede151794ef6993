"""Findings as lines for people, on stderr. No folder is named."""

import sys
from collections.abc import Mapping
from typing import Any

_SMALL_BYTES = 16_000_000
"""Less is read too soon to be measured well."""
_UNITS = ((86_400, "days"), (3_600, "h"), (60, "min"), (1, "s"))


def tell(findings: Mapping[str, Any]) -> None:
    """A line for each finding."""
    for name, value in findings.items():
        print(f"{name:<16} {in_words(value)}", file=sys.stderr)


def in_words(value: Any) -> str:
    """A finding as text."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {in_words(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        is_size = len(value) > 1 and isinstance(value[0], int)
        return (" x " if is_size else ", ").join(map(in_words, value)) or "none"
    return "none" if value is None else str(value)


def storage_in_words(storage: Mapping[str, Any]) -> list[str]:
    """What `measure_storage` found: the rates, and what they leave open."""
    num_bytes, rates = storage["num_bytes"], []
    for rate in storage["rates"]:
        cold, warm = (_megabytes(rate[f"{name}_bytes_per_s"]) for name in ("cold", "warm"))
        rates.append(f"{count(rate['threads'], 'thread')} cold {cold}, warm {warm}")
    lines = [f"{storage['file_system']}, {num_bytes / 1e6:,.1f} MB of {storage['kind']}: {'; '.join(rates)}"]
    if storage["is_remote"]:
        lines.append("cold: this machine forgot the file first; its server may have had it in memory")
    if any(rate["cold_bytes_per_s"] is None for rate in storage["rates"]):
        lines.append("cold cannot be measured: this machine does not let go of the file (held in memory, or in use)")
    elif num_bytes < _SMALL_BYTES:
        lines.append("a small sample: rough numbers")
    return lines


def decoding_in_words(decoding: Mapping[str, Any]) -> str:
    """What `measure_decoding` found."""
    rates = [f"{count(rate['threads'], 'thread')} {rate['tiles_per_s']:,.0f} tiles/s" for rate in decoding["rates"]]
    tiles = f"{decoding['num_tiles']:,} of {decoding['num_tiles_of_slide']:,} tiles"
    return f"{tiles} ({decoding['tile_px']} px at {decoding['tile_mpp']:g} mpp): {'; '.join(rates)}"


def count(number: int, one: str, many: str = "") -> str:
    """A number of things, as "1 thread" or "2 threads"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    """A time in the largest unit of which there are two, two digits long: "95 s", "12 min"."""
    size, unit = next(((size, unit) for size, unit in _UNITS if seconds >= 2 * size), _UNITS[-1])
    return f"{float(f'{seconds / size:.2g}'):g} {unit}"


def _megabytes(bytes_per_s: float | None) -> str:
    return "unknown" if bytes_per_s is None else f"{bytes_per_s / 1e6:,.0f} MB/s"
