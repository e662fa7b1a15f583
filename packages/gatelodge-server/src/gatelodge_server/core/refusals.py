"""Every refusal of the domain, each with a stable code. What the gate itself refuses with is in ``gatelodge.errors``.

::

    Refusal
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
    ├── TokenNotFound              token_not_found
    ├── TokenEnded                 token_ended
    ├── InvalidVerificationCode    invalid_verification_code
    ├── TooManyRequests            too_many_requests
    ├── SigningKeyNotFound         signing_key_not_found
    ├── SigningKeyInUse            signing_key_in_use
    └── StepNotFound               step_not_found

What status an answer has is not known here: ``http/problems.py`` holds that table.
"""

from typing import ClassVar


class Refusal(Exception):
    """Something was asked for and is refused. ``detail`` is one sentence for the asker and holds no secret."""

    code: ClassVar[str] = "refused"
    detail: ClassVar[str] = "The request was refused."

    def __init__(self) -> None:
        super().__init__(self.detail)


class NotAllowed(Refusal):
    """A known caller, but not one that may do this."""

    code = "insufficient_scope"
    detail = "This credential is not for this call; the documentation of the call says which one is."


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
    detail = (
        "The request was done before, and the key in its answer has been used or is past repeating. Rotate the key that came "
        "with it, or ask for a recovery code."
    )


class TokenNotFound(Refusal):
    """No access token has this id."""

    code = "token_not_found"
    detail = "There is no access token with this id."


class TokenEnded(Refusal):
    """The access token has ended already, so it cannot be rotated."""

    code = "token_ended"
    detail = "The access token has ended already and cannot be rotated. Issue a new one."


class InvalidVerificationCode(Refusal):
    """A code that is wrong, spent, expired or guessed at too often, or an address that was sent none: told alike."""

    code = "invalid_verification_code"
    detail = "The code is not valid. Check the newest mail; after five attempts or ten minutes, register again for a new code."


class TooManyRequests(Refusal):
    """An address or a partner has asked too often for what costs others something, such as their attention.

    ``retry_after`` is in seconds.
    """

    code = "too_many_requests"
    detail = "Too many requests of this kind from you. Try again after `Retry-After` seconds."

    def __init__(self, retry_after: int) -> None:
        super().__init__()
        self.retry_after = retry_after


class SigningKeyNotFound(Refusal):
    """No signing key has this id."""

    code = "signing_key_not_found"
    detail = "There is no signing key with this id."


class SigningKeyInUse(Refusal):
    """The signing key is needed: it signs, is to sign next, or has signed an access token that is alive."""

    code = "signing_key_in_use"
    detail = "The key signs, signs next, or live access tokens need it. Rotate first: the key, or the tokens that it signed."


class StepNotFound(Refusal):
    """The change sequence has no such step: it may have gone back, with a backup that was restored."""

    code = "step_not_found"
    detail = "There is no such step. Begin anew: read the feed without `after`."
