"""Paths are cut out of sentences, and nothing else is."""

import pytest

from manifests.privacy import without_paths


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("slide a: /x/Doe Jane.svs: no such file", "slide a: [path]: no such file"),
        ("slide a: /x/Doe Jane.svs cannot be read.", "slide a: [path] cannot be read."),
        ("[Errno 2] No such file: '/x/Doe, Jane (2).svs'", "[Errno 2] No such file: '[path]'"),
        ("/x/O'Neil 1.svs: cut", "[path]: cut"),
        ("/a/b.svs and /c/d.svs at 3 tiles/s", "[path] and [path] at 3 tiles/s"),
        ("no folder /archive/Doe Jane", "no folder [path]"),
        ("/x/Doe.zarr/0/1: torn", "[path]: torn"),
        ("OSError(2, '~/x y.svs', 3)", "OSError(2, '[path]', 3)"),
        ("~doe/x", "[path]"),
        (r"cannot open C:\x\Doe.svs", "cannot open [path]"),
        ("cannot open c:/Doe", "cannot open [path]"),
        (r"\\nas\Doe", "[path]"),
        ("s3://bucket/Doe.SVS timed out", "[path] timed out"),
        ("local-dir:/data/Doe", "local-dir:[path]"),
        ("archive=Doe/slides/x", "archive=[path]"),
        (r"in Doe\slides\x", "in [path]"),
        ("slides/Doe Jane.svs: torn", "[path]: torn"),
        ("torn: slides/Doe.tif.", "torn: [path]."),
        ("cannot open 'Doe Jane/S 1.svs' now", "cannot open '[path]' now"),
        ('["/a/b", "c"]', '["[path]", "c"]'),
        ("/data/Doe\n3 tiles/s", "[path]\n3 tiles/s"),
    ],
)
def test_paths_are_taken_out(text: str, shown: str) -> None:
    assert without_paths(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "[rank 3/8 encoder] 1/2 done",
        "936 tiles/s and/or N/A, 3 / 5 tiles (a/b)",
        "on 12/03/2024",
        "the slides' tiles/s and 'and/or'",
        "hf-hub:bioptimus/H-optimus-0",
        "S 1.svs: expected JPEG, got text/html",
        "test_resnet.a1/in1k",
    ],
)
def test_what_is_no_path_stays(text: str) -> None:
    assert without_paths(text) == text
