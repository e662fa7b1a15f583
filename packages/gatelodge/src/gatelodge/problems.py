"""Refusals on the wire: RFC 9457 `application/problem+json`.

``STATUSES`` is the one table from a refusal's code to an HTTP status, for whatever the gate may answer. A service that has
refusals of its own adds them to a copy.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Final, NamedTuple

from gatelodge.errors import Fault, NoCredential, QuotaExceeded, Rejected, Unavailable

Headers = list[tuple[bytes, bytes]]

STATUSES: Final[Mapping[str, int]] = {
    # of credentials
    "invalid_credential": 401,
    "credential_expired": 401,
    "credential_revoked": 401,
    "credential_rotated": 401,
    "wrong_environment": 401,
    "partner_mismatch": 401,
    "partner_suspended": 403,
    # of the request
    "credential_required": 401,
    "ambiguous_credentials": 400,
    "https_required": 403,
    "malformed_request": 400,
    "malformed_json": 400,
    "body_too_large": 413,
    "unsupported_media_type": 415,
    # of what is at hand
    "quota_exceeded": 429,
    "unavailable": 503,
    "keys_unavailable": 503,
    "revocations_unavailable": 503,
}

REFUSALS: Final = (Rejected, Fault, QuotaExceeded, Unavailable)
"""Every exception of this package that is an answer."""

# The registered type for it; draft-ietf-httpapi-ratelimit-headers-10, section 6.
_QUOTA_TYPE: Final = "https://iana.org/assignments/http-problem-types#quota-exceeded"
_REALM: Final = 'Bearer realm="gatelodge"'


class Problem(NamedTuple):
    """An answer that refuses: its status, the headers that go with it, and the members of its body."""

    status: int
    headers: Headers
    members: dict[str, object]


def problem_of(refused: Exception, request_id: str, *, statuses: Mapping[str, int] = STATUSES) -> Problem:
    """Say on the wire what ``refused`` says; its ``code`` must be in ``statuses``."""
    code = str(getattr(refused, "code", ""))
    status = statuses[code]
    members: dict[str, object] = {
        "type": f"/docs#problem-{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": str(getattr(refused, "detail", "")),
        "code": code,
        "requestId": request_id,
    }
    if isinstance(refused, QuotaExceeded):
        members["type"] = _QUOTA_TYPE
        members["violated-policies"] = list(refused.policies)
    return Problem(status, _headers_of(refused, code, status), members)


def _headers_of(refused: Exception, code: str, status: int) -> Headers:
    """How to authenticate (RFC 6750 section 3), when to come back (RFC 9110 10.2.3)."""
    headers: Headers = list(getattr(refused, "headers", ()))
    if status == HTTPStatus.UNAUTHORIZED:
        # RFC 6750 3.1: without any credential there is no error code either.
        told = "" if isinstance(refused, NoCredential) else f', error="invalid_token", error_description="{code}"'
        headers.append((b"www-authenticate", (_REALM + told).encode("ascii")))
    elif code == "insufficient_scope":  # RFC 6750 3: the header goes with this 403 as well
        headers.append((b"www-authenticate", f'{_REALM}, error="insufficient_scope"'.encode("ascii")))
    retry_after = getattr(refused, "retry_after", None)
    if retry_after is not None:
        headers.append((b"retry-after", str(retry_after).encode("ascii")))
    return headers
