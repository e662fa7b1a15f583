"""API keys: made, judged, rotated, revoked.

What happens when a key is presented:

1. ``gatelodge.wire.ApiKey.parse`` takes it apart; a wrong shape or checksum ends here, without a look-up.
2. ``Credentials.recognise`` compares its brand and environment with ours, and takes the digest.
3. ``judge_key`` decides, from the key's standing in the store, whether its holder may come in.

The other two files: ``store/keys.py`` reads the standing, ``http/guard.py`` hears the verdict.
"""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple
from uuid import UUID

from gatelodge.errors import (
    CredentialExpired,
    CredentialRevoked,
    CredentialRotated,
    InvalidCredential,
    PartnerSuspended,
    Rejected,
    WrongEnvironment,
)
from gatelodge.wire import ApiKey
from gatelodge_server.core.ids import api_key
from gatelodge_server.core.model import (
    AccessToken,
    Clock,
    Credential,
    Duration,
    EndCause,
    Entropy,
    Holder,
    Instant,
    PartnerStatus,
    Standing,
)
from gatelodge_server.core.ports import PartnerStore, Refused
from gatelodge_server.core.refusals import KeyNotFound, PartnerNotFound
from gatelodge_server.core.secrets import Secret

END_REASONS: Final[dict[EndCause, type[Rejected]]] = {
    EndCause.EXPIRED: CredentialExpired,
    EndCause.ROTATED: CredentialRotated,
    EndCause.REVOKED: CredentialRevoked,
}
_NOBODYS_DIGEST: Final = bytes(32)


def digest_key(text: Secret) -> bytes:
    """What is stored of a key. Its secret has 178 random bits, so a plain SHA-256 cannot be searched backwards."""
    return hashlib.sha256(text.reveal().encode("ascii")).digest()


def judge_standing(standing: Standing, now: Instant) -> type[Rejected] | None:
    """Why a genuine holder may not come in at ``now``; ``None`` if it may."""
    if standing.end_cause is EndCause.REVOKED:
        return CredentialRevoked  # at once and for good: a clock that is set back brings no revoked key to life
    if standing.end_cause is EndCause.ROTATED and _had_no_overlap(standing):
        return CredentialRotated  # and neither one whose holder was told that it is refused from now on
    if standing.ends_at is not None and now >= standing.ends_at:
        return END_REASONS[standing.end_cause or EndCause.REVOKED]
    if standing.company_gone or standing.partner_status is PartnerStatus.DEACTIVATED:
        return CredentialRevoked
    if standing.partner_status is PartnerStatus.SUSPENDED:
        return PartnerSuspended
    return None


def _had_no_overlap(standing: Standing) -> bool:
    return standing.ends_at is not None and standing.rotated_at is not None and standing.ends_at <= standing.rotated_at


def judge_key(standing: Standing | None, digest: bytes, now: Instant) -> type[Rejected] | None:
    """Why the presenter of a key with this digest may not come in at ``now``; ``None`` if it may.

    An unknown id and a wrong secret take the same path, a comparison included, and get the same answer.
    """
    known = standing.digest if standing is not None else _NOBODYS_DIGEST
    if not hmac.compare_digest(known, digest) or standing is None:
        return InvalidCredential
    return judge_standing(standing, now)


def credential_status(credential: Credential | AccessToken, now: Instant) -> str:
    """What a listed credential is at ``now``, as ``judge_standing`` would judge it. In its overlap a rotated one is active.

    ``active``, ``rotated``, ``revoked``, ``expired``, ``company-deleted``, ``partner-deactivated`` or ``partner-suspended``.
    """
    over = credential.ends_at is not None and now >= credential.ends_at
    if over and credential.end_cause in {EndCause.ROTATED, EndCause.EXPIRED}:
        return credential.end_cause.value
    if credential.company_gone:  # which has revoked its keys
        return "company-deleted"
    if over or credential.end_cause is EndCause.REVOKED:
        return EndCause.REVOKED.value
    if credential.partner_status is not PartnerStatus.ACTIVE:
        return f"partner-{credential.partner_status.value}"
    return "active"


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A new key: what is stored of it, and the one time that it can be read."""

    credential: Credential
    text: Secret
    sequence: int | None = None
    """Of the change that put it in the place of another."""


class PresentedKey(NamedTuple):
    """A well-formed key of this environment, not yet looked up."""

    id: str
    digest: bytes


class Credentials:
    """The API keys of one environment."""

    def __init__(self, *, store: PartnerStore, clock: Clock, entropy: Entropy, brand: str, environment: str) -> None:
        self._store = store
        self._clock = clock
        self._entropy = entropy
        self._brand = brand
        self.environment = environment

    def issue(self, partner_id: str, company_id: UUID | None, now: Instant) -> IssuedKey:
        """Make a key for a partner, or for one of its companies. Nothing is stored yet."""
        key = api_key(self._brand, self.environment, "pk" if company_id is None else "ck", self._entropy)
        text = Secret(key.text)
        credential = Credential(key.id, key.kind, partner_id, company_id, digest_key(text), key.masked, now)
        return IssuedKey(credential, text)

    def recognise(self, presented: Secret) -> PresentedKey:
        """Take a presented key apart. Raises ``InvalidCredential``, or ``WrongEnvironment`` by the key's own marking."""
        key = ApiKey.parse(presented.reveal())
        if key is None or key.brand != self._brand:
            raise InvalidCredential
        if key.environment != self.environment:
            raise WrongEnvironment(environment=key.environment)
        return PresentedKey(key.id, digest_key(presented))

    async def authenticate(self, presented: Secret) -> Holder:
        """Whom a key speaks for now. Raises a ``Rejected``."""
        key = self.recognise(presented)
        standing = await self._store.find_key(key.id)
        reason = judge_key(standing, key.digest, self._clock())
        if reason is not None or standing is None:
            raise reason or InvalidCredential
        return standing.holder

    async def list_for(self, partner_id: str) -> Sequence[Credential]:
        """A partner's keys and its companies', newest first. Raises ``PartnerNotFound``."""
        if await self._store.find_partner(partner_id) is None:
            raise PartnerNotFound
        return await self._store.list_keys(partner_id)

    async def rotate(self, key_id: str, *, overlap: Duration, by: str) -> IssuedKey:
        """Replace a live key; the old one works on for ``overlap``. Raises what ``roll_key`` refuses with."""
        old = await self._store.get_key(key_id)
        if old is None:
            raise KeyNotFound
        now = self._clock()
        issued = self.issue(old.partner_id, old.company_id, now)
        match await self._store.roll_key(key_id, issued.credential, ends_at=now + overlap, now=now, by=by):
            case Refused(reason):
                raise reason
            case done:
                return replace(issued, sequence=done.sequence)

    async def revoke(self, key_id: str, *, by: str) -> int:
        """End a key and every session that it started. The change's sequence number. Raises ``KeyNotFound``."""
        match await self._store.revoke_key(key_id, now=self._clock(), by=by):
            case Refused(reason):
                raise reason
            case done:
                return done.sequence
