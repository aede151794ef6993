"""Where a run stands between two steps, beside its weights: what a checkpoint's `state.json` keeps of it."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self


@dataclass
class Standing:
    """What a run remembers of the epochs and slides behind it."""

    best: tuple[float | None, float | None] | None = None
    """(merit on the validation slides, minus their loss) of the best epoch; None where it is not defined."""
    best_epoch: int | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    """slide_id to why it was skipped, the last time."""
    loss_sum: float = 0.0
    """Of this epoch's slides, as are all below."""
    num_slides: int = 0
    num_tiles: int = 0
    num_skipped: int = 0
    train_s: float = 0.0

    def begin_epoch(self) -> None:
        """Forgets the slides of the epoch before."""
        self.loss_sum, self.num_slides, self.num_tiles, self.num_skipped, self.train_s = 0.0, 0, 0, 0, 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From a checkpoint's state, of whatever else is in it too."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        best = known.pop("best", None)
        return cls(best=tuple(best) if best else None, **known)
