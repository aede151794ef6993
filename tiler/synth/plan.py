"""Who each slide is: label, pair, patient, and which special case it is. Pure functions of (seed, index).

Slides 2j and 2j+1 are a pair: one positive and one negative that share every draw but the foci's kind, so that
size, stain, tissue, pen and file size cannot tell the classes apart. They are two specimens of one patient, one with
and one without a tumour: a split by patient keeps a pair together, else what is learnt of a slide's look would speak
against its twin on the other side. Nothing here depends on how many slides are
asked for: slide i of a small cohort is slide i of a large one.
"""

from dataclasses import dataclass

import numpy as np

from tiler.synth.config import CohortConfig

_STREAM_PAIR, _STREAM_TEXTURE, _STREAM_SCANT, _STREAM_PEN, _STREAM_PATIENT = range(5)


@dataclass(frozen=True, kw_only=True)
class SlidePlan:
    """One slide before anything is drawn."""

    index: int
    """Place of the slide in the cohort, from 0."""
    pair: int
    """Number of the matched pair, index // 2."""
    label: int
    """1: positive, holds tumour foci; 0: negative, holds look-alike foci only."""
    mirror: int
    """How the pair's layout is turned: 0 as drawn, 1 left-right, 2 top-bottom, 3 both."""
    is_scant: bool
    """Almost no tissue."""
    has_pen: bool
    """Carries pen marks."""
    patient_id: str
    """The patient of the pair."""
    specimen_id: str
    """One specimen for each slide."""

    @property
    def slide_id(self) -> str:
        """The slide's name, which says nothing about its label."""
        return f"synth_{self.index:04d}"


def pair_rng(seed: int, pair: int) -> np.random.Generator:
    """The draws that both slides of a pair share."""
    return np.random.default_rng((seed, _STREAM_PAIR, pair))


def texture_rng(seed: int, index: int) -> np.random.Generator:
    """The draws of one slide alone: every nucleus and fibre."""
    return np.random.default_rng((seed, _STREAM_TEXTURE, index))


def plan_slide(seed: int, index: int, config: CohortConfig) -> SlidePlan:
    """Draws who slide `index` is."""
    pair, second = divmod(index, 2)
    label = _label(seed, index)
    mirror = int(np.random.default_rng((seed, _STREAM_PATIENT, 1, pair)).integers(1, 4)) if second else 0
    return SlidePlan(
        index=index,
        pair=pair,
        label=label,
        mirror=mirror,
        is_scant=_is_special(seed, pair, config.scant_every, _STREAM_SCANT),
        has_pen=_is_special(seed, pair, config.pen_every, _STREAM_PEN),
        patient_id=f"patient_{pair:04d}",
        specimen_id=f"specimen_{index:04d}",
    )


def _label(seed: int, index: int) -> int:
    """Label of a slide: in each pair one is positive, which one is drawn."""
    pair, second = divmod(index, 2)
    positive_is_second = int(np.random.default_rng((seed, _STREAM_PATIENT, 0, pair)).integers(2))
    return int(second == positive_is_second)


def _is_special(seed: int, pair: int, every: int, stream: int) -> bool:
    """Whether this pair is the one of its block of `every` pairs; drawn per block, so that none goes without."""
    if every == 0:
        return False
    block, place = divmod(pair, every)
    return place == int(np.random.default_rng((seed, stream, block)).integers(every))
