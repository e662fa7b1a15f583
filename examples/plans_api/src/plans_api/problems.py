"""Refusals: RFC 9457 `application/problem+json`, in the form in which the gate in front refuses."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Final

import msgspec
from starlette.responses import Response

PROBLEMS: Final[Mapping[str, tuple[int, str]]] = {
    "malformed_request": (400, "The request could not be understood."),
    "malformed_json": (
        400,
        "The body must be one JSON object in UTF-8: no member twice, no NaN or Infinity, nested no deeper than 16 levels.",
    ),
    "not_found": (404, "There is nothing at this path."),
    "method_not_allowed": (405, "This path does not take this method; `Allow` says which it takes."),
    "body_too_large": (413, "The body is larger than 64 KiB."),
    "unsupported_media_type": (415, "Send the body as `Content-Type: application/json`, not compressed."),
    "invalid_fields": (422, "Some fields are not valid; `errors` says which and why."),
    "internal_error": (500, "Something went wrong on our side. The `requestId` helps us to find out what."),
}
"""The status of each code, and what to do about it."""


class FieldError(msgspec.Struct, frozen=True):
    """What is wrong with one field; ``pointer`` is a JSON pointer (RFC 6901) into the body."""

    pointer: str
    detail: str


class Problem(Exception):
    """The request is at fault."""

    def __init__(self, code: str, *, errors: Sequence[FieldError] = ()) -> None:
        super().__init__(code)
        self.code = code
        self.errors = errors


class _Body(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: Sequence[FieldError] = ()


def answer(problem: Problem, request_id: str, headers: Mapping[str, str] | None = None) -> Response:
    """The answer that tells of a problem."""
    status, detail = PROBLEMS[problem.code]
    body = _Body(
        type=f"/docs#problem-{problem.code}",  # the gate's documentation, which has the same codes
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=problem.code,
        request_id=request_id,
        errors=problem.errors,
    )
    return Response(msgspec.json.encode(body), status, headers, "application/problem+json")
