"""The container files agree with each other and with the tree; no container engine is needed."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

HOME = Path(__file__).parents[2]
DOCKERFILES = sorted((HOME / "docker").glob("Dockerfile.*"))


@pytest.fixture
def compose() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((HOME / "docker" / "compose.yaml").read_text())
    return parsed


def _copied(dockerfile: Path) -> list[str]:
    """What a Dockerfile copies from the build context."""
    lines = re.findall(r"^COPY (?!--from)(.+)$", dockerfile.read_text(), re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


def test_compose_builds_from_dockerfiles_that_exist(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        context = (HOME / "docker" / service["build"]["context"]).resolve()
        assert context == HOME
        assert context / service["build"]["dockerfile"] in DOCKERFILES


def test_the_composed_service_is_closed(compose: dict[str, Any]) -> None:
    index = compose["services"]["index"]
    assert index["volumes"][0]["read_only"] is True
    assert all(port.startswith("127.0.0.1:") for port in index["ports"])
    [secret] = index["secrets"]
    assert secret in compose["secrets"]
    assert f'"--token-file", "/run/secrets/{secret}"' in (HOME / "docker" / "Dockerfile.service").read_text()


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda file: file.name)
def test_dockerfiles_copy_what_exists_and_what_is_not_ignored(dockerfile: Path) -> None:
    kept = [line[1:] for line in (HOME / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = _copied(dockerfile)
    assert len(sources) > 5
    for source in sources:
        assert (HOME / source).exists(), source
        assert any(Path(source).match(pattern) for pattern in kept), source


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda file: file.name)
def test_images_do_not_run_as_root_and_use_their_own_script(dockerfile: Path) -> None:
    text, script = dockerfile.read_text(), f"docker/install-{dockerfile.suffix[1:]}.sh"
    assert text.rindex("USER 10001") < text.index("ENTRYPOINT")
    assert f"sh {script} /opt/slidegrad" in text
    copied_by_script = re.search(r"cp -R (.+) \"\$sources\"", (HOME / script).read_text())
    assert copied_by_script is not None
    assert set(_copied(dockerfile)) == {*copied_by_script[1].split(), "constraints.txt", script}
