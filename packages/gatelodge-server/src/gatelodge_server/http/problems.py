"""Refusals on the wire: RFC 9457 `application/problem+json`.

``STATUSES`` is the one table from a refusal's code to an HTTP status. A test holds it to the refusals that there are, so that
a new one cannot be forgotten here.
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import ClassVar, Final

import msgspec

from gatelodge.errors import KeysUnavailable, Rejected
from gatelodge_server.core.refusals import NoCredential, NotAllowed, Refusal, Unavailable

STATUSES: Final[Mapping[str, int]] = {
    # of credentials
    "invalid_credential": 401,
    "credential_expired": 401,
    "credential_revoked": 401,
    "credential_rotated": 401,
    "wrong_environment": 401,
    "partner_mismatch": 401,
    "partner_suspended": 403,
    "keys_unavailable": 503,
    # of the domain
    "credential_required": 401,
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
    "signing_key_not_found": 404,
    "signing_key_in_use": 409,
    "unavailable": 503,
    # of the request
    "malformed_request": 400,
    "malformed_json": 400,
    "ambiguous_credentials": 400,
    "invalid_idempotency_key": 400,
    "https_required": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "body_too_large": 413,
    "head_too_large": 431,
    "unsupported_media_type": 415,
    "invalid_fields": 422,
    "too_many_failures": 429,
    "internal_error": 500,
}


class Fault(Exception):
    """The request itself is at fault, before anything was decided about it."""

    code: ClassVar[str]
    detail: ClassVar[str]

    def __init__(self) -> None:
        super().__init__(self.detail)


class MalformedRequest(Fault):
    """Not a request that can be understood."""

    code = "malformed_request"
    detail = "The request could not be understood."


class MalformedJson(Fault):
    """The body is not one strict JSON object."""

    code = "malformed_json"
    detail = "The body must be one JSON object in UTF-8: no member twice, no NaN or Infinity, nested no deeper than 16 levels."


class AmbiguousCredentials(Fault):
    """Two credentials in one request."""

    code = "ambiguous_credentials"
    detail = "The request carries more than one credential. Send one, in `Authorization` or in `R-Auth`."


class InvalidIdempotencyKey(Fault):
    """The Idempotency-Key cannot be one."""

    code = "invalid_idempotency_key"
    detail = "`Idempotency-Key` must be sent once, with 1 to 255 visible ASCII characters."


class HttpsRequired(Fault):
    """The request came over plain HTTP."""

    code = "https_required"
    detail = "Use https. Whatever credential was sent has crossed the network in the clear: replace it."


class NotFound(Fault):
    """No such path."""

    code = "not_found"
    detail = "There is nothing at this path. See /docs for what there is."


class MethodNotAllowed(Fault):
    """The path is there, the method is not."""

    code = "method_not_allowed"
    detail = "This path does not take this method; `Allow` says which it takes."


class BodyTooLarge(Fault):
    """The body is over the limit."""

    code = "body_too_large"
    detail = "The body is larger than 64 KiB."


class HeadTooLarge(Fault):
    """The request line and the headers are over the limit."""

    code = "head_too_large"
    detail = "The request line and the headers together are larger than 32 KiB."


class UnsupportedMediaType(Fault):
    """The body is not said to be JSON."""

    code = "unsupported_media_type"
    detail = "Send the body as `Content-Type: application/json`, not compressed."


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


class Problem(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """The body of every answer that is a refusal (RFC 9457 section 3)."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: Sequence[FieldError] = ()


Refused = (Rejected, KeysUnavailable, Refusal, Fault)
"""Every exception that is an answer."""


def details() -> Mapping[str, str]:
    """What to do about each problem, by its code."""
    found: dict[str, str] = {KeysUnavailable.code: Unavailable.detail}
    waiting: list[type[Exception]] = [*Rejected.__subclasses__(), *Refusal.__subclasses__(), *Fault.__subclasses__()]
    for kind in waiting:
        waiting += kind.__subclasses__()
        found[str(getattr(kind, "code", ""))] = str(getattr(kind, "detail", ""))
    return found


_REALM: Final = 'Bearer realm="gatelodge"'


def problem_of(refused: Exception, request_id: str) -> Problem:
    """The body that tells of a refusal."""
    code = str(getattr(refused, "code", InternalError.code))
    status = STATUSES[code]
    return Problem(
        type=f"/docs#problem-{code}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=str(getattr(refused, "detail", Unavailable.detail)),
        code=code,
        request_id=request_id,
        errors=getattr(refused, "errors", ()),
    )


def headers_of(refused: Exception, status: int) -> list[tuple[bytes, bytes]]:
    """The headers that go with a refusal: how to authenticate (RFC 6750 section 3), when to come back."""
    headers = []
    if status == HTTPStatus.UNAUTHORIZED or isinstance(refused, NotAllowed):
        headers.append((b"www-authenticate", _challenge(refused).encode("ascii")))
    elif status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", str(Unavailable.retry_after).encode("ascii")))
    if isinstance(refused, TooManyFailures):
        headers.append((b"retry-after", str(refused.retry_after).encode("ascii")))
    return headers


def _challenge(refused: Exception) -> str:
    code = getattr(refused, "code", "")
    if isinstance(refused, NoCredential):
        return _REALM  # RFC 6750 3.1: without any credential there is no error code either.
    if isinstance(refused, NotAllowed):
        return f'{_REALM}, error="insufficient_scope"'  # RFC 6750 3: the header goes with this 403 as well.
    return f'{_REALM}, error="invalid_token", error_description="{code}"'
