"""Registration, and what a partner does with its own key: `/api/v2/Partners/Register…`."""

from collections.abc import Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, Final

import msgspec

from gatelodge.errors import NoCredential, Unavailable
from gatelodge_server.core.model import SECOND, Tier
from gatelodge_server.core.ports import Limited
from gatelodge_server.core.quotas import Quotas, WindowUse
from gatelodge_server.core.refusals import (
    IdempotencyKeyReused,
    IdempotencyKeySpent,
    InvalidVerificationCode,
    KeyEnded,
    NotAllowed,
    TooManyRequests,
)
from gatelodge_server.core.registration import NewRegistration, Registrations, VerifiedKey
from gatelodge_server.core.secrets import Secret
from gatelodge_server.http.attempts import Attempts
from gatelodge_server.http.fields import Agreement, IntendedUse, Name, RegistrantEmail, WebsiteUrl
from gatelodge_server.http.guard import Guard
from gatelodge_server.http.operation import Answer, Call, Operation
from gatelodge_server.http.problems import InvalidIdempotencyKey, NotFound, TooManyFailures
from gatelodge_server.http.reach import WAIT_FOR_REACH, Count, ReachAnswer, ReachReport, wait_in
from gatelodge_server.http.sessions import CREDENTIAL_REFUSALS, rfc3339
from gatelodge_server.log import log

_PATH: Final = "/api/v2/Partners/Register"
_TAG: Final = "Registration"
_OVERLAP_MAX: Final = 86_400
_CREDENTIAL: Final = "the partner's own API key"
_REFUSALS: Final = (*CREDENTIAL_REFUSALS, NoCredential, NotAllowed)


class RegisterBody(msgspec.Struct, rename="camel", frozen=True):
    """Who wants to be a partner. The partner's id is made from `organizationName`, or else from `displayName`."""

    contact_email: RegistrantEmail
    display_name: Name
    agreed_to_terms: Agreement
    organization_name: Name | None = None
    website_url: WebsiteUrl | None = None
    intended_use: IntendedUse | None = None


class RegisterAnswer(msgspec.Struct, rename="camel", frozen=True):
    """The same whatever is known of the address. If a code was sent, it is good until `expiresAt`."""

    contact_email: str
    expires_at: str


class VerifyBody(msgspec.Struct, rename="camel", frozen=True):
    """The address, and the code of six digits from the newest mail to it."""

    contact_email: RegistrantEmail
    verification_code: Annotated[
        Secret,
        msgspec.Meta(
            description="The six digits of the mail.", extra_json_schema={"pattern": "^[0-9]{6}$", "examples": ["042517"]}
        ),
    ]


class RotateOwnKeyBody(msgspec.Struct, rename="camel", frozen=True):
    """For how long the present key goes on working."""

    overlap_seconds: Annotated[int, msgspec.Meta(ge=0, le=_OVERLAP_MAX)] = 0


class RateLimits(msgspec.Struct, rename="camel", frozen=True):
    """How many requests the tier allows in each hour and each day, by UTC."""

    requests_per_hour: int
    requests_per_day: int


class PartnerKeyAnswer(msgspec.Struct, rename="camel", frozen=True):
    """The API key of a partner, shown this once. `expiresAt` is `null`: it does not expire."""

    api_key: Secret
    partner_id: str
    tier: str
    rate_limits: RateLimits
    expires_at: str | None


class VerifiedKeyAnswer(PartnerKeyAnswer, rename="camel", frozen=True):
    """The API key of a partner, shown this once; for whoever asks with `wait`, who has heard that its other keys have ended.

    The first key of a partner ends none, and nothing is said of that.
    """

    sequence: Count = msgspec.UNSET
    verifiers: Count = msgspec.UNSET
    acknowledged: Count = msgspec.UNSET


class RotatedKeyAnswer(PartnerKeyAnswer, rename="camel", frozen=True):
    """The new API key of a partner, shown this once; for whoever asks with `wait`, who has heard that the old one ends."""

    sequence: Count = msgspec.UNSET
    verifiers: Count = msgspec.UNSET
    acknowledged: Count = msgspec.UNSET


class KeyInUse(msgspec.Struct, rename="camel", frozen=True):
    """The API key of the request. `lastUsedAt` may be a few seconds behind."""

    masked: str
    created_at: str
    expires_at: str | None
    last_used_at: str | None


class WindowAnswer(msgspec.Struct, rename="camel", frozen=True):
    """What has been used of a window, what remains, and when the next one begins."""

    used: int
    remaining: int
    resets_at: str


