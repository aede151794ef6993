"""Manifests that a tile-index service (`slidegrad serve`) answers for.

One thing to know before changing it: a manifest may be replaced at any moment. So what is answered counts only together
with the hash of the file that it was made from, and pages of two hashes are never joined.
"""

import json
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from manifests.answers import NUM_TRIES, NotAServiceError, Page, Query, RefusedError, ServiceClient
from manifests.errors import ManifestError
from manifests.schema import TILE_SCHEMA, Manifest, SlideRecord
from manifests.sets import complete_catalog

_SLIDES_PER_PAGE = 1_000
_MOST_VERSIONS = 3
"""How often a manifest may be replaced while its pages are read."""
_SLIDES = "v1/slides"
_ANSWER_SCHEMA = pa.schema([pa.field("row", pa.int64()), *TILE_SCHEMA])


class ServiceManifests:
    """The manifests behind a service. Safe to use from many threads.

    Args:
        client: asks the service.
    """

    def __init__(self, client: ServiceClient) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._catalog: pa.Table | None = None

    def catalog(self) -> pa.Table:
        """The catalogue as it was when it was first asked for; raises as `ServiceClient.page`."""
        with self._lock:
            if self._catalog is None:
                self._catalog = self._list_slides()
            return self._catalog

    def __getitem__(self, slide_id: str) -> Manifest:
        return self.read_hashed(slide_id)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.catalog().column("slide_id").to_pylist())

    def check(self) -> None:
        """Asks for one slide, to see that a service answers and takes the token; raises as `ServiceClient.page`."""
        self._client.page(_SLIDES, {"limit": 1})

    def hash_of(self, slide_id: str) -> str:
        """The hash of a slide's manifest, as `manifests.files.read_hashed` has it; raises as `ServiceClient.page`."""
        path = _tiles_of(slide_id)
        return self._hash(path, self._client.page(path, {"limit": 1}))

    def read_hashed(self, slide_id: str, num_tries: int = NUM_TRIES) -> tuple[Manifest, str]:
        """A slide's manifest, row for row the file's, and the file's hash.

        Args:
            slide_id: the slide.
            num_tries: attempts for each page, where another one may help.

        Raises:
            ServiceAwayError: no answer in so many attempts.
            ManifestError: no such slide, or an answer that cannot be used.
        """
        path = _tiles_of(slide_id)
        for _ in range(_MOST_VERSIONS):
            pages, hashes = list[Page](), set[str]()
            for page in self._client.pages(path, {}, num_tries):
                pages.append(page)
                hashes.add(self._hash(path, page))
                if len(hashes) > 1:
                    break
            else:
                return self._join(slide_id, path, pages), hashes.pop()
        raise ManifestError(f"{self._client.where}: slide {slide_id} is being replaced all the time; ask again later")

    def _hash(self, path: str, page: Page) -> str:
        found = page.about.get("manifest_hash")
        if not isinstance(found, str) or not found:
            raise self._client.damaged(path, "no manifest_hash")
        return found

    def _join(self, slide_id: str, path: str, pages: list[Page]) -> Manifest:
        """Raises ManifestError if the pages are not all rows of this slide's manifest, each once and in order."""
        tables = [page.table.replace_schema_metadata() for page in pages]
        if names := [table.column_names for table in tables if not table.schema.equals(_ANSWER_SCHEMA)]:
            raise self._client.damaged(path, f"columns {names[0]}")
        table = pa.concat_tables(tables).combine_chunks()
        record = SlideRecord.from_json(json.dumps(pages[0].about), f"{self._client.where}: slide {slide_id}")
        if record.slide_id != slide_id:
            raise self._client.damaged(path, f"it is slide {record.slide_id}")
        if not np.array_equal(table["row"], np.arange(record.num_tiles)):
            raise self._client.damaged(path, f"not the rows 0 to {record.num_tiles}, each once")
        return Manifest.from_table(record, table)

    def _list_slides(self) -> pa.Table:
        try:
            return self._join_slides({"limit": _SLIDES_PER_PAGE})
        except RefusedError as error:
            if error.status == 404:  # The service is there, but begins at another path.
                raise NotAServiceError(f"{error}; give the address that `slidegrad serve` tells") from None
            if error.status != 400:
                raise
            return self._join_slides({})  # It gives smaller pages.

    def _join_slides(self, query: Query) -> pa.Table:
        where = f"{self._client.where}/{_SLIDES}"
        pages = [complete_catalog(page.table, where) for page in self._client.pages(_SLIDES, query)]
        table = pa.concat_tables(pages).combine_chunks()
        if any(a >= b for a, b in pairwise(table["slide_id"].to_pylist())):
            raise self._client.damaged(_SLIDES, "a slide twice, or not in order")
        return table


def open_service(url: str) -> ServiceManifests:
    """A service that has told its catalogue.

    Raises:
        NotAServiceError: something else answers there.
        ManifestError: nobody answers, the token is not taken, or no such address.
    """
    source = ServiceManifests(ServiceClient(url))
    source.catalog()
    return source


def find_service(url: str) -> ServiceManifests | None:
    """As `open_service`; None where something else answers, such as a web server with files, or httpx is not here."""
    if find_spec("httpx") is None:
        return None
    try:
        return open_service(url)
    except NotAServiceError:
        return None


def _tiles_of(slide_id: str) -> str:
    return f"{_SLIDES}/{quote(slide_id, safe='')}/tiles"
