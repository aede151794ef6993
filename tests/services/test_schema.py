"""The whole OpenAPI document against the running service: schemathesis makes requests of it, good and bad ones."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.services.running import environment_of, serving

TOKEN = "a-token-of-enough-characters"
# Slides that are there, among ids that are not; what a schema cannot say is told apart in schema_checks.py.
CONFIG = """
[dictionaries.slides]
values = ["B_3", "a_1", "a_2", "c_empty", "d_failed", "ö #5%"]

[parameters]
"path.slide_id" = { dictionary = "slides", probability = 0.7 }

[checks.positive_data_acceptance]
expected-statuses = [200, 304, 400, 401, 404, 409]
"""


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.parametrize("guarded", [False, True], ids=["open", "with a token"])
def test_no_request_made_of_the_schema_is_answered_otherwise_than_it_says(
    settled: Path, tmp_path: Path, guarded: bool, times: Callable[[int, int], int]
) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "labels.csv").write_text("slide_id,label\nB_3,tumour\n")
    labels = ("--labels", str(tmp_path / "labels.csv"))
    door = ("--token-file", str(tmp_path / "token")) if guarded else ()
    key = ("--header", f"Authorization: Bearer {TOKEN}") if guarded else ()
    with serving(str(settled), *labels, *door) as (_, address):
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml", "--no-color", "run"]
        command += [f"{address}/openapi.json", *key, "--checks", "all", "--warnings", "off", "--no-shrink"]
        # With a token the same routes answer: what differs is the door.
        phases = "examples,coverage" if guarded else "examples,coverage,fuzzing,stateful"
        command += ["--phases", phases, "--max-examples", str(times(4, 200)), "--seed", "1"]
        variables = {"SCHEMATHESIS_HOOKS": "tests.services.schema_checks", "COLUMNS": "200"}
        env = {**environment_of(**variables), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=3600, check=False)
    if found := re.search(r"(\d+) generated", done.stdout):
        print(f"schema: {found[1]} requests, {'with a token' if guarded else 'open'}", file=sys.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    assert found
    assert int(found[1]) > times(100, 300), done.stdout
