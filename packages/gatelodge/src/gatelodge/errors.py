"""Every reason for which a request is refused at the gate, each with a stable code.

::

    Rejected                        the credential does not let its presenter in
    ├── InvalidCredential           invalid_credential      unknown, malformed, forged or foreign; says no more
    ├── CredentialExpired           credential_expired
    ├── CredentialRevoked           credential_revoked
    ├── CredentialRotated           credential_rotated
    ├── WrongEnvironment            wrong_environment
    ├── PartnerSuspended            partner_suspended
    └── PartnerMismatch             partner_mismatch

    Fault                           the request is at fault, whatever credential it carries
    ├── NoCredential                credential_required
    ├── AmbiguousCredentials        ambiguous_credentials
    ├── HttpsRequired               https_required
    ├── MalformedRequest            malformed_request
    ├── MalformedJson               malformed_json
    ├── BodyTooLarge                body_too_large
    └── UnsupportedMediaType        unsupported_media_type

    QuotaExceeded                   quota_exceeded          a known caller that has used up what its tier allows

    Unavailable                     unavailable             nobody's verdict: try again later
    ├── KeysUnavailable             keys_unavailable        the issuer's keys cannot be had
    └── RevocationsUnavailable      revocations_unavailable  what the issuer has revoked cannot be known

A ``Rejected``, a ``Fault`` and a ``QuotaExceeded`` are the sender's and are safe to show to it. ``Unavailable`` is a 503.
What status each has on the wire is in ``problems.py``. A mistake in calling this package is a ``TypeError`` or ``ValueError``
and never one of these.
"""

from collections.abc import Sequence
from typing import ClassVar

from gatelodge.wire import ENVIRONMENT_PATTERN


class Rejected(Exception):
    """A credential was judged and refused.

    ``code`` is stable and is what programs branch on; ``detail`` is one sentence for the person who reads the answer.
    Neither ever holds a part of the credential.
    """

    code: ClassVar[str] = "rejected"
    detail: ClassVar[str] = "The credential was refused."

    def __init__(self) -> None:
        super().__init__(self.detail)


class InvalidCredential(Rejected):
    """The one answer to everything that is not a genuine credential: it must not tell how close a guess came."""

    code = "invalid_credential"
    detail = "The credential is not valid here. Check that it was copied whole and belongs to this service."


class CredentialExpired(Rejected):
    """A genuine credential whose time is over."""

    code = "credential_expired"
    detail = "The credential has expired. Log in again, or refresh the session."


class CredentialRevoked(Rejected):
    """A genuine credential that was ended by somebody."""

    code = "credential_revoked"
    detail = "The credential has been revoked. Ask the partner manager for a new one, register anew, or log in again."


class CredentialRotated(Rejected):
    """A genuine credential that has been replaced by a newer one."""

    code = "credential_rotated"
    detail = "The credential has been replaced by a newer one. Use the newer one."


class WrongEnvironment(Rejected):
    """A credential whose own marking names another environment; tells its presenter nothing that it does not hold."""

    code = "wrong_environment"
    detail = "The credential belongs to another environment. Use the one that was issued for this base URL."

    def __init__(self, *, environment: str | None = None) -> None:
        super().__init__()
        if environment is not None and ENVIRONMENT_PATTERN.fullmatch(environment):
            self.detail = (  # type: ignore[misc]  # of this one only
                f"The credential belongs to the environment `{environment}`. Use the one that was issued for this base URL."
            )


class PartnerSuspended(Rejected):
    """A genuine credential of a partner that is suspended."""

    code = "partner_suspended"
    detail = "The partner is suspended. Contact the partner manager."


class PartnerMismatch(Rejected):
    """A request names another partner than the one that its credential belongs to."""

    code = "partner_mismatch"
    detail = "The `partner` field must be absent or name the partner that the credential belongs to."


class Fault(Exception):
    """The request itself is at fault, before anything was decided about it."""

    code: ClassVar[str]
    detail: ClassVar[str]

    def __init__(self) -> None:
        super().__init__(self.detail)


class NoCredential(Fault):
    """The call needs a credential and came without."""

    code = "credential_required"
    detail = "Send an API key, an access token or a session JWT as `Authorization: Bearer …` or as `R-Auth: …`."


class AmbiguousCredentials(Fault):
    """Two credentials in one request: none is preferred (RFC 6750 section 2)."""

    code = "ambiguous_credentials"
    detail = "The request carries more than one credential. Send one, in `Authorization` or in `R-Auth`."


class HttpsRequired(Fault):
    """The request came over plain HTTP."""

    code = "https_required"
    detail = "Use https. Whatever credential was sent has crossed the network in the clear: replace it."


class MalformedRequest(Fault):
    """Not a request that can be understood."""

    code = "malformed_request"
    detail = "The request could not be understood."


class MalformedJson(Fault):
    """The body is not strict JSON."""

    code = "malformed_json"
    detail = "The body must be one JSON object in UTF-8: no member twice, no NaN or Infinity, nested no deeper than 16 levels."


class BodyTooLarge(Fault):
    """The body is over the limit, which is in bytes."""

    code = "body_too_large"
    detail = "The body is larger than is taken."

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.detail = f"The body is larger than {limit:,} bytes."  # type: ignore[misc]  # of this one only


class UnsupportedMediaType(Fault):
    """The body is not said to be JSON."""

    code = "unsupported_media_type"
    detail = "Send the body as `Content-Type: application/json`, not compressed."


class QuotaExceeded(Exception):
    """The partner has used up what its tier allows.

    ``policies`` names the windows that are used up, ``retry_after`` says in how many seconds the last of them ends, and
    ``headers`` are the rate headers that every answer to the partner carries.
    """

    code: ClassVar[str] = "quota_exceeded"
    detail: ClassVar[str] = (
        "The requests that the tier allows are used up. Try again after `Retry-After` seconds, or ask for another tier."
    )

    def __init__(self, policies: Sequence[str], retry_after: int, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(self.detail)
        self.policies = tuple(policies)
        self.retry_after = retry_after
        self.headers = tuple(headers)


class Unavailable(Exception):
    """It cannot be done now: something that is needed is down or too busy. Fail closed, and try again."""

    code: ClassVar[str] = "unavailable"
    detail: ClassVar[str] = "The service cannot do this right now. Nothing is lost; try again shortly."
    retry_after: ClassVar[int] = 1
    """Seconds."""

    def __init__(self) -> None:
        super().__init__(self.detail)


class KeysUnavailable(Unavailable):
    """The issuer's keys could not be had, so no verdict is possible."""

    code = "keys_unavailable"


class RevocationsUnavailable(Unavailable):
    """What the issuer has revoked was not heard for too long, so no verdict is possible."""

    code = "revocations_unavailable"
