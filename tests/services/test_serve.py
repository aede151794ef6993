"""`slidegrad serve` as a process: it starts light, answers, refuses to be open by mistake, and ends when told."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from manifests import SlidegradError, sample_tiles
from manifests.files import tiles_path
from services.cli import Serve
from tests.services.running import COMMAND, environment_of, serving


def _refusal(*arguments: str, **environment: str) -> str:
    """The one sentence of a command that must not start."""
    ended = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        env=environment_of(**environment),
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, ""), ended
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    return ended.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_answers_and_ends_with_a_result_when_told(cohort: Path, number: signal.Signals) -> None:
    with serving(str(cohort)) as (process, address), httpx.Client(base_url=address) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        rows = client.get("/v1/slides/a_1/sample?k=20&seed=5").json()["columns"]["row"]
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=20)  # The client's idle connection must not hold up the end.
    assert rows == sample_tiles(80, k=20, seed=5, epoch=0, slide_id="a_1").tolist()
    assert (process.returncode, stderr) == (0, "")
    assert json.loads(stdout.splitlines()[-1]) == {"address": address, "num_requests": 2}


def test_small_answers_do_not_wait_for_acknowledgements(cohort: Path) -> None:
    with Serve(manifests=cohort, port=0)._listen() as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_the_token_file_opens_the_door(cohort: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-token-of-enough-characters\n")
    with serving(str(cohort), "--host", "0.0.0.0", "--token-file", str(token)) as (_, address):
        address = address.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{address}/v1/slides").status_code == 401
        headers = {"Authorization": "Bearer a-token-of-enough-characters"}
        assert httpx.get(f"{address}/v1/slides", headers=headers).json()["numberMatched"] == 6


def test_environment_variables_set_the_limits_and_the_token_file(cohort: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-token-of-enough-characters")
    with serving(str(cohort), SLIDEGRAD_MAX_K="7", SLIDEGRAD_TOKEN_FILE=str(token)) as (_, address):
        headers = {"Authorization": "Bearer a-token-of-enough-characters"}
        assert httpx.get(f"{address}/v1/slides").status_code == 401
        answer = httpx.get(f"{address}/v1/slides/a_1/sample?k=8", headers=headers)
        assert answer.json()["detail"] == "k is 8, at most 7 here"


def _pids(parent: int) -> set[int]:
    """The workers of a running command: its children, but for multiprocessing's own helper."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    found = set()
    for pid in children:
        with contextlib.suppress(OSError):  # It ended meanwhile.
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(int(pid))
    return found


