"""What pictures say in words: of the slide, of what is known and predicted of it, and of a tile. Pure.

One thing to know before changing it: a slide id is any text, and the pictures' font has not every character.
"""

import functools
import math
import textwrap

from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font

from trainer.cohort import Case, Cohort
from trainer.heatmaps.values import SlideValues
from trainer.reports.findings import decimals, significant

_MISSING = "□"
_MAX_CHARACTERS = 300


def printable(text: str) -> str:
    """The text as the pictures' font can show it; a box for every other character."""
    known = _characters()
    return "".join(character if ord(character) in known else _MISSING for character in text)


def in_lines(text: str, width: int) -> list[str]:
    """Printable lines of at most `width` characters, broken within words where they must be; very long text is cut."""
    text = text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 1]}…"
    return textwrap.wrap(printable(text), width, break_on_hyphens=False) or [""]


def describe_slide(case: Case, values: SlideValues, cohort: Cohort) -> str:
    """What is known of a slide and what is predicted, in one line."""
    if cohort.task == "classes":
        shown = [(p, name) for p, name in zip(values.predictions, values.outputs, strict=True) if p is not None]
        known = f"{cohort.columns[0]} {cohort.classes[case.label]}"
        if not shown:
            return f"{known}, no prediction: the model diverged"
        (probability, name), last = max(shown), values.outputs[-1]
        if len(values.outputs) == 2:
            return f"{known}, predicted {name} (probability of {last}: {decimals(values.predictions[-1])})"
        return f"{known}, predicted {name} (probability: {decimals(probability)})"
    column = values.outputs.index(values.origin.output) if values.origin.output else 0
    target, found = case.targets[column], values.predictions[column]
    if cohort.task == "multilabel":
        known = {1.0: "yes", 0.0: "no"}.get(target, "not known")
        return f"{values.outputs[column]} {known}, score {decimals(found)}"
    known = "not known" if math.isnan(target) else significant(target)
    return f"{values.outputs[column]} {known}, predicted {'–' if found is None else significant(found)}"


def describe_sum(values: SlideValues) -> str:
    """How contributions add up to the slide's output; empty if there are none."""
    if values.base is None or values.total is None:
        return ""
    numbers = values.total, values.total - values.base, values.base
    total, parts, base = (significant(number).replace("-", "−") for number in numbers)
    return f"{values.what}: {total} = {parts} from the tiles and {base} that every slide has"


def describe_model(values: SlideValues) -> str:
    """Whose values they are."""
    return f"{values.aggregator}, checkpoint {values.origin.checkpoint}. Research software, not a medical device."


@functools.cache
def _characters() -> frozenset[int]:
    return frozenset(FT2Font(findfont(FontProperties())).get_charmap())
