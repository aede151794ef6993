"""Routes of what is looked at: a slide's thumbnail and areas, the pixels of a tile, and what runs say of its tiles.

Label and macro images are never served: the thumbnail is the one that the tiler drew from the pyramid. Where slides lie
is looked up here and told to a decoding process, and to nobody else.
"""

import dataclasses
import hashlib
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi import Path as PathParameter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from manifests import Manifest, ManifestError
from manifests.catalog import find_place
from manifests.files import mask_path
from services import openapi
from services.decoder import Decoder
from services.errors import UnavailableError, UnknownPictureError
from services.index import TileIndex
from services.render import MEDIA_TYPES, to_json
from services.runs import RunShelf
from services.settings import Settings
from services.worker import Pictures, cut_tile, draw_pictures


class NoQuery(BaseModel):
    """For routes without parameters."""

    model_config = ConfigDict(extra="forbid")


class RunsQuery(NoQuery):
    """Which runs."""

    slide_id: str | None = Field(None, max_length=1000, description="Only runs with a heatmap of this slide.")


Row = Annotated[int, PathParameter(ge=0, lt=2**31, description="The tile's row in the manifest.")]


def viewing_routes(index: TileIndex, settings: Settings) -> APIRouter:
    """The routes, and the processes behind them, which end with the service.

    Raises:
        ServiceError: `settings.runs` is no folder.
    """
    decoder = Decoder(
        num_processes=settings.decode_processes,
        time_s=settings.decode_time_s,
        memory_bytes=round(settings.decode_memory_gb * 1e9),
    )
    album = Album(settings.manifests, decoder, settings.picture_cache_mb * 1_000_000)
    shelf = RunShelf(settings.runs)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        decoder.close()

    router = APIRouter(prefix="/v1", default_response_class=Response, lifespan=lifespan)

    frame = {"Slidegrad-Px-L0": "Level-0 px per px of the picture."}
    gone = (400, 404, 504)

    @router.get("/slides/{slide_id}/thumbnail", responses=openapi.picture("image/jpeg", *gone, headers=frame))
    def get_thumbnail(request: Request, slide_id: str, _: Annotated[NoQuery, Query()]) -> Response:
        """The slide as JPEG; the header Slidegrad-Px-L0 tells how many level-0 px one px of it is."""
        return _picture(request, album, index.manifest(slide_id).manifest.slide.slide_id, "thumbnail")

    legend = {**frame, "Slidegrad-Legend": "JSON: value, name, colour and share of the picture of each area."}

    @router.get("/slides/{slide_id}/areas", responses=openapi.picture("image/png", *gone, headers=legend))
    def get_areas(request: Request, slide_id: str, _: Annotated[NoQuery, Query()]) -> Response:
        """Tissue and what was left out, by reason, in the frame of the thumbnail: PNG, transparent where nothing is.

        The header Slidegrad-Legend is JSON: value, name, colour and share of the picture of each.
        """
        return _picture(request, album, index.manifest(slide_id).manifest.slide.slide_id, "areas")

    @router.get("/slides/{slide_id}/tiles/{row}/pixels", responses=openapi.picture("image/png", *gone, 409))
    def get_pixels(request: Request, slide_id: str, row: Row, _: Annotated[NoQuery, Query()]) -> Response:
        """One tile as PNG, the very pixels that training reads."""
        source = index.manifest(slide_id)
        alone = _take(source.manifest, row)

        def cut() -> bytes:
            path = _find(settings, alone.slide.slide_id)
            return decoder.run(alone.slide.slide_id, cut_tile, path, alone, row)

        return _respond(request, f"{source.hash}-{row}", "image/png", cut)

    @router.get("/runs", responses=openapi.describe(openapi.RunList, 400))
    def list_runs(request: Request, query: Annotated[RunsQuery, Query()]) -> Response:
        """Runs with heatmaps, or those with one of this slide."""
        body = to_json({"runs": [{"run": name} for name in shelf.names(query.slide_id)]})
        return _respond(request, _digest(body), MEDIA_TYPES["json"], lambda: body)

    @router.get("/runs/{run}/slides/{slide_id}", responses=openapi.describe(openapi.RunValues, 400, 404, 409))
    def get_values(request: Request, run: str, slide_id: str, _: Annotated[NoQuery, Query()]) -> Response:
        """A run's attention and contribution of every tile of a slide."""
        values = shelf.values(run, index.manifest(slide_id))
        return _respond(request, values.hash, MEDIA_TYPES["json"], lambda: to_json(values.to_record()))

    return router


