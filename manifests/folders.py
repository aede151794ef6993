"""Bytes by name, wherever a folder lies: on this machine, in an object store, behind a web server.

Two questions are enough for manifests: a whole small file, and a range of a large one. Object stores are asked through
fsspec. Web servers are not: fsspec's reader of them wants two more packages for what the standard library can do.
"""

import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from manifests.errors import ManifestError

_TIMEOUT_S = 30
_TRIES = 3
"""A busy server is asked again, after 1 and 2 s."""


class Folder(Protocol):
    """What every folder answers. `name` is relative, with slashes; FileNotFoundError says there is none."""

    where: str
    """What to call the folder in errors: no passwords, no tokens."""

    def read(self, name: str) -> bytes:
        """A whole file."""

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file; fewer if it ends before."""


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path, self.where = path, str(path)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        with (self.path / name).open("rb", buffering=0) as stream:
            stream.seek(start)
            return stream.read(stop - start)


class StoreFolder:
    """A folder that fsspec reaches: s3://, gs://, az://, memory:// and more.

    Raises:
        ManifestError: a kind of address that is not known, or needs a package that is not here.
    """

    def __init__(self, url: str) -> None:
        import fsspec
        from fsspec.registry import known_implementations

        self.where = shown(url)
        protocol = url.partition("://")[0]
        try:
            self._store, self._root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            package = known_implementations.get(protocol, {}).get("class", "fsspec").partition(".")[0]
            way_out = f"pip install {package}" if package != "fsspec" else str(error)
            raise ManifestError(
                f"{self.where}: addresses with {protocol}:// need one more package: {way_out}"
            ) from None
        except ValueError as error:
            raise ManifestError(f"{self.where}: not an address that can be read ({error})") from None

    def read(self, name: str) -> bytes:
        return self._cat(name)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        return self._cat(name, start=start, end=stop)

    def _cat(self, name: str, **span: int) -> bytes:
        try:
            return bytes(self._store.cat_file(f"{self._root.rstrip('/')}/{name}", **span))
        except FileNotFoundError:
            raise
        except Exception as error:  # noqa: BLE001 - each store has exceptions of its own, with no common root
            raise ManifestError(f"{self.where}: cannot read {name} ({type(error).__name__}: {error})") from None


class WebFolder:
    """A folder behind a plain web server."""

    def __init__(self, url: str) -> None:
        self._root, self.where = url.rstrip("/"), shown(url)
        self._whole: tuple[str, bytes] | None = None

    def read(self, name: str) -> bytes:
        return self._get(name, {})[1]

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        if self._whole is not None and self._whole[0] == name:
            return self._whole[1][start:stop]
        if stop <= start:
            return b""
        is_part, data = self._get(name, {"Range": f"bytes={start}-{stop - 1}"})
        if is_part:
            return data
        self._whole = (name, data)  # Some servers know no ranges: not for every range the whole file again.
        return data[start:stop]

    def _get(self, name: str, headers: dict[str, str]) -> tuple[bool, bytes]:
        """Whether the answer is a part, and its bytes."""
        request = urllib.request.Request(f"{self._root}/{name}", headers=headers)
        for attempt in range(_TRIES):
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
                    return answer.status == 206, answer.read()
            except urllib.error.HTTPError as error:
                if error.code in (404, 410):
                    raise FileNotFoundError(name) from None
                if error.code == 416:  # The file ends before the range begins.
                    return True, b""
                reason = f"HTTP {error.code} {error.reason}"
                if error.code < 500 and error.code != 429:
                    break
            except (OSError, ValueError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error))
            if attempt + 1 < _TRIES:
                time.sleep(attempt + 1)
        raise ManifestError(f"{self.where}: cannot read {name} ({reason})")


def open_folder(url: str) -> Folder:
    """The folder at an address with `://`, other than file://."""
    return WebFolder(url) if is_web(url) else StoreFolder(url)


def is_web(url: str) -> bool:
    """Whether a web server is asked for it."""
    return url.startswith(("http://", "https://"))


def shown(url: str) -> str:
    """The address without user, password and query, which may hold keys."""
    parts: Any = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"
