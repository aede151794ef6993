"""Records of slides: what a slide says of itself; of one that cannot be used, a sentence that names its id alone."""

import re
import unicodedata
from pathlib import Path

from manifests.schema import SlideRecord
from tiler.slide import Slide
from tiler.version import VERSION

_PATH = re.compile(r"""(?<![\w.])(?:[A-Za-z]:)?/[^\s:'")]+/[^\s:'")]*""")
"""An absolute path, as far as it has no space."""


def slide_record(slide: Slide, slide_id: str, mpp: tuple[float, float], mpp_source: str) -> SlideRecord:
    """The record of an open slide without tiles.

    Args:
        slide: the slide.
        slide_id: its id.
        mpp: microns per level-0 px (x, y), as resolved.
        mpp_source: where they came from.
    """
    width, height = slide.size_l0
    return SlideRecord(
        slide_id=slide_id,
        status="empty",
        width_l0=width,
        height_l0=height,
        mpp_x=mpp[0],
        mpp_y=mpp[1],
        mpp_source=mpp_source,
        mpp_conflict=slide.scale.conflict,
        mpp_other=slide.scale.other,
        backend=slide.backend,
        vendor=slide.vendor,
        fingerprint=slide.fingerprint,
        version=VERSION,
    )


def hide_paths(sentence: str, slide_id: str, *files: Path) -> str:
    """The sentence on one line, with the slide's id in place of every path and file name.

    Readers' errors like to repeat paths, of the slide's other files too, and file names may hold names of people.

    Args:
        sentence: what went wrong.
        slide_id: what may be told.
        files: the slide, its mask, and what else may be named.
    """
    folders = [f"{file.parent}/" for file in files if len(file.parent.name) > 1]  # Other files of the slide lie there.
    stems = [file.stem for file in files if len(file.stem) >= _LEAST_STEM]
    for text in (*map(str, files), *(file.name for file in files), *folders, *stems):
        sentence = sentence.replace(text, slide_id)
    if files and unicodedata.normalize("NFC", files[0].stem) not in slide_id:
        # A pseudonym: what readers add in brackets may name other files of the slide, after the patient too.
        while (shorter := _BRACKETS.sub("", sentence)) != sentence:
            sentence = shorter
    sentence = " ".join(_PATH.sub(slide_id, sentence).split())
    return sentence.removeprefix(f"slide {slide_id}: ").removeprefix(f"{slide_id}: ")


_BRACKETS = re.compile(r"\s*\([^()]*\)")
_LEAST_STEM = 4
"""A shorter stem is part of too many words."""


def failed_record(slide_id: str, sentence: str, mark: str, config_hash: str) -> SlideRecord:
    """The record of a slide that cannot be used; `mark` is its fingerprint, "" where it could not be read."""
    return SlideRecord(
        slide_id=slide_id,
        status="failed",
        error=f"slide {slide_id}: {sentence}",
        fingerprint=mark,
        config_hash=config_hash,
        version=VERSION,
    )
