"""The store: every verb of ``core/ports.py``, each one transaction of a driver. The hot ones are micro-batched."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Concatenate, ParamSpec, Protocol, TypeVar
from uuid import UUID

from sqlalchemy import Connection

from gatelodge.errors import Unavailable
from gatelodge_server.core.model import (
    AccessToken,
    AuditEvent,
    Change,
    Company,
    Credential,
    Duration,
    Instant,
    Partner,
    PartnerStatus,
    SessionEnd,
    SigningKey,
    Standing,
    Tier,
)
from gatelodge_server.core.ports import (
    UNHEARD,
    Acknowledgement,
    Beginning,
    Begun,
    Challenge,
    CompanyOutcome,
    Confirmation,
    Confirmed,
    Deactivated,
    Done,
    LastUse,
    Lease,
    Limited,
    LoginAttempt,
    Mail,
    MailLimits,
    MailOutcome,
    Opened,
    Purged,
    QuotaAsk,
    Reach,
    Recovery,
    RefreshAttempt,
    RefreshOutcome,
    Refused,
    Registrant,
    Registration,
    Replay,
    Rolled,
    RolledBefore,
    RolledTooOften,
    SessionStanding,
    Tail,
    Unheard,
    UsageMark,
)
from gatelodge_server.store import (
    companies,
    deployment,
    keys,
    outbox,
    partners,
    quotas,
    revocations,
    sessions,
    signing,
    tiers,
    tokens,
    trail,
)
from gatelodge_server.store import registration as registrations
from gatelodge_server.store.batch import Batch, UnheardError
from gatelodge_server.store.clock import StoreClock, going_by, shared_now

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class Driver(Protocol):
    """Runs a verb in a transaction. What SQLite and PostgreSQL do differently is behind this."""

    @property
    def at_once(self) -> int:
        """How many transactions of one verb are worth having under way at the same time."""
        ...

    async def write(
        self,
        verb: Callable[Concatenate[Connection, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Run ``verb``; what it has written is durable when this returns. Raises ``Unavailable``."""
        ...

    async def read(
        self,
        verb: Callable[Concatenate[Connection, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Run ``verb``, which only reads; what it says is less old than the maximum staleness. Raises ``Unavailable``."""
        ...

    async def read_current(
        self,
        verb: Callable[Concatenate[Connection, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """The same; what it says was so when this was asked, or later. Raises ``Unavailable``."""
        ...

    def bell(self) -> int:
        """A number that has become another once a change is committed, before ``write`` returns."""
        ...

    async def listen(self) -> None:
        """Let ``bell`` hear of what others commit as soon as can be, until cancelled."""
        ...

    async def close(self) -> None:
        """Finish what has begun and let go."""
        ...


class _GoingBy:
    """A driver whose verbs go by another clock than the database's."""

    def __init__(self, driver: Driver, clock: StoreClock) -> None:
        self._driver = driver
        self._clock = clock
        self.at_once = driver.at_once
        self.bell = driver.bell
        self.listen = driver.listen
        self.close = driver.close

    async def write(
        self,
        verb: Callable[Concatenate[Connection, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        return await self._driver.write(going_by(self._clock, verb), *args, **kwargs)

    async def read(
        self,
        verb: Callable[Concatenate[Connection, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        return await self._driver.read(going_by(self._clock, verb), *args, **kwargs)

    async def read_current(
        self,
        verb: Callable[Concatenate[Connection, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        return await self._driver.read_current(going_by(self._clock, verb), *args, **kwargs)


class SqlStore:
    """The store over a driver. It is a ``ports.Store``.

    ``marking`` is what its node marks credentials with. While the database is marked otherwise, no partner is made and no
    signing key is told, so that nothing is signed either; ``on_fault`` is told why. ``store_now`` takes the place of the
    database's clock, in tests and experiments.
    """

    def __init__(
        self,
        driver: Driver,
        *,
        store_now: StoreClock | None = None,
        marking: deployment.Marking | None = None,
        on_fault: Callable[[str], None] = lambda _: None,
    ) -> None:
        driver = driver if store_now is None else _GoingBy(driver, store_now)
        self._driver = driver
        self._marking = marking
        self._on_fault = on_fault
        self.bell = driver.bell
        self.listen = driver.listen
        self._registering = asyncio.Lock()
        many = partial(Batch, at_once=driver.at_once)
        self._open: Batch[LoginAttempt, Opened | Refused] = many(lambda all_: driver.write(sessions.open_sessions, all_))
        self._advance: Batch[RefreshAttempt, RefreshOutcome] = many(lambda all_: driver.write(sessions.advance_sessions, all_))
        self._find: Batch[bytes, SessionStanding | None] = many(lambda all_: driver.read(sessions.find_sessions, all_))
        self._find_key: Batch[str, Standing | None] = many(lambda all_: driver.read(keys.find_keys, all_))
        self._find_token: Batch[str, Standing | None] = many(lambda all_: driver.read(tokens.find_tokens, all_))
        self._lease: Batch[QuotaAsk, Lease | None] = many(lambda all_: self._write_known(quotas.lease_quotas, all_))
        self._read_revocations: Batch[tuple[int, int], Tail] = Batch(
            lambda all_: driver.read_current(revocations.read_revocations, all_)
        )
        self._count_reach: Batch[tuple[int, Duration, Instant], Reach] = Batch(
            lambda all_: driver.read(revocations.count_reach, all_)
        )
        self._acknowledge: Batch[Acknowledgement, Refused | None] = Batch(
            lambda all_: driver.write(revocations.acknowledge_steps, all_)
        )

    async def close(self) -> None:
        """Finish what has begun and let go of the database."""
        await self._driver.close()

    def _marked(
        self,
        look: Callable[[Connection], deployment.Marking | None],
        verb: Callable[Concatenate[Connection, Arguments], Result],
    ) -> Callable[Concatenate[Connection, Arguments], Result]:
        """``verb``, which raises ``Unavailable`` where ``look`` finds another marking than this node's."""

        def run(connection: Connection, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            if self._marking is not None and (found := look(connection)) != self._marking:
                now = "nothing" if found is None else ", ".join(found)
                then = ", ".join(self._marking)
                self._on_fault(f"the database is marked as {now}, this node was started as {then}: restart it")
                raise Unavailable
            return verb(connection, *args, **kwargs)

        return run

    # sessions

    async def open_session(self, attempt: LoginAttempt) -> Opened | Refused:
        return await self._open(attempt)

    async def advance_session(self, attempt: RefreshAttempt) -> RefreshOutcome:
        return await self._advance(attempt)

    async def find_session(self, session_id: bytes) -> SessionStanding | None:
        return await self._find(session_id)

    async def end_session(self, session_id: bytes, *, cause: SessionEnd, now: Instant, by: str) -> Done | None:
        return await self._driver.write(sessions.end_session, session_id, cause, now, by)

    async def purge_sessions(self, *, after: bytes | None, limit: int, ended_before: Instant) -> Purged:
        return await self._driver.write(sessions.purge_sessions, after, limit, ended_before)

    # partners and keys

    async def add_partner(self, partner: Partner, key: Credential, *, by: str) -> Done | Refused:
        return await self._driver.write(self._marked(deployment.hold_marking, partners.add_partner), partner, key, by)

    async def find_partner(self, partner_id: str) -> Partner | None:
        return await self._driver.read(partners.find_partner, partner_id)

    async def list_partners(self) -> Sequence[Partner]:
        return await self._driver.read(partners.list_partners)

    async def set_partner_status(self, partner_id: str, status: PartnerStatus, *, now: Instant, by: str) -> Done | Refused:
        return await self._driver.write(partners.set_partner_status, partner_id, status, now, by)

    async def set_partner_tier(self, partner_id: str, tier: str, *, now: Instant, by: str) -> Done | Refused:
        return await self._driver.write(tiers.set_partner_tier, partner_id, tier, now, by)

    async def list_tiers(self) -> Sequence[Tier]:
        return await self._driver.read(tiers.list_tiers)

    async def set_tier(self, tier: Tier, *, now: Instant, by: str) -> Done:
        return await self._driver.write(tiers.set_tier, tier, now, by)

    async def find_key(self, key_id: str) -> Standing | None:
        return await self._find_key(key_id)

    async def note_first_use(self, key_id: str, *, now: Instant) -> None:
        await self._driver.write(keys.note_first_use, [key_id], now)

    async def get_key(self, key_id: str) -> Credential | None:
        return await self._driver.read(keys.get_key, key_id)

    async def list_keys(self, partner_id: str) -> Sequence[Credential]:
        return await self._driver.read(keys.list_keys, partner_id)

    async def roll_key(
        self, key_id: str, replacement: Credential, *, ends_at: Instant, now: Instant, by: str
    ) -> Done | Refused:
        return await self._driver.write(keys.roll_key, key_id, replacement, ends_at, now, by)

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
        return await self._driver.write(keys.roll_own_key, key_id, digest, replacement, ends_at, replay, now)

    async def deactivate_own(self, key_id: str, digest: bytes, *, now: Instant) -> Deactivated | Refused:
        return await self._driver.write(partners.deactivate_own, key_id, digest, now)

    async def revoke_key(self, key_id: str, *, now: Instant, by: str) -> Done | Refused:
        return await self._driver.write(keys.revoke_key, key_id, now, by)

    # access tokens

    async def issue_token(self, token: AccessToken, *, by: str) -> Done | Refused:
        return await self._driver.write(tokens.issue_token, token, by)

    async def find_token(self, token_id: str) -> Standing | None:
        return await self._find_token(token_id)

    async def get_token(self, token_id: str) -> AccessToken | None:
        return await self._driver.read(tokens.get_token, token_id)

    async def list_tokens(self, partner_id: str) -> Sequence[AccessToken]:
        return await self._driver.read(tokens.list_tokens, partner_id)

    async def list_token_versions(self, lineage_id: str) -> Sequence[AccessToken]:
        return await self._driver.read(tokens.list_token_versions, lineage_id)

    async def roll_token(
        self, token_id: str, replacement: AccessToken, *, ends_at: Instant, now: Instant, by: str
    ) -> Done | Refused:
        return await self._driver.write(tokens.roll_token, token_id, replacement, ends_at, now, by)

    async def revoke_token(self, token_id: str, *, now: Instant, by: str) -> Done | Refused:
        return await self._driver.write(tokens.revoke_token, token_id, now, by)

    # companies

    async def create_company(self, company: Company, key: Credential, *, replay: Replay | None, by: str) -> CompanyOutcome:
        return await self._driver.write(companies.create_company, company, key, replay, by)

    async def find_company(self, partner_id: str, company_id: UUID) -> Company | None:
        return await self._driver.read(companies.find_company, partner_id, company_id)

    async def list_companies(self, partner_id: str, *, before: UUID | None, limit: int) -> Sequence[Company]:
        return await self._driver.read(companies.list_companies, partner_id, before, limit)

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
        return await self._driver.write(companies.roll_company_key, company_id, replacement, ends_at, replay, now, by)

    async def delete_company(self, partner_id: str, company_id: UUID, *, now: Instant, by: str) -> Done | Refused:
        return await self._driver.write(companies.delete_company, partner_id, company_id, now, by)

    # signing keys

    async def list_signing_keys(self) -> Sequence[SigningKey]:
        return await self._driver.read(self._marked(deployment.find_marking, signing.list_signing_keys))

    async def establish_signing_keys(self, first: Sequence[SigningKey], *, now: Instant) -> Sequence[SigningKey]:
        return await self._driver.write(signing.establish_signing_keys, first, now)

    async def rotate_signing_keys(
        self, candidate: SigningKey, *, lead: Duration, life: Duration | None, now: Instant, by: str
    ) -> Done:
        return await self._driver.write(signing.rotate_signing_keys, candidate, lead, life, now, by)

    async def count_live_tokens(self, *, now: Instant) -> Mapping[str, int]:
        return await self._driver.read(tokens.count_live_tokens, now)

    async def retire_unneeded_keys(self, *, now: Instant) -> Sequence[str]:
        return await self._driver.write(signing.retire_unneeded_keys, now)

    async def retire_signing_key(self, kid: str, *, now: Instant, by: str) -> Done | Refused:
        return await self._driver.write(signing.retire_signing_key, kid, now, by)

    # quotas and usage

    async def lease_quota(self, ask: QuotaAsk) -> Lease | Unheard | None:
        try:
            return await self._lease(ask)
        except UnheardError:
            return UNHEARD

    async def note_usage(self, usage: Sequence[UsageMark], last_uses: Sequence[LastUse]) -> None:
        # To add again what may be on the disk would be to count some requests twice.
        with suppress(UnheardError):
            await self._write_known(quotas.note_usage, usage, last_uses)

    async def _write_known(
        self,
        verb: Callable[Concatenate[Connection, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """``Driver.write``, where ``Unavailable`` says that nothing was done; else it is ``UnheardError``."""
        is_written = False

        def run(connection: Connection) -> Result:
            nonlocal is_written
            is_written = False  # it may be tried again
            outcome = verb(connection, *args, **kwargs)
            is_written = True
            return outcome

        try:
            return await self._driver.write(run)
        except Unavailable as fault:
            if is_written:  # so it was the commit that failed, and what of it is on the disk nobody knows
                raise UnheardError from fault
            raise

    async def list_usage(self, partner_id: str, *, since: Instant) -> Sequence[UsageMark]:
        return await self._driver.read(quotas.list_usage, partner_id, since)

    async def forget_usage(self, *, before: Instant) -> None:
        await self._driver.write(quotas.forget_usage, before)

    # the trail

    async def list_audit(self, *, partner_id: str | None, since: Instant | None) -> Sequence[AuditEvent]:
        return await self._driver.read(trail.list_audit, partner_id, since)

    async def list_changes(self, *, after: int, limit: int) -> Sequence[Change]:
        return await self._driver.read(trail.list_changes, after, limit)

    async def note_issuer(self, url: str, *, now: Instant) -> None:
        await self._driver.write(deployment.note_issuer, url, now)

    async def is_issuer(self, url: str) -> bool:
        return await self._driver.read(deployment.is_issuer, url)

    async def last_change(self) -> int:
        return await self._driver.read(trail.last_change)

    async def forget_replays(self, *, now: Instant) -> None:
        await self._driver.write(trail.forget_replays, now)

    async def tell_time(self) -> Instant | None:
        return await self._driver.read(shared_now)

    async def ping(self) -> None:
        await self._driver.read(trail.ping)

    # revocations and who follows them

    async def read_revocations(self, *, after: int, limit: int) -> Tail:
        return await self._read_revocations((after, limit))

    async def begin_revocations(self, *, since: Instant, after: tuple[str, str] | None, limit: int) -> Beginning:
        return await self._driver.read_current(revocations.begin_revocations, since, after, limit)

    async def acknowledge_step(self, acknowledgement: Acknowledgement) -> Refused | None:
        return await self._acknowledge(acknowledgement)

    async def count_reach(self, sequence: int, *, within: Duration, now: Instant) -> Reach:
        return await self._count_reach((sequence, within, now))

    async def forget_verifiers(self, *, away_for: Duration, now: Instant) -> int:
        return await self._driver.write(revocations.forget_verifiers, away_for, now)

    # mails

    async def begin_registration(
        self, registration: Registration, *, limits: MailLimits, recovery: Recovery
    ) -> Begun | Limited:
        # One at a time here: who waits for other nodes' turns holds a connection, and logins need some too.
        async with self._registering:
            return await self._driver.write(registrations.begin_registration, registration, limits, recovery)

    async def claim_attempt(self, address: str, *, now: Instant) -> Challenge | None:
        return await self._driver.write(registrations.claim_attempt, address, now)

    async def confirm_registration(self, confirmation: Confirmation) -> Confirmed | Refused:
        confirm = self._marked(deployment.hold_marking, registrations.confirm_registration)
        return await self._driver.write(confirm, confirmation)

    async def repeat_confirmation(self, address: str, challenge: Challenge, *, now: Instant) -> Confirmed | Refused:
        return await self._driver.write(registrations.repeat_confirmation, address, challenge, now)

    async def find_registrant(self, partner_id: str) -> Registrant | None:
        return await self._driver.read(registrations.find_registrant, partner_id)

    async def claim_mails(self, *, limit: int, now: Instant, until: Instant) -> Sequence[Mail]:
        return await self._driver.write(outbox.claim_mails, limit, now, until)

    async def settle_mail(self, mail_id: bytes, outcome: MailOutcome, *, now: Instant) -> None:
        await self._driver.write(outbox.settle_mail, mail_id, outcome, now)

    async def purge_mails(self, *, ended_before: Instant, now: Instant) -> None:
        await self._driver.write(registrations.purge_mails_and_codes, ended_before, now)
