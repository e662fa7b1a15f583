"""Where companies live."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias
from uuid import UUID

from gatelodge_server.core.model import Company, Credential, Instant
from gatelodge_server.core.ports.common import Done, Refused, Replay


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
