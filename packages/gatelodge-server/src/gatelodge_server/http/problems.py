"""Refusals on the wire, those of the gate (``gatelodge.problems``) and those of the domain.

``STATUSES`` is the one table from a refusal's code to an HTTP status. A test holds it to the refusals that there are, so that
a new one cannot be forgotten here.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from gatelodge import problems
from gatelodge.errors import Fault, Unavailable
from gatelodge_server.core.refusals import Refusal

STATUSES: Final[Mapping[str, int]] = {
    **problems.STATUSES,
    # of the domain
    "insufficient_scope": 403,
    "refresh_token_reused": 401,
    "partner_not_found": 404,
    "partner_id_taken": 409,
    "partner_deactivated": 409,
    "tier_not_found": 404,
    "key_not_found": 404,
    "key_ended": 409,
    "company_not_found": 404,
    "company_exists": 409,
    "idempotency_key_reused": 422,
    "idempotency_key_spent": 409,
    "token_not_found": 404,
    "token_ended": 409,
    "invalid_verification_code": 401,
    "too_many_requests": 429,
    "signing_key_not_found": 404,
    "signing_key_in_use": 409,
    "step_not_found": 409,
    # of the request
    "invalid_idempotency_key": 400,
    "not_found": 404,
    "method_not_allowed": 405,
    "head_too_large": 431,
    "invalid_fields": 422,
    "too_many_failures": 429,
    "internal_error": 500,
    # of the process
    "about_to_stop": 503,
}


class InvalidIdempotencyKey(Fault):
    """The Idempotency-Key cannot be one."""

    code = "invalid_idempotency_key"
    detail = "`Idempotency-Key` must be sent once, with 1 to 255 visible ASCII characters."


class NotFound(Fault):
    """No such path."""

    code = "not_found"
    detail = "There is nothing at this path. See /docs for what there is."


class MethodNotAllowed(Fault):
    """The path is there, the method is not."""

    code = "method_not_allowed"
    detail = "This path does not take this method; `Allow` says which it takes."


class HeadTooLarge(Fault):
    """The request line and the headers are over the limit."""

    code = "head_too_large"
    detail = "The request line and the headers together are larger than 32 KiB."


class FieldError(msgspec.Struct, frozen=True):
    """What is wrong with one field; ``pointer`` is a JSON pointer (RFC 6901) into the body, or `?name` for a parameter."""

    pointer: str
    detail: str


class InvalidFields(Fault):
    """Well-formed, but not valid. All faults are told at once."""

    code = "invalid_fields"
    detail = "Some fields are not valid; `errors` says which and why."

    def __init__(self, errors: Sequence[FieldError]) -> None:
        super().__init__()
        self.errors = errors


class TooManyFailures(Fault):
    """An address has failed too often to be answered in detail."""

    code = "too_many_failures"
    detail = "Too many failed attempts from this address. Check the credential, then try again after `Retry-After` seconds."

    def __init__(self, retry_after: int) -> None:
        super().__init__()
        self.retry_after = retry_after


class InternalError(Fault):
    """Our own mistake."""

    code = "internal_error"
    detail = "Something went wrong on our side. The `requestId` helps us to find out what."


class AboutToStop(Unavailable):
    """The process goes on serving for a moment, and wants no more traffic."""

    code = "about_to_stop"
    detail = "This process is about to stop. Send no more requests here; another one takes them."


class Problem(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """The body of every answer that is a refusal (RFC 9457 section 3)."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: Sequence[FieldError] = ()


Refused = (*problems.REFUSALS, Refusal)
"""Every exception that is an answer."""


def details() -> Mapping[str, str]:
    """What to do about each problem, by its code."""
    found: dict[str, str] = {}
    waiting: list[type[Exception]] = [*problems.REFUSALS, *Refusal.__subclasses__()]
    for kind in waiting:
        waiting += kind.__subclasses__()
        if getattr(kind, "code", None) in STATUSES:
            found[str(getattr(kind, "code", ""))] = str(getattr(kind, "detail", ""))
    return found


def problem_of(refused: Exception, request_id: str) -> problems.Problem:
    """The answer that tells of a refusal."""
    problem = problems.problem_of(refused, request_id, statuses=STATUSES)
    errors = getattr(refused, "errors", ())
    if errors:
        problem.members["errors"] = errors
    return problem
