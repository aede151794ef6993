"""Of a slide that cannot be used its id is told, never a path or a file name."""

from pathlib import Path

import pytest

from tiler.outcome import failed_record, hide_paths

SLIDE = Path("/archive/Jane Doe, 1950/MUELLER_HANS.vms")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("slide p1: cut file", "cut file"),
        ("MUELLER_HANS.vms: no such file", "no such file"),
        (f"not a slide (Couldn't open {SLIDE.parent}/MUELLER_HANS_map2.jpg: No such file)", None),
        ("Couldn't open /archive/Jane Doe, 1950/MUELLER_HANS/Index.dat", None),
        ("reading /somewhere/else/Hans-Mueller.svs\nfailed", "reading p1 failed"),
        ("level 1/4 at 0.5 um/px, 3 and/or 4 tiles", "level 1/4 at 0.5 um/px, 3 and/or 4 tiles"),
        ("mask /masks/MUELLER_HANS.png is of another slide", "mask p1 is of another slide"),
    ],
)
def test_paths_and_names_are_hidden(error: str, sentence: str | None) -> None:
    told = hide_paths(error, "p1", SLIDE, Path("/masks/MUELLER_HANS.png"))
    for secret in ("MUELLER", "Jane", "1950", "archive", "somewhere", "\n"):
        assert secret not in told
    assert sentence is None or told == sentence


def test_a_failed_slide_says_so_in_one_sentence() -> None:
    record = failed_record("p1", "cut file", "f00", "c00")
    assert (record.status, record.error, record.fingerprint, record.config_hash) == (
        "failed",
        "slide p1: cut file",
        "f00",
        "c00",
    )
