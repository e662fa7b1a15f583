"""The things of the domain, as they are once stored: frozen, exact, without behaviour beyond what follows from their fields.

Those that are made several times for every login and refresh are named tuples: a frozen dataclass takes three times as long.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple, TypeAlias
from uuid import UUID

from gatelodge.wire import KeyKind

Instant: TypeAlias = int
"""A moment: whole milliseconds since 1970-01-01T00:00:00Z. Names of instants end in ``_at``."""
Duration: TypeAlias = int
"""A length of time in whole milliseconds. Names of durations end in ``_ttl`` or say what they measure."""

Clock: TypeAlias = Callable[[], Instant]
"""Reads the wall clock. An operation reads it once and hands ``now`` on."""
Entropy: TypeAlias = Callable[[int], bytes]
"""Gives so many bytes from the operating system's generator."""

SECOND: Final[Duration] = 1_000
MINUTE: Final[Duration] = 60 * SECOND
HOUR: Final[Duration] = 60 * MINUTE
DAY: Final[Duration] = 24 * HOUR


class PartnerStatus(StrEnum):
    """Where a partner stands. ``DEACTIVATED`` is final."""

    ACTIVE = "active"
    SUSPENDED = "suspended"
    DEACTIVATED = "deactivated"


class Origin(StrEnum):
    """How a partner came to be: made by a partner manager, or by registering itself."""

    MANAGED = "managed"
    SELF_SERVICE = "self-service"


class EndCause(StrEnum):
    """Why an API key or an access token ends, or ended."""

    EXPIRED = "expired"
    ROTATED = "rotated"
    REVOKED = "revoked"


class SessionEnd(StrEnum):
    """Why a session was ended before its time. What its credential or its partner went through is not repeated here."""

    LOGOUT = "logout"
    REUSE = "reuse"
    RESTORED = "restored"
    """A refresh token was newer than the row: the database has been restored from a backup."""


class KeyPurpose(StrEnum):
    """What a signing key signs. Each purpose has a ring of keys of its own."""

    SESSION = "session"
    ACCESS = "access"


class MailKind(StrEnum):
    """What a mail is about; each kind has its templates."""

    VERIFICATION = "verification"
    RECOVERY = "recovery"
    SUSPENDED = "suspended"
    """Somebody tried to register an address whose partner is suspended."""
    KEY_ROTATED = "key_rotated"
    KEY_RECOVERED = "key_recovered"
    TOKEN_ROTATED = "token_rotated"  # noqa: S105 - a kind of mail
    SESSION_REUSED = "session_reused"
    DEACTIVATED = "deactivated"


class Tier(NamedTuple):
    """How many requests a partner may make, in each hour and in each day by UTC."""

    name: str
    requests_per_hour: int
    requests_per_day: int


@dataclass(frozen=True, slots=True)
class Partner:
    """An organisation that calls the API. ``id`` is a slug, unique for ever."""

    id: str
    name: str
    contact_email: str
    tier: str
    status: PartnerStatus
    origin: Origin
    created_at: Instant
    organization_name: str | None = None
    """What one that registered itself said, here and in the next two, and when it agreed to the terms."""
    website_url: str | None = None
    intended_use: str | None = None
    agreed_at: Instant | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompanyDetails:
    """What a partner says about one of its companies. Every field has been checked; ``None`` is "not said"."""

    company_name: str
    country: str
    tax_number: str
    vat_number: str | None = None
    language: str | None = None
    address: str | None = None
    city: str | None = None
    state: str | None = None
    postal_code: str | None = None
    email: str | None = None
    user_email: str | None = None
    iban_number: str | None = None
    bic_number: str | None = None


@dataclass(frozen=True, slots=True)
class Company:
    """An end customer that exactly one partner manages."""

    id: UUID
    partner_id: str
    details: CompanyDetails
    created_at: Instant