def _is_running(pid: int) -> bool:
    """Orphans may stay as zombies, where nobody waits for them."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _ask(address: str, path: str) -> httpx.Response:
    """One request on a connection of its own, so that any worker may take it."""
    return httpx.get(address + path, timeout=30)


def test_workers_share_the_port_and_their_counts_and_a_killed_one_is_replaced(settled: Path) -> None:
    with serving(str(settled), "--workers", "2") as (process, address):
        before = _pids(process.pid)
        assert len(before) == 2
        for _ in range(6):
            assert _ask(address, "/v1/slides/a_1").status_code == 200
        killed = min(before)
        os.kill(killed, signal.SIGKILL)
        _wait_until(lambda: len(_pids(process.pid) - before) == 1)
        _wait_until(lambda: _ask(address, "/healthz").status_code == 200)
        counted = _ask(address, "/metrics").text
        assert 'slidegrad_http_requests_total{route="/v1/slides/{slide_id}",status="200"} 6.0' in counted
        assert 'slidegrad_http_request_seconds_count{route="/v1/slides/{slide_id}"} 6.0' in counted
        os.kill(max(before), signal.SIGTERM)  # An end of its own is one, too.
        _wait_until(lambda: len(_pids(process.pid) - before) == 2)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, json.loads(stdout)["num_requests"] >= 7) == (0, True)
    assert f"worker {killed} ended (exit code -9) and is replaced" in stderr
    assert str(settled) not in stderr


def test_a_worker_that_cannot_start_ends_the_command(tmp_path: Path) -> None:
    assert "no manifests here" in _refusal(str(tmp_path), "--workers", "2", "--port", "0")


def test_workers_whose_parent_was_killed_end_too(settled: Path) -> None:
    with serving(str(settled), "--workers", "2") as (process, _):
        workers = _pids(process.pid)
        process.kill()
        process.wait()
        _wait_until(lambda: not any(map(_is_running, workers)))


def test_a_request_in_hand_is_finished_when_the_service_is_told_to_stop(settled: Path) -> None:
    with serving(str(settled)) as (process, address):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"GET /v1/slides/B_3/tiles HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            head = client.recv(100)
            process.send_signal(signal.SIGTERM)
            rest = b"".join(iter(lambda: client.recv(65536), b""))
        assert process.wait(timeout=20) == 0
    head, _, body = (head + rest).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert len(json.loads(body)["columns"]["row"]) == 1200


def test_each_request_is_a_line_of_json_with_slide_ids_alone(cohort: Path) -> None:
    with serving(str(cohort), "--log-json") as (process, address), httpx.Client(base_url=address) as client:
        tiles_path(cohort, "a_2").write_bytes(b"torn")
        answer = client.get("/v1/slides/a_1/tiles?limit=2", headers={"X-Request-Id": "step-7"})
        assert answer.headers["x-request-id"] == "step-7"
        assert len(client.get("/v1/slides/a_2", headers={"X-Request-Id": "no id: a/b"}).headers["x-request-id"]) == 16
        client.get("/v1/slides/Jane%20Doe.svs")
        client.get("/data/Jane%20Doe.svs")
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=20)
    lines = [json.loads(line) for line in stderr.splitlines()]
    asked = [line for line in lines if line["message"] == "request"]
    assert [(line["route"], line["status"], line["slide_id"]) for line in asked] == [
        ("/v1/slides/{slide_id}/tiles", 200, "a_1"),
        ("/v1/slides/{slide_id}", 500, None),
        ("/v1/slides/{slide_id}", 404, None),
        ("other", 404, None),
    ]
    assert asked[0]["request_id"] == "step-7"
    assert asked[0]["ms"] > 0
    [damaged] = [line for line in lines if line["level"] == "error"]
    assert "slide a_2: its manifest cannot be read" in damaged["message"]
    assert "Jane" not in stderr
    assert str(cohort) not in stderr


def test_refuses_in_one_sentence(settled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = tmp_path / "short"
    short.write_text("abc\n")

    def refusal(manifests: Path = settled, **flags: Any) -> str:
        with pytest.raises(SlidegradError) as refused:
            Serve(manifests=manifests, **{"port": 0, **flags}).run()
        return str(refused.value)

    wanted = "--host 0.0.0.0: other machines could read everything; give --token-file too"
    assert refusal(host="0.0.0.0") == wanted
    assert wanted in _refusal(str(settled), "--host", "0.0.0.0")
    assert "no manifests here" in refusal(tmp_path / "nothing")
    assert "the token has 3 characters" in refusal(host="0.0.0.0", token_file=short)
    assert "No such file" in refusal(token_file=tmp_path / "none")
    assert refusal(root_path="tiles/").startswith("--root-path: Value error, expected a path such as /tiles")
    assert refusal(workers=0) == "--workers 0: expected at least 1"
    assert refusal(port=99_999) == "--port 99999: expected 0 to 65535"
    assert "--labels" in refusal(labels=tmp_path / "none.csv")
    assert "no folder; give a run's folder" in refusal(runs=short)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refusal(port=port) == f"--port {port}: in use on 127.0.0.1; give another, or 0"
    monkeypatch.setenv("SLIDEGRAD_MAX_K", "many")
    assert refusal().startswith("SLIDEGRAD_MAX_K: ")


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
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment_of(), check=True
    )
    assert done.stdout == "[]\n"
