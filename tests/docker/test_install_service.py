"""docker/install-service.sh as the image runs it: a service without torch and cuCIM, that answers."""

import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from manifests import Manifest, SlideRecord, write_manifest
from manifests.files import tiles_path

HOME = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_installed_service_has_no_torch_and_no_cucim_and_answers(tmp_path: Path) -> None:
    venv, root = tmp_path / "venv", tmp_path / "manifests"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SLIDEGRAD_VENV")}
    environment["PYTHON"] = sys.executable
    subprocess.run([HOME / "docker" / "install-service.sh", venv], check=True, env=environment, cwd=tmp_path)

    for module in ("torch", "cucim"):
        found = subprocess.run(
            [venv / "bin" / "python", "-c", f"import {module}"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert f"No module named '{module}'" in found.stderr

    slide = SlideRecord(slide_id="one", status="ok", num_tiles=1, mpp_x=0.5, mpp_y=0.5, tile_px=224, tile_mpp=0.5)
    corner = np.zeros(1, np.int32)
    write_manifest(tiles_path(root, "one"), Manifest(slide, corner, corner, np.ones(1, np.float32)))
    command = [str(venv / "bin" / "slidegrad"), "serve", str(root), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as process:
        try:
            assert process.stderr is not None
            address = process.stderr.readline().split(" at ")[1].split()[0]
            with urllib.request.urlopen(f"{address}/healthz", timeout=10) as answer:
                assert answer.read() == b'{"status":"ok"}'
            with urllib.request.urlopen(f"{address}/", timeout=10) as answer:  # The page came along in the wheel.
                assert b"<table>" in answer.read()
            with urllib.request.urlopen(f"{address}/page/main.js", timeout=10) as answer:
                assert b"import" in answer.read()
        finally:
            process.terminate()
    assert process.returncode == 0
