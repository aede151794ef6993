"""Answers of a tile-index service, page by page: the HTTP under `manifests.service`. Knows Arrow, not what is in it.

Proxies and certificates are what the environment says (HTTP_PROXY, HTTPS_PROXY, NO_PROXY; SSL_CERT_FILE, SSL_CERT_DIR),
as with other programs of a cluster; only this machine itself is never asked through a proxy. The token comes from the
environment too (SLIDEGRAD_TOKEN, or SLIDEGRAD_TOKEN_FILE with a file's name), is sent only to a server that asks for
one, and is in no message.
"""

import json
import os
import random
import re
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa

from manifests.errors import ManifestError
from manifests.folders import shown

if TYPE_CHECKING:
    import httpx

NUM_TRIES = 4
_FIRST_WAIT_S = 0.5
"""Longest wait before the second attempt, twice as long before each further one; half of it is drawn, so that ranks do
not all come back at once."""
_MOST_WAIT_S = 30.0
"""What a server may ask for by Retry-After."""
_CONNECT_S, _TIMEOUT_S = 5.0, 15.0
_PASSING = (429, 502, 503, 504)
"""Answers that another attempt may change."""
_MOST_DETAIL = 200
"""Characters of a server's own words that go into a message."""
_KEY = b"slidegrad"
_ARROW, _PROBLEM = "application/vnd.apache.arrow.stream", "application/problem+json"
_TOKEN, _TOKEN_FILE = "SLIDEGRAD_TOKEN", "SLIDEGRAD_TOKEN_FILE"

Query = Mapping[str, Any]


class ServiceAwayError(ManifestError):
    """Nobody answers, or only that it cannot be done now; another time may do."""


class NotAServiceError(ManifestError):
    """What answers is no tile-index service."""


