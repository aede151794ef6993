"""What schemathesis checks of every answer beside its own checks; it loads this by the name in SCHEMATHESIS_HOOKS."""

import re

import schemathesis

REASONS = re.compile(
    r"cursor (is none that this service gave|belongs to another order)"
    r"|bbox is .* expected x0 < x1 and y0 < y1"
    r"|part is \d+ of \d+, expected"
    r"|(k|limit) is \d+, at most 20000 here"  # As GeoJSON.
    r"|label names no column"
)
"""Why a request that fits the schema may be refused: a schema cannot say these."""


@schemathesis.check
def refused_for_what_a_schema_cannot_say(
    _: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """Else the schema lacks a limit, or the route has one too many."""
    meant_well = case.meta is not None and case.meta.generation.mode.is_positive
    if meant_well and response.status_code == 400:
        detail = response.json()["detail"]
        assert REASONS.match(detail), detail


@schemathesis.check
def errors_are_problem_documents(
    _: schemathesis.CheckContext, response: schemathesis.Response, __: schemathesis.Case
) -> None:
    """Of the status that the answer has, never to be kept, and with a sentence in them."""
    if response.status_code >= 400:
        told = response.json()
        assert (response.headers["content-type"], told["status"]) == (
            ["application/problem+json"],
            response.status_code,
        )
        assert told["detail"]