class Album:
    """Pictures of slides, those asked for last kept in memory.

    Args:
        root: the manifests folder.
        decoder: draws them.
        max_bytes: of all pictures that are kept.
    """

    def __init__(self, root: Path, decoder: Decoder, max_bytes: int) -> None:
        self._root, self._decoder, self._max_bytes = root, decoder, max_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Pictures] = OrderedDict()
        self._num_bytes = 0

    def mark(self, slide_id: str) -> str:
        """Changes with the pictures.

        Raises:
            UnknownPictureError: the slide has none.
        """
        try:
            state = mask_path(self._root, slide_id).stat()
        except FileNotFoundError:
            text = f"slide {slide_id} has no thumbnail: it failed when it was tiled, or its masks/ are not here"
            raise UnknownPictureError(text) from None
        except OSError:
            raise UnavailableError(f"slide {slide_id}: its thumbnail cannot be reached now") from None
        return _digest(f"{slide_id} {state.st_mtime_ns} {state.st_size} {state.st_ino}".encode())

    def pictures(self, slide_id: str, mark: str) -> Pictures:
        """The slide's pictures at `mark`; raises as `Decoder.run` and `draw_pictures`."""
        with self._lock:
            if mark in self._kept:
                self._kept.move_to_end(mark)
                return self._kept[mark]
        found = self._decoder.run(slide_id, draw_pictures, mask_path(self._root, slide_id), slide_id)
        with self._lock:
            if mark not in self._kept:
                self._kept[mark] = found
                self._num_bytes += _size(found)
            while self._num_bytes > self._max_bytes and len(self._kept) > 1:
                self._num_bytes -= _size(self._kept.popitem(last=False)[1])
        return found


def _size(pictures: Pictures) -> int:
    return len(pictures.thumbnail) + len(pictures.areas)


def _picture(request: Request, album: Album, slide_id: str, name: str) -> Response:
    mark = album.mark(slide_id)
    if _is_known(request, tag := f"{mark}-{name}"):
        return _respond(request, tag, "", bytes)
    found = album.pictures(slide_id, mark)
    media_type, content = ("image/jpeg", found.thumbnail) if name == "thumbnail" else ("image/png", found.areas)
    answer = _respond(request, tag, media_type, lambda: content)
    answer.headers["Slidegrad-Px-L0"] = repr(found.px_l0)
    answer.headers["Slidegrad-Legend"] = found.legend
    return answer


def _take(manifest: Manifest, row: int) -> Manifest:
    """The manifest with one of its tiles alone.

    Raises:
        UnknownPictureError: it has no such row.
    """
    if row >= len(manifest):
        text = f"slide {manifest.slide.slide_id} has {len(manifest)} tiles, counted from 0; there is no tile {row}"
        raise UnknownPictureError(text)
    one = slice(row, row + 1)
    slide = dataclasses.replace(manifest.slide, num_tiles=1)
    return Manifest(slide, manifest.x_l0[one], manifest.y_l0[one], manifest.tissue[one])


def _find(settings: Settings, slide_id: str) -> Path:
    """The slide's file.

    Raises:
        UnavailableError: the lists of paths may not be read.
        UnknownPictureError: none of them names the slide.
    """
    try:
        place = find_place(settings.manifests, slide_id)
    except (ManifestError, OSError):
        raise UnavailableError(
            "the service may not read where slides lie (manifests/paths belong to whoever tiled); run it as that user"
        ) from None
    if place is None:
        raise UnknownPictureError(f"slide {slide_id}: where its file lies was not kept; tile it again")
    return (settings.archive or Path(place.archive)) / place.path


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _is_known(request: Request, tag: str) -> bool:
    known = [one.strip().removeprefix("W/") for one in ",".join(request.headers.getlist("if-none-match")).split(",")]
    return f'"{tag}"' in known or "*" in known


def _respond(request: Request, tag: str, media_type: str, encode: Callable[[], bytes]) -> Response:
    """The answer, or 304 without making it where the client has it already."""
    headers = {"ETag": f'"{tag}"', "Cache-Control": "private, no-cache", "X-Content-Type-Options": "nosniff"}
    if _is_known(request, tag):
        return Response(status_code=304, headers=headers)
    return Response(encode(), media_type=media_type, headers=headers)