class RefusedError(ManifestError):
    """The service answers that it does not give what was asked for."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


class Page(NamedTuple):
    """One page of an answer."""

    table: pa.Table
    about: dict[str, Any]
    """The metadata key `slidegrad`."""
    next_query: Query | None
    """What to ask the next page with; None on the last."""


class ServiceClient:
    """Asks one service, over connections that are kept; nothing is asked before it is needed. Safe for many threads.

    Args:
        url: http:// or https:// with host, port and, behind a proxy, the path where the service begins.

    Raises:
        ManifestError: no such address, no httpx, or a token that cannot be one.

    Attributes:
        where: the address, as errors name it.
    """

    def __init__(self, url: str) -> None:
        self.where = shown(url).rstrip("/") if "://" in url else url.rpartition("@")[2].partition("?")[0]
        try:
            import httpx
        except ModuleNotFoundError:
            raise ManifestError(f"{self.where}: to ask a service needs httpx; pip install httpx") from None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc or parts.query:
            raise ManifestError(
                f"{self.where}: expected http://HOST:PORT without user, password or query; a token goes into {_TOKEN}"
            )
        try:
            httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ManifestError(f"{self.where}: not an address ({error})") from None
        self._token = _read_token()
        self._client = httpx.Client(
            # A cluster's network is quicker than a compressor, of which many ranks would ask one service.
            headers={"Accept": _ARROW, "Accept-Encoding": "identity"},
            timeout=httpx.Timeout(_TIMEOUT_S, connect=_CONNECT_S),
            mounts={f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")},
        )
        weakref.finalize(self, self._client.close)

    def pages(self, path: str, query: Query, num_tries: int = NUM_TRIES) -> Iterator[Page]:
        """All pages of an answer; arguments and errors as `page` has them."""
        following: Query | None = query
        while following is not None:
            page = self.page(path, following, num_tries)
            yield page
            asked, following = following, page.next_query
            if following is not None and (not len(page.table) or dict(following) == dict(asked)):
                raise self.damaged(path, "pages that do not end")

    def page(self, path: str, query: Query, num_tries: int = NUM_TRIES) -> Page:
        """One page.

        Args:
            path: without a slash before it.
            query: the parameters.
            num_tries: attempts, where another one may help.

        Raises:
            ServiceAwayError: no answer in so many attempts.
            NotAServiceError: something else answers.
            RefusedError: the service says that it does not give it.
            ManifestError: an answer that cannot be used.
        """
        import httpx

        answer = self._get(path, query, num_tries)
        try:
            table = pa.ipc.open_stream(answer.content).read_all()
            table.validate(full=True)
            about = dict(json.loads(table.schema.metadata[_KEY]))
            return Page(table, about, _next_query(answer))
        except (pa.ArrowException, httpx.InvalidURL, OSError, LookupError, TypeError, ValueError) as error:
            raise self.damaged(path, _brief(error)) from None

    def damaged(self, path: str, reason: str) -> ManifestError:
        """The error of an answer that cannot be used."""
        text = f"the answer for {path} is damaged ({reason}); look at what stands between here and the service"
        return ManifestError(f"{self.where}: {text}")

    def _get(self, path: str, query: Query, num_tries: int) -> "httpx.Response":
        """An answer in Arrow; asked for again where that may help."""
        import httpx

        for attempt in range(num_tries):
            wait_s = _FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1.0)
            try:
                answer = self._ask(path, query)
            except httpx.RequestError as error:
                reason = _brief(error) or type(error).__name__
            else:
                if answer.status_code not in _PASSING:
                    break
                reason, wait_s = f"HTTP {answer.status_code}", max(wait_s, _retry_after_s(answer))
            if attempt + 1 < num_tries:
                time.sleep(wait_s)
        else:
            raise ServiceAwayError(f"{self.where}: does not answer ({reason}); look whether the service runs there")
        if answer.status_code != 200 or _media_type(answer) != _ARROW:
            raise self._refusal(answer)
        return answer

    def _ask(self, path: str, query: Query) -> "httpx.Response":
        """One request; again with the token if the server asks for one."""
        url = f"{self.where}/{path}"
        answer = self._client.get(url, params=query)
        is_asked = answer.status_code == 401 and "bearer" in answer.headers.get("www-authenticate", "").lower()
        if is_asked and self._token and "authorization" not in answer.request.headers:
            self._client.headers["Authorization"] = f"Bearer {self._token}"
            answer = self._client.get(url, params=query)
        return answer

    def _refusal(self, answer: "httpx.Response") -> ManifestError:
        """What an answer without tiles says, in one sentence."""
        status, media_type = answer.status_code, _media_type(answer)
        if media_type != _PROBLEM:
            what = f"HTTP {status}, {media_type or 'no content type'}"
            return NotAServiceError(
                f"{self.where}: no tile-index service answers here ({what}); give the address that `slidegrad serve` "
                "tells"
            )
        if status == 401:
            what = "does not take the token" if self._token else "asks for a token"
            sentence = f"{self.where}: {what}; set {_TOKEN}, or {_TOKEN_FILE} to the name of a file with it"
            return RefusedError(sentence, status)
        try:
            detail = _brief(answer.json()["detail"])
        except (LookupError, TypeError, ValueError):
            detail = "no reason given"
        return RefusedError(f"{self.where}: {detail} (HTTP {status})", status)


def _next_query(answer: "httpx.Response") -> Query | None:
    """What to ask the next page with.

    Of a link the query alone counts: no answer leads to another server, and a service behind a proxy does not know the
    path that it is asked by.
    """
    import httpx

    link = answer.links.get("next")
    return None if link is None else httpx.URL(link["url"]).params


def _read_token() -> str:
    """The token from the environment; "" if there is none.

    Raises:
        ManifestError: a file that cannot be read, or what can be no token.
    """
    token, name = os.environ.get(_TOKEN, "").strip(), _TOKEN
    if not token and (file := os.environ.get(_TOKEN_FILE)):
        name = f"{_TOKEN_FILE} {file}"
        try:
            token = Path(file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ManifestError(f"{name}: {getattr(error, 'strerror', None) or 'not ASCII text'}") from None
    if not re.fullmatch(r"[\x21-\x7e]*", token):
        raise ManifestError(f"{name}: a token holds no blank, and nothing but ASCII; give the token alone")
    return token


def _retry_after_s(answer: "httpx.Response") -> float:
    """Seconds that the server asks to wait; a date counts as none."""
    text = answer.headers.get("retry-after", "")
    return min(float(text), _MOST_WAIT_S) if text.isdecimal() else 0.0


def _media_type(answer: "httpx.Response") -> str:
    text: str = answer.headers.get("content-type", "")
    return text.partition(";")[0].strip().lower()


def _brief(reason: object) -> str:
    """Others' words on one line, and not too many of them."""
    return " ".join(str(reason).split())[:_MOST_DETAIL]
