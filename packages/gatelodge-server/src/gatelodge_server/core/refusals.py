"""Every refusal that is not a credential's own (those are ``gatelodge.errors``), each with a stable code.

::

    Refusal
    ├── NoCredential               credential_required
    ├── NotAllowed                 insufficient_scope
    ├── RefreshTokenReused         refresh_token_reused
    ├── PartnerNotFound            partner_not_found
    ├── PartnerIdTaken             partner_id_taken
    ├── PartnerDeactivated         partner_deactivated
    ├── TierNotFound               tier_not_found
    ├── KeyNotFound                key_not_found
    ├── KeyEnded                   key_ended
    ├── CompanyNotFound            company_not_found
    ├── CompanyExists              company_exists
    ├── IdempotencyKeyReused       idempotency_key_reused
    ├── IdempotencyKeySpent        idempotency_key_spent
    ├── SigningKeyNotFound         signing_key_not_found
    ├── SigningKeyInUse            signing_key_in_use
    └── Unavailable                unavailable

What status an answer has is not known here; ``http/problems.py`` holds that table, for these and for the credential's own.
"""

from typing import ClassVar


class Refusal(Exception):
    """Something was asked for and is refused. ``detail`` is one sentence for the asker and holds no secret."""

    code: ClassVar[str] = "refused"
    detail: ClassVar[str] = "The request was refused."

    def __init__(self) -> None:
        super().__init__(self.detail)


class NoCredential(Refusal):
    """The call needs a credential and came without."""

    code = "credential_required"
    detail = "Send an API key or a session JWT as `Authorization: Bearer …` or as `R-Auth: …`."


class NotAllowed(Refusal):
    """A known caller, but not one that may do this."""

    code = "insufficient_scope"
    detail = "This call is for partners; the credential belongs to a company."


class RefreshTokenReused(Refusal):
    """A spent refresh token came back. The whole session is already dead when this is raised."""

    code = "refresh_token_reused"
    detail = "The refresh token was used before, so the whole session has been ended. Log in again with the API key."


class PartnerNotFound(Refusal):
    """No partner has this id."""

    code = "partner_not_found"
    detail = "There is no partner with this id."


class PartnerIdTaken(Refusal):
    """A partner has, or once had, this id."""

    code = "partner_id_taken"
    detail = "A partner has or had this id, and ids are never used again. Choose another."


class PartnerDeactivated(Refusal):
    """The partner has been deactivated, which is final."""

    code = "partner_deactivated"
    detail = "The partner is deactivated, which is final. Add a new partner instead."


class TierNotFound(Refusal):
    """No tier has this name."""

    code = "tier_not_found"
    detail = "There is no tier with this name."


class KeyNotFound(Refusal):
    """No API key has this id."""

    code = "key_not_found"
    detail = "There is no API key with this id."


class KeyEnded(Refusal):
    """The API key has ended already, so it cannot be rotated."""

    code = "key_ended"
    detail = "The API key has ended already and cannot be rotated."


class CompanyNotFound(Refusal):
    """The partner has no such company; another partner's is answered alike."""

    code = "company_not_found"
    detail = "There is no company with this id."


class CompanyExists(Refusal):
    """The partner already has a company with this tax number in this country."""

    code = "company_exists"
    detail = "A company with this tax number and country exists already."


class IdempotencyKeyReused(Refusal):
    """The Idempotency-Key came with another request before."""

    code = "idempotency_key_reused"
    detail = "This Idempotency-Key was sent with another request. Send a new one with every new request."


class IdempotencyKeySpent(Refusal):
    """The request was done, and the key that it made has been used since: the answer cannot be repeated any more."""

    code = "idempotency_key_spent"
    detail = "The request was done before, and the key in its answer has been used or is past repeating. Rotate the key."


class SigningKeyNotFound(Refusal):
    """No signing key has this id."""

    code = "signing_key_not_found"
    detail = "There is no signing key with this id."


class SigningKeyInUse(Refusal):
    """The signing key is the only one that could sign."""

    code = "signing_key_in_use"
    detail = "The key is signing now. Rotate first; then it can be retired."


class Unavailable(Refusal):
    """It cannot be done now: the store is down or too busy. Ask again after ``retry_after``."""

    code = "unavailable"
    detail = "The service cannot do this right now. Nothing is lost; try again shortly."
    retry_after: ClassVar[int] = 1
    """Seconds."""