@dataclass(frozen=True, slots=True)
class Credential:
    """An API key as it is stored: recognisable by its id and masked form, checkable by its digest, never readable again."""

    id: str
    kind: KeyKind
    partner_id: str
    company_id: UUID | None
    digest: bytes
    masked: str
    created_at: Instant
    ends_at: Instant | None = None
    end_cause: EndCause | None = None
    last_used_at: Instant | None = None
    partner_status: PartnerStatus = PartnerStatus.ACTIVE
    """Of its partner. Only a listing reads it, and ``company_gone``; whoever decides looks at the `Standing`."""
    company_gone: bool = False


@dataclass(frozen=True, slots=True)
class AccessToken:
    """A version of a pre-generated token as it is stored. The versions that were rotated into one another share a lineage."""

    id: str
    """Its `jti`."""
    lineage_id: str
    """The id of the first version."""
    version: int
    partner_id: str
    label: str
    kid: str
    """The signing key that it was signed with."""
    digest: bytes
    created_at: Instant
    rotated_at: Instant | None = None
    ends_at: Instant | None = None
    end_cause: EndCause | None = None
    last_used_at: Instant | None = None
    last_used_from: str | None = None
    partner_status: PartnerStatus = PartnerStatus.ACTIVE
    """Of its partner. Only a listing reads it; whoever decides looks at the `Standing`."""

    @property
    def company_gone(self) -> bool:
        """Never: access tokens are for partners."""
        return False


class Holder(NamedTuple):
    """Whom a credential speaks for."""

    partner_id: str
    company_id: UUID | None
    tier: str
    credential_id: str

    @property
    def kind(self) -> str:
        """``partner`` or ``company``: the claim of that name."""
        return "partner" if self.company_id is None else "company"


class Standing(NamedTuple):
    """All that decides whether an API key, a session that it started, or an access token still lets its holder in."""

    holder: Holder
    digest: bytes
    ends_at: Instant | None
    end_cause: EndCause | None
    partner_status: PartnerStatus
    session_epoch: int
    """Counts how often all of the partner's sessions were ended at once. A session lives in the epoch that it started in."""
    company_gone: bool
    rotated_at: Instant | None = None
    """When it was replaced by a newer one; until ``ends_at`` both work."""
    first_used_at: Instant | None = None
    """When it first let somebody in: from then on its maker has it, and no answer that held it is repeated."""


class Session(NamedTuple):
    """One login and all that was refreshed from it: a single row, however often it is refreshed."""

    id: bytes
    """A UUIDv7 in 16 bytes: time-ordered, so that new rows stand side by side in the index."""
    credential_id: str
    epoch: int
    generation: int
    started_at: Instant
    rotated_at: Instant
    expires_at: Instant
    """When the refresh token of the present generation expires: it slides with each refresh."""
    retires_at: Instant
    """When the session ends however busy it is."""
    retry_digest: bytes | None = None
    ended_at: Instant | None = None
    end_cause: SessionEnd | None = None


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key that signs session JWTs or access tokens: first published, then signing, then published only, then gone.

    Its state at a moment follows from the four instants; nothing else is stored about it, so nothing can contradict them.
    """

    kid: str
    jwk: str
    """The public JWK (RFC 7517) as JSON."""
    wrapped: bytes
    """The private key, sealed under the master key."""
    published_at: Instant
    signs_from: Instant | None = None
    signs_until: Instant | None = None
    gone_at: Instant | None = None
    purpose: KeyPurpose = KeyPurpose.SESSION

    def state(self, now: Instant) -> str:
        """``next``, ``current``, ``retiring`` or ``gone`` at ``now``."""
        if self.gone_at is not None and now >= self.gone_at:
            return "gone"
        if self.signs_until is not None and now >= self.signs_until:
            return "retiring"
        if self.signs_from is not None and now >= self.signs_from:
            return "current"
        return "next"


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """Something that was done, by whom and to whom. ``detail`` holds no secret and no control character."""

    sequence: int
    at: Instant
    action: str
    actor: str
    partner_id: str | None
    subject: str
    detail: str


@dataclass(frozen=True, slots=True)
class Change:
    """A step of the change sequence: something that others may have cached is no longer so."""

    sequence: int
    kind: str
    subject: str
    at: Instant