class Windows(msgspec.Struct, rename="camel", frozen=True):
    """The present hour and the present day, by UTC."""

    hour: WindowAnswer
    day: WindowAnswer


class UsageAnswer(msgspec.Struct, rename="camel", frozen=True):
    """A partner as it is on record, and what it has used of what its tier allows."""

    partner_id: str
    display_name: str
    contact_email: str
    tier: str
    status: str
    registered_at: str
    key: KeyInUse
    rate_limits: RateLimits
    usage: Windows


class RegistrationRoutes:
    """The handlers of `/api/v2/Partners/Register…`. ``requests`` counts registrations, ``failures`` wrong codes."""

    def __init__(
        self,
        *,
        registrations: Registrations,
        quotas: Quotas,
        guard: Guard,
        requests: Attempts,
        failures: Attempts,
        reach: ReachReport,
    ) -> None:
        self._reach = reach
        self._registrations = registrations
        self._quotas = quotas
        self._guard = guard
        self._requests = requests
        self._failures = failures

    async def register(self, call: Call, body: RegisterBody) -> Answer:
        """Send a code to an address."""
        new = NewRegistration(
            contact_email=body.contact_email,
            display_name=body.display_name,
            organization_name=body.organization_name,
            website_url=body.website_url,
            intended_use=body.intended_use,
        )
        with self._requests.place(call.address):
            expires_at, outcome = await self._registrations.register(new, admit=partial(self._requests.count, call.address))
        match outcome:
            case Limited(by):
                log.warning("registration.limited", limit=by, address=call.address, request_id=call.request_id)
            case _:
                log.info("registration.begun", address=call.address, request_id=call.request_id)
        return Answer(HTTPStatus.ACCEPTED, RegisterAnswer(str(body.contact_email), rfc3339(expires_at)))

    async def verify(self, call: Call, body: VerifyBody) -> Answer:
        """Exchange a code for an API key."""
        wait = wait_in(call)  # before the attempt is counted
        async with self._failures.attempt(call.address):
            try:
                key = await self._registrations.verify(body.contact_email, body.verification_code)
            except InvalidVerificationCode:
                await self._failures.count(call.address)
                raise
        log.info("registration.verified", partner=key.partner_id, address=call.address, request_id=call.request_id)
        counts = {} if key.sequence is None else await self._reach.counts(key.sequence, wait)
        return Answer(HTTPStatus.OK, VerifiedKeyAnswer(**_shown(key), **counts))

    async def rotate(self, call: Call, body: RotateOwnKeyBody | None) -> Answer:
        """Give the caller a new key. The present one is judged by the verb that replaces it."""
        wait, presented = wait_in(call), await self._guard.unjudged_key(call)
        overlap = body.overlap_seconds * SECOND if body is not None else 0
        key = await self._registrations.rotate(presented, overlap=overlap, idempotency_key=call.idempotency_key())
        log.info("key.rotated", partner=key.partner_id, address=call.address, request_id=call.request_id)
        counts = await self._reach.counts(key.sequence, wait)
        return Answer(HTTPStatus.OK, RotatedKeyAnswer(**_shown(key), **counts))

    async def show_usage(self, call: Call, _: None) -> Answer:
        """What the caller's partner is and has used."""
        registrant, key = await self._registrations.describe(call.holder.partner_id, call.holder.credential_id)
        partner, tier = registrant.partner, registrant.tier
        quota = await self._quotas.status(partner.id)
        answer = UsageAnswer(
            partner_id=partner.id,
            display_name=partner.name,
            contact_email=partner.contact_email,
            tier=tier.name,
            status=partner.status.value,
            registered_at=rfc3339(partner.created_at),
            key=KeyInUse(
                masked=key.masked,
                created_at=rfc3339(key.created_at),
                expires_at=None if key.ends_at is None else rfc3339(key.ends_at),
                last_used_at=None if key.last_used_at is None else rfc3339(key.last_used_at),
            ),
            rate_limits=_rate_limits(tier),
            usage=Windows(hour=_window_answer(quota.hour), day=_window_answer(quota.day)),
        )
        return Answer(HTTPStatus.OK, answer)

    async def deactivate(self, call: Call, _: None) -> Answer:
        """End the caller's partner. The key is judged by the verb that ends it: whoever is suspended stays suspended."""
        wait = wait_in(call)
        done = await self._registrations.deactivate(await self._guard.unjudged_key(call))
        log.info(
            "partner.deactivated",
            partner=done.partner_id,
            credential=call.subject,
            address=call.address,
            request_id=call.request_id,
        )
        return await self._reach.answer(done.sequence, wait)

    def operations(self, *, registration: bool = True) -> Sequence[Operation]:
        """What is served here; without ``registration`` only what is for partners that there are."""
        return [*(self._registering() if registration else _switched_off()), *self._managing()]

    def _registering(self) -> Sequence[Operation]:
        return [
            Operation(
                method="POST",
                path=_PATH,
                tag=_TAG,
                summary="Register",
                description=(
                    "Ask for a code by mail: to become a partner, or, for an address that is a partner's already, to get a new "
                    "API key for it. The answer is the same whether or not the address is known. A code is good for ten "
                    "minutes and five attempts, and takes the place of the one before."
                ),
                handler=self.register,
                body=RegisterBody,
                answers={202: RegisterAnswer},
                refusals=(TooManyRequests, Unavailable),
            ),
            Operation(
                method="POST",
                path=f"{_PATH}/Verify",
                tag=_TAG,
                summary="Verify an address",
                description=(
                    "Exchange a code for an API key, which is shown this once. Sent again while the code is good and the key "
                    "unused, it gives the same answer. A code for an address that is a partner's already ends all other API "
                    "keys of that partner."
                ),
                handler=self.verify,
                body=VerifyBody,
                answers={200: VerifiedKeyAnswer},
                parameters=WAIT_FOR_REACH,
                refusals=(InvalidVerificationCode, TooManyFailures, Unavailable),
            ),
        ]

    def _managing(self) -> Sequence[Operation]:
        return [
            Operation(
                method="POST",
                path=f"{_PATH}/Rotate",
                tag=_TAG,
                summary="Rotate the API key",
                description=(
                    "Exchange the API key of the request for a new one. It ends at once, or after `overlapSeconds`. Sent "
                    "again with the same key and the same `Idempotency-Key` within ten minutes, while the new key is unused, "
                    "it gives the same answer. A partner gets at most 30 new keys in an hour."
                ),
                handler=self.rotate,
                body=RotateOwnKeyBody,
                body_optional=True,
                answers={200: RotatedKeyAnswer},
                parameters=WAIT_FOR_REACH,
                refusals=(
                    *_REFUSALS,
                    KeyEnded,
                    IdempotencyKeyReused,
                    IdempotencyKeySpent,
                    InvalidIdempotencyKey,
                    TooManyRequests,
                ),
                credential=_CREDENTIAL,
                idempotent_by_key=True,
            ),
            Operation(
                method="GET",
                path=f"{_PATH}/Usage",
                tag=_TAG,
                summary="Show registration and usage",
                handler=self.show_usage,
                answers={200: UsageAnswer},
                refusals=_REFUSALS,
                credential=_CREDENTIAL,
                admit=self._guard.partner_key,
            ),
            Operation(
                method="DELETE",
                path=_PATH,
                tag=_TAG,
                summary="Deactivate the partner",
                description=(
                    "End the partner, its companies, API keys and sessions for good. Its address may register anew. Only for "
                    "partners that have registered themselves: one that a partner manager has made gets 403 "
                    "`insufficient_scope`, and asks the manager."
                ),
                handler=self.deactivate,
                answers={204: None, 200: ReachAnswer},
                parameters=WAIT_FOR_REACH,
                refusals=_REFUSALS,
                credential=_CREDENTIAL,
            ),
        ]


def _switched_off() -> Sequence[Operation]:
    """Nothing is at these paths; the first one has to say so by itself, since another method is there."""

    async def refuse(_call: Call, _: None) -> Answer:
        raise NotFound

    summary = "Register (switched off)"
    return [Operation(method="POST", path=_PATH, tag=_TAG, summary=summary, handler=refuse, answers={}, refusals=(NotFound,))]


def _shown(key: VerifiedKey) -> Mapping[str, Any]:
    return {
        "api_key": key.api_key,
        "partner_id": key.partner_id,
        "tier": key.tier.name,
        "rate_limits": _rate_limits(key.tier),
        "expires_at": None if key.expires_at is None else rfc3339(key.expires_at),
    }


def _rate_limits(tier: Tier) -> RateLimits:
    return RateLimits(tier.requests_per_hour, tier.requests_per_day)


def _window_answer(window: WindowUse) -> WindowAnswer:
    return WindowAnswer(window.used, window.remaining, rfc3339(window.resets_at))
