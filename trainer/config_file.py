"""The file `config.yaml`: nested dataclasses to plain values and back, whatever version wrote them.

Knows no setting but the names that some once had; the settings are in `config`. One thing to know before changing it:
all that does not fit is told at once, by name.
"""

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from trainer.errors import TrainerError

VERSION_KEY = "version"
"""Of Slidegrad, beside the fields."""


def plain(value: Any) -> Any:
    """Nested values fit for YAML: lists for tuples, text for paths."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted name."""
    out: dict[str, Any] = {}
    for key, item in value.items():
        out.update(flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item})
    return out


def parse(text: str, where: str) -> tuple[dict[str, Any], str | None]:
    """The values of a `config.yaml`, in today's names, and the version that wrote it, if it said so.

    Raises:
        TrainerError: no config.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TrainerError(f"{where}: not a run's config ({str(error).partition(chr(10))[0]})") from None
    if not isinstance(values, dict):
        raise TrainerError(f"{where}: not a run's config (got {values!r:.40})")
    version = values.pop(VERSION_KEY, None)
    return _without_old_names(values), version


def _without_old_names(values: dict[str, Any]) -> dict[str, Any]:
    """A saved config in today's fields: tiles.augment was a switch for flips, machine.read_ahead a number of shards."""
    values = {name: dict(section) if isinstance(section, dict) else section for name, section in values.items()}
    tiles, machine = values.get("tiles"), values.get("machine")
    if isinstance(tiles, dict) and "augment" in tiles and "augment" not in values:
        values["augment"] = {"flips": tiles.pop("augment")}
    if isinstance(machine, dict):
        machine.pop("read_ahead", None)
        if "keep" in machine and machine["keep"] is None:
            machine["keep"] = "all"
    return values


def build(cls: Any, values: Any, prefix: str, faults: list[str]) -> Any:
    """A dataclass from plain values; what does not fit is added to `faults`, and has its default."""
    from typeguard import TypeCheckError, check_type

    hints, out = get_type_hints(cls), {}
    if not isinstance(values, dict):
        faults.append(f"{prefix.rstrip('.')} is {values!r}, expected a section")
        return cls()
    for name, value in values.items():
        if name not in hints:
            faults.append(f"{prefix}{name} is no setting of this version")
            continue
        if dataclasses.is_dataclass(hints[name]):
            out[name] = build(hints[name], value, f"{prefix}{name}.", faults)
            continue
        if "Path" in str(hints[name]) and isinstance(value, str):
            value = Path(value)
        elif isinstance(value, list):
            value = tuple(value)
        try:
            out[name] = check_type(value, hints[name])
        except TypeCheckError:
            faults.append(f"{prefix}{name} is {value!r}, which this version does not take")
    return cls(**out) if not faults else cls()
