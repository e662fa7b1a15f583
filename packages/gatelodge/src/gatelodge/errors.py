"""Every reason for which a credential is refused, each with a stable code.

::

    Rejected                    the credential does not let its presenter in
    ├── InvalidCredential       invalid_credential      unknown, malformed, forged or foreign; says no more
    ├── CredentialExpired       credential_expired
    ├── CredentialRevoked       credential_revoked
    ├── CredentialRotated       credential_rotated
    ├── WrongEnvironment        wrong_environment
    ├── PartnerSuspended        partner_suspended
    └── PartnerMismatch         partner_mismatch

    KeysUnavailable             keys_unavailable        nothing is known of the credential: try again later

A ``Rejected`` is the presenter's fault and is safe to show to it. ``KeysUnavailable`` is nobody's verdict: answer 503.
A mistake in calling this package is a ``TypeError`` or ``ValueError`` and never one of these.
"""

from typing import ClassVar


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
    detail = "The credential has been revoked. Ask the partner manager for a new one, or log in again."


class CredentialRotated(Rejected):
    """A genuine credential that has been replaced by a newer one."""

    code = "credential_rotated"
    detail = "The credential has been replaced by a newer one. Use the newer one."


class WrongEnvironment(Rejected):
    """A credential whose own marking names another environment; tells its presenter nothing that it does not hold."""

    code = "wrong_environment"
    detail = "The credential belongs to another environment. Use the one that was issued for this base URL."


class PartnerSuspended(Rejected):
    """A genuine credential of a partner that is suspended."""

    code = "partner_suspended"
    detail = "The partner is suspended. Contact the partner manager."


class PartnerMismatch(Rejected):
    """A request names another partner than the one that its credential belongs to."""

    code = "partner_mismatch"
    detail = "The `partner` field must be absent or name the partner that the credential belongs to."


class KeysUnavailable(Exception):
    """The issuer's keys could not be had, so no verdict is possible. Fail closed, and try again later."""

    code: ClassVar[str] = "keys_unavailable"
