"""A real service over a small cohort, and a real browser that looks at it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from manifests import Manifest, SlideRecord, open_manifests, write_manifest
from manifests.catalog import rebuild_catalog
from manifests.files import tiles_path
from tests.trainer.heatmaps.made_values import ORIGIN, made_values
from tiler.archive import Job, tile_archive
from tiler.config import TilerConfig

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

HOME = Path(__file__).parents[3]
TOKEN = "sixteen-characters-or-more"
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_WAIT_MS = 15_000


@pytest.fixture(scope="session")
def archive(small_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides: three of the cohort, one of them with pen marks, and two that are none."""
    folder = tmp_path_factory.mktemp("page_archive")
    for slide_id in ("synth_0000", "synth_0001", "synth_0006"):
        shutil.copy(small_cohort / "slides" / f"{slide_id}.svs", folder)
    for slide_id in ("broken_1", "broken_2"):
        (folder / f"{slide_id}.svs").write_bytes(b"no slide")
    return folder


@pytest.fixture(scope="session")
def manifests(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their manifests: 44 to 91 tiles of 32 px at 1 mpp; and 60 empty slides, so that the list has two pages."""
    out = tmp_path_factory.mktemp("page_manifests")
    tile_archive(str(archive), out, TilerConfig(tile_px=32, mpp=1.0), Job(num_workers=0))
    none = np.zeros(0, np.int32)
    for i in range(60):
        slide = SlideRecord(slide_id=f"waste_{i:02}", status="empty")
        write_manifest(tiles_path(out, slide.slide_id), Manifest(slide, none, none, none.astype(np.float32)))
    rebuild_catalog(out)
    return out


@pytest.fixture(scope="session")
def runs(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, as `slidegrad heatmap` leaves them: `first`, and `old`, whose slide was tiled again since."""
    import dataclasses
    import hashlib

    from trainer.heatmaps.values import write_values

    folder = tmp_path_factory.mktemp("page_runs")
    for slide_id in ("synth_0000", "synth_0006"):
        manifest = open_manifests(manifests)[slide_id]
        digest = hashlib.blake2b(tiles_path(manifests, slide_id).read_bytes(), digest_size=16).hexdigest()
        parts = np.linspace(-0.5, 1, len(manifest), dtype=np.float32)
        parts[0] = np.nan
        for run, manifest_hash in (("first", digest), ("old", "0" * 32)):
            origin = dataclasses.replace(ORIGIN, manifest_hash=manifest_hash)
            file = folder / run / "heatmaps" / f"{slide_id}.parquet"
            write_values(file, manifest, made_values(parts, slide_id=slide_id, origin=origin))
    return folder


@contextmanager
def serving(*arguments: str | Path) -> Iterator[str]:
    """The address of a running `slidegrad serve`."""
    command = [sys.executable, HOME / "slidegrad.py", "serve", "--port", "0", *arguments]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLIDEGRAD_")}
    environment = {**kept, "PYTHONPATH": str(HOME), "SLIDEGRAD_DECODE_PROCESSES": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert " at http://" in line, line + process.stderr.read()
            yield line.split(" at ")[1].split()[0]
        finally:
            process.terminate()
            process.communicate(timeout=30)


@pytest.fixture(scope="session")
def address(manifests: Path, runs: Path) -> Iterator[str]:
    """The service, open to this machine."""
    with serving(manifests, "--runs", runs) as found:
        yield found


@pytest.fixture(scope="session")
def guarded_address(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The service, which asks for `TOKEN`."""
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text(TOKEN)
    with serving(manifests, "--token-file", file) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Debian's Chromium, without a window. Not for longer: playwright's event loop is in the way of others' tests."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'slidegrad[test]'")
    program = next(filter(None, map(shutil.which, _CHROMIUM)), None)
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium")
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--disable-gpu", *as_root])
        yield opened
        opened.close()


class Visitor:
    """A page of the browser that notes what it should not do."""

    def __init__(self, context: "BrowserContext", address: str) -> None:
        self.context, self.address = context, address
        self.faults: list[str] = []
        self.page: Page = context.new_page()
        self.page.set_default_timeout(_WAIT_MS)
        self.page.on("console", lambda said: self._note(said.type in ("error", "warning"), said.text))
        self.page.on("pageerror", lambda error: self._note(True, str(error)))
        self.page.on("request", lambda request: self._note(not self._is_ours(request.url), f"asked {request.url}"))

    def _is_ours(self, url: str) -> bool:
        return urlsplit(url).netloc == urlsplit(self.address).netloc

    def _note(self, is_fault: bool, text: str) -> None:
        if is_fault:
            self.faults.append(text)

    def open(self, view: str = "") -> "Page":
        """Goes to an address of the page, `#…`, as one who follows a link from elsewhere."""
        self.page.goto(f"{self.address}/{view}")
        return self.page

    def expect_refusal(self, status: int) -> None:
        """The browser told of one answer of this status; it is no fault of the page."""
        said = [fault for fault in self.faults if f"status of {status}" in fault]
        assert said, self.faults
        self.faults.remove(said[0])


Visit = Callable[..., Visitor]


@pytest.fixture
def visit(browser: "Browser", address: str) -> Iterator[Visit]:
    """Opens a browser page that must log no error and ask nothing of another server."""
    visitors: list[Visitor] = []

    def opened(to: str = address, **context: Any) -> Visitor:
        asked = {"viewport": {"width": 1440, "height": 900}, **context}
        visitors.append(Visitor(browser.new_context(**asked), to))
        return visitors[-1]

    yield opened
    for visitor in visitors:
        visitor.context.close()
        assert visitor.faults == []
