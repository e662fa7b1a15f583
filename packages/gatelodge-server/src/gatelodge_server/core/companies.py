"""Companies: the customers of a partner, each with keys of its own.

What happens when one is created (``POST /companies``):

1. ``http/companies.py`` has checked every field; the caller is a partner, known by its key or its session.
2. ``Companies.create`` makes the id and the key, and, if the call has an Idempotency-Key, seals the key so that a lost answer
   can be asked for again.
3. ``store/companies.py`` writes all of it in one transaction, or says what was there before.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Final, assert_never
from uuid import UUID

from gatelodge_server.core.credentials import Credentials
from gatelodge_server.core.ids import company_id
from gatelodge_server.core.model import MINUTE, Clock, Company, CompanyDetails, Duration, Entropy, Instant
from gatelodge_server.core.ports import (
    CompanyOutcome,
    CompanyStore,
    Created,
    Digester,
    Refused,
    Replay,
    Replayed,
    Sealer,
)
from gatelodge_server.core.refusals import CompanyNotFound
from gatelodge_server.core.secrets import Secret

REPLAY_WINDOW: Final[Duration] = 10 * MINUTE
"""For so long may an answer that held a key be asked for again, unless the key is used before."""

_SEAL_LABEL: Final = b"replay:"
_SEPARATORS: Final = str.maketrans("", "", " .-/\t")


def canonical_tax_number(text: str) -> str:
    """How tax numbers are compared: NFKC, upper case, without the separators that people put in for reading."""
    return unicodedata.normalize("NFKC", text).upper().translate(_SEPARATORS)


@dataclass(frozen=True, slots=True)
class CompanyKey:
    """A company's id and its new key."""

    company_id: UUID
    api_key: Secret
    sequence: int | None = None
    """The change that it was; ``None`` for one that was made when the same was asked before."""


class Companies:
    """The companies of every partner of one environment."""

    def __init__(
        self,
        *,
        store: CompanyStore,
        credentials: Credentials,
        sealer: Sealer,
        digester: Digester,
        clock: Clock,
        entropy: Entropy,
    ) -> None:
        self._store = store
        self._credentials = credentials
        self._sealer = sealer
        self._digester = digester
        self._clock = clock
        self._entropy = entropy

    async def create(self, partner_id: str, details: CompanyDetails, *, idempotency_key: str | None) -> CompanyKey:
        """Add a company with its first key. Raises ``CompanyExists`` and the refusals of an Idempotency-Key."""
        now = self._clock()
        company = Company(company_id(now, self._entropy), partner_id, details, now)
        issued = self._credentials.issue(partner_id, company.id, now)
        caller = _caller(partner_id, idempotency_key)
        replay = self._replay(caller, ("create", astuple(details)), issued.text, now)
        outcome = await self._store.create_company(company, issued.credential, replay=replay, by=_by(partner_id))
        return self._answer(outcome, issued.text, caller)

    async def rotate_key(self, partner_id: str, company: UUID, *, overlap: Duration, idempotency_key: str | None) -> CompanyKey:
        """Give a company a new key; the ones it has work on for ``overlap``. Raises ``CompanyNotFound`` and as above."""
        now = self._clock()
        issued = self._credentials.issue(partner_id, company, now)
        caller = _caller(partner_id, idempotency_key)
        replay = self._replay(caller, ("rotate", company, overlap), issued.text, now)
        outcome = await self._store.roll_company_key(
            company, issued.credential, ends_at=now + overlap, replay=replay, now=now, by=_by(partner_id)
        )
        return self._answer(outcome, issued.text, caller)

    async def get(self, partner_id: str, company: UUID) -> Company:
        """The partner's company. Raises ``CompanyNotFound``, for another partner's alike."""
        found = await self._store.find_company(partner_id, company)
        if found is None:
            raise CompanyNotFound
        return found

    async def list_page(self, partner_id: str, *, before: UUID | None, limit: int) -> Sequence[Company]:
        """Up to ``limit`` companies, newest first, from the one after ``before`` on."""
        return await self._store.list_companies(partner_id, before=before, limit=limit)

    async def delete(self, partner_id: str, company: UUID) -> int:
        """End a company, its keys and sessions. The change's sequence number. Raises ``CompanyNotFound``."""
        match await self._store.delete_company(partner_id, company, now=self._clock(), by=_by(partner_id)):
            case Refused(reason):
                raise reason
            case done:
                return done.sequence

    def _replay(self, caller: bytes | None, asked: object, key: Secret, now: Instant) -> Replay | None:
        if caller is None:
            return None
        return Replay(
            id=self._digester.digest(caller, purpose="replay-id"),
            fingerprint=self._digester.digest(caller + repr(asked).encode(), purpose="replay-fingerprint"),
            # The sealing key comes from the Idempotency-Key, which is not stored: the row alone opens nothing.
            sealed=self._sealer.seal(key.reveal().encode("ascii"), label=_SEAL_LABEL + caller),
            readable_until=now + REPLAY_WINDOW,
        )

    def _answer(self, outcome: CompanyOutcome, fresh: Secret, caller: bytes | None) -> CompanyKey:
        match outcome:
            case Created(company, sequence):
                return CompanyKey(company, fresh, sequence)
            case Replayed(company, sealed):
                return CompanyKey(
                    company, Secret(self._sealer.open(sealed, label=_SEAL_LABEL + (caller or b"")).decode("ascii"))
                )
            case Refused(reason):
                raise reason
            case unreachable:
                assert_never(unreachable)


def _caller(partner_id: str, idempotency_key: str | None) -> bytes | None:
    return None if idempotency_key is None else f"{partner_id}\n{idempotency_key}".encode()


def _by(partner_id: str) -> str:
    return f"partner:{partner_id}"
