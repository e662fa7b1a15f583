"""Where partners, tiers and API keys live."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gatelodge_server.core.model import Credential, Instant, Partner, PartnerStatus, Standing, Tier
from gatelodge_server.core.ports.common import Done, Refused, Replay


@dataclass(frozen=True, slots=True)
class Rolled:
    """A key has been replaced; ``partner_id`` is whose it is, and ``tier`` what that allows."""

    partner_id: str
    tier: Tier
    sequence: int


@dataclass(frozen=True, slots=True)
class RolledBefore:
    """The same was asked before: this is the key that was made then, sealed."""

    partner_id: str
    tier: Tier
    sealed: bytes


@dataclass(frozen=True, slots=True)
class Deactivated:
    """A partner has ended itself."""

    partner_id: str
    sequence: int


@dataclass(frozen=True, slots=True)
class RolledTooOften:
    """The partner has had so many new keys in the last hour (``registration.KEYS_AN_HOUR``) that nothing was changed."""

    again_at: Instant
    """When the next one may be asked for."""


class PartnerStore(Protocol):
    """Where partners, tiers and API keys live."""

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

        Refused with ``PartnerNotFound``, or ``PartnerDeactivated`` because that is final. Its owner is told of the latter.
        """
        ...

    async def set_partner_tier(self, partner_id: str, tier: str, *, now: Instant, by: str) -> Done | Refused:
        """Put a partner into a tier. Refused with ``PartnerNotFound``, ``PartnerDeactivated`` or ``TierNotFound``."""
        ...

    async def list_tiers(self) -> Sequence[Tier]:
        """All tiers, the smallest first."""
        ...

    async def set_tier(self, tier: Tier, *, now: Instant, by: str) -> Done:
        """Add a tier, or change what it allows."""
        ...

    async def find_key(self, key_id: str) -> Standing | None:
        """An API key's standing at this moment. Micro-batched."""
        ...

    async def note_first_use(self, key_id: str, *, now: Instant) -> None:
        """A key is about to let its holder in for the first time: no answer that held it can be asked for any more."""
        ...

    async def get_key(self, key_id: str) -> Credential | None:
        """An API key as it is stored."""
        ...

    async def list_keys(self, partner_id: str) -> Sequence[Credential]:
        """The keys of a partner and of its companies, newest first, with how their holders stand."""
        ...

    async def roll_key(
        self, key_id: str, replacement: Credential, *, ends_at: Instant, now: Instant, by: str
    ) -> Done | Refused:
        """Put ``replacement`` in the place of a live key, which ends at ``ends_at``. The owner of a partner's key is told.

        Refused with ``KeyNotFound``, ``KeyEnded`` or ``PartnerDeactivated``; a suspended partner's key can be replaced.
        """
        ...

    async def roll_own_key(
        self,
        key_id: str,
        digest: bytes,
        replacement: Credential,
        *,
        ends_at: Instant,
        replay: Replay | None,
        now: Instant,
    ) -> Rolled | RolledBefore | RolledTooOften | Refused:
        """As ``roll_key``, at the wish of who presents the key: it is judged (``credentials.judge_key``) by this very verb.

        The same asked again with the same Idempotency-Key is answered although the key has ended. ``replacement`` belongs to
        the partner that the key belongs to; its ``partner_id`` is set by this verb. Refused with a ``Rejected``'s reasons,
        with ``NotAllowed`` for a company's key, or with an Idempotency-Key's reasons.
        """
        ...

    async def deactivate_own(self, key_id: str, digest: bytes, *, now: Instant) -> Deactivated | Refused:
        """Deactivate the partner whose key is presented: the key is judged (``credentials.judge_key``) by this very verb.

        Refused with a ``Rejected``'s reasons, so nobody escapes a suspension; with ``NotAllowed`` for a company's key and for
        a partner that has not registered itself.
        """
        ...

    async def revoke_key(self, key_id: str, *, now: Instant, by: str) -> Done | Refused:
        """End a key and so every session it started. Doing it twice is no fault. Refused with ``KeyNotFound``."""
        ...
