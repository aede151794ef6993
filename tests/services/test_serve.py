"""`slidegrad serve` as a process: it starts light, answers, refuses to be open by mistake, and ends when told."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from manifests import sample_tiles

HOME = Path(__file__).parents[2]
COMMAND = [sys.executable, str(HOME / "slidegrad.py"), "serve"]


def _environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLIDEGRAD_")}
    return {**kept, "PYTHONPATH": str(HOME), **more}


@contextmanager
def _serving(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The running command and its address; killed at the end if it still runs."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [*COMMAND, "--port", "0", *arguments]
    with subprocess.Popen(command, text=True, env=_environment(**environment), **pipes) as process:  # type: ignore[call-overload]
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert " at http://" in line, line + process.stderr.read()
            yield process, line.split(" at ")[1].split()[0]
        finally:
            process.kill()


def _refusal(*arguments: str, **environment: str) -> str:
    """The one sentence of a command that must not start."""
    ended = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=_environment(**environment), timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, ""), ended
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    return ended.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_answers_and_ends_with_a_result_when_told(cohort: Path, number: signal.Signals) -> None:
    with _serving(str(cohort)) as (process, address), httpx.Client(base_url=address) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        rows = client.get("/v1/slides/a_1/sample?k=20&seed=5").json()["columns"]["row"]
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=20)  # The client's idle connection must not hold up the end.
    assert rows == sample_tiles(80, k=20, seed=5, epoch=0, slide_id="a_1").tolist()
    assert (process.returncode, stderr) == (0, "")
    assert json.loads(stdout.splitlines()[-1]) == {"address": address, "num_requests": 2}


def test_small_answers_do_not_wait_for_acknowledgements(cohort: Path) -> None:
    from services.cli import Serve

    with Serve(manifests=cohort, port=0)._listen() as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_the_token_file_opens_the_door(cohort: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-token-of-enough-characters\n")
    with _serving(str(cohort), "--host", "0.0.0.0", "--token-file", str(token)) as (_, address):
        address = address.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{address}/v1/slides").status_code == 401
        headers = {"Authorization": "Bearer a-token-of-enough-characters"}
        assert httpx.get(f"{address}/v1/slides", headers=headers).json()["num_matched"] == 6


def test_environment_variables_set_the_limits_and_the_token_file(cohort: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-token-of-enough-characters")
    with _serving(str(cohort), SLIDEGRAD_MAX_K="7", SLIDEGRAD_TOKEN_FILE=str(token)) as (_, address):
        headers = {"Authorization": "Bearer a-token-of-enough-characters"}
        assert httpx.get(f"{address}/v1/slides").status_code == 401
        answer = httpx.get(f"{address}/v1/slides/a_1/sample?k=8", headers=headers)
        assert answer.json()["detail"] == "k is 8, at most 7 here"


def test_refuses_in_one_sentence(cohort: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_text("abc\n")
    folder = str(cohort)
    assert "--host 0.0.0.0: other machines could read everything; give --token-file" in _refusal(
        folder, "--host", "0.0.0.0"
    )
    assert "no manifests here" in _refusal(str(tmp_path / "nothing"))
    assert "the token has 3 characters" in _refusal(folder, "--host", "0.0.0.0", "--token-file", str(short))
    assert "No such file" in _refusal(folder, "--token-file", str(tmp_path / "none"))
    assert "--runs " in (refusal := _refusal(folder, "--runs", str(short)))
    assert "no folder; give a run's folder" in refusal
    assert "SLIDEGRAD_MAX_K: " in _refusal(folder, SLIDEGRAD_MAX_K="many")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}: in use on 127.0.0.1" in _refusal(folder, "--port", port)


def test_runs_without_decoders_and_training(cohort: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from services.app import create_app\n"
        "from services.cli import Serve\n"
        "from services.settings import Settings\n"
        f"create_app(Settings(manifests=Path({str(cohort)!r})))\n"
        "print(sorted({'torch', 'cucim', 'openslide', 'cv2', 'tiler', 'trainer'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=_environment(), check=True
    )
    assert done.stdout == "[]\n"
