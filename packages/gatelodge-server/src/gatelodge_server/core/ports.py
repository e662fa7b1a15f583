"""What the core asks of the outside: a store, and somebody who keeps secrets.

Each verb of a store is one decision: it is read, decided and written in one transaction, and **committed when it returns**. So
a refusal that follows a verb can never undo what the verb did. What may be expected to happen comes back as a value; a verb
raises only ``refusals.Unavailable``, when nothing is known to have been done.

Every verb that changes what others may rely on appends to the change sequence, and every one that a person would want to
answer for later appends to the audit trail, in that same transaction. ``by`` names who asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias
from uuid import UUID

from gatelodge.errors import Rejected
from gatelodge_server.core.model import (
    AuditEvent,
    Change,
    Company,
    Credential,
    Holder,
    Instant,
    Partner,
    PartnerStatus,
    Session,
    SessionEnd,
    SigningKey,
    Standing,
)
from gatelodge_server.core.refusals import Refusal

Reason: TypeAlias = type[Rejected] | type[Refusal]
"""Why not: the class of the refusal that the caller is to raise."""


class Refused(NamedTuple):
    """It was not done, for this reason."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Done:
    """It was done, and is step ``sequence`` of the change sequence."""

    sequence: int


# --- sessions -------------------------------------------------------------------------------------------------------------


class LoginAttempt(NamedTuple):
    """A session to be opened with an API key. The instants are those of the session if it is."""

    key_id: str
    digest: bytes
    session_id: bytes
    now: Instant
    expires_at: Instant
    retires_at: Instant


class Opened(NamedTuple):
    """The session stands."""

    session: Session
    holder: Holder


class RefreshAttempt(NamedTuple):
    """A genuine refresh token was presented. ``retry`` is the digest of its Idempotency-Key."""

    session_id: bytes
    generation: int
    retry: bytes | None
    now: Instant
    expires_at: Instant
    """When the successor expires, unless the session retires before."""


class Advanced(NamedTuple):
    """This caller won: the session is one generation on."""

    session: Session
    holder: Holder


class Repeated(NamedTuple):
    """The same caller asks again for the successor that it never heard of."""

    session: Session
    holder: Holder


class Condemned(NamedTuple):
    """The token was spent, or from a lost future: the session has been ended by this very verb."""

    session: Session
    cause: SessionEnd


RefreshOutcome: TypeAlias = Advanced | Repeated | Condemned | Refused


class SessionStanding(NamedTuple):
    """A session and the credential that started it."""

    session: Session
    standing: Standing


@dataclass(frozen=True, slots=True)
class Purged:
    """A slice of the sessions was looked at up to ``after`` (``None``: the end was reached), ``deleted`` rows are gone."""

    after: bytes | None
    deleted: int


class SessionStore(Protocol):
    """Where sessions live. The first three verbs are the hot ones and are micro-batched."""

    async def open_session(self, attempt: LoginAttempt) -> Opened | Refused:
        """Judge the key (``credentials.judge_key``) and open a session in its partner's present epoch."""
        ...

    async def advance_session(self, attempt: RefreshAttempt) -> RefreshOutcome:
        """Judge the token (``sessions.judge_refresh``) and write what that says.

        Of any number of attempts with one generation, at any number of nodes, at most one is ``Advanced``.
        """
        ...

    async def find_session(self, session_id: bytes) -> SessionStanding | None:
        """The session as it stands at this moment."""
        ...

    async def end_session(self, session_id: bytes, *, cause: SessionEnd, now: Instant, by: str) -> Done | None:
        """End the session; ``None`` when there is none or it has ended before."""
        ...

    async def purge_sessions(self, *, after: bytes | None, limit: int, ended_before: Instant) -> Purged:
        """Delete, among the next ``limit`` sessions by id, those that nobody could use since ``ended_before``."""
        ...


# --- partners and keys ----------------------------------------------------------------------------------------------------


class PartnerStore(Protocol):
    """Where partners and API keys live."""

    async def add_partner(self, partner: Partner, key: Credential, *, by: str) -> Done | Refused:
        """Add a partner with its first key. Refused with ``PartnerIdTaken`` or ``TierNotFound``."""
        ...

    async def find_partner(self, partner_id: str) -> Partner | None:
        """The partner with this id."""
        ...

    async def list_partners(self) -> Sequence[Partner]:
        """All partners, by id."""
        ...

    async def set_partner_status(self, partner_id: str, status: PartnerStatus, *, now: Instant, by: str) -> Done | Refused:
        """Suspend, resume or deactivate. Whatever is not ``ACTIVE`` ends every session of the partner and its companies.

        Refused with ``PartnerNotFound``, or ``PartnerDeactivated`` because that is final.
        """
        ...

    async def find_key(self, key_id: str) -> Standing | None:
        """An API key's standing at this moment."""
        ...

    async def get_key(self, key_id: str) -> Credential | None:
        """An API key as it is stored."""
        ...

    async def list_keys(self, partner_id: str) -> Sequence[Credential]:
        """The keys of a partner and of its companies, newest first."""
        ...

    async def roll_key(
        self, key_id: str, replacement: Credential, *, ends_at: Instant, now: Instant, by: str
    ) -> Done | Refused:
        """Put ``replacement`` in the place of a live key, which ends at ``ends_at``.

        Refused with ``KeyNotFound``, ``KeyEnded`` or ``PartnerDeactivated``; a suspended partner's key can be replaced.
        """
        ...

    async def revoke_key(self, key_id: str, *, now: Instant, by: str) -> Done | Refused:
        """End a key and so every session it started. Doing it twice is no fault. Refused with ``KeyNotFound``."""
        ...


