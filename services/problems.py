"""Errors as RFC 9457 problem documents. The one place that knows which error is which HTTP status."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from services.errors import (
    BadParametersError,
    BadQueryError,
    BusyError,
    NothingToSampleError,
    ServiceError,
    SlideFileError,
    StaleValuesError,
    TooSlowError,
    UnavailableError,
    UnknownPictureError,
    UnknownRunError,
    UnknownSlideError,
    UnreadableManifestError,
    UnreadableMaskError,
    UnreadableValuesError,
)
from services.render import to_json

STATUS: dict[type[ServiceError], HTTPStatus] = {
    BadQueryError: HTTPStatus.BAD_REQUEST,
    UnknownSlideError: HTTPStatus.NOT_FOUND,
    NothingToSampleError: HTTPStatus.CONFLICT,
    UnreadableManifestError: HTTPStatus.INTERNAL_SERVER_ERROR,
    UnavailableError: HTTPStatus.SERVICE_UNAVAILABLE,
    UnknownPictureError: HTTPStatus.NOT_FOUND,
    UnreadableMaskError: HTTPStatus.INTERNAL_SERVER_ERROR,
    SlideFileError: HTTPStatus.CONFLICT,
    BusyError: HTTPStatus.SERVICE_UNAVAILABLE,
    TooSlowError: HTTPStatus.GATEWAY_TIMEOUT,
    UnknownRunError: HTTPStatus.NOT_FOUND,
    StaleValuesError: HTTPStatus.CONFLICT,
    UnreadableValuesError: HTTPStatus.INTERNAL_SERVER_ERROR,
}
_COME_AGAIN = {"Retry-After": "1"}


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None, **more: Any) -> Response:
    """One problem document; `more` are its extension members."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": int(status), "detail": detail, **more}
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", **(headers or {})}
    return Response(to_json(body), int(status), headers, media_type="application/problem+json")


def install_problems(app: FastAPI) -> None:
    """Makes every error of `app` a problem document, the framework's too; faults of ours are `services.front`'s."""
    app.add_exception_handler(ServiceError, _of_ours)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(HTTPException, _of_framework)


def _of_ours(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), HTTPStatus.INTERNAL_SERVER_ERROR)
    if not isinstance(error, BadParametersError):
        return problem(status, str(error), _COME_AGAIN if isinstance(error, BusyError) else None)
    faults = [{"parameter": name[:80], "reason": reason} for name, reason in error.faults[:20]]
    return problem(status, str(error), errors=faults)


def _of_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # ("query", "k"), or of one of several values ("query", "label", 0).
    faults = [(str([*fault["loc"], ""][1]), str(fault["msg"])) for fault in error.errors()]
    return _of_ours(request, BadParametersError(faults))


def _of_framework(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, str(error.detail), error.headers)