# --- companies ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Replay:
    """Lets an answer that held a new API key be asked for again, with the key sealed under what the asker presented."""

    id: bytes
    """Stands for the caller, the call and the Idempotency-Key."""
    fingerprint: bytes
    """Stands for what was asked."""
    sealed: bytes
    readable_until: Instant
    """The sealed key goes at this moment, or when the key is first used."""


@dataclass(frozen=True, slots=True)
class Created:
    """A company has a new key, and did not have it before."""

    company_id: UUID
    sequence: int


@dataclass(frozen=True, slots=True)
class Replayed:
    """The same was asked before: this is the key that was made then."""

    company_id: UUID
    sealed: bytes


CompanyOutcome: TypeAlias = Created | Replayed | Refused


class CompanyStore(Protocol):
    """Where companies live. A partner reaches its own only; any other is as good as not there."""

    async def create_company(self, company: Company, key: Credential, *, replay: Replay | None, by: str) -> CompanyOutcome:
        """Add a company with its first key. Refused with ``CompanyExists`` or an Idempotency-Key's reasons."""
        ...

    async def find_company(self, partner_id: str, company_id: UUID) -> Company | None:
        """The partner's company with this id."""
        ...

    async def list_companies(self, partner_id: str, *, before: UUID | None, limit: int) -> Sequence[Company]:
        """Up to ``limit`` of the partner's companies, newest first, from the one after ``before`` on."""
        ...

    async def roll_company_key(
        self,
        company_id: UUID,
        replacement: Credential,
        *,
        ends_at: Instant,
        replay: Replay | None,
        now: Instant,
        by: str,
    ) -> CompanyOutcome:
        """Give a company a new key; what keys it has end at ``ends_at``. Refused with ``CompanyNotFound`` and as above."""
        ...

    async def delete_company(self, partner_id: str, company_id: UUID, *, now: Instant, by: str) -> Done | Refused:
        """End a company, its keys and its sessions. Refused with ``CompanyNotFound``."""
        ...


# --- signing keys ---------------------------------------------------------------------------------------------------------


class SigningKeyStore(Protocol):
    """Where signing keys live, their private halves sealed."""

    async def list_signing_keys(self) -> Sequence[SigningKey]:
        """Every key that there is or was, oldest first."""
        ...

    async def establish_signing_keys(self, first: Sequence[SigningKey], *, now: Instant) -> Sequence[SigningKey]:
        """Store ``first`` unless there are keys; the keys that there are then. Two nodes that start at once agree."""
        ...

    async def rotate_signing_keys(self, candidate: SigningKey, *, lead: int, life: int, now: Instant, by: str) -> Done:
        """Let the next key sign (``signing.plan_rotation``) and publish ``candidate`` as the new next."""
        ...

    async def retire_signing_key(self, kid: str, *, now: Instant, by: str) -> Done | Refused:
        """Withdraw a key at once (``signing.plan_retirement``), and with it every token that it signed."""
        ...


# --- the trail ------------------------------------------------------------------------------------------------------------


class TrailStore(Protocol):
    """What was done, and what others have to hear of."""

    async def list_audit(self, *, partner_id: str | None, since: Instant | None) -> Sequence[AuditEvent]:
        """The audit trail, oldest first."""
        ...

    async def list_changes(self, *, after: int, limit: int) -> Sequence[Change]:
        """The change sequence after step ``after``."""
        ...

    async def forget_replays(self, *, now: Instant) -> None:
        """Blank what may no longer be asked for again, and drop what is older than a day."""
        ...

    async def ping(self) -> None:
        """Return if the store answers; else raise ``Unavailable``."""
        ...


class Store(SessionStore, PartnerStore, CompanyStore, SigningKeyStore, TrailStore, Protocol):
    """All of it: what a backend provides."""


class Sealer(Protocol):
    """Seals small secrets (AES-256-GCM) under keys that come from the deployment's master key and a label."""

    def seal(self, plaintext: bytes, *, label: bytes) -> bytes:
        """Seal; only ``open`` with the same label gives it back, so a label may itself be a secret."""
        ...

    def open(self, sealed: bytes, *, label: bytes) -> bytes:
        """Open, under any master key that is still honoured. Raises ``ValueError`` if it is not whole or not ours."""
        ...


class Digester(Protocol):
    """Keyed digests for what must be recognised again but not stored."""

    def digest(self, message: bytes, *, purpose: str) -> bytes:
        """32 bytes that stand for ``message``."""
        ...
